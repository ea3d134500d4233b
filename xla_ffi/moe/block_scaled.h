// Rows as e4m3 with block scales: how dispatch sends them if it is asked to.
//
// A scaled row is its payload, one byte for each element, filled up to a
// multiple of 4, and then a float32 scale for each block of 128 elements; the
// last block may be shorter. With amax the block's largest magnitude, or 2^-100
// if that is larger, and every operation rounded to the nearest float32:
//
//   scale   = amax * (1/448)
//   payload = e4m3(element * (448 / amax)), ties to even, never above 448
//
// A block with an infinity or a NaN has the scale NaN and 0x7f throughout. The
// way back is float(payload) * scale, rounded to the row's type. The same bits
// on every processor, and as jaxfabric/moe/_wire.py (payloads of NaNs aside).

#ifndef JAXFABRIC_MOE_BLOCK_SCALED_H_
#define JAXFABRIC_MOE_BLOCK_SCALED_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "moe/layout.h"
#include "moe/message.h"
#include "moe/receive_plan.h"
#include "moe/sum_rows.h"

namespace jaxfabric::moe {

inline constexpr int64_t kScaleBlock = 128;

// Rows of `hidden` elements of `type`, which is not kF64, and their scaled
// form.
struct ScaledRows {
  RowType type = RowType::kF32;
  int64_t hidden = 0;

  int64_t blocks() const { return (hidden + kScaleBlock - 1) / kScaleBlock; }
  int64_t scales_offset() const { return (hidden + 3) / 4 * 4; }
  int64_t scale_bytes() const {
    return blocks() * static_cast<int64_t>(sizeof(float));
  }
  // Of a scaled row.
  int64_t row_bytes() const { return scales_offset() + scale_bytes(); }
};

// Both take one row, of any alignment, within a ScopedFloatEnvironment.
void ScaleRow(const ScaledRows& rows, const std::byte* row, std::byte* scaled);
void UnscaleRow(const ScaledRows& rows, const std::byte* scaled,
                std::byte* row);

// Scales rows `tokens` of x, each once however often it is listed: row t comes
// to `scaled` + t * rows.row_bytes(); the others are left alone.
void ScaleRows(const ScaledRows& rows, std::span<const int32_t> tokens,
               int32_t token_count, const std::byte* x, std::byte* scaled);

// Where received rows go: as rows of `type`, or as they are.
struct UnscaledOutput {
  std::byte* rows = nullptr;
  std::byte* scales = nullptr;  // null: rows are unscaled
};

// As UnpackRows and ZeroUnwrittenRows, for a layout whose row_bytes are
// rows.row_bytes().
void UnpackScaledRows(const Layout& layout, const ReceivePlan& plan,
                      int32_t source, const ScaledRows& rows,
                      const RowSource& from, RowRange range,
                      const UnscaledOutput& out);
void ZeroUnwrittenScaledRows(const Layout& layout, const ReceivePlan& plan,
                             const ScaledRows& rows, const UnscaledOutput& out);

// The variants that ScaleRow and UnscaleRow choose from; for tests.
void ScaleRowWith(Isa isa, const ScaledRows& rows, const std::byte* row,
                  std::byte* scaled);
void UnscaleRowWith(Isa isa, const ScaledRows& rows, const std::byte* scaled,
                    std::byte* row);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_BLOCK_SCALED_H_
