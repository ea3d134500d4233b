#include "moe/reduce.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/check.h"

namespace jaxfabric::moe {
namespace {

const int32_t* SlotRows(const Layout& layout, const ReceivePlan& plan,
                        int32_t source, int64_t m) {
  return plan.slot_row.data() +
         (plan.source_begin[source] + m) * layout.slots();
}

// Where each destination's list stands at a token.
std::vector<int32_t> Cursors(const SendLists& lists, int32_t num_ranks,
                             int32_t token) {
  std::vector<int32_t> cursors;
  cursors.reserve(num_ranks);
  for (int32_t d = 0; d < num_ranks; ++d) {
    const std::span<const int32_t> tokens = lists.Tokens(d);
    const auto at = std::lower_bound(tokens.begin(), tokens.end(), token);
    cursors.push_back(static_cast<int32_t>(at - tokens.begin()));
  }
  return cursors;
}

}  // namespace

Status CheckRowType(const Layout& layout, RowType type) {
  if (layout.row_bytes % ElementBytes(type) == 0) return OkStatus();
  return Status(StatusCode::kInvalidArgument,
                "rows of " + std::to_string(layout.row_bytes) +
                    " bytes are not whole elements of " +
                    std::to_string(ElementBytes(type)) + " bytes");
}

void ReduceRows(const Layout& layout, const ReceivePlan& plan, int32_t source,
                RowRange range, const ReduceInput& input, std::byte* out) {
  JF_CHECK(0 <= range.begin && range.begin <= range.end &&
           range.end <= plan.RowCount(source));
  if (range.begin == range.end) return;
  const int64_t row_bytes = layout.row_bytes;
  if (!input.per_slot) {
    const int64_t first = int64_t{plan.source_begin[source]} + range.begin;
    std::memcpy(out, input.rows + first * row_bytes,
                (range.end - range.begin) * row_bytes);
    return;
  }
  const ScopedFloatEnvironment environment;
  const int64_t slots = layout.slots();
  std::vector<const std::byte*> rows(slots);
  std::vector<float> weights(slots);
  const int32_t* slot_row = SlotRows(layout, plan, source, range.begin);
  for (int64_t m = range.begin; m < range.end; ++m, slot_row += slots) {
    size_t count = 0;
    for (int64_t q = 0; q < slots; ++q) {
      if (slot_row[q] < 0) continue;
      rows[count] = input.rows + slot_row[q] * row_bytes;
      if (input.weights != nullptr) weights[count] = input.weights[slot_row[q]];
      ++count;
    }
    SumRows(input.type, {rows.data(), count},
            input.weights != nullptr ? weights.data() : nullptr, row_bytes,
            out);
    out += row_bytes;
  }
}

void GatherScalars(const Layout& layout, const ReceivePlan& plan,
                   int32_t source, const float* scalars, std::byte* out) {
  const int32_t* row = SlotRows(layout, plan, source, 0);
  const int32_t* end = SlotRows(layout, plan, source, plan.RowCount(source));
  for (; row != end; ++row, out += sizeof(float)) {
    const float scalar = *row < 0 ? 0.0f : scalars[*row];
    std::memcpy(out, &scalar, sizeof(scalar));
  }
}

void PackReduceMessage(const Layout& layout, const ReceivePlan& plan,
                       int32_t source, const ReduceInput& input,
                       std::byte* out) {
  const int32_t row_count = plan.RowCount(source);
  const ReduceParts parts =
      StartReduceMessage(layout, row_count, input.with_scalars, out);
  if (input.with_scalars) {
    GatherScalars(layout, plan, source, input.scalars, parts.scalars);
  }
  ReduceRows(layout, plan, source, {0, row_count}, input, parts.rows);
}

void Accumulate(const Layout& layout, RowType type, const SendLists& lists,
                std::span<const RowSource> partials, RowRange tokens,
                std::byte* y) {
  JF_CHECK(partials.size() == static_cast<size_t>(layout.num_ranks));
  JF_CHECK(0 <= tokens.begin && tokens.begin <= tokens.end &&
           tokens.end <= layout.tokens);
  const ScopedFloatEnvironment environment;
  std::vector<int32_t> cursors = Cursors(lists, layout.num_ranks, tokens.begin);
  std::vector<const std::byte*> rows(layout.num_ranks);
  for (int32_t t = tokens.begin; t < tokens.end; ++t) {
    size_t count = 0;
    for (int32_t d = 0; d < layout.num_ranks; ++d) {
      const int32_t m = cursors[d];
      if (m == lists.RowCount(d) || lists.Tokens(d)[m] != t) continue;
      rows[count++] = partials[d].Row(m);
      ++cursors[d];
    }
    SumRows(type, {rows.data(), count}, nullptr, layout.row_bytes,
            y + t * layout.row_bytes);
  }
}

void ScatterScalars(const Layout& layout, const SendLists& lists,
                    std::span<const std::byte* const> by_destination,
                    std::span<float> slot_scalars) {
  JF_CHECK(by_destination.size() == static_cast<size_t>(layout.num_ranks));
  JF_CHECK(slot_scalars.size() ==
           static_cast<size_t>(layout.tokens) * layout.k);
  std::ranges::fill(slot_scalars, 0.0f);
  const int64_t row_bytes = int64_t{layout.slots()} * sizeof(float);
  for (int32_t d = 0; d < layout.num_ranks; ++d) {
    const std::span<const int32_t> tokens = lists.Tokens(d);
    const std::span<const int32_t> counts = lists.SlotCounts(d);
    const SendSlot* slot = lists.Slots(d).data();
    for (size_t m = 0; m < tokens.size(); ++m) {
      const std::byte* from = by_destination[d] + m * row_bytes;
      float* to = slot_scalars.data() + int64_t{tokens[m]} * layout.k;
      for (int32_t q = 0; q < counts[m]; ++q, ++slot) {
        std::memcpy(to + slot->k, from + q * sizeof(float), sizeof(float));
      }
    }
  }
}

}  // namespace jaxfabric::moe
