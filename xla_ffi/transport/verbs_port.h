// VerbsPort: one port of a device, as one Domain uses it: its completion queue,
// its memory registrations, and how its queue pairs are made.

#ifndef JAXFABRIC_TRANSPORT_VERBS_PORT_H_
#define JAXFABRIC_TRANSPORT_VERBS_PORT_H_

#include "transport/verbs_library.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "transport/transport.h"
#include "transport/verbs.h"
#include "transport/verbs_address.h"

namespace jaxfabric {

struct VerbsPortName {
  std::string device;
  uint8_t port = 1;
  std::string Text() const { return device + ":" + std::to_string(port); }
};

// Ports that are up and have an address, in libibverbs' order. Where there are
// none, `why` says what there is.
std::vector<VerbsPortName> FindVerbsPorts(const VerbsLibrary& library,
                                          std::string* why);

using VerbsMemory = VerbsOwned<ibv_mr>;

class VerbsPort {
 public:
  static StatusOr<std::unique_ptr<VerbsPort>> Open(
      const VerbsLibrary& library, const VerbsPortName& name,
      const VerbsSettings& settings);

  const VerbsLibrary& library() const { return library_; }
  const VerbsSettings& settings() const { return settings_; }
  const std::string& name() const { return name_; }
  uint8_t number() const { return number_; }
  VerbsLinkLayer link_layer() const { return link_layer_; }
  const VerbsGid& gid() const { return gid_; }
  uint16_t lid() const { return port_.lid; }
  ibv_mtu mtu() const { return port_.active_mtu; }
  uint64_t write_bytes_max() const { return port_.max_msg_sz; }
  uint32_t receives_max() const { return receives_max_; }
  uint32_t queue_depth() const { return queue_depth_; }
  ibv_pd* pd() const { return pd_.get(); }
  ibv_cq* queue() const { return queue_.get(); }
  // Readable once after RequestNotice when the completion queue has news.
  int notice_fd() const { return channel_->fd; }

  VerbsOwned<ibv_mr> NoMemory() const { return {nullptr, library_.dereg_mr}; }
  StatusOr<VerbsMemory> Register(const void* base, uint64_t bytes, int access);
  // As the target and the source of writes; device memory by its dma-buf.
  StatusOr<VerbsMemory> RegisterForPeers(const MemoryRegion& region);

  VerbsOwned<ibv_qp> NoQueuePair() const {
    return {nullptr, library_.destroy_qp};
  }
  // With room for `sends` and, unless `receives` is null, receives of its own.
  // Lowers *inline_bytes to what the device grants.
  StatusOr<VerbsOwned<ibv_qp>> CreateQueuePair(ibv_qp_type type,
                                               ibv_srq* shared, uint32_t sends,
                                               uint32_t receives,
                                               uint32_t* inline_bytes);
  // The way to the port of `address`, for packets of one flow.
  ibv_ah_attr WayTo(const VerbsAddress& address, uint32_t flow) const;

  void RequestNotice() { (void)ibv_req_notify_cq(queue_.get(), 0); }
  bool TakeNotices();  // whether there was one

  // Why the device can do nothing any more, if so; also notes whether the port
  // is up.
  Status TakeEvents();

  // That the port is down, to be put behind an error; empty if it is up. It is
  // what events told: to ask the device may wait for whoever takes it down.
  std::string Fault() const;

  // What `call` has left in errno, or `error`.
  Status Failed(const char* call, int error) const;

 private:
  VerbsPort(const VerbsLibrary& library, const VerbsPortName& name,
            const VerbsSettings& settings)
      : library_(library),
        settings_(settings),
        name_(name.Text()),
        number_(name.port) {}
  Status OpenDevice(const std::string& device);
  Status ReadAttributes();
  Status ChooseAddress();
  Status OpenQueue();

  const VerbsLibrary& library_;
  const VerbsSettings settings_;
  const std::string name_;
  const uint8_t number_;
  // Closed from the last to the first.
  VerbsOwned<ibv_context> context_{nullptr, library_.close_device};
  VerbsOwned<ibv_pd> pd_{nullptr, library_.dealloc_pd};
  VerbsOwned<ibv_comp_channel> channel_{nullptr, library_.destroy_comp_channel};
  VerbsOwned<ibv_cq> queue_{nullptr, library_.destroy_cq};

  ibv_port_attr port_ = VerbsZeroed<ibv_port_attr>();
  VerbsLinkLayer link_layer_ = VerbsLinkLayer::kEthernet;
  VerbsGid gid_ = {};
  uint8_t gid_index_ = 0;
  uint32_t receives_max_ = 0;
  uint32_t queue_depth_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
#endif  // JAXFABRIC_TRANSPORT_VERBS_PORT_H_
