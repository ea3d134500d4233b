// Layouts of random worlds, and what a kernel is told of them.

#ifndef JAXFABRIC_CUDA_TESTS_MOE_LAYOUTS_H_
#define JAXFABRIC_CUDA_TESTS_MOE_LAYOUTS_H_

#include <algorithm>
#include <cstdint>

#include "moe/layout.h"
#include "moe_shape.h"
#include "tests/cpp/moe_oracle.h"
#include "tests/scaled_world.h"

namespace jaxfabric::cuda {

inline constexpr uint64_t kMailboxBytes = 8 << 20;

inline moe::Layout RandomLayout(moe::Random& random, int ranks, RowType type,
                                bool large) {
  moe::Layout layout;
  layout.num_ranks = ranks;
  layout.num_experts = ranks * moe::Choose<int32_t>(random, {1, 2, 5, 32, 64});
  layout.tokens =
      large ? moe::Uniform(random, 200, 1400) : moe::Uniform(random, 1, 70);
  layout.k = std::min<int32_t>(moe::Uniform(random, 1, 8), layout.num_experts);
  layout.row_bytes = moe::ElementBytes(HostType(type)) *
                     moe::Choose<int64_t>(random, {1, 3, 8, 12, 100, 240, 256,
                                                   1024, 1800, 2176});
  layout.expert_alignment = moe::Choose<int32_t>(random, {1, 1, 3, 8});
  layout.expand = moe::Uniform(random, 0, 2) != 0;
  layout.zero_tail = moe::Uniform(random, 0, 1) == 0;
  const int64_t all = layout.unique_rows_max() * layout.slots();
  layout.capacity = moe::Choose<int64_t>(
      random, {-1, -1, 1, all, moe::Uniform(random, 1, all)});
  return layout;
}

// `layout` is that of x.
inline MoeShape ShapeOf(const moe::Layout& layout, RowType type,
                        bool with_scalars, bool scaled = false,
                        bool keep = false) {
  MoeShape shape = {};
  shape.ranks = layout.num_ranks;
  shape.tokens = layout.tokens;
  shape.k = layout.k;
  shape.experts = layout.experts_local();
  shape.slots = layout.slots();
  shape.alignment = layout.expert_alignment;
  shape.row_bytes = layout.row_bytes;
  shape.rows = layout.rows();
  shape.kept_max = layout.kept_max() < layout.unique_rows_max() * layout.slots()
                       ? layout.kept_max()
                       : INT32_MAX;
  shape.expand = layout.expand;
  shape.zero_tail = layout.zero_tail;
  shape.type = type;
  if (scaled) {
    shape.scaled = true;
    shape.keep = keep;
    shape.hidden = static_cast<int32_t>(layout.row_bytes / ElementBytes(type));
    if (keep) shape.row_bytes = shape.hidden;
  }
  Complete(shape, with_scalars);
  return shape;
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_TESTS_MOE_LAYOUTS_H_
