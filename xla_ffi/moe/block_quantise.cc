#include "moe/block_quantise.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/check.h"
#include "moe/block_kernel.h"
#include "moe/block_scaled.h"

namespace jaxfabric::moe {
namespace {

struct Matrix {
  RowType type;
  const std::byte* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

// A block whose rows are not contiguous, in the order that suits its memory.
template <typename Element>
JF_KERNEL void Gather(const Matrix& values, const std::byte* block,
                      int64_t rows, int64_t columns, Element* out) {
  const auto copy = [&](int64_t row, int64_t column) {
    std::memcpy(&out[row * kScaleBlock + column],
                block + row * values.row_stride + column * values.column_stride,
                sizeof(Element));
  };
  if (std::abs(values.row_stride) >= std::abs(values.column_stride)) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) copy(row, column);
    }
    return;
  }
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) copy(row, column);
  }
}

template <typename Format>
JF_KERNEL void QuantiseFormat(const Matrix& values, uint8_t* payload,
                              std::byte* scale_out) {
  using Element = typename Format::Element;
  Element gathered[kScaleBlock * kScaleBlock];
  for (int64_t row = 0; row < values.rows; row += kScaleBlock) {
    for (int64_t column = 0; column < values.columns; column += kScaleBlock) {
      const std::byte* in =
          values.data + row * values.row_stride + column * values.column_stride;
      BlockShape shape = {std::min(values.rows - row, kScaleBlock),
                          std::min(values.columns - column, kScaleBlock),
                          values.row_stride, values.columns,
                          values.columns - column > kScaleBlock};
      if (values.column_stride != sizeof(Element)) {
        Gather(values, in, shape.rows, shape.columns, gathered);
        in = reinterpret_cast<const std::byte*>(gathered);
        shape.in_stride = kScaleBlock * sizeof(Element);
        shape.fetch_right = false;
      }
      uint8_t* out = payload + row * values.columns + column;
      float scale;
      if (shape.columns == kScaleBlock) {
        // A constant count is what vectorises best.
        shape.columns = kScaleBlock;
        scale = ScaleBlock<Format>(shape, in, out);
      } else {
        scale = ScaleBlock<Format>(shape, in, out);
      }
      std::memcpy(scale_out, &scale, sizeof(scale));
      scale_out += sizeof(scale);
    }
  }
}

JF_KERNEL void QuantiseType(const Matrix& values, uint8_t* payload,
                            std::byte* scales) {
  switch (values.type) {
    case RowType::kF32:
      return QuantiseFormat<F32>(values, payload, scales);
    case RowType::kF64:
      return QuantiseFormat<F64>(values, payload, scales);
    case RowType::kBf16:
      return QuantiseFormat<Bf16>(values, payload, scales);
    case RowType::kF16:
      return QuantiseFormat<F16>(values, payload, scales);
  }
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] void QuantiseAvx2(const Matrix& values,
                                          uint8_t* payload, std::byte* scales) {
  QuantiseType(values, payload, scales);
}

[[gnu::target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")]] void
QuantiseAvx512(const Matrix& values, uint8_t* payload, std::byte* scales) {
  QuantiseType(values, payload, scales);
}
#endif

void QuantiseMatrix([[maybe_unused]] Isa isa, const Matrix& values,
                    std::byte* payload, std::byte* scales) {
  auto* const out = reinterpret_cast<uint8_t*>(payload);
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return QuantiseAvx512(values, out, scales);
  if (isa == Isa::kAvx2) return QuantiseAvx2(values, out, scales);
#endif
  QuantiseType(values, out, scales);
}

int64_t Blocks(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

}  // namespace

void QuantiseBlocksWith(Isa isa, const StridedArray& values, std::byte* payload,
                        std::byte* scales) {
  const size_t dimensions = values.shape.size();
  JF_CHECK(dimensions >= 2 && values.strides.size() == dimensions);
  const int64_t first = values.shape[0];
  if (dimensions == 2) {
    const int64_t columns = values.shape[1];
    return QuantiseMatrix(isa,
                          {values.type, values.data, first, columns,
                           values.strides[0], values.strides[1]},
                          payload, scales);
  }
  StridedArray inner = {values.type, values.data, values.shape.subspan(1),
                        values.strides.subspan(1)};
  int64_t payload_bytes = 1;
  int64_t scale_bytes = sizeof(float);
  for (size_t axis = 1; axis < dimensions; ++axis) {
    const int64_t size = values.shape[axis];
    payload_bytes *= size;
    scale_bytes *= axis < dimensions - 2 ? size : Blocks(size);
  }
  for (int64_t i = 0; i < first; ++i) {
    inner.data = values.data + i * values.strides[0];
    QuantiseBlocksWith(isa, inner, payload + i * payload_bytes,
                       scales + i * scale_bytes);
  }
}

void QuantiseBlocks(const StridedArray& values, std::byte* payload,
                    std::byte* scales) {
  static const Isa fastest = FastestIsa();
  QuantiseBlocksWith(fastest, values, payload, scales);
}

}  // namespace jaxfabric::moe
