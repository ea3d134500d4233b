// VerbsReceives: the receives that all queue pairs of one Domain share.
//
// It is grown with each peer by what that peer is promised, so that there are
// always at least as many receives posted as peers may use up.

#ifndef JAXFABRIC_TRANSPORT_VERBS_RECEIVES_H_
#define JAXFABRIC_TRANSPORT_VERBS_RECEIVES_H_

#include "transport/verbs_port.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "transport/verbs_credits.h"
#include "transport/verbs_frame.h"

namespace jaxfabric {

class VerbsReceives {
 public:
  // Receives are posted under wr_id = `tag` | their index.
  static StatusOr<std::unique_ptr<VerbsReceives>> Open(VerbsPort& port,
                                                       uint64_t tag);

  ibv_srq* shared() const { return shared_.get(); }

  // Promises receives to a further peer, and sees to it that they are there.
  // Returns how many; see ChooseQuota.
  StatusOr<uint32_t> Reserve();
  void Release(uint32_t quota) { reserved_ -= quota; }

  const std::byte* data(uint32_t index) const { return BufferOf(index); }
  bool IsIndex(uint64_t index) const { return index < posted_; }
  // After its bytes were read.
  Status Repost(uint32_t index);

 private:
  static constexpr uint32_t kSlab = kVerbsQuotaMax;
  struct Slab {
    std::unique_ptr<std::byte[]> bytes;
    VerbsMemory memory;
  };

  VerbsReceives(VerbsPort& port, uint64_t tag) : port_(port), tag_(tag) {}
  Status Grow();
  std::byte* BufferOf(uint32_t index) const {
    return slabs_[index / kSlab].bytes.get() +
           uint64_t{index % kSlab} * kVerbsFrameBytesMax;
  }

  VerbsPort& port_;
  const uint64_t tag_;
  std::vector<Slab> slabs_;
  VerbsOwned<ibv_srq> shared_{nullptr, nullptr};  // goes before its memory
  uint32_t posted_ = 0;
  uint32_t reserved_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
#endif  // JAXFABRIC_TRANSPORT_VERBS_RECEIVES_H_
