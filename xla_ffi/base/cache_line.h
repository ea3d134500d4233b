// Sizes and hints of the processor's caches.

#ifndef JAXFABRIC_BASE_CACHE_LINE_H_
#define JAXFABRIC_BASE_CACHE_LINE_H_

#include <cstddef>

namespace jaxfabric {

inline constexpr size_t kCacheLineBytes = 64;

// Tells the processor that this thread is spinning.
inline void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline constexpr size_t AlignUp(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_BASE_CACHE_LINE_H_
