#include "transport/ofi_endpoint.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <algorithm>
#include <cstring>
#include <string_view>

#include "base/check.h"

namespace jaxfabric {
namespace {

// Options that headers of libfabric 1.17 do not know; the values are those of
// fi_endpoint.h and fi_ext_efa.h of libfabric 2, which are part of its ABI.
constexpr int kOptCudaApiPermitted = 10;       // bool
constexpr int kOptSharedMemoryPermitted = 11;  // bool
constexpr int kOptMaxRmaSize = 14;             // size_t
constexpr int kOptEfa = -(0xefa << 16);
constexpr int kOptEfaRnrRetry = kOptEfa;           // size_t
constexpr int kOptEfaEmulatedWrite = kOptEfa + 2;  // bool

// Receivers without a posted receive are tried again without end; whether they
// still live is found out by other means.
constexpr size_t kRnrRetryForEver = 7;

// An EFA queue does not defend itself: it must hold all that is posted and as
// many immediates as peers send between two polls.
constexpr size_t kQueueEntries = 16384;
constexpr size_t kQueueEntriesMin = 1024;

// Of a write where the device gives no limit of its own: no length overflows a
// type of 32 bits in between, and nothing is lost by cutting there.
constexpr uint64_t kWriteBytesMax = uint64_t{1} << 30;

bool IsEfa(OfiProvider provider) {
  return provider == OfiProvider::kEfa || provider == OfiProvider::kEfaDirect;
}

}  // namespace

Status OfiEndpoint::Failed(const char* call, int64_t error) const {
  return Status(StatusCode::kUnavailable,
                std::string("ofi/") + OfiProviderName(provider_) + " on " +
                    info_->domain_attr->name + ": " + call +
                    " failed: " + library_.ErrorText(error));
}

StatusOr<std::unique_ptr<OfiEndpoint>> OfiEndpoint::Open(
    const OfiLibrary& library, OfiProvider provider, const fi_info& info) {
  std::unique_ptr<OfiEndpoint> endpoint(
      new OfiEndpoint(library, provider, info));
  JF_RETURN_IF_ERROR(endpoint->OpenDevice());
  JF_RETURN_IF_ERROR(endpoint->OpenObjects());
  JF_RETURN_IF_ERROR(endpoint->Enable());
  return endpoint;
}

Status OfiEndpoint::Reopen() {
  JF_CHECK(endpoint_ == nullptr);
  errors_.reset();
  queue_.reset();
  addresses_.reset();
  batch_next_ = batch_size_ = 0;
  JF_RETURN_IF_ERROR(OpenObjects());
  return Enable();
}

Status OfiEndpoint::OpenDevice() {
  fid_fabric* fabric = nullptr;
  int error = library_.OpenFabric(info_.get(), &fabric);
  if (error != 0) return Failed("fi_fabric", error);
  fabric_.reset(fabric);
  fid_domain* domain = nullptr;
  error = fi_domain(fabric, info_.get(), &domain, nullptr);
  if (error != 0) return Failed("fi_domain", error);
  domain_.reset(domain);
  return OkStatus();
}

Status OfiEndpoint::OpenObjects() {
  fi_av_attr table = {};
  table.type = FI_AV_TABLE;
  fid_av* addresses = nullptr;
  int error = fi_av_open(domain_.get(), &table, &addresses, nullptr);
  if (error != 0) return Failed("fi_av_open", error);
  addresses_.reset(addresses);
  JF_RETURN_IF_ERROR(OpenQueue());
  fid_ep* endpoint = nullptr;
  error = fi_endpoint(domain_.get(), info_.get(), &endpoint, nullptr);
  if (error != 0) return Failed("fi_endpoint", error);
  endpoint_.reset(endpoint);
  return OkStatus();
}

Status OfiEndpoint::OpenQueue() {
  fi_cq_attr attributes = {};
  attributes.format = FI_CQ_FORMAT_DATA;
  // Only tcp's descriptor is known to work in all versions.
  const bool has_fd = provider_ == OfiProvider::kTcp;
  attributes.wait_obj = has_fd ? FI_WAIT_FD : FI_WAIT_NONE;
  fid_cq* queue = nullptr;
  int error = 0;
  // Devices differ in the largest queue that they grant.
  for (size_t entries = kQueueEntries; entries >= kQueueEntriesMin;
       entries /= 2) {
    attributes.size = entries;
    error = fi_cq_open(domain_.get(), &attributes, &queue, nullptr);
    if (error == 0) break;
  }
  if (error != 0) return Failed("fi_cq_open", error);
  queue_.reset(queue);
  if (!has_fd) return OkStatus();
  error = fi_control(&queue->fid, FI_GETWAIT, &wait_fd_);
  return error == 0 ? OkStatus() : Failed("fi_control(FI_GETWAIT)", error);
}

Status OfiEndpoint::Enable() {
  int error = fi_ep_bind(endpoint_.get(), &addresses_->fid, 0);
  if (error != 0) return Failed("fi_ep_bind", error);
  error = fi_ep_bind(endpoint_.get(), &queue_->fid, FI_TRANSMIT | FI_RECV);
  if (error != 0) return Failed("fi_ep_bind", error);
  JF_RETURN_IF_ERROR(BindErrors());
  SetOptions();
  error = fi_enable(endpoint_.get());
  if (error != 0) return Failed("fi_enable", error);
  ReadOptions();
  size_t size = name_.size();
  error = fi_getname(&endpoint_->fid, name_.data(), &size);
  if (error != 0) return Failed("fi_getname", error);
  if (size == 0 || size > name_.size()) {
    return Failed("fi_getname", -FI_ETOOSMALL);
  }
  name_size_ = size;
  return OkStatus();
}

Status OfiEndpoint::BindErrors() {
  if (!IsEfa(provider_)) return OkStatus();
  fi_eq_attr attributes = {};
  attributes.wait_obj = FI_WAIT_NONE;
  fid_eq* errors = nullptr;
  int error = fi_eq_open(fabric_.get(), &attributes, &errors, nullptr);
  if (error != 0) return Failed("fi_eq_open", error);
  errors_.reset(errors);
  error = fi_ep_bind(endpoint_.get(), &errors->fid, 0);
  return error == 0 ? OkStatus() : Failed("fi_ep_bind", error);
}

void OfiEndpoint::DrainErrors() {
  if (errors_ == nullptr) return;
  uint32_t kind = 0;
  std::byte entry[256];
  // Bounded, should a device have an endless tale to tell.
  for (int i = 0; i < 64; ++i) {
    const ssize_t read =
        fi_eq_read(errors_.get(), &kind, entry, sizeof(entry), 0);
    if (read >= 0) continue;
    if (read != -FI_EAVAIL) return;
    union {
      fi_eq_err_entry error;
      std::byte room[256];
    } error;
    std::memset(&error, 0, sizeof(error));
    if (fi_eq_readerr(errors_.get(), &error.error, 0) < 0) return;
  }
}

// Libraries and providers that do not know an option refuse it, which is fine.
void OfiEndpoint::SetOptions() {
  const auto set = [this](int option, const auto& value) {
    (void)fi_setopt(&endpoint_->fid, FI_OPT_ENDPOINT, option, &value,
                    sizeof(value));
  };
  if (!IsEfa(provider_)) return;
  set(kOptCudaApiPermitted, false);
  // Ranks of one host have our own shm transport; with libfabric's, writes
  // would take another way with other rules.
  set(kOptSharedMemoryPermitted, false);
  set(kOptEfaRnrRetry, kRnrRetryForEver);
}

void OfiEndpoint::ReadOptions() {
  const auto get = [this](int option, auto* value) {
    size_t size = sizeof(*value);
    return fi_getopt(&endpoint_->fid, FI_OPT_ENDPOINT, option, value, &size) ==
           0;
  };
  write_bytes_max_ =
      std::min<uint64_t>(info_->ep_attr->max_msg_size, kWriteBytesMax);
  receives_for_data_ =
      ((info_->mode | info_->rx_attr->mode) & FI_RX_CQ_DATA) != 0;
  if (IsEfa(provider_)) {
    size_t most = 0;
    if (get(kOptMaxRmaSize, &most) && most > 0) {
      write_bytes_max_ = most;
    }
    bool emulated = false;
    emulated_writes_ = get(kOptEfaEmulatedWrite, &emulated) && emulated;
  }
  // The layers that libfabric 1 puts over its tcp name the wrong source for
  // writes, and crash when they are closed with posts open.
  const std::string_view driver = info_->fabric_attr->prov_name;
  const bool trusted = FI_MAJOR(library_.NumericVersion()) >= 2 &&
                       (driver == "tcp" || (driver == "efa"));
  names_source_ = trusted && (info_->caps & FI_SOURCE) != 0;
  can_reopen_ = trusted && !HasMode(FI_MR_ENDPOINT);
  // "Done" means that the bytes are there. A device's writes end no sooner;
  // software would otherwise report that it has passed them on.
  if (writes_in_software()) write_flags_ |= FI_DELIVERY_COMPLETE;
}

bool OfiEndpoint::writes_in_software() const {
  return !IsEfa(provider_) || emulated_writes_;
}

bool OfiEndpoint::MaySleep() {
  if (batch_next_ < batch_size_) return false;
  fid* queue = &queue_->fid;
  return fi_trywait(fabric_.get(), &queue, 1) == 0;
}

StatusOr<OfiMemory> OfiEndpoint::Register(std::byte* base, uint64_t bytes,
                                          bool remote, uint64_t key) {
  const uint64_t access =
      FI_SEND | FI_RECV | FI_WRITE | (remote ? FI_REMOTE_WRITE : 0);
  const size_t key_bytes = info_->domain_attr->mr_key_size;
  if (HasMode(FI_MR_PROV_KEY)) {
    key = 0;
  } else if (key_bytes < sizeof(key)) {
    key &= (uint64_t{1} << (8 * key_bytes)) - 1;
  }
  fid_mr* region = nullptr;
  const int error = fi_mr_reg(domain_.get(), base, bytes, access, 0, key, 0,
                              &region, nullptr);
  if (error != 0) {
    return Failed("fi_mr_reg", error)
        .Annotate("registering " + std::to_string(bytes) +
                  " bytes (is the limit of locked memory, ulimit -l, large "
                  "enough?)");
  }
  OfiMemory memory = {OfiOwned<fid_mr>(region), base};
  if (HasMode(FI_MR_ENDPOINT)) {
    const int bound = fi_mr_bind(region, &endpoint_->fid, 0);
    if (bound != 0) return Failed("fi_mr_bind", bound);
    const int enabled = fi_mr_enable(region);
    if (enabled != 0) return Failed("fi_mr_enable", enabled);
  }
  return memory;
}

StatusOr<fi_addr_t> OfiEndpoint::Insert(std::span<const std::byte> name) {
  fi_addr_t address = FI_ADDR_NOTAVAIL;
  const int inserted =
      fi_av_insert(addresses_.get(), name.data(), 1, &address, 0, nullptr);
  if (inserted != 1 || address == FI_ADDR_NOTAVAIL) {
    return Failed("fi_av_insert", inserted < 0 ? inserted : -FI_EINVAL);
  }
  return address;
}

void OfiEndpoint::Remove(fi_addr_t address) {
  (void)fi_av_remove(addresses_.get(), &address, 1, 0);
}

size_t OfiEndpoint::write_pieces_max() const {
  const size_t most =
      std::min(info_->tx_attr->iov_limit, info_->tx_attr->rma_iov_limit);
  return std::clamp<size_t>(most, 1, kWritePiecesMax);
}

int64_t OfiEndpoint::Write(fi_addr_t to, std::span<const iovec> from,
                           void* descriptor, std::span<const fi_rma_iov> target,
                           std::optional<uint32_t> immediate, void* context) {
  std::array<void*, kWritePiecesMax> descriptors;
  descriptors.fill(descriptor);
  fi_msg_rma message = {};
  message.msg_iov = from.data();
  message.desc = descriptors.data();
  message.iov_count = from.size();
  message.addr = to;
  message.rma_iov = target.data();
  message.rma_iov_count = target.size();
  message.context = context;
  message.data = immediate.value_or(0);
  const uint64_t flags = FI_COMPLETION | write_flags_ |
                         (immediate.has_value() ? FI_REMOTE_CQ_DATA : 0);
  return fi_writemsg(endpoint_.get(), &message, flags);
}

int64_t OfiEndpoint::Send(fi_addr_t to, const void* data, void* descriptor,
                          uint64_t bytes, void* context) {
  return fi_send(endpoint_.get(), data, bytes, descriptor, to, context);
}

int64_t OfiEndpoint::Receive(void* data, void* descriptor, uint64_t bytes,
                             void* context) {
  return fi_recv(endpoint_.get(), data, bytes, descriptor, FI_ADDR_UNSPEC,
                 context);
}

bool OfiEndpoint::Next(OfiEvent* event) {
  if (batch_next_ == batch_size_) {
    batch_next_ = batch_size_ = 0;
    const ssize_t count =
        names_source_ ? fi_cq_readfrom(queue_.get(), batch_.data(),
                                       batch_.size(), sources_.data())
                      : fi_cq_read(queue_.get(), batch_.data(), batch_.size());
    if (count == -FI_EAVAIL) {
      ReadError(event);
      return true;
    }
    if (count <= 0) return false;
    batch_size_ = static_cast<size_t>(count);
  }
  event->source = sources_[batch_next_];
  const fi_cq_data_entry& entry = batch_[batch_next_++];
  event->context = entry.op_context;
  event->bytes = entry.len;
  event->immediate = static_cast<uint32_t>(entry.data);
  // A message may carry data as well, and is still no immediate.
  if ((entry.flags & FI_REMOTE_CQ_DATA) != 0 &&
      (entry.flags & FI_REMOTE_WRITE) != 0) {
    event->kind = OfiEvent::Kind::kImmediate;
  } else if ((entry.flags & FI_RECV) != 0) {
    event->kind = OfiEvent::Kind::kReceived;
  } else if (entry.op_context != nullptr) {
    event->kind = OfiEvent::Kind::kDone;
  } else {
    event->kind = OfiEvent::Kind::kOther;
  }
  return true;
}

void OfiEndpoint::ReadError(OfiEvent* event) {
  // Newer libraries have a longer entry than these headers.
  union {
    fi_cq_err_entry entry;
    std::byte room[256];
  } error;
  std::memset(&error, 0, sizeof(error));
  event->kind = OfiEvent::Kind::kOther;
  event->context = nullptr;
  if (fi_cq_readerr(queue_.get(), &error.entry, 0) < 0) return;
  event->kind = OfiEvent::Kind::kFailed;
  event->context = error.entry.op_context;
  char text[128] = {};
  const char* const detail =
      fi_cq_strerror(queue_.get(), error.entry.prov_errno, error.entry.err_data,
                     text, sizeof(text));
  event->error = library_.ErrorText(error.entry.err);
  if (IsEfa(provider_) && detail != nullptr) {
    event->error += " (" + std::string(detail) + ")";
  }
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
