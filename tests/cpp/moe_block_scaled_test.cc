// Scaled rows against arithmetic in double, and their way through a dispatch.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <memory>

#include "moe/block_scaled.h"
#include "moe/place.h"
#include "moe/unpack.h"
#include "tests/cpp/moe_e4m3_values.h"
#include "tests/cpp/moe_oracle.h"
#include "tests/cpp/moe_row_values.h"

namespace jaxfabric::moe {
namespace {

constexpr RowType kTypes[] = {RowType::kF32, RowType::kBf16, RowType::kF16};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<Isa> SupportedIsas() {
  std::vector<Isa> found;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (IsaSupported(isa)) found.push_back(isa);
  }
  return found;
}

float ElementAt(RowType type, const Bytes& row, int64_t i) {
  uint32_t bits = 0;
  const int64_t bytes = ElementBytes(type);
  std::memcpy(&bits, row.data() + i * bytes, bytes);
  return type == RowType::kF32 ? std::bit_cast<float>(bits)
                               : static_cast<float>(Decode(type, bits));
}

void Store(RowType type, float value, std::byte* at) {
  if (type == RowType::kF32) {
    std::memcpy(at, &value, sizeof(value));
    return;
  }
  const uint16_t bits = Encode(type, value);
  std::memcpy(at, &bits, sizeof(bits));
}

// Blocks of different sizes, with zeros, the ends of the type's range, and
// sometimes what is not finite.
Bytes RandomRow(Random& random, const ScaledRows& rows) {
  Bytes row(rows.hidden * ElementBytes(rows.type));
  const bool narrow = rows.type == RowType::kF16;
  std::normal_distribution<double> normal;
  double size = 1;
  for (int64_t i = 0; i < rows.hidden; ++i) {
    if (i % kScaleBlock == 0) {
      size = std::ldexp(
          1, narrow ? Uniform(random, -24, 14) : Uniform(random, -148, 124));
    }
    float value = static_cast<float>(size * normal(random));
    const int64_t kind = Uniform(random, 0, 400);
    if (kind < 20) value = kind % 2 == 0 ? 0.0f : -0.0f;
    if (kind == 20) value = std::numeric_limits<float>::infinity();
    if (kind == 21) value = static_cast<float>(size) * 448;
    Store(rows.type, value, row.data() + i * ElementBytes(rows.type));
  }
  return row;
}

Bytes WantScaled(const ScaledRows& rows, const Bytes& row) {
  Bytes want(rows.row_bytes(), std::byte{0});
  for (int64_t block = 0; block < rows.blocks(); ++block) {
    const int64_t begin = block * kScaleBlock;
    const int64_t end = std::min(begin + kScaleBlock, rows.hidden);
    float amax = 0x1p-100f;
    bool finite = true;
    for (int64_t i = begin; i < end; ++i) {
      const float value = ElementAt(rows.type, row, i);
      finite = finite && std::isfinite(value);
      amax = std::max(amax, std::fabs(value));
    }
    const float scale = finite ? amax * std::bit_cast<float>(0x3b124925) : kNan;
    std::memcpy(want.data() + rows.scales_offset() + block * 4, &scale, 4);
    for (int64_t i = begin; i < end; ++i) {
      const float scaled = ElementAt(rows.type, row, i) * (448.0f / amax);
      want[i] = std::byte(finite ? E4m3CodeOf(scaled) : uint8_t{0x7f});
    }
  }
  return want;
}

TEST(BlockScaled, ScalesAsWritten) {
  const ScopedFloatEnvironment environment;
  Random random = Seeded(7);
  for (const RowType type : kTypes) {
    for (const int64_t hidden : {1, 3, 127, 128, 129, 256, 300, 300, 300}) {
      const ScaledRows rows = {type, hidden};
      const Bytes row = RandomRow(random, rows);
      const Bytes want = WantScaled(rows, row);
      for (const Isa isa : SupportedIsas()) {
        for (const size_t shift : {0, 1}) {  // no alignment is assumed
          Bytes in(row.size() + shift), out(want.size() + shift, kGarbage);
          std::copy(row.begin(), row.end(), in.begin() + shift);
          ScaleRowWith(isa, rows, in.data() + shift, out.data() + shift);
          EXPECT_TRUE(std::equal(want.begin(), want.end(), out.begin() + shift))
              << "type " << static_cast<int>(type) << " hidden " << hidden
              << " isa " << static_cast<int>(isa);
        }
      }
    }
  }
}

TEST(BlockScaled, RoundsToNearestEven) {
  const ScopedFloatEnvironment environment;
  // With 448 as the largest, elements are scaled by one.
  std::vector<float> values;
  for (uint32_t code = 0; code < 0x7e; ++code) {
    const auto low = static_cast<float>(E4m3ValueOf(code));
    const float middle = (low + static_cast<float>(E4m3ValueOf(code + 1))) / 2;
    for (const float value : {low, middle, std::nextafter(middle, 0.0f),
                              std::nextafter(middle, 1e9f)}) {
      values.push_back(value);
      values.push_back(-value);
    }
  }
  for (const Isa isa : SupportedIsas()) {
    for (size_t begin = 0; begin < values.size(); begin += 127) {
      const size_t count = std::min<size_t>(127, values.size() - begin);
      std::vector<float> block(values.begin() + begin,
                               values.begin() + begin + count);
      block.push_back(448);
      const ScaledRows rows = {RowType::kF32, std::ssize(block)};
      Bytes out(rows.row_bytes(), kGarbage);
      ScaleRowWith(isa, rows, reinterpret_cast<const std::byte*>(block.data()),
                   out.data());
      for (size_t i = 0; i < count; ++i) {
        ASSERT_EQ(static_cast<uint8_t>(out[i]), E4m3CodeOf(block[i]))
            << std::hexfloat << block[i] << " isa " << static_cast<int>(isa);
      }
    }
  }
}

TEST(BlockScaled, EveryCodeComesBack) {
  const ScopedFloatEnvironment environment;
  for (const RowType type : kTypes) {
    for (const float scale : {1.0f, 0x1.24924ap-9f, 0x1p-109f, 1e30f, kNan}) {
      const ScaledRows rows = {type, 256};
      Bytes scaled(rows.row_bytes());
      for (int code = 0; code < 256; ++code) scaled[code] = std::byte(code);
      std::memcpy(scaled.data() + 256, &scale, 4);
      std::memcpy(scaled.data() + 260, &scale, 4);
      for (const Isa isa : SupportedIsas()) {
        Bytes row(256 * ElementBytes(type), kGarbage);
        UnscaleRowWith(isa, rows, scaled.data(), row.data());
        for (int code = 0; code < 256; ++code) {
          const float want = static_cast<float>(E4m3ValueOf(code)) * scale;
          const float got = ElementAt(type, row, code);
          if (std::isnan(want)) {
            ASSERT_TRUE(std::isnan(got)) << code;
            continue;
          }
          std::byte rounded[4] = {};
          Store(type, want, rounded);
          ASSERT_EQ(std::memcmp(rounded, &row[code * ElementBytes(type)],
                                ElementBytes(type)),
                    0)
              << "code " << code << " scale " << scale << " got " << got;
        }
      }
    }
  }
}

// A program's result buffer, full of garbage until it is written.
struct Received {
  explicit Received(const Layout& layout)
      : size(layout.output_rows() * layout.row_bytes),
        bytes(std::make_unique<std::byte[]>(size + 1)) {
    std::fill_n(bytes.get(), size, kGarbage);
  }

  void ExpectIs(const Bytes& want) const {
    EXPECT_TRUE(
        std::equal(want.begin(), want.end(), bytes.get(), bytes.get() + size));
  }

  const int64_t size;
  const std::unique_ptr<std::byte[]> bytes;
};

// One rank's part of a dispatch of scaled rows, against the oracle's dispatch
// of rows that were scaled and unscaled one by one.
class ScaledDispatch {
 public:
  ScaledDispatch(Random& random, const ScaledRows& rows, Layout layout)
      : rows_(rows) {
    layout.row_bytes = rows.hidden * ElementBytes(rows.type);
    layout.tokens = std::max(layout.tokens, 1);
    world_ = RandomWorld(random, layout);
    scaled_ = layout;
    scaled_.row_bytes = rows.row_bytes();
    scaled_.scaled = true;
    for (Bytes& x : world_.x) ScaleAll(random, x);
  }

  void ExpectIsRight(int32_t rank) {
    World seen = world_;
    World payloads = world_;
    World scales = world_;
    payloads.layout.row_bytes = rows_.hidden;
    scales.layout.row_bytes = rows_.scale_bytes();
    for (int32_t s = 0; s < scaled_.num_ranks; ++s) {
      for (World* world : {&seen, &payloads, &scales}) world->x[s].clear();
      for (int32_t t = 0; t < scaled_.tokens; ++t) {
        const std::byte* row = travels_[s].data() + t * rows_.row_bytes();
        Bytes unscaled(world_.layout.row_bytes);
        UnscaleRow(rows_, row, unscaled.data());
        Append(seen.x[s], unscaled.data(), unscaled.size());
        Append(payloads.x[s], row, rows_.hidden);
        Append(scales.x[s], row + rows_.scales_offset(), rows_.scale_bytes());
      }
    }
    Received tokens(seen.layout);
    Receive(rank, {tokens.bytes.get(), nullptr});
    tokens.ExpectIs(Dispatch(seen, rank).tokens);
    Received kept(payloads.layout);
    Received kept_scales(scales.layout);
    Receive(rank, {kept.bytes.get(), kept_scales.bytes.get()});
    kept.ExpectIs(Dispatch(payloads, rank).tokens);
    kept_scales.ExpectIs(Dispatch(scales, rank).tokens);
  }

 private:
  static void Append(Bytes& to, const std::byte* data, int64_t bytes) {
    to.insert(to.end(), data, data + bytes);
  }

  void ScaleAll(Random& random, Bytes& x) {
    x.clear();
    std::vector<int32_t> tokens;
    for (int32_t t = 0; t < scaled_.tokens; ++t) {
      const Bytes row = RandomRow(random, rows_);
      Append(x, row.data(), std::ssize(row));
      tokens.insert(tokens.end(), 2, t);  // as for two destinations
    }
    Bytes& travels =
        travels_.emplace_back(scaled_.tokens * scaled_.row_bytes, kGarbage);
    ScaleRows(rows_, tokens, scaled_.tokens, x.data(), travels.data());
  }

  void Receive(int32_t rank, UnscaledOutput out) {
    std::vector<SendLists> lists;
    for (const auto& ids : world_.ids) {
      lists.push_back(*BuildSendLists(scaled_, ids));
    }
    std::vector<RouteView> views;
    std::vector<Bytes> messages;
    for (int32_t s = 0; s < scaled_.num_ranks; ++s) {
      Bytes& message = messages.emplace_back(
          RouteMessageBytes(scaled_, lists[s], rank), kGarbage);
      PackRouteMessage(scaled_, lists[s], rank, world_.weights[s],
                       travels_[s].data(), message.data());
      auto view = ParseRouteMessage(scaled_, message);
      ASSERT_TRUE(view.ok()) << view.status().message();
      views.push_back(*std::move(view));
    }
    std::vector<int32_t> group_sizes(scaled_.experts_local()),
        slot_row(scaled_.unique_rows_max() * scaled_.slots()),
        recv_count(scaled_.num_ranks),
        row_index(scaled_.expand ? 0 : scaled_.rows());
    std::vector<float> weights(scaled_.rows());
    const Placement placement =
        Place(scaled_, views,
              {group_sizes, slot_row, recv_count, weights, row_index});
    for (int32_t s = 0; s < scaled_.num_ranks; ++s) {
      UnpackScaledRows(scaled_, placement.plan, s, rows_, views[s].rows,
                       {0, views[s].row_count()}, out);
    }
    ZeroUnwrittenScaledRows(scaled_, placement.plan, rows_, out);
  }

  const ScaledRows rows_;
  World world_;
  Layout scaled_;
  std::vector<Bytes> travels_;
};

TEST(BlockScaled, RandomWorlds) {
  const ScopedFloatEnvironment environment;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Random random = Seeded(seed);
    const Layout layout = RandomLayout(random);
    SCOPED_TRACE(testing::Message()
                 << "seed " << seed << ": " << testing::PrintToString(layout));
    const ScaledRows rows = {kTypes[Uniform(random, 0, 2)],
                             Uniform(random, 1, 200)};
    ScaledDispatch dispatch(random, rows, layout);
    for (int32_t rank = 0; rank < layout.num_ranks; ++rank) {
      dispatch.ExpectIsRight(rank);
    }
    if (testing::Test::HasFailure()) return;
  }
}

TEST(BlockScaled, OnlyListedRowsAreScaled) {
  const ScopedFloatEnvironment environment;
  const ScaledRows rows = {RowType::kF32, 4};
  const std::vector<float> x(12, 1.0f);
  Bytes out(3 * rows.row_bytes(), kGarbage);
  ScaleRows(rows, std::vector<int32_t>{2, 0, 2}, 3,
            reinterpret_cast<const std::byte*>(x.data()), out.data());
  EXPECT_EQ(out[0], std::byte{0x7e});
  EXPECT_EQ(out[rows.row_bytes()], kGarbage);
  EXPECT_EQ(out[2 * rows.row_bytes()], std::byte{0x7e});
}

// Ranks that disagree on the wire's type are told, whatever the sizes.
TEST(BlockScaled, OtherWireTypesAreRefused) {
  Layout layout = {
      .num_ranks = 2, .tokens = 1, .k = 1, .num_experts = 2, .row_bytes = 8};
  const auto lists = BuildSendLists(layout, std::vector<int32_t>{1});
  Bytes message(RouteMessageBytes(layout, *lists, 1));
  const Bytes x(8);
  PackRouteMessage(layout, *lists, 1, std::vector<float>{1}, x.data(),
                   message.data());
  layout.scaled = true;
  const auto parsed = ParseRouteMessage(layout, message);
  ASSERT_FALSE(parsed.ok());
  EXPECT_EQ(parsed.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(parsed.status().message().find("e4m3 rows = 0"), std::string::npos)
      << parsed.status().message();
}

}  // namespace
}  // namespace jaxfabric::moe
