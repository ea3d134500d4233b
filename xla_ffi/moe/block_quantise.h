// Matrices as e4m3 with a scale for each block of 128x128: how weights are
// quantised.
//
// Blocks at the last rows and columns may be smaller. Scales, payloads, and
// what becomes of infinities and NaNs are as in block_scaled.h, for blocks of
// two dimensions. The same bits on every processor.

#ifndef JAXFABRIC_MOE_BLOCK_QUANTISE_H_
#define JAXFABRIC_MOE_BLOCK_QUANTISE_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "moe/sum_rows.h"

namespace jaxfabric::moe {

// An array in memory, of any alignment: [..., rows, columns].
struct StridedArray {
  RowType type = RowType::kF32;
  const std::byte* data = nullptr;
  std::span<const int64_t> shape;    // two dimensions or more
  std::span<const int64_t> strides;  // in bytes, of any size and sign
};

// `payload` gets a byte for each element, and `scales` a float32 for each
// block, [..., ceil(rows / 128), ceil(columns / 128)]; both row-major and of
// any alignment. kF64 is rounded to float32 first. Call within a
// ScopedFloatEnvironment.
void QuantiseBlocks(const StridedArray& values, std::byte* payload,
                    std::byte* scales);

// The variants that QuantiseBlocks chooses from; for tests.
void QuantiseBlocksWith(Isa isa, const StridedArray& values, std::byte* payload,
                        std::byte* scales);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_BLOCK_QUANTISE_H_
