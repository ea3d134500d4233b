// One block as e4m3 with a scale, the arithmetic of block_scaled.h. A block is
// a part of a row, or of several rows.
//
// Inlined into one function for each instruction set; call within a
// ScopedFloatEnvironment.

#ifndef JAXFABRIC_MOE_BLOCK_KERNEL_H_
#define JAXFABRIC_MOE_BLOCK_KERNEL_H_

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/cache_line.h"
#include "moe/float_formats.h"

namespace jaxfabric::moe {

// Formats: elements as they lie in memory. Magnitudes order as their bits do,
// with infinity and then NaNs above all others, and Widen keeps that order.
struct F32 {
  using Element = uint32_t;
  JF_KERNEL static float Widen(Element element) {
    return std::bit_cast<float>(element);
  }
  JF_KERNEL static Element Round(float value) {
    return std::bit_cast<uint32_t>(value);
  }
};

struct Bf16 {
  using Element = uint16_t;
  JF_KERNEL static float Widen(Element element) {
    return std::bit_cast<float>(uint32_t{element} << 16);
  }
  JF_KERNEL static Element Round(float value) {
    return static_cast<Element>(RoundToUpperHalf(value) >> 16);
  }
};

struct F16 {
  using Element = uint16_t;
  JF_KERNEL static float Widen(Element element) { return WidenHalf(element); }
  JF_KERNEL static Element Round(float value) {
    return static_cast<Element>(RoundToHalf(value));
  }
};

// Rounded to float32 before anything else.
struct F64 {
  using Element = uint64_t;
  JF_KERNEL static float Widen(Element element) {
    return static_cast<float>(std::bit_cast<double>(element));
  }
};

// Rows may begin anywhere.
template <typename Element>
struct [[gnu::packed, gnu::may_alias]] Unaligned {
  Element element;
};

inline constexpr float kAmaxMin = 0x1p-100f;

struct BlockShape {
  int64_t rows = 1;
  int64_t columns = 0;
  int64_t in_stride = 0;       // bytes from one row to the next
  int64_t payload_stride = 0;  // the same
  // Whether the block to the right is next. Of its rows only a few cache lines
  // lie together, too few for the processor to fetch them ahead by itself.
  bool fetch_right = false;
};

// Writes the payload, and returns the scale.
template <typename Format>
JF_KERNEL float ScaleBlock(const BlockShape& shape, const std::byte* in,
                           uint8_t* payload) {
  using Element = typename Format::Element;
  constexpr auto kMagnitude =
      static_cast<Element>(std::numeric_limits<Element>::max() >> 1);
  Element largest = 0;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const auto* from =
        reinterpret_cast<const Unaligned<Element>*>(in + row * shape.in_stride);
    if (shape.fetch_right) {
      constexpr int64_t kLine = kCacheLineBytes / sizeof(Element);
      for (int64_t i = 0; i < shape.columns; i += kLine) {
        __builtin_prefetch(from + shape.columns + i);
      }
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < shape.columns; ++i) {
      largest =
          std::max(largest, static_cast<Element>(from[i].element & kMagnitude));
    }
  }
  const float widest = Format::Widen(largest);
  if (std::bit_cast<uint32_t>(widest) >= kFloatInfinity) {
    for (int64_t row = 0; row < shape.rows; ++row) {
      std::memset(payload + row * shape.payload_stride, kE4m3Nan,
                  shape.columns);
    }
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float amax = std::max(widest, kAmaxMin);
  const float reciprocal = kE4m3Largest / amax;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const auto* from =
        reinterpret_cast<const Unaligned<Element>*>(in + row * shape.in_stride);
    uint8_t* to = payload + row * shape.payload_stride;
#pragma GCC ivdep
    for (int64_t i = 0; i < shape.columns; ++i) {
      to[i] = static_cast<uint8_t>(
          RoundToE4m3(Format::Widen(from[i].element) * reciprocal));
    }
  }
  return amax * (1 / kE4m3Largest);
}

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_BLOCK_KERNEL_H_
