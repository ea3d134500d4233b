// SpanAllocator: which parts of a region are in use. First fit from the start,
// so that a lightly used region stays within few pages, and warm.

#ifndef JAXFABRIC_ENGINE_SPAN_ALLOCATOR_H_
#define JAXFABRIC_ENGINE_SPAN_ALLOCATOR_H_

#include <cstdint>
#include <map>
#include <optional>

#include "base/cache_line.h"
#include "base/check.h"

namespace jaxfabric {

class SpanAllocator {
 public:
  explicit SpanAllocator(uint64_t capacity_bytes)
      : capacity_bytes_(capacity_bytes) {}

  // The offset of `bytes` free bytes on a cache line, or nothing.
  std::optional<uint64_t> Allocate(uint64_t bytes) {
    const uint64_t length = AlignUp(bytes == 0 ? 1 : bytes, kCacheLineBytes);
    uint64_t offset = 0;
    for (const auto& [begin, end] : used_) {
      if (begin - offset >= length) break;
      offset = end;
    }
    // The last line need not be whole.
    if (offset > capacity_bytes_ || capacity_bytes_ - offset < bytes) {
      return std::nullopt;
    }
    used_[offset] = offset + length;
    return offset;
  }

  void Free(uint64_t offset) { JF_CHECK(used_.erase(offset) == 1); }

 private:
  uint64_t capacity_bytes_;
  std::map<uint64_t, uint64_t> used_;  // begin to end, disjoint
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_SPAN_ALLOCATOR_H_
