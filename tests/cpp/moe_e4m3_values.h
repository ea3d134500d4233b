// e4m3fn by the definition of the format, in double arithmetic.

#ifndef JAXFABRIC_TESTS_CPP_MOE_E4M3_VALUES_H_
#define JAXFABRIC_TESTS_CPP_MOE_E4M3_VALUES_H_

#include <cmath>
#include <cstdint>
#include <limits>

namespace jaxfabric::moe {

inline double E4m3ValueOf(uint32_t code) {
  const double sign = code & 0x80 ? -1.0 : 1.0;
  const int exponent = static_cast<int>(code & 0x7f) >> 3;
  const int mantissa = static_cast<int>(code & 7);
  if ((code & 0x7f) == 0x7f) return std::numeric_limits<double>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(mantissa, -9);
  return sign * std::ldexp(mantissa + 8, exponent - 10);
}

// The code nearest to `value`, even if two are.
inline uint8_t E4m3CodeOf(float value) {
  // The last code that is not above it: codes order as their values do.
  uint8_t low = 0;
  for (uint8_t bit = 0x40; bit != 0; bit >>= 1) {
    const uint8_t code = low | bit;
    if (code < 0x7f && E4m3ValueOf(code) <= std::fabs(value)) low = code;
  }
  uint8_t best = low;
  if (low < 0x7e) {
    const uint8_t high = low + 1;
    const double below = std::fabs(value) - E4m3ValueOf(low);
    const double above = E4m3ValueOf(high) - std::fabs(value);
    if (above < below || (above == below && high % 2 == 0)) best = high;
  }
  return best | (std::signbit(value) ? 0x80 : 0);
}

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_TESTS_CPP_MOE_E4M3_VALUES_H_
