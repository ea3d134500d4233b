// The contract of dispatch and combine in plain loops, and random worlds to
// hold the real code against it. Shares no code with xla_ffi/moe but Layout.

#ifndef JAXFABRIC_TESTS_CPP_MOE_ORACLE_H_
#define JAXFABRIC_TESTS_CPP_MOE_ORACLE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <ostream>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "moe/layout.h"

namespace jaxfabric::moe {

using Bytes = std::vector<std::byte>;
using Random = std::mt19937_64;

// The same numbers in every run, so that a printed seed reproduces a failure.
inline Random Seeded(uint64_t seed) { return Random(seed); }

inline int64_t Uniform(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

template <typename T>
T Choose(Random& random, std::vector<T> values) {
  return values[Uniform(random, 0, static_cast<int64_t>(values.size()) - 1)];
}

inline Bytes RandomBytes(Random& random, size_t size) {
  Bytes bytes(size);
  for (std::byte& byte : bytes) byte = std::byte(Uniform(random, 0, 255));
  return bytes;
}

inline void PrintTo(const Layout& layout, std::ostream* out) {
  *out << "N=" << layout.num_ranks << " T=" << layout.tokens
       << " K=" << layout.k << " E=" << layout.num_experts
       << " row_bytes=" << layout.row_bytes << " capacity=" << layout.capacity
       << " alignment=" << layout.expert_alignment
       << " expand=" << layout.expand << " zero_tail=" << layout.zero_tail;
}

// Every rank's operands.
struct World {
  Layout layout;
  std::vector<std::vector<int32_t>> ids;
  std::vector<std::vector<float>> weights;
  std::vector<Bytes> x;
};

enum class Routing { kUniform, kOneExpert, kSparse, kNone, kEmptyRanks };

inline std::vector<int32_t> RandomIds(Random& random, const Layout& layout,
                                      Routing routing) {
  std::vector<int32_t> ids(layout.tokens * layout.k, -1);
  if (routing == Routing::kEmptyRanks) {
    routing = Choose<Routing>(random, {Routing::kUniform, Routing::kNone});
  }
  if (routing == Routing::kNone) return ids;
  std::vector<int32_t> experts(layout.num_experts);
  for (int32_t e = 0; e < layout.num_experts; ++e) experts[e] = e;
  for (int32_t t = 0; t < layout.tokens; ++t) {
    std::shuffle(experts.begin(), experts.end(), random);
    if (routing == Routing::kOneExpert) {
      ids[t * layout.k + Uniform(random, 0, layout.k - 1)] = 0;
      continue;
    }
    for (int32_t k = 0; k < std::min(layout.k, layout.num_experts); ++k) {
      const bool skip =
          routing == Routing::kSparse && Uniform(random, 0, 1) == 0;
      if (!skip) ids[t * layout.k + k] = experts[k];
    }
  }
  return ids;
}

inline Layout RandomLayout(Random& random) {
  Layout layout;
  layout.num_ranks = Choose<int32_t>(random, {1, 2, 3, 4, 8});
  layout.num_experts = layout.num_ranks * Choose<int32_t>(random, {1, 2, 3, 5});
  layout.tokens = Uniform(random, 0, 12);
  layout.k = Uniform(random, 1, 6);
  layout.row_bytes = Choose<int64_t>(random, {1, 3, 16, 65, 128});
  layout.expert_alignment = Choose<int32_t>(random, {1, 1, 3, 8, 16});
  layout.expand = Uniform(random, 0, 1) == 0;
  layout.zero_tail = Uniform(random, 0, 1) == 0;
  const int64_t all = layout.unique_rows_max() * layout.slots();
  layout.capacity =
      Choose<int64_t>(random, {-1, -1, 0, 1, all, Uniform(random, 0, all)});
  return layout;
}

inline World RandomWorld(Random& random, const Layout& layout) {
  World world;
  world.layout = layout;
  const auto routing = Choose<Routing>(
      random, {Routing::kUniform, Routing::kUniform, Routing::kOneExpert,
               Routing::kSparse, Routing::kNone, Routing::kEmptyRanks});
  for (int32_t s = 0; s < layout.num_ranks; ++s) {
    world.ids.push_back(RandomIds(random, layout, routing));
    std::vector<float> weights(layout.tokens * layout.k);
    for (float& weight : weights) weight = Uniform(random, 1, 1000) / 1024.0f;
    world.weights.push_back(weights);
    world.x.push_back(RandomBytes(random, layout.tokens * layout.row_bytes));
  }
  return world;
}

// What one rank must hold after dispatch.
struct Expected {
  std::vector<int32_t> group_sizes, slot_row, recv_count, row_index;
  std::vector<float> weights;
  Bytes tokens;  // garbage byte where unspecified
  int32_t dropped = 0;
  // (source, token, k) -> expert row, for kept assignments.
  std::map<std::tuple<int32_t, int32_t, int32_t>, int32_t> row_of;
};

inline constexpr std::byte kGarbage{0xAB};

// An assignment to this rank's experts that its capacity let through.
struct Kept {
  int32_t source, token, k, expert, unique, q;
};

struct Routed {
  std::vector<Kept> kept;  // in (source, token, k) order
  std::vector<std::pair<int32_t, int32_t>> unique_rows;  // source, token
  std::vector<int32_t> recv_count;
  int32_t dropped = 0;
};

inline Routed Route(const World& world, int32_t rank, int64_t kept_max) {
  const Layout& layout = world.layout;
  const int32_t local = layout.num_experts / layout.num_ranks;
  Routed routed;
  routed.recv_count.assign(layout.num_ranks, 0);
  for (int32_t s = 0; s < layout.num_ranks; ++s) {
    for (int32_t t = 0; t < layout.tokens; ++t) {
      int32_t q = 0;
      for (int32_t k = 0; k < layout.k; ++k) {
        const int32_t id = world.ids[s][t * layout.k + k];
        if (id < 0 || id / local != rank) continue;
        if (q == 0) {
          routed.unique_rows.emplace_back(s, t);
          ++routed.recv_count[s];
        }
        const auto unique = static_cast<int32_t>(routed.unique_rows.size()) - 1;
        if (static_cast<int64_t>(routed.kept.size()) == kept_max) {
          ++routed.dropped;
        } else {
          routed.kept.push_back({s, t, k, id % local, unique, q});
        }
        ++q;
      }
    }
  }
  return routed;
}

// What Dispatch knows of the sizes, from the contract's text.
struct Sizes {
  explicit Sizes(const Layout& layout)
      : local(layout.num_experts / layout.num_ranks),
        slots(std::min(layout.k, local)),
        unique_max(int64_t{layout.num_ranks} * layout.tokens),
        kept_max(unique_max * slots) {
    if (layout.capacity >= 0) {
      kept_max = std::min<int64_t>(kept_max, layout.capacity);
    }
    const int64_t alignment = layout.expert_alignment;
    rows = kept_max + local * (alignment - 1);
    rows -= rows % alignment;
  }
  int32_t local, slots;
  int64_t unique_max, kept_max, rows = 0;
};

inline Expected Dispatch(const World& world, int32_t rank) {
  const Layout& layout = world.layout;
  const Sizes sizes(layout);
  const Routed routed = Route(world, rank, sizes.kept_max);
  Expected want;
  want.recv_count = routed.recv_count;
  want.dropped = routed.dropped;
  want.slot_row.assign(sizes.unique_max * sizes.slots, -1);
  want.weights.assign(sizes.rows, 0.0f);
  if (!layout.expand) want.row_index.assign(sizes.rows, -1);
  want.tokens.assign(
      (layout.expand ? sizes.rows : sizes.unique_max) * layout.row_bytes,
      layout.zero_tail ? std::byte{0} : kGarbage);
  const auto copy_row = [&](int64_t to, size_t unique) {
    const auto [s, t] = routed.unique_rows[unique];
    std::memcpy(want.tokens.data() + to * layout.row_bytes,
                world.x[s].data() + t * layout.row_bytes, layout.row_bytes);
  };
  int32_t row = 0;
  for (int32_t e = 0; e < sizes.local; ++e) {
    const int32_t begin = row;
    for (const Kept& a : routed.kept) {
      if (a.expert != e) continue;
      want.slot_row[a.unique * sizes.slots + a.q] = row;
      want.weights[row] = world.weights[a.source][a.token * layout.k + a.k];
      want.row_of[{a.source, a.token, a.k}] = row;
      if (layout.expand) copy_row(row, a.unique);
      if (!layout.expand) want.row_index[row] = a.unique;
      ++row;
    }
    for (; (row - begin) % layout.expert_alignment != 0; ++row) {
      if (!layout.expand) continue;
      std::memset(want.tokens.data() + row * layout.row_bytes, 0,
                  layout.row_bytes);
    }
    want.group_sizes.push_back(row - begin);
  }
  for (size_t j = 0; !layout.expand && j < routed.unique_rows.size(); ++j) {
    copy_row(static_cast<int64_t>(j), j);
  }
  return want;
}

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_TESTS_CPP_MOE_ORACLE_H_
