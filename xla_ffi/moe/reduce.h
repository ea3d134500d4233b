// Reduce: combine's two halves of a sum over a token's experts.
//
// At the expert's rank the rows of a token's slots become one partial, which
// travels; at the token's rank the partials of all destinations become y. Both
// are SumRows with its fixed order and rounding: slots ascending, then
// destination ranks ascending. A partial is rounded to the rows' type even if
// it stays on its rank, so that y does not depend on who is where.

#ifndef JAXFABRIC_MOE_REDUCE_H_
#define JAXFABRIC_MOE_REDUCE_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/status.h"
#include "moe/layout.h"
#include "moe/message.h"
#include "moe/receive_plan.h"
#include "moe/send_lists.h"
#include "moe/sum_rows.h"

namespace jaxfabric::moe {

// The operands of combine at the expert's rank.
struct ReduceInput {
  RowType type = RowType::kF32;
  // [R, D] if per_slot, else the unique rows [N*T, D], which are sent as they
  // are.
  const std::byte* rows = nullptr;
  bool per_slot = true;
  const float* weights = nullptr;  // f32[R], or null: sum without weights
  // Not told by a null pointer: with capacity 0 there are no scalars to point
  // at, and both ends must still agree on the message.
  bool with_scalars = false;
  const float* scalars = nullptr;  // f32[R], sent back to their slots
};

// InvalidArgument if layout.row_bytes is not whole elements of `type`.
Status CheckRowType(const Layout& layout, RowType type);

// The partials of rows [begin, end) of `source`, stored at `out` one after the
// other; a row whose slots were all dropped gives zeros. Pieces may run on
// several threads.
void ReduceRows(const Layout& layout, const ReceivePlan& plan, int32_t source,
                RowRange range, const ReduceInput& input, std::byte* out);

// scalars[slot_row[j, q]] for each row j of `source` and slot q, f32[rows * S];
// 0 where there is no slot or it was dropped.
void GatherScalars(const Layout& layout, const ReceivePlan& plan,
                   int32_t source, const float* scalars, std::byte* out);

// The whole reduce message for `source`: ReduceMessageBytes(layout,
// plan.RowCount(source), input.with_scalars) bytes at `out`.
void PackReduceMessage(const Layout& layout, const ReceivePlan& plan,
                       int32_t source, const ReduceInput& input,
                       std::byte* out);

// Tokens [begin, end) of y[T, D] at the token's rank: `partials` has one source
// for each destination rank d, with lists.RowCount(d) rows. Tokens that nobody
// has a partial of get zeros.
void Accumulate(const Layout& layout, RowType type, const SendLists& lists,
                std::span<const RowSource> partials, RowRange tokens,
                std::byte* y);

// slot_scalars f32[T, K] from what GatherScalars wrote at each destination
// (null where a destination has no rows); 0 where ids is -1.
void ScatterScalars(const Layout& layout, const SendLists& lists,
                    std::span<const std::byte* const> by_destination,
                    std::span<float> slot_scalars);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_REDUCE_H_
