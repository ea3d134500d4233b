#include "moe/receive_plan.h"

#include <algorithm>
#include <cstddef>
#include <string>

#include "base/check.h"

namespace jaxfabric::moe {
namespace {

Status Refuse(const std::string& what) {
  return Status(
      StatusCode::kInvalidArgument,
      what + ": the plan was changed, or belongs to another dispatch");
}

Status AddSources(const Layout& layout, std::span<const int32_t> recv_count,
                  ReceivePlan& plan) {
  plan.source_begin.reserve(recv_count.size() + 1);
  plan.source_begin.push_back(0);
  for (size_t s = 0; s < recv_count.size(); ++s) {
    if (recv_count[s] < 0 || recv_count[s] > layout.tokens) {
      return Refuse("plan.recv_count[" + std::to_string(s) +
                    "] = " + std::to_string(recv_count[s]) +
                    " is not between 0 and " + std::to_string(layout.tokens));
    }
    plan.source_begin.push_back(plan.source_begin.back() + recv_count[s]);
  }
  return OkStatus();
}

std::string NameEntry(const Layout& layout, size_t index, int32_t row) {
  return "plan.slot_row[" + std::to_string(index / layout.slots()) + ", " +
         std::to_string(index % layout.slots()) + "] = " + std::to_string(row);
}

// Marks the expert rows that a slot names.
Status Mark(const Layout& layout, std::span<const int32_t> slot_row,
            std::vector<uint8_t>& named) {
  for (size_t i = 0; i < slot_row.size(); ++i) {
    const int32_t row = slot_row[i];
    if (row == -1) continue;
    if (row < 0 || static_cast<size_t>(row) >= named.size()) {
      return Refuse(NameEntry(layout, i, row) + " is not between -1 and " +
                    std::to_string(static_cast<int64_t>(named.size()) - 1));
    }
    if (named[row]) {
      return Refuse(NameEntry(layout, i, row) + " is a row of another slot");
    }
    named[row] = 1;
  }
  return OkStatus();
}

Status CheckUnused(const Layout& layout, std::span<const int32_t> slot_row,
                   size_t begin) {
  const auto used = std::find_if(slot_row.begin() + begin, slot_row.end(),
                                 [](int32_t row) { return row != -1; });
  if (used == slot_row.end()) return OkStatus();
  return Refuse(NameEntry(layout, used - slot_row.begin(), *used) +
                " is past the rows that were received");
}

// Groups begin at multiples of the alignment and have at least one row, so the
// last named row tells where the last group ends.
void AddPadding(const Layout& layout, const std::vector<uint8_t>& named,
                ReceivePlan& plan) {
  const auto last = std::find(named.rbegin(), named.rend(), uint8_t{1});
  const int64_t end = named.rend() - last;
  const int64_t alignment = layout.expert_alignment;
  plan.rows_end =
      static_cast<int32_t>((end + alignment - 1) / alignment * alignment);
  for (int32_t row = 0; row < plan.rows_end; ++row) {
    if (named[row]) continue;
    if (plan.padding.empty() || plan.padding.back().end != row) {
      plan.padding.push_back({row, row});
    }
    plan.padding.back().end = row + 1;
  }
}

}  // namespace

StatusOr<ReceivePlan> CheckPlan(const Layout& layout,
                                std::span<const int32_t> recv_count,
                                std::span<const int32_t> slot_row) {
  JF_CHECK(recv_count.size() == static_cast<size_t>(layout.num_ranks));
  JF_CHECK(slot_row.size() ==
           static_cast<size_t>(layout.unique_rows_max() * layout.slots()));
  ReceivePlan plan;
  JF_RETURN_IF_ERROR(AddSources(layout, recv_count, plan));
  plan.slot_row = slot_row;
  const size_t used = static_cast<size_t>(plan.rows_received()) *
                      static_cast<size_t>(layout.slots());
  std::vector<uint8_t> named(layout.rows());
  JF_RETURN_IF_ERROR(Mark(layout, slot_row.first(used), named));
  JF_RETURN_IF_ERROR(CheckUnused(layout, slot_row, used));
  AddPadding(layout, named, plan);
  return plan;
}

}  // namespace jaxfabric::moe
