// Quantised matrices against arithmetic in double, element by element.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "moe/block_quantise.h"
#include "moe/block_scaled.h"
#include "tests/cpp/moe_e4m3_values.h"
#include "tests/cpp/moe_oracle.h"
#include "tests/cpp/moe_row_values.h"

namespace jaxfabric::moe {
namespace {

constexpr RowType kTypes[] = {RowType::kF32, RowType::kF64, RowType::kBf16,
                              RowType::kF16};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

void Store(RowType type, double value, std::byte* at) {
  if (type == RowType::kF64) {
    std::memcpy(at, &value, sizeof(value));
  } else if (type == RowType::kF32) {
    const auto rounded = static_cast<float>(value);
    std::memcpy(at, &rounded, sizeof(rounded));
  } else if (std::isnan(value)) {
    const uint16_t bits = 0xffff;
    std::memcpy(at, &bits, sizeof(bits));
  } else {
    const uint16_t bits = Encode(type, value);
    std::memcpy(at, &bits, sizeof(bits));
  }
}

// As float32, which is what is quantised.
float Load(RowType type, const std::byte* at) {
  if (type == RowType::kF64) {
    double value;
    std::memcpy(&value, at, sizeof(value));
    return static_cast<float>(value);
  }
  uint32_t bits = 0;
  std::memcpy(&bits, at, ElementBytes(type));
  return type == RowType::kF32 ? std::bit_cast<float>(bits)
                               : static_cast<float>(Decode(type, bits));
}

// [stack, rows, columns] somewhere in memory, in the order of `axes` (the last
// one innermost), with gaps, and backwards along `reversed`.
class Scattered {
 public:
  Scattered(Random& random, RowType type, std::vector<int64_t> shape)
      : type_(type), shape_(std::move(shape)), strides_(shape_.size()) {
    std::vector<size_t> axes(shape_.size());
    for (size_t i = 0; i < axes.size(); ++i) axes[i] = i;
    if (Uniform(random, 0, 1) == 1) std::ranges::shuffle(axes, random);
    int64_t bytes = ElementBytes(type) + Uniform(random, 0, 2) / 2;
    for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
      strides_[*axis] = bytes;
      bytes = bytes * shape_[*axis] + Uniform(random, 0, 3);
    }
    begin_ = Uniform(random, 0, 3);
    memory_.resize(begin_ + bytes, kGarbage);
    for (size_t axis = 0; axis < axes.size(); ++axis) {
      if (shape_[axis] == 0 || Uniform(random, 0, 3) != 0) continue;
      begin_ += (shape_[axis] - 1) * strides_[axis];
      strides_[axis] = -strides_[axis];
    }
  }

  StridedArray array() const {
    return {type_, memory_.data() + begin_, shape_, strides_};
  }
  std::byte* At(int64_t matrix, int64_t row, int64_t column) {
    return memory_.data() + begin_ + matrix * strides_[0] + row * strides_[1] +
           column * strides_[2];
  }
  int64_t size(size_t axis) const { return shape_[axis]; }

 private:
  RowType type_;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  Bytes memory_;
  int64_t begin_;
};

int64_t Blocks(int64_t size) { return (size + 127) / 128; }

struct Quantised {
  Bytes payload;
  Bytes scales;
};

void WantBlock(RowType type, Scattered& values, int64_t matrix, int64_t row,
               int64_t column, Quantised& want) {
  const int64_t row_end = std::min(row + 128, values.size(1));
  const int64_t column_end = std::min(column + 128, values.size(2));
  float amax = 0x1p-100f;
  bool finite = true;
  const auto each = [&](auto visit) {
    for (int64_t r = row; r < row_end; ++r) {
      for (int64_t c = column; c < column_end; ++c) {
        visit(Load(type, values.At(matrix, r, c)),
              (matrix * values.size(1) + r) * values.size(2) + c);
      }
    }
  };
  each([&](float value, int64_t) {
    finite = finite && std::isfinite(value);
    amax = std::max(amax, std::fabs(value));
  });
  each([&](float value, int64_t at) {
    const float scaled = value * (448.0f / amax);
    want.payload[at] = std::byte(finite ? E4m3CodeOf(scaled) : uint8_t{0x7f});
  });
  const float scale = finite ? amax * std::bit_cast<float>(0x3b124925)
                             : static_cast<float>(kNan);
  const int64_t block =
      (matrix * Blocks(values.size(1)) + row / 128) * Blocks(values.size(2)) +
      column / 128;
  std::memcpy(want.scales.data() + block * 4, &scale, 4);
}

Quantised Want(RowType type, Scattered& values) {
  const int64_t blocks =
      values.size(0) * Blocks(values.size(1)) * Blocks(values.size(2));
  Quantised want = {Bytes(values.size(0) * values.size(1) * values.size(2)),
                    Bytes(blocks * 4)};
  for (int64_t matrix = 0; matrix < values.size(0); ++matrix) {
    for (int64_t row = 0; row < values.size(1); row += 128) {
      for (int64_t column = 0; column < values.size(2); column += 128) {
        WantBlock(type, values, matrix, row, column, want);
      }
    }
  }
  return want;
}

void ExpectQuantised(const StridedArray& values, const Quantised& want) {
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (!IsaSupported(isa)) continue;
    // No alignment is assumed, and what stands behind stays.
    Bytes payload(want.payload.size() + 2, kGarbage);
    Bytes scales(want.scales.size() + 2, kGarbage);
    QuantiseBlocksWith(isa, values, payload.data() + 1, scales.data() + 1);
    EXPECT_TRUE(std::equal(want.payload.begin(), want.payload.end(),
                           payload.begin() + 1))
        << "isa " << static_cast<int>(isa);
    EXPECT_TRUE(
        std::equal(want.scales.begin(), want.scales.end(), scales.begin() + 1))
        << "isa " << static_cast<int>(isa);
    for (const Bytes& bytes : {payload, scales}) {
      EXPECT_EQ(bytes.front(), kGarbage);
      EXPECT_EQ(bytes.back(), kGarbage);
    }
  }
}

// Sizes over the type's range, zeros, subnormals, and what is not finite.
double RandomValue(Random& random, RowType type, int64_t exponent) {
  static std::normal_distribution<double> normal;
  switch (Uniform(random, 0, 20000)) {
    case 0:
      return kInfinity;
    case 1:
      return -kNan;
    case 2:
      return type == RowType::kF64 ? 1e300 : 1;  // no float32
    default:
      break;
  }
  if (Uniform(random, 0, 20) == 0) return Uniform(random, 0, 1) ? 0.0 : -0.0;
  return std::ldexp(normal(random), static_cast<int>(exponent));
}

TEST(BlockQuantise, QuantisesAsWritten) {
  const ScopedFloatEnvironment environment;
  constexpr int64_t kSizes[] = {1, 2, 63, 127, 128, 129, 200, 256, 300};
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random = Seeded(seed);
    const RowType type = kTypes[seed % 4];
    Scattered values(random, type,
                     {Uniform(random, 0, 2), kSizes[Uniform(random, 0, 8)],
                      kSizes[Uniform(random, 0, 8)]});
    const bool narrow = type == RowType::kF16;
    for (int64_t m = 0; m < values.size(0); ++m) {
      const int64_t exponent =
          narrow ? Uniform(random, -24, 12) : Uniform(random, -148, 124);
      for (int64_t r = 0; r < values.size(1); ++r) {
        for (int64_t c = 0; c < values.size(2); ++c) {
          Store(type, RandomValue(random, type, exponent), values.At(m, r, c));
        }
      }
    }
    ExpectQuantised(values.array(), Want(type, values));
    if (testing::Test::HasFailure()) return;
  }
}

TEST(BlockQuantise, OneElementDecidesItsBlock) {
  const ScopedFloatEnvironment environment;
  for (const RowType type : kTypes) {
    for (const double last : {kInfinity, -kInfinity, kNan, 1e30, 0.5, 0.0}) {
      Random random = Seeded(3);
      Scattered values(random, type, {1, 130, 257});
      for (int64_t r = 0; r < 130; ++r) {
        for (int64_t c = 0; c < 257; ++c) Store(type, 0, values.At(0, r, c));
      }
      Store(type, last, values.At(0, 127, 255));
      ExpectQuantised(values.array(), Want(type, values));
    }
  }
}

TEST(BlockQuantise, LeadingDimensionsAreOneAfterTheOther) {
  const ScopedFloatEnvironment environment;
  Random random = Seeded(5);
  const Bytes x = RandomBytes(random, 2 * 3 * 130 * 140 * 2);
  const std::vector<int64_t> flat = {6, 130, 140};
  const std::vector<int64_t> flat_strides = {130 * 140 * 2, 140 * 2, 2};
  Quantised want = {Bytes(6 * 130 * 140), Bytes(6 * 2 * 2 * 4)};
  QuantiseBlocks({RowType::kF16, x.data(), flat, flat_strides},
                 want.payload.data(), want.scales.data());
  const std::vector<int64_t> shape = {2, 3, 130, 140};
  const std::vector<int64_t> strides = {3 * 130 * 140 * 2, 130 * 140 * 2,
                                        140 * 2, 2};
  ExpectQuantised({RowType::kF16, x.data(), shape, strides}, want);
}

TEST(BlockQuantise, NothingIsWrittenForNothing) {
  const ScopedFloatEnvironment environment;
  const int64_t strides[] = {0, 0, 4};
  for (const auto& shape :
       {std::vector<int64_t>{0, 5, 5}, {3, 0, 5}, {3, 5, 0}}) {
    ExpectQuantised({RowType::kF32, nullptr, shape, strides}, {});
  }
}

}  // namespace
}  // namespace jaxfabric::moe
