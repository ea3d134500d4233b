#include "moe/unpack.h"

#include <cstring>

#include "base/check.h"

namespace jaxfabric::moe {
namespace {

void CopyToSlots(const Layout& layout, const ReceivePlan& plan, int32_t source,
                 const RowSource& rows, RowRange range, std::byte* out) {
  const int64_t slots = layout.slots();
  const int32_t* row_of_slot =
      plan.slot_row.data() + (plan.source_begin[source] + range.begin) * slots;
  for (int64_t m = range.begin; m < range.end; ++m, row_of_slot += slots) {
    const std::byte* row = rows.Row(m);
    for (int64_t q = 0; q < slots; ++q) {
      if (row_of_slot[q] < 0) continue;
      std::memcpy(out + row_of_slot[q] * layout.row_bytes, row,
                  layout.row_bytes);
    }
  }
}

void CopyPacked(const Layout& layout, const RowSource& rows, RowRange range,
                std::byte* out) {
  if (rows.tokens == nullptr) {
    std::memcpy(out, rows.Row(range.begin),
                (range.end - range.begin) * layout.row_bytes);
    return;
  }
  for (int64_t m = range.begin; m < range.end; ++m, out += layout.row_bytes) {
    std::memcpy(out, rows.Row(m), layout.row_bytes);
  }
}

void Zero(const Layout& layout, int64_t begin, int64_t end, std::byte* out) {
  if (begin == end) return;
  std::memset(out + begin * layout.row_bytes, 0,
              (end - begin) * layout.row_bytes);
}

}  // namespace

void UnpackRows(const Layout& layout, const ReceivePlan& plan, int32_t source,
                const RowSource& rows, RowRange range, std::byte* out) {
  JF_CHECK(0 <= range.begin && range.begin <= range.end &&
           range.end <= plan.RowCount(source));
  JF_CHECK(rows.row_bytes == layout.row_bytes);
  if (range.begin == range.end) return;
  if (layout.expand) {
    CopyToSlots(layout, plan, source, rows, range, out);
    return;
  }
  const int64_t first = int64_t{plan.source_begin[source]} + range.begin;
  CopyPacked(layout, rows, range, out + first * layout.row_bytes);
}

void ZeroUnwrittenRows(const Layout& layout, const ReceivePlan& plan,
                       std::byte* out) {
  if (layout.expand) {
    for (const RowRange& range : plan.padding) {
      Zero(layout, range.begin, range.end, out);
    }
  }
  if (!layout.zero_tail) return;
  const int64_t written = layout.expand ? plan.rows_end : plan.rows_received();
  Zero(layout, written, layout.output_rows(), out);
}

}  // namespace jaxfabric::moe
