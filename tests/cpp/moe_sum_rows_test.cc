#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "moe/sum_rows.h"
#include "tests/cpp/moe_oracle.h"
#include "tests/cpp/moe_row_values.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jaxfabric::moe {
namespace {

constexpr RowType kTypes[] = {RowType::kF32, RowType::kF64, RowType::kBf16,
                              RowType::kF16};
constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

std::vector<Isa> SupportedIsas() {
  std::vector<Isa> isas;
  for (const Isa isa : kIsas) {
    if (IsaSupported(isa)) isas.push_back(isa);
  }
  return isas;
}

// 16-bit patterns of `values` rounded to `type`: weights[i] * 1.0.
std::vector<uint16_t> RoundAll(Isa isa, RowType type,
                               const std::vector<float>& values) {
  const uint16_t one = type == RowType::kBf16 ? 0x3f80 : 0x3c00;
  // Four elements a row, so that whole words are tested and not the rest.
  const std::vector<uint16_t> row(4, one);
  std::vector<uint16_t> rounded;
  for (const float value : values) {
    const auto* data = reinterpret_cast<const std::byte*>(row.data());
    uint16_t out[4] = {};
    SumRowsWith(isa, type, {&data, 1}, &value, sizeof(out),
                reinterpret_cast<std::byte*>(out));
    EXPECT_TRUE(out[0] == out[1] && out[1] == out[2] && out[2] == out[3]);
    rounded.push_back(out[0]);
  }
  return rounded;
}

std::vector<float> HardValues(RowType type, Random& random) {
  std::vector<float> values = {0.0f,
                               -0.0f,
                               65504.0f,
                               65519.996f,
                               65520.0f,
                               65536.0f,
                               -65520.0f,
                               1e-8f,
                               std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity(),
                               std::numeric_limits<float>::max(),
                               std::numeric_limits<float>::min(),
                               std::numeric_limits<float>::denorm_min(),
                               0x1p-24f,
                               0x1p-25f,
                               0x1.000002p-25f,
                               0x1p-14f,
                               0x1.ffep-15f,
                               0x1.fffp-15f};
  // Every number of the type, and the middles between neighbours.
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const double low = Decode(type, bits);
    const double high = Decode(type, bits + 1);
    if (!std::isfinite(high)) break;
    const float middle = static_cast<float>(low + (high - low) / 2);
    values.push_back(middle);
    values.push_back(-middle);
    values.push_back(std::nextafter(middle, 0.0f));
    values.push_back(std::nextafter(middle, 1e30f));
    values.push_back(static_cast<float>(low));
  }
  for (int i = 0; i < 100000; ++i) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (!std::isnan(value)) values.push_back(value);
  }
  return values;
}

TEST(SumRows, RoundsToNearestEven) {
  const ScopedFloatEnvironment environment;
  Random random = Seeded(11);
  for (const RowType type : {RowType::kBf16, RowType::kF16}) {
    const std::vector<float> values = HardValues(type, random);
    for (const Isa isa : SupportedIsas()) {
      const std::vector<uint16_t> got = RoundAll(isa, type, values);
      for (size_t i = 0; i < values.size(); ++i) {
        ASSERT_EQ(got[i], Encode(type, values[i]))
            << std::hexfloat << values[i] << " isa " << static_cast<int>(isa)
            << " type " << static_cast<int>(type);
      }
    }
  }
}

// Through a float32 and back: widening is exact, rounding finds it again.
TEST(SumRows, EveryPatternOf16BitsSurvives) {
  const ScopedFloatEnvironment environment;
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  const auto* row = reinterpret_cast<const std::byte*>(all.data());
  const float one = 1.0f;
  for (const RowType type : {RowType::kBf16, RowType::kF16}) {
    const uint32_t infinity = type == RowType::kBf16 ? 0x7f80 : 0x7c00;
    const uint32_t quiet = type == RowType::kBf16 ? 0x40 : 0x200;
    for (const Isa isa : SupportedIsas()) {
      std::vector<uint16_t> out(all.size());
      SumRowsWith(isa, type, {&row, 1}, &one, out.size() * 2,
                  reinterpret_cast<std::byte*>(out.data()));
      for (uint32_t i = 0; i < all.size(); ++i) {
        const bool is_nan = (i & 0x7fff) > infinity;
        ASSERT_EQ(out[i], is_nan ? i | quiet : i);
      }
    }
  }
}

TEST(SumRows, NansWithAFullMantissaStayNans) {
  const ScopedFloatEnvironment environment;
  const std::vector<float> nans = {std::bit_cast<float>(0x7fffffffu),
                                   std::bit_cast<float>(0xffffffffu),
                                   std::bit_cast<float>(0x7f800001u)};
  for (const Isa isa : SupportedIsas()) {
    for (const RowType type : {RowType::kBf16, RowType::kF16}) {
      for (const uint16_t bits : RoundAll(isa, type, nans)) {
        EXPECT_TRUE(std::isnan(Decode(type, bits)));
      }
    }
  }
}

// Rows of odd length at odd addresses, in memory of exactly their size.
struct RandomRows {
  RandomRows(Random& random, RowType type, int64_t count, int64_t elements,
             size_t shift)
      : row_bytes(elements * ElementBytes(type)) {
    for (int64_t q = 0; q < count; ++q) {
      Bytes& bytes = memory.emplace_back(shift + row_bytes);
      for (int64_t i = 0; i < elements; ++i) {
        StoreValue(type, RandomValue(random),
                   bytes.data() + shift + i * ElementBytes(type));
      }
      rows.push_back(bytes.data() + shift);
      weights.push_back(static_cast<float>(RandomValue(random)));
    }
  }

  int64_t row_bytes;
  std::vector<Bytes> memory;
  std::vector<const std::byte*> rows;
  std::vector<float> weights;
};

TEST(SumRows, SameBitsAsPlainLoopsOnEveryIsa) {
  const ScopedFloatEnvironment environment;
  for (uint64_t seed = 0; seed < 600; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random = Seeded(seed);
    const RowType type = kTypes[seed % 4];
    const int64_t count = Uniform(random, 0, 13);
    const int64_t elements =
        Choose<int64_t>(random, {1, 2, 7, 64, 511, 512, 513, 1500});
    const size_t shift = Uniform(random, 0, 9);
    const RandomRows rows(random, type, count, elements, shift);
    const float* weights =
        Uniform(random, 0, 1) == 0 ? rows.weights.data() : nullptr;
    const Bytes want = PlainSum(type, rows.rows, weights, rows.row_bytes);
    for (const Isa isa : SupportedIsas()) {
      Bytes out(shift + rows.row_bytes, kGarbage);
      SumRowsWith(isa, type, rows.rows, weights, rows.row_bytes,
                  out.data() + shift);
      ASSERT_EQ(std::memcmp(out.data() + shift, want.data(), want.size()), 0)
          << "isa " << static_cast<int>(isa);
    }
  }
}

// (1 + 2^-12)^2 has a 2^-24 that a fused multiply-add would keep.
TEST(SumRows, ProductsAreRoundedBeforeTheyAreAdded) {
  const float a = 1.0f + 0x1p-12f;
  const std::vector<float> first(64, -(1.0f + 0x1p-11f));
  const std::vector<float> second(64, a);
  const std::byte* rows[] = {reinterpret_cast<const std::byte*>(first.data()),
                             reinterpret_cast<const std::byte*>(second.data())};
  const float weights[] = {1.0f, a};
  for (const Isa isa : SupportedIsas()) {
    std::vector<float> out(64, 1.0f);
    SumRowsWith(isa, RowType::kF32, rows, weights, 256,
                reinterpret_cast<std::byte*>(out.data()));
    for (const float value : out) EXPECT_EQ(value, 0.0f);
  }
}

TEST(SumRows, FirstTermStartsTheSum) {
  const float minus_zero = -0.0f;
  const float one = 1.0f;
  const auto* row = reinterpret_cast<const std::byte*>(&minus_zero);
  for (const float* weights : {static_cast<const float*>(nullptr), &one}) {
    float out = 1.0f;
    SumRows(RowType::kF32, {&row, 1}, weights, sizeof(out),
            reinterpret_cast<std::byte*>(&out));
    EXPECT_TRUE(std::signbit(out));
  }
}

#if defined(__x86_64__)
TEST(ScopedFloatEnvironment, KeepsSubnormalsOnAThreadThatFlushes) {
  const unsigned before = _mm_getcsr();
  constexpr unsigned kFlushAndDenormalsAreZero = 0x8040;
  _mm_setcsr(before | kFlushAndDenormalsAreZero);
  const float tiny = 0x1p-130f;
  const float half = 0.5f;
  const auto* row = reinterpret_cast<const std::byte*>(&tiny);
  float out = 0.0f;
  {
    const ScopedFloatEnvironment environment;
    SumRows(RowType::kF32, {&row, 1}, &half, sizeof(out),
            reinterpret_cast<std::byte*>(&out));
  }
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  EXPECT_EQ(std::bit_cast<uint32_t>(out), std::bit_cast<uint32_t>(0x1p-131f));
  EXPECT_EQ(after & kFlushAndDenormalsAreZero, kFlushAndDenormalsAreZero);
}
#endif

}  // namespace
}  // namespace jaxfabric::moe
