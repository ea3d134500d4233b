#include "moe/layout.h"

#include <algorithm>
#include <limits>
#include <string>

namespace jaxfabric::moe {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

Status RefuseBelow(const char* name, int64_t value, int64_t minimum) {
  if (value >= minimum) return OkStatus();
  return Status(StatusCode::kInvalidArgument,
                std::string(name) + " is " + std::to_string(value) +
                    ", and must be at least " + std::to_string(minimum));
}

Status RefuseAboveInt32(const char* what, int64_t value) {
  if (value <= kInt32Max) return OkStatus();
  return Status(StatusCode::kInvalidArgument,
                std::string(what) + " is " + std::to_string(value) +
                    ", and must fit an int32: use fewer tokens per rank, or a "
                    "capacity");
}

}  // namespace

int32_t Layout::slots() const { return std::min(k, experts_local()); }

int64_t Layout::kept_max() const {
  const int64_t all = unique_rows_max() * slots();
  return capacity == kDropless ? all : std::min<int64_t>(capacity, all);
}

int64_t Layout::rows() const {
  const int64_t padding = int64_t{experts_local()} * (expert_alignment - 1);
  return (kept_max() + padding) / expert_alignment * expert_alignment;
}

Status CheckLayout(const Layout& layout) {
  JF_RETURN_IF_ERROR(RefuseBelow("num_ranks", layout.num_ranks, 1));
  JF_RETURN_IF_ERROR(RefuseBelow("tokens", layout.tokens, 0));
  JF_RETURN_IF_ERROR(RefuseBelow("k", layout.k, 1));
  JF_RETURN_IF_ERROR(RefuseBelow("num_experts", layout.num_experts, 1));
  JF_RETURN_IF_ERROR(RefuseBelow("row_bytes", layout.row_bytes, 1));
  JF_RETURN_IF_ERROR(RefuseBelow("capacity", layout.capacity, kDropless));
  JF_RETURN_IF_ERROR(
      RefuseBelow("expert_alignment", layout.expert_alignment, 1));
  if (layout.num_experts % layout.num_ranks != 0) {
    return Status(StatusCode::kInvalidArgument,
                  std::to_string(layout.num_experts) +
                      " experts do not divide by " +
                      std::to_string(layout.num_ranks) + " ranks");
  }
  JF_RETURN_IF_ERROR(RefuseAboveInt32("row_bytes", layout.row_bytes));
  JF_RETURN_IF_ERROR(
      RefuseAboveInt32("tokens * k", int64_t{layout.tokens} * layout.k));
  JF_RETURN_IF_ERROR(
      RefuseAboveInt32("num_ranks * tokens", layout.unique_rows_max()));
  JF_RETURN_IF_ERROR(RefuseAboveInt32(
      "num_ranks * tokens * slots", layout.unique_rows_max() * layout.slots()));
  return RefuseAboveInt32("rows of the output", layout.rows());
}

}  // namespace jaxfabric::moe
