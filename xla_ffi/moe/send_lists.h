// SendLists: what a rank sends to every rank, from the routes of its tokens.

#ifndef JAXFABRIC_MOE_SEND_LISTS_H_
#define JAXFABRIC_MOE_SEND_LISTS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "moe/layout.h"

namespace jaxfabric::moe {

// One expert of a token at the rank that owns it. Also the wire's format.
struct SendSlot {
  int32_t expert = 0;  // local index at the destination
  int32_t k = 0;       // column of ids
};
static_assert(sizeof(SendSlot) == 8);

// Compressed rows, destination-major. Both ends of a reduce need the same lists
// again; they are recomputed from ids, never remembered.
//
// Example (N=2, E=4, K=2, ids = {{0,3}, {1,0}, {-1,2}}): to rank 0 go tokens
// {0, 1} with 1 and 2 slots, to rank 1 tokens {0, 2} with one slot each;
// slots = {0,0} {1,0} {0,1} | {1,1} {0,1}.
struct SendLists {
  std::vector<int32_t> row_begin;    // [N + 1]
  std::vector<int32_t> slot_begin;   // [N + 1]
  std::vector<int32_t> tokens;       // [rows], ascending per destination
  std::vector<int32_t> slot_counts;  // [rows], each 1..S
  std::vector<SendSlot> slots;       // ascending k within a row

  // Unique rows that go to `destination`.
  int32_t RowCount(int32_t destination) const {
    return row_begin[destination + 1] - row_begin[destination];
  }
  int32_t SlotCount(int32_t destination) const {
    return slot_begin[destination + 1] - slot_begin[destination];
  }
  std::span<const int32_t> Tokens(int32_t destination) const {
    return {tokens.data() + row_begin[destination],
            static_cast<size_t>(RowCount(destination))};
  }
  std::span<const int32_t> SlotCounts(int32_t destination) const {
    return {slot_counts.data() + row_begin[destination],
            static_cast<size_t>(RowCount(destination))};
  }
  std::span<const SendSlot> Slots(int32_t destination) const {
    return {slots.data() + slot_begin[destination],
            static_cast<size_t>(SlotCount(destination))};
  }
};

// `ids` is int32[T, K]; -1 skips. InvalidArgument if an id is outside
// [-1, num_experts) or an expert is twice in a token; the text names token, k
// and value.
StatusOr<SendLists> BuildSendLists(const Layout& layout,
                                   std::span<const int32_t> ids);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_SEND_LISTS_H_
