#include "moe/place.h"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "base/check.h"

namespace jaxfabric::moe {
namespace {

void CheckSizes(const Layout& layout, size_t sources,
                const PlaceOutputs& outputs) {
  const size_t ranks = layout.num_ranks;
  const size_t rows = layout.rows();
  JF_CHECK(sources == ranks);
  JF_CHECK(outputs.group_sizes.size() ==
           static_cast<size_t>(layout.experts_local()));
  JF_CHECK(outputs.slot_row.size() ==
           static_cast<size_t>(layout.unique_rows_max() * layout.slots()));
  JF_CHECK(outputs.recv_count.size() == ranks);
  JF_CHECK(outputs.weights.size() == rows);
  JF_CHECK(outputs.row_index.size() == (layout.expand ? 0 : rows));
}

// Kept assignments of each local expert. Returns how many were dropped.
int64_t CountKept(const Layout& layout, std::span<const RouteView> by_source,
                  std::vector<int32_t>& kept) {
  int64_t room = layout.kept_max();
  int64_t dropped = 0;
  for (const RouteView& view : by_source) {
    const int64_t slots = static_cast<int64_t>(view.slots.size());
    const int64_t taken = std::min(slots, room);
    for (const SendSlot& slot : view.slots.first(taken)) ++kept[slot.expert];
    room -= taken;
    dropped += slots - taken;
  }
  return dropped;
}

// Sets group_sizes, plan.padding and plan.rows_end; returns the groups' begins.
std::vector<int32_t> AddGroups(const Layout& layout,
                               const std::vector<int32_t>& kept,
                               std::span<int32_t> group_sizes,
                               ReceivePlan& plan) {
  const int64_t alignment = layout.expert_alignment;
  std::vector<int32_t> begins;
  begins.reserve(kept.size());
  int32_t begin = 0;
  for (size_t e = 0; e < kept.size(); ++e) {
    begins.push_back(begin);
    const int64_t size = (kept[e] + alignment - 1) / alignment * alignment;
    group_sizes[e] = static_cast<int32_t>(size);
    const int32_t end = begin + group_sizes[e];
    if (begin + kept[e] < end) plan.padding.push_back({begin + kept[e], end});
    begin = end;
  }
  plan.rows_end = begin;
  return begins;
}

// Hands out rows in (source, token, k) order.
class Placer {
 public:
  Placer(const Layout& layout, std::vector<int32_t> next_row,
         const PlaceOutputs& outputs)
      : slots_(layout.slots()),
        room_(layout.kept_max()),
        next_row_(std::move(next_row)),
        out_(outputs) {}

  void AddSource(const RouteView& view) {
    const SendSlot* slot = view.slots.data();
    const float* weight = view.weights.data();
    for (const int32_t count : view.slot_counts) {
      int32_t* row_of_slot = out_.slot_row.data() + unique_row_ * slots_;
      for (int32_t q = 0; q < count; ++q, ++slot, ++weight) {
        row_of_slot[q] = PlaceSlot(slot->expert, *weight);
      }
      std::fill(row_of_slot + count, row_of_slot + slots_, -1);
      ++unique_row_;
    }
  }

 private:
  int32_t PlaceSlot(int32_t expert, float weight) {
    if (room_ == 0) return -1;
    --room_;
    const int32_t row = next_row_[expert]++;
    out_.weights[row] = weight;
    if (!out_.row_index.empty()) {
      out_.row_index[row] = static_cast<int32_t>(unique_row_);
    }
    return row;
  }

  const int32_t slots_;
  int64_t room_;
  int64_t unique_row_ = 0;
  std::vector<int32_t> next_row_;
  const PlaceOutputs out_;
};

}  // namespace

Placement Place(const Layout& layout, std::span<const RouteView> by_source,
                const PlaceOutputs& outputs) {
  CheckSizes(layout, by_source.size(), outputs);
  Placement placement;
  ReceivePlan& plan = placement.plan;
  std::vector<int32_t> kept(layout.experts_local());
  // At most N*T*S, so an int32 by CheckLayout.
  placement.dropped = static_cast<int32_t>(CountKept(layout, by_source, kept));
  std::vector<int32_t> begins =
      AddGroups(layout, kept, outputs.group_sizes, plan);

  std::ranges::fill(outputs.weights, 0.0f);
  std::ranges::fill(outputs.row_index, -1);
  Placer placer(layout, std::move(begins), outputs);
  plan.source_begin.reserve(by_source.size() + 1);
  plan.source_begin.push_back(0);
  for (size_t s = 0; s < by_source.size(); ++s) {
    placer.AddSource(by_source[s]);
    outputs.recv_count[s] = by_source[s].row_count();
    plan.source_begin.push_back(plan.source_begin.back() +
                                outputs.recv_count[s]);
  }
  std::ranges::fill(
      outputs.slot_row.subspan(static_cast<size_t>(plan.rows_received()) *
                               static_cast<size_t>(layout.slots())),
      -1);
  plan.slot_row = outputs.slot_row;
  return placement;
}

}  // namespace jaxfabric::moe
