// OfiOperations: what one ofi Domain has posted and not completed, and the
// buffers that frames are sent from and received in.

#ifndef JAXFABRIC_TRANSPORT_OFI_OPERATIONS_H_
#define JAXFABRIC_TRANSPORT_OFI_OPERATIONS_H_

#include "transport/ofi_endpoint.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "transport/ofi_frame.h"

namespace jaxfabric {

struct OfiPeer;

struct OfiOperation {
  enum class Kind { kReceive, kWrite, kMessage, kFrame };
  // libfabric writes here until the operation ends; its address is the context.
  fi_context2 context = {};
  Kind kind = Kind::kWrite;
  OfiPeer* peer = nullptr;
  uint64_t cookie = 0;          // of kWrite and kMessage
  std::byte* buffer = nullptr;  // kOfiFrameBytesMax; null for kWrite
  OfiFrameKind frame = OfiFrameKind::kPing;  // of kFrame
};

class OfiOperations {
 public:
  // `writes` operations without a buffer, `sends` and `receives` with one.
  static StatusOr<std::unique_ptr<OfiOperations>> Open(OfiEndpoint& endpoint,
                                                       size_t writes,
                                                       size_t sends,
                                                       size_t receives);

  // Null if all are in use.
  OfiOperation* TakeWrite() { return Take(&free_writes_); }
  // Leaves `reserve` for others.
  OfiOperation* TakeSend(size_t reserve) {
    return free_sends_.size() > reserve ? Take(&free_sends_) : nullptr;
  }
  void GiveBack(OfiOperation* operation) {
    operation->peer = nullptr;
    (operation->buffer == nullptr ? free_writes_ : free_sends_)
        .push_back(operation);
  }

  // Those that were posted and have not ended, receives aside.
  std::vector<OfiOperation*> Posted();

  void* descriptor() const { return memory_.descriptor(); }
  // Registered, for writes of no bytes.
  const std::byte* anything() const { return buffers_.get(); }
  const std::vector<OfiOperation*>& receives() const { return receives_; }
  // Of `context`, which an event brought.
  static OfiOperation* FromContext(void* context) {
    return static_cast<OfiOperation*>(context);
  }

 private:
  static OfiOperation* Take(std::vector<OfiOperation*>* free) {
    if (free->empty()) return nullptr;
    OfiOperation* const taken = free->back();
    free->pop_back();
    return taken;
  }

  std::unique_ptr<std::byte[]> buffers_;
  OfiMemory memory_;  // of buffers_
  std::vector<OfiOperation> all_;
  std::vector<OfiOperation*> free_writes_;
  std::vector<OfiOperation*> free_sends_;
  std::vector<OfiOperation*> receives_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
#endif  // JAXFABRIC_TRANSPORT_OFI_OPERATIONS_H_
