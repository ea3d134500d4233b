#include "transport/verbs_buffers.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include "transport/verbs_frame.h"

namespace jaxfabric {

StatusOr<std::unique_ptr<VerbsBuffers>> VerbsBuffers::Open(VerbsPort& port,
                                                           uint32_t frames) {
  std::unique_ptr<VerbsBuffers> buffers(new VerbsBuffers());
  const uint64_t bytes = uint64_t{frames} * kVerbsFrameBytesMax;
  buffers->frames_ = std::make_unique<std::byte[]>(bytes);
  JF_ASSIGN_OR_RETURN(
      buffers->frame_memory_,
      port.Register(buffers->frames_.get(), bytes, IBV_ACCESS_LOCAL_WRITE));
  buffers->words_ = std::make_unique<VerbsWords[]>(kConnectionsMax);
  JF_ASSIGN_OR_RETURN(
      buffers->words_memory_,
      port.Register(buffers->words_.get(),
                    uint64_t{kConnectionsMax} * sizeof(VerbsWords),
                    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));
  for (uint32_t i = 0; i < frames; ++i) buffers->free_frames_.push_back(i);
  for (uint32_t i = kConnectionsMax; i > 0; --i) {
    buffers->free_words_.push_back(i - 1);
  }
  return buffers;
}

std::optional<uint32_t> VerbsBuffers::TakeFrame(size_t reserve) {
  if (free_frames_.size() <= reserve) return std::nullopt;
  const uint32_t index = free_frames_.back();
  free_frames_.pop_back();
  return index;
}

std::byte* VerbsBuffers::frame(uint32_t index) const {
  return frames_.get() + uint64_t{index} * kVerbsFrameBytesMax;
}

std::optional<uint32_t> VerbsBuffers::TakeWords() {
  if (free_words_.empty()) return std::nullopt;
  const uint32_t index = free_words_.back();
  free_words_.pop_back();
  return index;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
