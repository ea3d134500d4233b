// Dispatch and combine against the oracle of the host's tests, on worlds of 2
// to 8 ranks, in both forms (every block does everything; blocks with roles).

#include <gmock/gmock.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "moe/block_scaled.h"
#include "moe/layout.h"
#include "moe_kernels.h"
#include "tests/cluster.h"
#include "tests/cpp/moe_oracle.h"
#include "tests/cpp/moe_row_values.h"
#include "tests/moe_layouts.h"
#include "tests/rank_buffers.h"
#include "tests/scaled_world.h"

namespace jaxfabric::cuda {
namespace {

using moe::Bytes;
using moe::Choose;
using moe::Expected;
using moe::Layout;
using moe::Random;
using moe::Uniform;
using moe::World;
using ::testing::HasSubstr;

struct Case {
  World world;
  RowType type;
  bool roles, together;
  bool late;  // senders place their own rows
  bool weighted, with_scalars;
  bool halves;
  bool scaled, keep;  // see MoeShape
};

Grid GridFor(Cluster& cluster, int rank, const Case& c) {
  const int blocks = cluster.blocks_max(rank);
  const int senders = c.late ? 1 : std::max(1, blocks / 4);
  return {blocks, c.roles ? senders : 0, 1 + rank, c.together,
          c.late ? 1 + rank : 0};
}

void CheckRows(const Layout& layout, Bytes got, const Bytes& want) {
  got.resize(want.size());
  ASSERT_EQ(got.size(), want.size());
  // Where nothing is promised the oracle has the byte of poisoned memory.
  for (int64_t row = 0; row < layout.output_rows(); ++row) {
    ASSERT_EQ(
        std::memcmp(got.data() + row * layout.row_bytes,
                    want.data() + row * layout.row_bytes, layout.row_bytes),
        0)
        << "row " << row;
  }
}

void CheckDispatch(const World& world, int rank, const RankBuffers& got) {
  const Expected want = moe::Dispatch(world, rank);
  const Layout& layout = world.layout;
  EXPECT_EQ(got.group_sizes.Read<int32_t>(), want.group_sizes);
  EXPECT_EQ(got.recv_count.Read<int32_t>(), want.recv_count);
  EXPECT_EQ(got.slot_row.Read<int32_t>(), want.slot_row);
  EXPECT_EQ(got.row_weights.Read<float>(), want.weights);
  EXPECT_EQ(got.dropped.Read<int32_t>()[0], want.dropped);
  if (!layout.expand) {
    EXPECT_EQ(got.row_index.Read<int32_t>(), want.row_index);
  }
}

void CheckTokens(const Case& c, int rank, const RankBuffers& got) {
  const Layout& layout = c.world.layout;
  Bytes tokens = got.tokens.Read<std::byte>();
  if (!c.scaled) {
    CheckRows(layout, tokens, moe::Dispatch(c.world, rank).tokens);
    return;
  }
  const moe::ScopedFloatEnvironment environment;
  const moe::ScaledRows rows = {
      HostType(c.type), layout.row_bytes / moe::ElementBytes(HostType(c.type))};
  if (!c.keep) {
    const World want = ScaledWorld(c.world, rows, 0, layout.row_bytes, true);
    Bytes expected = moe::Dispatch(want, rank).tokens;
    UniteNans(c.type, tokens);
    UniteNans(c.type, expected);
    CheckRows(layout, tokens, expected);
    return;
  }
  const World payload = ScaledWorld(c.world, rows, 0, rows.hidden, false);
  CheckRows(payload.layout, tokens, moe::Dispatch(payload, rank).tokens);
  const World scales = ScaledWorld(c.world, rows, rows.scales_offset(),
                                   rows.scale_bytes(), false);
  CheckRows(scales.layout, got.scales.Read<std::byte>(),
            moe::Dispatch(scales, rank).tokens);
}

// Rows for combine: one per expert row.
struct Operands {
  Bytes rows;
  std::vector<float> weights, scalars;
};

Operands RandomOperands(Random& random, const Layout& layout, RowType type) {
  Operands operands;
  const int64_t rows = layout.expand ? layout.rows() : layout.unique_rows_max();
  operands.rows.resize(rows * layout.row_bytes);
  const int64_t size = moe::ElementBytes(HostType(type));
  for (size_t at = 0; at < operands.rows.size(); at += size) {
    // Small enough for sums in f16, because infinities can make a NaN.
    const double value = moe::RandomValue(random) / 64;
    moe::StoreValue(HostType(type), value, operands.rows.data() + at);
  }
  for (int64_t row = 0; row < layout.rows(); ++row) {
    operands.weights.push_back(Uniform(random, -1000, 1000) / 1024.0f);
    operands.scalars.push_back(static_cast<float>(moe::RandomValue(random)));
  }
  return operands;
}

// One token's y and slot scalars, by the contract's text.
struct Combined {
  Bytes y;
  std::vector<float> scalars;
};

Combined PlainCombine(const Case& c, const std::vector<Expected>& dispatched,
                      const std::vector<Operands>& operands, int source,
                      int token) {
  const Layout& layout = c.world.layout;
  const auto type = HostType(c.type);
  Combined want;
  want.scalars.assign(layout.k, 0.0f);
  std::vector<Bytes> partials;
  for (int rank = 0; rank < layout.num_ranks; ++rank) {
    std::vector<const std::byte*> rows;
    std::vector<float> weights;
    bool sent = false;
    for (int k = 0; k < layout.k; ++k) {
      const int id = c.world.ids[source][token * layout.k + k];
      if (id < 0 || id / layout.experts_local() != rank) continue;
      sent = true;
      const auto row = dispatched[rank].row_of.find({source, token, k});
      if (row == dispatched[rank].row_of.end()) continue;
      rows.push_back(operands[rank].rows.data() +
                     row->second * layout.row_bytes);
      weights.push_back(operands[rank].weights[row->second]);
      want.scalars[k] = operands[rank].scalars[row->second];
    }
    if (!sent) continue;
    partials.push_back(moe::PlainSum(
        type, rows, c.weighted ? weights.data() : nullptr, layout.row_bytes));
  }
  std::vector<const std::byte*> rows;
  for (const Bytes& partial : partials) rows.push_back(partial.data());
  want.y = moe::PlainSum(type, rows, nullptr, layout.row_bytes);
  return want;
}

void CheckCombine(const Case& c, const std::vector<Operands>& operands,
                  int rank, const DeviceBuffer& y,
                  const DeviceBuffer& slot_scalars) {
  const Layout& layout = c.world.layout;
  std::vector<Expected> dispatched;
  for (int r = 0; r < layout.num_ranks; ++r) {
    dispatched.push_back(moe::Dispatch(c.world, r));
  }
  const Bytes got = y.Read<std::byte>();
  const std::vector<float> scalars = slot_scalars.Read<float>();
  for (int token = 0; token < layout.tokens; ++token) {
    const Combined want = PlainCombine(c, dispatched, operands, rank, token);
    ASSERT_EQ(std::memcmp(got.data() + token * layout.row_bytes, want.y.data(),
                          layout.row_bytes),
              0)
        << "token " << token;
    for (int k = 0; c.with_scalars && k < layout.k; ++k) {
      ASSERT_EQ(scalars[token * layout.k + k], want.scalars[k])
          << "token " << token << " k " << k;
    }
  }
}

// Ranks, and which part of the worlds.
class MoeTest : public ::testing::TestWithParam<std::tuple<int, int>> {
 protected:
  static int Ranks() { return std::get<0>(GetParam()); }

  void SetUp() override {
    // Two ranks on a GPU at most.
    const std::string missing = Missing(std::max(2, Ranks() / 2));
    if (!missing.empty()) GTEST_SKIP() << missing;
    cluster_ = std::make_unique<Cluster>(
        Ranks(), std::min(Ranks(), DeviceCount()), 1 << 16, kMailboxBytes);
    for (int rank = 0; rank < Ranks(); ++rank) {
      const int device = cluster_->device(rank);
      pending_.emplace_back();
      for (int i = 0; i < 2; ++i) pending_[rank].emplace_back(device, 24);
    }
  }

  Case RandomCase(Random& random, bool large) {
    Case c;
    c.type =
        Choose<RowType>(random, {RowType::kF32, RowType::kBf16, RowType::kF16});
    const Layout layout = RandomLayout(random, Ranks(), c.type, large);
    c.world = moe::RandomWorld(random, layout);
    c.scaled = Uniform(random, 0, 2) == 0;
    c.keep = Uniform(random, 0, 1) == 0;
    if (c.scaled) FillNumbers(random, c.type, c.world);
    c.roles = large || Uniform(random, 0, 1) == 0;
    c.together = large || Uniform(random, 0, 1) == 0;
    c.late = false;
    c.weighted = Uniform(random, 0, 1) == 0;
    c.with_scalars = Uniform(random, 0, 1) == 0;
    c.halves = Uniform(random, 0, 1) == 0;
    return c;
  }

  void Run(const Case& c, Random& random) {
    const Layout& layout = c.world.layout;
    const std::vector<Phase> phases = PhasesOf(c);
    std::vector<RankBuffers> buffers;
    ASSERT_NO_FATAL_FAILURE(RunDispatch(c, phases, buffers));
    Layout expanded = layout;
    expanded.expand = true;  // combine sees expert rows
    std::vector<Operands> operands;
    std::vector<DeviceBuffer> rows, weights, scalars, y, slot_scalars;
    for (int rank = 0; rank < cluster_->ranks(); ++rank) {
      const int device = cluster_->device(rank);
      operands.push_back(RandomOperands(random, expanded, c.type));
      rows.push_back(Upload(device, operands.back().rows));
      weights.push_back(Upload(device, operands.back().weights));
      scalars.push_back(Upload(device, operands.back().scalars));
      y.emplace_back(device, layout.tokens * layout.row_bytes);
      slot_scalars.emplace_back(device, layout.tokens * layout.k * 4);
    }
    const MoeShape reduce = ShapeOf(expanded, c.type, c.with_scalars);
    InPhases(phases, [&](int rank, const Peers& peers) {
      const RankBuffers& b = buffers[rank];
      return LaunchCombine(
          peers, reduce, GridFor(*cluster_, rank, c),
          {rows[rank].as<char>(),
           c.weighted ? weights[rank].as<float>() : nullptr,
           c.with_scalars ? scalars[rank].as<float>() : nullptr,
           b.ids.as<int32_t>(), b.recv_count.as<int32_t>(),
           b.slot_row.as<int32_t>(), y[rank].as<char>(),
           c.with_scalars ? slot_scalars[rank].as<float>() : nullptr},
          cluster_->stream(rank));
    });
    ASSERT_TRUE(cluster_->group().Failure().ok())
        << cluster_->group().Failure().message();
    for (int rank = 0; rank < cluster_->ranks(); ++rank) {
      CheckCombine(c, operands, rank, y[rank], slot_scalars[rank]);
    }
    RunReplay(c, buffers);
  }

  // Makes `buffers`, and checks what comes into them.
  void RunDispatch(const Case& c, const std::vector<Phase>& phases,
                   std::vector<RankBuffers>& buffers) {
    const Layout& layout = c.world.layout;
    for (int rank = 0; rank < cluster_->ranks(); ++rank) {
      buffers.emplace_back(cluster_->device(rank), c.world, rank);
    }
    const MoeShape shape = ShapeOf(layout, c.type, false, c.scaled, c.keep);
    InPhases(phases, [&](int rank, const Peers& peers) {
      return LaunchDispatch(peers, shape, GridFor(*cluster_, rank, c),
                            buffers[rank].Dispatch(layout),
                            cluster_->group().Workspace(rank),
                            cluster_->stream(rank));
    });
    ASSERT_TRUE(cluster_->group().Failure().ok())
        << cluster_->group().Failure().message();
    for (int rank = 0; rank < cluster_->ranks(); ++rank) {
      CheckDispatch(c.world, rank, buffers[rank]);
      CheckTokens(c, rank, buffers[rank]);
    }
  }

  // The whole call, or its halves with those of a second one between them.
  static std::vector<Phase> PhasesOf(const Case& c) {
    if (!c.halves) return {Phase::kWhole};
    return {Phase::kStart, Phase::kStart, Phase::kDone, Phase::kDone};
  }

  template <typename Launch>
  void InPhases(const std::vector<Phase>& phases, Launch launch) {
    int started = 0, finished = 0;  // halves are finished in their order
    for (const Phase phase : phases) {
      const int call = (phase == Phase::kDone ? finished++ : started++) % 2;
      cluster_->ForEach([&](int rank) {
        Peers peers = cluster_->peers(rank, 20, phase);
        // A second half has the tag of its first one, whatever its own is.
        peers.tag = phase == Phase::kDone ? 99 : 0xabcdef - call;
        peers.pending = pending_[rank][call].as<uint32_t>();
        return launch(rank, peers);
      });
    }
    cluster_->Synchronize();
  }

  // x once more along the plan: to the places that dispatch gave its rows.
  void RunReplay(const Case& c, const std::vector<RankBuffers>& buffers) {
    World world = c.world;
    world.layout.zero_tail = true;
    const MoeShape shape = ShapeOf(world.layout, c.type, false);
    std::vector<DeviceBuffer> rows;
    for (int rank = 0; rank < cluster_->ranks(); ++rank) {
      rows.emplace_back(cluster_->device(rank), buffers[rank].tokens.bytes());
    }
    cluster_->ForEach([&](int rank) {
      const RankBuffers& b = buffers[rank];
      return LaunchReplay(
          cluster_->peers(rank), shape, cluster_->blocks_max(rank),
          {b.x.as<char>(), b.ids.as<int32_t>(), b.recv_count.as<int32_t>(),
           b.slot_row.as<int32_t>(), rows[rank].as<char>()},
          cluster_->stream(rank));
    });
    cluster_->Synchronize();
    ASSERT_TRUE(cluster_->group().Failure().ok())
        << cluster_->group().Failure().message();
    for (int rank = 0; rank < cluster_->ranks(); ++rank) {
      const Bytes want = moe::Dispatch(world, rank).tokens;
      Bytes got = rows[rank].Read<std::byte>();
      got.resize(want.size());
      ASSERT_TRUE(got == want) << "replay on rank " << rank;
    }
  }

  std::unique_ptr<Cluster> cluster_;
  std::vector<std::vector<DeviceBuffer>> pending_;  // two of each rank
};

TEST_P(MoeTest, SendersPlaceTheirOwnRows) {
  for (uint64_t seed = 1; seed <= 12 && !HasFailure(); ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    Random random = moe::Seeded(1000 + seed);
    Case c = RandomCase(random, /*large=*/seed % 3 == 0);
    c.world.layout.expand = false;
    if (!c.scaled) FillNumbers(random, c.type, c.world);
    c.scaled = c.roles = c.together = c.late = true;
    c.halves = false;
    Run(c, random);
  }
}

// Halves and whole calls have epochs of the same numbers: here the first ones.
TEST_P(MoeTest, WholeCallsDoNotFollowThePlansOfHalves) {
  Random random = moe::Seeded(77);
  Case c = RandomCase(random, /*large=*/true);
  c.world.layout.expand = false;
  FillNumbers(random, c.type, c.world);
  c.scaled = c.roles = c.together = c.late = true;
  std::vector<RankBuffers> of_halves, of_whole;
  ASSERT_NO_FATAL_FAILURE(
      RunDispatch(c, {Phase::kStart, Phase::kDone}, of_halves));
  cluster_->ForEach([&](int rank) {
    // Whoever followed the plan of before would follow this.
    return cudaMemset(cluster_->group().Workspace(rank), 0xff,
                      Group::kWorkspaceBytes);
  });
  cluster_->ForEach([](int) { return cudaDeviceSynchronize(); });
  RunDispatch(c, {Phase::kWhole}, of_whole);
}

// In parts, so that a sanitizer, under which each world takes seconds, can be
// given one of them.
class MoeWorldsTest : public MoeTest {};

TEST_P(MoeWorldsTest, EqualsTheOracle) {
  const uint64_t first = 1 + 10 * std::get<1>(GetParam());
  for (uint64_t seed = first; seed < first + 10 && !HasFailure(); ++seed) {
    Random random = moe::Seeded(seed);
    const Case c = RandomCase(random, /*large=*/seed % 10 == 0);
    SCOPED_TRACE(::testing::Message()
                 << "seed " << seed << " type " << static_cast<int>(c.type)
                 << " roles " << c.roles << " together " << c.together
                 << " weighted " << c.weighted << " scalars " << c.with_scalars
                 << " halves " << c.halves << " scaled " << c.scaled << " keep "
                 << c.keep << " " << ::testing::PrintToString(c.world.layout));
    Run(c, random);
  }
}

std::string NameOf(const ::testing::TestParamInfo<std::tuple<int, int>>& info) {
  return std::to_string(std::get<0>(info.param)) + "RanksPart" +
         std::to_string(std::get<1>(info.param));
}

INSTANTIATE_TEST_SUITE_P(All, MoeTest,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values(0)),
                         NameOf);
INSTANTIATE_TEST_SUITE_P(All, MoeWorldsTest,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Range(0, 6)),
                         NameOf);

}  // namespace
}  // namespace jaxfabric::cuda
