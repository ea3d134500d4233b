#include "moe/block_scaled.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "moe/block_kernel.h"
#include "moe/unpack.h"

namespace jaxfabric::moe {
namespace {

template <typename Format>
JF_KERNEL void ScaleFormat(const ScaledRows& rows, const std::byte* row,
                           std::byte* scaled) {
  constexpr int64_t kBytes = sizeof(typename Format::Element);
  auto* payload = reinterpret_cast<uint8_t*>(scaled);
  std::byte* scale_out = scaled + rows.scales_offset();
  std::fill(payload + rows.hidden, payload + rows.scales_offset(), uint8_t{0});
  for (int64_t begin = 0; begin < rows.hidden; begin += kScaleBlock) {
    const int64_t left = rows.hidden - begin;
    // A constant count is what vectorises best.
    const float scale =
        left >= kScaleBlock
            ? ScaleBlock<Format>({.columns = kScaleBlock}, row + begin * kBytes,
                                 payload + begin)
            : ScaleBlock<Format>({.columns = left}, row + begin * kBytes,
                                 payload + begin);
    std::memcpy(scale_out, &scale, sizeof(scale));
    scale_out += sizeof(scale);
  }
}

template <typename Format>
JF_KERNEL void UnscaleFormat(const ScaledRows& rows, const std::byte* scaled,
                             std::byte* row) {
  using Element = Unaligned<typename Format::Element>;
  const auto* payload = reinterpret_cast<const uint8_t*>(scaled);
  const std::byte* scale_in = scaled + rows.scales_offset();
  auto* out = reinterpret_cast<Element*>(row);
  for (int64_t begin = 0; begin < rows.hidden; begin += kScaleBlock) {
    const int64_t end = std::min(begin + kScaleBlock, rows.hidden);
    float scale;
    std::memcpy(&scale, scale_in, sizeof(scale));
    scale_in += sizeof(scale);
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      out[i].element = Format::Round(WidenE4m3(payload[i]) * scale);
    }
  }
}

JF_KERNEL void ScaleType(const ScaledRows& rows, const std::byte* row,
                         std::byte* scaled) {
  switch (rows.type) {
    case RowType::kF32:
      return ScaleFormat<F32>(rows, row, scaled);
    case RowType::kBf16:
      return ScaleFormat<Bf16>(rows, row, scaled);
    case RowType::kF16:
      return ScaleFormat<F16>(rows, row, scaled);
    case RowType::kF64:
      JF_CHECK(false);
  }
}

JF_KERNEL void UnscaleType(const ScaledRows& rows, const std::byte* scaled,
                           std::byte* row) {
  switch (rows.type) {
    case RowType::kF32:
      return UnscaleFormat<F32>(rows, scaled, row);
    case RowType::kBf16:
      return UnscaleFormat<Bf16>(rows, scaled, row);
    case RowType::kF16:
      return UnscaleFormat<F16>(rows, scaled, row);
    case RowType::kF64:
      JF_CHECK(false);
  }
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] void ScaleAvx2(const ScaledRows& rows,
                                       const std::byte* row,
                                       std::byte* scaled) {
  ScaleType(rows, row, scaled);
}

[[gnu::target("avx2")]] void UnscaleAvx2(const ScaledRows& rows,
                                         const std::byte* scaled,
                                         std::byte* row) {
  UnscaleType(rows, scaled, row);
}

[[gnu::target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")]] void
ScaleAvx512(const ScaledRows& rows, const std::byte* row, std::byte* scaled) {
  ScaleType(rows, row, scaled);
}

[[gnu::target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")]] void
UnscaleAvx512(const ScaledRows& rows, const std::byte* scaled, std::byte* row) {
  UnscaleType(rows, scaled, row);
}
#endif

// Calls put(m, row) for each output row that unique row m of `range` has.
template <typename Put>
void ForEachOutputRow(const Layout& layout, const ReceivePlan& plan,
                      int32_t source, RowRange range, Put put) {
  const int64_t first = plan.source_begin[source];
  if (!layout.expand) {
    for (int64_t m = range.begin; m < range.end; ++m) put(m, first + m);
    return;
  }
  const int64_t slots = layout.slots();
  for (int64_t m = range.begin; m < range.end; ++m) {
    for (const int32_t row :
         plan.slot_row.subspan((first + m) * slots, slots)) {
      if (row >= 0) put(m, row);
    }
  }
}

// The layout of one of the outputs, which differ from what travels.
Layout WithRowBytes(Layout layout, int64_t row_bytes) {
  layout.row_bytes = row_bytes;
  return layout;
}

}  // namespace

void ScaleRowWith([[maybe_unused]] Isa isa, const ScaledRows& rows,
                  const std::byte* row, std::byte* scaled) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return ScaleAvx512(rows, row, scaled);
  if (isa == Isa::kAvx2) return ScaleAvx2(rows, row, scaled);
#endif
  ScaleType(rows, row, scaled);
}

void UnscaleRowWith([[maybe_unused]] Isa isa, const ScaledRows& rows,
                    const std::byte* scaled, std::byte* row) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return UnscaleAvx512(rows, scaled, row);
  if (isa == Isa::kAvx2) return UnscaleAvx2(rows, scaled, row);
#endif
  UnscaleType(rows, scaled, row);
}

void ScaleRow(const ScaledRows& rows, const std::byte* row, std::byte* scaled) {
  static const Isa fastest = FastestIsa();
  ScaleRowWith(fastest, rows, row, scaled);
}

void UnscaleRow(const ScaledRows& rows, const std::byte* scaled,
                std::byte* row) {
  static const Isa fastest = FastestIsa();
  UnscaleRowWith(fastest, rows, scaled, row);
}

void ScaleRows(const ScaledRows& rows, std::span<const int32_t> tokens,
               int32_t token_count, const std::byte* x, std::byte* scaled) {
  const int64_t x_bytes = rows.hidden * ElementBytes(rows.type);
  std::vector<bool> done(token_count);
  for (const int64_t token : tokens) {
    if (done[token]) continue;
    done[token] = true;
    ScaleRow(rows, x + token * x_bytes, scaled + token * rows.row_bytes());
  }
}

void UnpackScaledRows(const Layout& layout, const ReceivePlan& plan,
                      int32_t source, const ScaledRows& rows,
                      const RowSource& from, RowRange range,
                      const UnscaledOutput& out) {
  JF_CHECK(0 <= range.begin && range.begin <= range.end &&
           range.end <= plan.RowCount(source));
  JF_CHECK(from.row_bytes == rows.row_bytes());
  if (out.scales != nullptr) {
    ForEachOutputRow(layout, plan, source, range, [&](int64_t m, int64_t row) {
      const std::byte* scaled = from.Row(m);
      std::memcpy(out.rows + row * rows.hidden, scaled, rows.hidden);
      std::memcpy(out.scales + row * rows.scale_bytes(),
                  scaled + rows.scales_offset(), rows.scale_bytes());
    });
    return;
  }
  const int64_t bytes = rows.hidden * ElementBytes(rows.type);
  int64_t last = -1;
  const std::byte* unscaled = nullptr;
  ForEachOutputRow(layout, plan, source, range, [&](int64_t m, int64_t row) {
    std::byte* to = out.rows + row * bytes;
    if (m == last) {  // the arithmetic once, copies after that
      std::memcpy(to, unscaled, bytes);
      return;
    }
    UnscaleRow(rows, from.Row(m), to);
    last = m;
    unscaled = to;
  });
}

void ZeroUnwrittenScaledRows(const Layout& layout, const ReceivePlan& plan,
                             const ScaledRows& rows,
                             const UnscaledOutput& out) {
  if (out.scales == nullptr) {
    const int64_t bytes = rows.hidden * ElementBytes(rows.type);
    return ZeroUnwrittenRows(WithRowBytes(layout, bytes), plan, out.rows);
  }
  ZeroUnwrittenRows(WithRowBytes(layout, rows.hidden), plan, out.rows);
  ZeroUnwrittenRows(WithRowBytes(layout, rows.scale_bytes()), plan, out.scales);
}

}  // namespace jaxfabric::moe
