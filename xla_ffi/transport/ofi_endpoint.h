// OfiEndpoint: the libfabric objects behind one Domain, and what they can do.
//
// Everything about the device is read from the fi_info and the options that
// libfabric gives. Closing it ends all that was posted, by us and to us.

#ifndef JAXFABRIC_TRANSPORT_OFI_ENDPOINT_H_
#define JAXFABRIC_TRANSPORT_OFI_ENDPOINT_H_

#include "transport/ofi_library.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/status.h"
#include "transport/ofi_address.h"

namespace jaxfabric {

template <typename Fid>
struct OfiClose {
  void operator()(Fid* fid) const { fi_close(&fid->fid); }
};
template <typename Fid>
using OfiOwned = std::unique_ptr<Fid, OfiClose<Fid>>;

// A piece of memory that the NIC may read and, with remote access, write.
struct OfiMemory {
  OfiOwned<fid_mr> region;
  const std::byte* base = nullptr;
  void* descriptor() const { return fi_mr_desc(region.get()); }
};

// One entry of the completion queue.
struct OfiEvent {
  enum class Kind { kDone, kReceived, kImmediate, kFailed, kOther };
  Kind kind = Kind::kOther;
  void* context = nullptr;  // as it was posted; null for a bare immediate
  size_t bytes = 0;         // of kReceived
  uint32_t immediate = 0;
  // Whose it is, of kImmediate and where names_source(); else unspecified.
  fi_addr_t source = FI_ADDR_NOTAVAIL;
  std::string error;  // of kFailed
};

class OfiEndpoint {
 public:
  static constexpr size_t kWritePiecesMax = 4;

  static StatusOr<std::unique_ptr<OfiEndpoint>> Open(const OfiLibrary& library,
                                                     OfiProvider provider,
                                                     const fi_info& info);

  // Ends all that is posted, without a word; nothing that peers have posted
  // lands any more. What was in the queue can still be read.
  void Stop() { endpoint_.reset(); }
  // After Stop: a new endpoint, with another name, on the same NIC. Memory
  // stays registered, with its keys; peers have to be inserted anew.
  Status Reopen();
  // Whether Reopen works.
  bool can_reopen() const { return can_reopen_; }

  OfiProvider provider() const { return provider_; }
  // As fi_getname gives it; at most kOfiEndpointBytesMax.
  std::span<const std::byte> name() const { return {name_.data(), name_size_}; }

  uint64_t write_bytes_max() const { return write_bytes_max_; }
  size_t write_pieces_max() const;
  size_t send_depth() const { return info_->tx_attr->size; }
  size_t receive_depth() const { return info_->rx_attr->size; }
  bool immediate_consumes_receive() const { return receives_for_data_; }
  bool emulated_writes() const { return emulated_writes_; }
  bool writes_in_software() const;
  bool names_source() const { return names_source_; }
  bool virtual_addresses() const { return HasMode(FI_MR_VIRT_ADDR); }
  // Readable when the queue has news; -1 if it must be polled.
  int wait_fd() const { return wait_fd_; }
  // Whether sleeping on wait_fd misses nothing; else there is news already.
  bool MaySleep();

  // `key` is what peers name it by, where the device does not choose that.
  StatusOr<OfiMemory> Register(std::byte* base, uint64_t bytes, bool remote,
                               uint64_t key);
  uint64_t KeyOf(const OfiMemory& memory) const {
    return fi_mr_key(memory.region.get());
  }

  StatusOr<fi_addr_t> Insert(std::span<const std::byte> name);
  void Remove(fi_addr_t address);

  // These give 0, or a negative libfabric error; -FI_EAGAIN is back-pressure.
  // Contexts are a fi_context2 that lives until the operation's event.
  // `from` is up to write_pieces_max() pieces of the memory of `descriptor`.
  int64_t Write(fi_addr_t to, std::span<const iovec> from, void* descriptor,
                std::span<const fi_rma_iov> target,
                std::optional<uint32_t> immediate, void* context);
  int64_t Send(fi_addr_t to, const void* data, void* descriptor, uint64_t bytes,
               void* context);
  int64_t Receive(void* data, void* descriptor, uint64_t bytes, void* context);

  // Moves everything forward; false if there was nothing.
  bool Next(OfiEvent* event);
  // Drops what the device says of no operation in particular. Peers that it
  // concerns are found out by pings.
  void DrainErrors();

 private:
  OfiEndpoint(const OfiLibrary& library, OfiProvider provider,
              const fi_info& info)
      : library_(library), provider_(provider), info_(library.Copy(&info)) {}

  bool HasMode(uint64_t mode) const {
    return (static_cast<uint64_t>(info_->domain_attr->mr_mode) & mode) != 0;
  }
  Status OpenDevice();
  Status OpenObjects();
  Status OpenQueue();
  Status Enable();
  Status BindErrors();
  void SetOptions();
  void ReadOptions();
  Status Failed(const char* call, int64_t error) const;
  void ReadError(OfiEvent* event);

  const OfiLibrary& library_;
  const OfiProvider provider_;
  const OfiLibrary::Info info_;
  // Closed from the last to the first.
  OfiOwned<fid_fabric> fabric_;
  OfiOwned<fid_domain> domain_;
  OfiOwned<fid_av> addresses_;
  OfiOwned<fid_cq> queue_;
  OfiOwned<fid_eq> errors_;  // of efa, which aborts the process without one
  OfiOwned<fid_ep> endpoint_;

  std::array<std::byte, kOfiEndpointBytesMax> name_ = {};
  size_t name_size_ = 0;
  int wait_fd_ = -1;
  uint64_t write_bytes_max_ = 0;
  uint64_t write_flags_ = 0;
  bool receives_for_data_ = false;
  bool emulated_writes_ = false;
  bool names_source_ = false;
  bool can_reopen_ = false;

  // Entries that were read and not handed out.
  std::array<fi_cq_data_entry, 32> batch_ = {};
  std::array<fi_addr_t, 32> sources_ = {};  // of batch_
  size_t batch_next_ = 0;
  size_t batch_size_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
#endif  // JAXFABRIC_TRANSPORT_OFI_ENDPOINT_H_
