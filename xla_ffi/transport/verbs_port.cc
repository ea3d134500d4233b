#include "transport/verbs_port.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "transport/verbs_gid.h"

namespace jaxfabric {
namespace {

// Receives that all peers of a Domain share; see ChooseQuota.
constexpr uint32_t kReceivesMax = 65536;
// Beside them, the completion queue holds what one Domain has posted: its
// owner's writes and messages, and its own words and frames.
constexpr uint32_t kOtherEntries = 8192;
constexpr uint32_t kOtherEntriesMin = 1024;
// A signed length must hold it.
constexpr uint32_t kWriteBytesMax = uint32_t{1} << 30;
constexpr size_t kGidsMax = 256;
// Packets may cross so many routers.
constexpr uint8_t kHopLimit = 64;

using Devices = std::unique_ptr<ibv_device*, void (*)(ibv_device**)>;

Devices ListDevices(const VerbsLibrary& library, int* count) {
  *count = 0;
  Devices devices(library.get_device_list(count), library.free_device_list);
  if (devices == nullptr) *count = 0;
  return devices;
}

std::vector<VerbsGidEntry> ReadGids(const VerbsLibrary& library,
                                    ibv_context* context, uint8_t port) {
  std::vector<ibv_gid_entry> raw(kGidsMax);
  const ssize_t count = library.query_gid_table(context, raw.data(), raw.size(),
                                                0, sizeof(ibv_gid_entry));
  std::vector<VerbsGidEntry> entries;
  for (ssize_t i = 0; i < count; ++i) {
    const ibv_gid_entry& from = raw[static_cast<size_t>(i)];
    if (from.port_num != port) continue;
    VerbsGidEntry& entry = entries.emplace_back();
    entry.index = from.gid_index;
    switch (from.gid_type) {
      case IBV_GID_TYPE_IB:
        entry.type = VerbsGidType::kInfiniBand;
        break;
      case IBV_GID_TYPE_ROCE_V1:
        entry.type = VerbsGidType::kRoceV1;
        break;
      default:
        entry.type = VerbsGidType::kRoceV2;
    }
    std::memcpy(entry.gid.data(), from.gid.raw, entry.gid.size());
  }
  return entries;
}

// What keeps a port from being used, or an empty string.
std::string WhyNot(const VerbsLibrary& library, ibv_context* context,
                   uint8_t number) {
  auto port = VerbsZeroed<ibv_port_attr>();
  if (library.query_port(context, number, &port) != 0) {
    return "cannot be asked";
  }
  if (port.state != IBV_PORT_ACTIVE) return "is not up";
  const std::vector<VerbsGidEntry> gids = ReadGids(library, context, number);
  if (ChooseGid(gids, -1) == nullptr) {
    return "has no address for RoCE v2 or InfiniBand";
  }
  return "";
}

}  // namespace

std::vector<VerbsPortName> FindVerbsPorts(const VerbsLibrary& library,
                                          std::string* why) {
  int count = 0;
  const Devices devices = ListDevices(library, &count);
  std::vector<VerbsPortName> ports;
  why->clear();
  for (int i = 0; i < count; ++i) {
    ibv_device* const device = devices.get()[i];
    const std::string name = library.get_device_name(device);
    const VerbsOwned<ibv_context> context(library.open_device(device),
                                          library.close_device);
    auto attributes = VerbsZeroed<ibv_device_attr>();
    if (context == nullptr ||
        library.query_device(context.get(), &attributes) != 0) {
      *why += (why->empty() ? "" : ", ") + name + " cannot be opened";
      continue;
    }
    for (uint8_t port = 1; port <= attributes.phys_port_cnt; ++port) {
      const std::string fault = WhyNot(library, context.get(), port);
      if (fault.empty()) {
        ports.push_back({name, port});
      } else {
        *why += (why->empty() ? "" : ", ") + VerbsPortName{name, port}.Text() +
                " " + fault;
      }
    }
  }
  if (count <= 0) *why = "there is no RDMA device";
  return ports;
}

std::string VerbsPort::Fault() const {
  if (port_.state == IBV_PORT_ACTIVE) return "";
  return "; " + name_ + " is not up (rdma link show)";
}

Status VerbsPort::Failed(const char* call, int error) const {
  return Status(StatusCode::kUnavailable,
                "verbs on " + name_ + ": " + call +
                    " failed: " + std::strerror(error != 0 ? error : errno));
}

StatusOr<std::unique_ptr<VerbsPort>> VerbsPort::Open(
    const VerbsLibrary& library, const VerbsPortName& name,
    const VerbsSettings& settings) {
  std::unique_ptr<VerbsPort> port(new VerbsPort(library, name, settings));
  JF_RETURN_IF_ERROR(port->OpenDevice(name.device));
  JF_RETURN_IF_ERROR(port->ReadAttributes());
  JF_RETURN_IF_ERROR(port->ChooseAddress());
  JF_RETURN_IF_ERROR(port->OpenQueue());
  return port;
}

Status VerbsPort::OpenDevice(const std::string& device) {
  int count = 0;
  const Devices devices = ListDevices(library_, &count);
  for (int i = 0; i < count; ++i) {
    if (device != library_.get_device_name(devices.get()[i])) continue;
    context_.reset(library_.open_device(devices.get()[i]));
    if (context_ == nullptr) return Failed("ibv_open_device", 0);
    const int flags = fcntl(context_->async_fd, F_GETFL);
    if (fcntl(context_->async_fd, F_SETFL, flags | O_NONBLOCK) != 0) {
      return Failed("fcntl", 0);
    }
    pd_.reset(library_.alloc_pd(context_.get()));
    return pd_ == nullptr ? Failed("ibv_alloc_pd", 0) : OkStatus();
  }
  return Status(StatusCode::kUnavailable,
                "verbs: the device " + device + " is gone");
}

Status VerbsPort::ReadAttributes() {
  auto device = VerbsZeroed<ibv_device_attr>();
  int error = library_.query_device(context_.get(), &device);
  if (error != 0) return Failed("ibv_query_device", error);
  error = library_.query_port(context_.get(), number_, &port_);
  if (error != 0) return Failed("ibv_query_port", error);
  link_layer_ = port_.link_layer == IBV_LINK_LAYER_ETHERNET
                    ? VerbsLinkLayer::kEthernet
                    : VerbsLinkLayer::kInfiniBand;
  if (link_layer_ == VerbsLinkLayer::kEthernet) port_.lid = 0;
  port_.max_msg_sz = std::min(port_.max_msg_sz, kWriteBytesMax);
  const auto largest = [](int value) {
    return static_cast<uint32_t>(std::max(value, 1));
  };
  const uint32_t entries = largest(device.max_cqe);
  if (entries < 2 * kOtherEntriesMin) {
    return Failed("a large enough completion queue", ENOSPC);
  }
  receives_max_ = std::min({kReceivesMax, largest(device.max_srq_wr),
                            entries - std::min(kOtherEntries, entries / 2)});
  queue_depth_ = std::clamp<uint32_t>(settings_.queue_depth, 16,
                                      largest(device.max_qp_wr) / 2);
  return OkStatus();
}

Status VerbsPort::ChooseAddress() {
  const std::vector<VerbsGidEntry> gids =
      ReadGids(library_, context_.get(), number_);
  const VerbsGidEntry* const chosen = ChooseGid(gids, settings_.gid_index);
  if (chosen == nullptr || chosen->index > 255) {
    std::string known;
    for (const VerbsGidEntry& entry : gids) {
      known += (known.empty() ? "" : ", ") + std::to_string(entry.index) +
               " = " + DescribeGid(entry.gid);
    }
    return Status(StatusCode::kInvalidArgument,
                  "verbs on " + name_ + " has no address with GID index " +
                      std::to_string(settings_.gid_index) + "; it has " +
                      (known.empty() ? "none" : known) +
                      " (JAXFABRIC_VERBS=gid_index=N)");
  }
  gid_ = chosen->gid;
  gid_index_ = static_cast<uint8_t>(chosen->index);
  return OkStatus();
}

Status VerbsPort::OpenQueue() {
  channel_.reset(library_.create_comp_channel(context_.get()));
  if (channel_ == nullptr) return Failed("ibv_create_comp_channel", 0);
  const int flags = fcntl(channel_->fd, F_GETFL);
  if (fcntl(channel_->fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    return Failed("fcntl", 0);
  }
  for (uint32_t others = kOtherEntries;
       queue_ == nullptr && others >= kOtherEntriesMin; others /= 2) {
    queue_.reset(library_.create_cq(context_.get(),
                                    static_cast<int>(receives_max_ + others),
                                    nullptr, channel_.get(), 0));
  }
  return queue_ == nullptr ? Failed("ibv_create_cq", 0) : OkStatus();
}

StatusOr<VerbsMemory> VerbsPort::Register(const void* base, uint64_t bytes,
                                          int access) {
  VerbsMemory memory = NoMemory();
  memory.reset(library_.reg_mr_iova2(pd_.get(), const_cast<void*>(base), bytes,
                                     reinterpret_cast<uintptr_t>(base),
                                     static_cast<unsigned>(access)));
  if (memory == nullptr) {
    return Failed("ibv_reg_mr", 0)
        .Annotate("registering " + std::to_string(bytes) +
                  " bytes (is the limit of locked memory, ulimit -l, large "
                  "enough?)");
  }
  return memory;
}

StatusOr<VerbsMemory> VerbsPort::RegisterForPeers(const MemoryRegion& region) {
  int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
  // The bytes of a write may then reach memory in any order, but not after the
  // completion that tells of it.
  if (settings_.relaxed_ordering) access |= IBV_ACCESS_RELAXED_ORDERING;
  if (region.dmabuf_fd < 0) return Register(region.base, region.length, access);
  if (library_.reg_dmabuf_mr == nullptr) {
    return Status(StatusCode::kUnimplemented,
                  "this libibverbs cannot register device memory; it takes "
                  "rdma-core 34 or newer");
  }
  VerbsMemory memory = NoMemory();
  memory.reset(library_.reg_dmabuf_mr(
      pd_.get(), region.dmabuf_offset, region.length,
      reinterpret_cast<uintptr_t>(region.base), region.dmabuf_fd, access));
  if (memory == nullptr) {
    return Failed("ibv_reg_dmabuf_mr", 0)
        .Annotate("registering " + std::to_string(region.length) +
                  " bytes of device memory");
  }
  return memory;
}

StatusOr<VerbsOwned<ibv_qp>> VerbsPort::CreateQueuePair(
    ibv_qp_type type, ibv_srq* shared, uint32_t sends, uint32_t receives,
    uint32_t* inline_bytes) {
  VerbsOwned<ibv_qp> pair = NoQueuePair();
  // Devices differ in what they carry inline.
  for (;;) {
    auto attributes = VerbsZeroed<ibv_qp_init_attr>();
    attributes.send_cq = attributes.recv_cq = queue_.get();
    attributes.srq = shared;
    attributes.qp_type = type;
    attributes.cap.max_send_wr = sends;
    attributes.cap.max_recv_wr = receives;
    attributes.cap.max_send_sge = 1;
    attributes.cap.max_recv_sge = receives > 0 ? 1 : 0;
    attributes.cap.max_inline_data = *inline_bytes;
    pair.reset(library_.create_qp(pd_.get(), &attributes));
    if (pair != nullptr) {
      *inline_bytes = std::min(*inline_bytes, attributes.cap.max_inline_data);
      return pair;
    }
    if (*inline_bytes == 0) return Failed("ibv_create_qp", 0);
    *inline_bytes /= 2;
  }
}

ibv_ah_attr VerbsPort::WayTo(const VerbsAddress& address, uint32_t flow) const {
  ibv_ah_attr way = {};
  way.is_global = 1;
  std::memcpy(way.grh.dgid.raw, address.gid.data(), address.gid.size());
  // Switches spread flows over their paths by it.
  way.grh.flow_label = flow & 0xfffff;
  way.grh.sgid_index = gid_index_;
  way.grh.hop_limit = kHopLimit;
  way.grh.traffic_class = settings_.traffic_class;
  way.dlid = address.lid;
  way.sl = settings_.service_level;
  way.port_num = number_;
  return way;
}

bool VerbsPort::TakeNotices() {
  ibv_cq* queue = nullptr;
  void* context = nullptr;
  unsigned count = 0;
  while (library_.get_cq_event(channel_.get(), &queue, &context) == 0) ++count;
  if (count > 0) library_.ack_cq_events(queue_.get(), count);
  return count > 0;
}

Status VerbsPort::TakeEvents() {
  auto event = VerbsZeroed<ibv_async_event>();
  Status fatal;
  while (library_.get_async_event(context_.get(), &event) == 0) {
    const ibv_event_type type = event.event_type;
    const bool of_port =
        (type == IBV_EVENT_PORT_ACTIVE || type == IBV_EVENT_PORT_ERR) &&
        event.element.port_num == number_;
    library_.ack_async_event(&event);
    if (of_port) {
      port_.state =
          type == IBV_EVENT_PORT_ACTIVE ? IBV_PORT_ACTIVE : IBV_PORT_DOWN;
    }
    if (type == IBV_EVENT_DEVICE_FATAL || type == IBV_EVENT_CQ_ERR ||
        type == IBV_EVENT_SRQ_ERR) {
      fatal = Status(StatusCode::kUnavailable,
                     "verbs: the device of " + name_ + " has failed (" +
                         library_.event_type_str(type) + ")");
    }
  }
  return fatal;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
