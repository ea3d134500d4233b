// Unpack: received rows into the program's result, the one copy at the
// receiver.
//
// Pieces may run in any order and on several threads: distinct unique rows
// write distinct output rows, and ZeroUnwrittenRows writes only the others.

#ifndef JAXFABRIC_MOE_UNPACK_H_
#define JAXFABRIC_MOE_UNPACK_H_

#include <cstddef>
#include <cstdint>

#include "moe/layout.h"
#include "moe/message.h"
#include "moe/receive_plan.h"

namespace jaxfabric::moe {

// Copies rows [begin, end) of `source`'s unique rows to `out`, which is
// layout.output_rows() rows: each to all of its slots' rows if layout.expand,
// else to its place in the packed unique rows.
void UnpackRows(const Layout& layout, const ReceivePlan& plan, int32_t source,
                const RowSource& rows, RowRange range, std::byte* out);

// Zeroes the padding in groups, and if layout.zero_tail the tail. Replay's
// contract has zeros in the tail always: pass a layout with zero_tail set.
void ZeroUnwrittenRows(const Layout& layout, const ReceivePlan& plan,
                       std::byte* out);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_UNPACK_H_
