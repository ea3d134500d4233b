// The float formats of rows, one element at a time: to float32 and back.
//
// Everything is inlined into loops that the compiler vectorises, once for each
// instruction set, so nothing here branches. Back means rounding to nearest,
// ties to even. Widening keeps every value; a NaN stays a NaN.
//
// Call within a ScopedFloatEnvironment (sum_rows.h): subnormal numbers count.

#ifndef JAXFABRIC_MOE_FLOAT_FORMATS_H_
#define JAXFABRIC_MOE_FLOAT_FORMATS_H_

#include <bit>
#include <cstdint>

#if defined(__FAST_MATH__)
#error "the order and rounding of the additions are part of the contract"
#endif

// Inlined into one function per instruction set, and compiled for it there.
#define JF_KERNEL [[gnu::always_inline]] inline

namespace jaxfabric::moe {

// Without a branch, which would keep the compiler from vectorising.
JF_KERNEL uint32_t Select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

inline constexpr uint32_t kFloatInfinity = 0x7f800000;

// The bfloat16 nearest to `value`, in the upper half; what is in the lower half
// is of no meaning.
JF_KERNEL uint32_t RoundToUpperHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  // Half of the last place, less one if the last place is even already.
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  // Rounding could carry a NaN into infinity.
  return Select(value != value, bits | 0x400000, rounded);
}

// IEEE binary16: 5 exponent bits, bias 15; 10 mantissa bits. Exponent biases
// differ by 127 - 15; mantissas by 13 bits.
inline constexpr uint32_t kHalfRebias = 112u << 23;
inline constexpr uint32_t kHalfSmallestNormal = 113u << 23;  // 2^-14

JF_KERNEL float WidenHalf(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16;
  const uint32_t magnitude = (half & 0x7fff) << 13;
  const bool special = magnitude >= (31u << 23);  // infinity or NaN
  const uint32_t normal =
      magnitude + Select(special, 2 * kHalfRebias, kHalfRebias);
  // A subnormal's mantissa below an exponent of 2^-14, less that 2^-14.
  const float subnormal =
      std::bit_cast<float>(magnitude + kHalfSmallestNormal) -
      std::bit_cast<float>(kHalfSmallestNormal);
  const uint32_t bits = Select(magnitude < (1u << 23),
                               std::bit_cast<uint32_t>(subnormal), normal);
  return std::bit_cast<float>(bits | sign);
}

JF_KERNEL uint32_t RoundToHalf(float value) {
  const uint32_t all = std::bit_cast<uint32_t>(value);
  const uint32_t sign = all & 0x80000000;
  const uint32_t bits = all ^ sign;
  const uint32_t normal =
      (bits - kHalfRebias + 0xfff + ((bits >> 13) & 1)) >> 13;
  // The last place of numbers near 0.5 is 2^-24, as that of subnormals here:
  // the addition rounds.
  const float shifted = std::bit_cast<float>(bits) + 0.5f;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
  const uint32_t nan = 0x7e00 | (bits >> 13 & 0x3ff);
  uint32_t half = Select(bits < kHalfSmallestNormal, subnormal, normal);
  // 65520, half a place above the largest number, and more.
  half = Select(bits >= 0x477ff000, 0x7c00, half);
  half = Select(bits > kFloatInfinity, nan, half);
  return half | sign >> 16;
}

// e4m3fn: 4 exponent bits, bias 7; 3 mantissa bits; no infinity, and one NaN,
// 0x7f. Exponent biases differ by 127 - 7; mantissas by 20 bits.
inline constexpr uint32_t kE4m3Rebias = 120u << 23;
inline constexpr uint32_t kE4m3SmallestNormal = 121u << 23;  // 2^-6
inline constexpr uint8_t kE4m3Nan = 0x7f;
inline constexpr float kE4m3Largest = 448.0f;

JF_KERNEL float WidenE4m3(uint32_t code) {
  const uint32_t sign = (code & 0x80) << 24;
  const uint32_t magnitude = (code & 0x7f) << 20;
  const uint32_t normal = magnitude + kE4m3Rebias;
  const float subnormal =
      std::bit_cast<float>(magnitude + kE4m3SmallestNormal) -
      std::bit_cast<float>(kE4m3SmallestNormal);
  uint32_t bits = Select(magnitude < (1u << 23),
                         std::bit_cast<uint32_t>(subnormal), normal);
  bits = Select((code & 0x7f) == kE4m3Nan, 0x7fc00000, bits);
  return std::bit_cast<float>(bits | sign);
}

// For magnitudes below 464, which is half a place above the largest number.
JF_KERNEL uint32_t RoundToE4m3(float value) {
  const uint32_t all = std::bit_cast<uint32_t>(value);
  const uint32_t sign = all & 0x80000000;
  const uint32_t bits = all ^ sign;
  const uint32_t normal =
      (bits - kE4m3Rebias + 0x7ffff + ((bits >> 20) & 1)) >> 20;
  // The last place of numbers from 2^14 on is 2^-9, as that of subnormals here.
  const float shifted = std::bit_cast<float>(bits) + 16384.0f;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(16384.0f);
  return Select(bits < kE4m3SmallestNormal, subnormal, normal) | sign >> 24;
}

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_FLOAT_FORMATS_H_
