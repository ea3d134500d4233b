// Row elements by the definition of their formats, in double arithmetic and
// without bit tricks: what the fast conversions are held against.

#ifndef JAXFABRIC_TESTS_CPP_MOE_ROW_VALUES_H_
#define JAXFABRIC_TESTS_CPP_MOE_ROW_VALUES_H_

#include <cmath>
#include <cstring>
#include <limits>
#include <span>

#include "moe/sum_rows.h"
#include "tests/cpp/moe_oracle.h"

namespace jaxfabric::moe {

struct Binary16 {
  int mantissa_bits;
  int exponent_max;  // of the largest finite numbers; 1 - it of the smallest
};

inline Binary16 FormatOf(RowType type) {
  return type == RowType::kBf16 ? Binary16{7, 127} : Binary16{10, 15};
}

// The value of a bf16 or f16 pattern.
inline double Decode(RowType type, uint32_t bits) {
  const auto [mantissa_bits, exponent_max] = FormatOf(type);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  if (exponent == 2 * exponent_max + 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) {
    return sign * std::ldexp(mantissa, 1 - exponent_max - mantissa_bits);
  }
  return sign * std::ldexp(mantissa + (1 << mantissa_bits),
                           exponent - exponent_max - mantissa_bits);
}

// The nearest bf16 or f16 pattern, even if two are; `value` is not a NaN.
inline uint16_t Encode(RowType type, double value) {
  const auto [mantissa_bits, exponent_max] = FormatOf(type);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = (2 * exponent_max + 1) << mantissa_bits;
  const double size = std::fabs(value);
  if (size == 0) return sign;
  if (std::isinf(size)) return sign | infinity;
  const int exponent = std::max(std::ilogb(size), 1 - exponent_max);
  // std::nearbyint rounds halves to even.
  const auto places = static_cast<int64_t>(
      std::nearbyint(std::ldexp(size, mantissa_bits - exponent)));
  // 2^mantissa_bits places are the implied one: it counts up the exponent.
  const int64_t bits =
      places + (int64_t{exponent + exponent_max - 1} << mantissa_bits);
  return sign | static_cast<uint16_t>(std::min<int64_t>(bits, infinity));
}

inline double LoadValue(RowType type, const std::byte* from) {
  if (type == RowType::kF64) {
    double value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  if (type == RowType::kF32) {
    float value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  return Decode(type, bits);
}

inline void StoreValue(RowType type, double value, std::byte* to) {
  if (type == RowType::kF64) {
    std::memcpy(to, &value, sizeof(value));
    return;
  }
  if (type == RowType::kF32) {
    const auto narrow = static_cast<float>(value);
    std::memcpy(to, &narrow, sizeof(narrow));
    return;
  }
  const uint16_t bits = Encode(type, value);
  std::memcpy(to, &bits, sizeof(bits));
}

// Mostly of ordinary size; now and then subnormal or large in f16.
inline double RandomValue(Random& random) {
  const double mantissa = Uniform(random, -(1 << 24), 1 << 24);
  const int64_t rare = Uniform(random, 0, 15);
  return std::ldexp(mantissa, rare == 0 ? -42 : rare == 1 ? -9 : -24);
}

template <typename Sum>
double PlainSumOfElement(RowType type, std::span<const std::byte* const> rows,
                         const float* weights, int64_t offset) {
  Sum sum = 0;
  for (size_t q = 0; q < rows.size(); ++q) {
    const Sum value = static_cast<Sum>(LoadValue(type, rows[q] + offset));
    const Sum term =
        weights == nullptr ? value : static_cast<Sum>(weights[q]) * value;
    sum = q == 0 ? term : sum + term;
  }
  return sum;
}

// What SumRows must give, of finite values.
inline Bytes PlainSum(RowType type, std::span<const std::byte* const> rows,
                      const float* weights, int64_t row_bytes) {
  Bytes out(row_bytes);
  for (int64_t at = 0; at < row_bytes; at += ElementBytes(type)) {
    const double sum = type == RowType::kF64
                           ? PlainSumOfElement<double>(type, rows, weights, at)
                           : PlainSumOfElement<float>(type, rows, weights, at);
    StoreValue(type, sum, out.data() + at);
  }
  return out;
}

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_TESTS_CPP_MOE_ROW_VALUES_H_
