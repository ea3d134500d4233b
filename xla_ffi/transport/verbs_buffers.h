// VerbsBuffers: what one Domain sends frames from, and the words in which its
// peers say how many receives they keep for it (verbs_credits.h).

#ifndef JAXFABRIC_TRANSPORT_VERBS_BUFFERS_H_
#define JAXFABRIC_TRANSPORT_VERBS_BUFFERS_H_

#include "transport/verbs_port.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/cache_line.h"
#include "base/status.h"

namespace jaxfabric {

// Of one connection, on a cache line of its own:
//   offset 0  limit  u32  written by the peer: how far we may count
//   offset 4  told   u32  what we write to the peer
struct alignas(kCacheLineBytes) VerbsWords {
  uint32_t limit = 0;
  uint32_t told = 0;
};
static_assert(sizeof(VerbsWords) == kCacheLineBytes);

class VerbsBuffers {
 public:
  // Connections that one Domain has at the same time.
  static constexpr uint32_t kConnectionsMax = 4096;

  static StatusOr<std::unique_ptr<VerbsBuffers>> Open(VerbsPort& port,
                                                      uint32_t frames);

  // Nothing if no more than `reserve` are left.
  std::optional<uint32_t> TakeFrame(size_t reserve);
  void GiveFrame(uint32_t index) { free_frames_.push_back(index); }
  std::byte* frame(uint32_t index) const;
  uint32_t frame_key() const { return frame_memory_->lkey; }

  std::optional<uint32_t> TakeWords();
  void GiveWords(uint32_t index) { free_words_.push_back(index); }
  VerbsWords& words(uint32_t index) const { return words_[index]; }
  uint32_t words_local_key() const { return words_memory_->lkey; }
  uint32_t words_remote_key() const { return words_memory_->rkey; }

 private:
  VerbsBuffers() = default;

  std::unique_ptr<std::byte[]> frames_;
  std::unique_ptr<VerbsWords[]> words_;
  VerbsMemory frame_memory_{nullptr, nullptr};
  VerbsMemory words_memory_{nullptr, nullptr};
  std::vector<uint32_t> free_frames_;
  std::vector<uint32_t> free_words_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
#endif  // JAXFABRIC_TRANSPORT_VERBS_BUFFERS_H_
