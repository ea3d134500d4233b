// ReceivePlan: where each received unique row goes, or came from.
//
// It is all that unpack and reduce need. Dispatch makes one with Place; replay
// and reduce make one from the arrays of the user's plan with CheckPlan.

#ifndef JAXFABRIC_MOE_RECEIVE_PLAN_H_
#define JAXFABRIC_MOE_RECEIVE_PLAN_H_

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "moe/layout.h"

namespace jaxfabric::moe {

// Rows [begin, end).
struct RowRange {
  int32_t begin = 0;
  int32_t end = 0;
};

struct ReceivePlan {
  // [N + 1]: source s's unique rows are [source_begin[s], source_begin[s+1]).
  std::vector<int32_t> source_begin;
  // int32[N*T, S], the caller's array: expert row of each slot, or -1.
  std::span<const int32_t> slot_row;
  // Expert rows below rows_end that no slot names.
  std::vector<RowRange> padding;
  // Sum of the group sizes: expert rows from here on are the tail.
  int32_t rows_end = 0;

  int32_t RowCount(int32_t source) const {
    return source_begin[source + 1] - source_begin[source];
  }
  int32_t rows_received() const { return source_begin.back(); }
};

// `recv_count` is int32[N], `slot_row` int32[N*T, S]; the plan refers to
// `slot_row`. InvalidArgument if they cannot be the arrays of one dispatch:
// a count or row out of range, a row that two slots name, or an entry past the
// received rows. So no use of the plan leaves its buffers.
StatusOr<ReceivePlan> CheckPlan(const Layout& layout,
                                std::span<const int32_t> recv_count,
                                std::span<const int32_t> slot_row);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_RECEIVE_PLAN_H_
