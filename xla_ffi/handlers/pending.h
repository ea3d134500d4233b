// Pending: what the first half of a call hands to its second, as an array.

#ifndef JAXFABRIC_HANDLERS_PENDING_H_
#define JAXFABRIC_HANDLERS_PENDING_H_

#include <cstdint>
#include <cstring>

#include "engine/mailbox.h"

namespace jaxfabric {

// u32[6] to the program: channel, sequence, and the start's monotonic time, low
// word first.
struct Pending {
  MatchKey key;
  int64_t begun_ns;
};
inline constexpr size_t kPendingWords = 6;
static_assert(sizeof(Pending) == kPendingWords * sizeof(uint32_t));

inline void StorePending(const Pending& pending, void* words) {
  std::memcpy(words, &pending, sizeof pending);
}

inline Pending LoadPending(const void* words) {
  Pending pending;
  std::memcpy(&pending, words, sizeof pending);
  return pending;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HANDLERS_PENDING_H_
