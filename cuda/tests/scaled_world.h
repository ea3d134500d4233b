// Worlds whose rows travel as e4m3: what the host makes of them.

#ifndef JAXFABRIC_CUDA_TESTS_SCALED_WORLD_H_
#define JAXFABRIC_CUDA_TESTS_SCALED_WORLD_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "moe/block_scaled.h"
#include "moe_shape.h"
#include "tests/cpp/moe_oracle.h"
#include "tests/cpp/moe_row_values.h"

namespace jaxfabric::cuda {

inline moe::RowType HostType(RowType type) {
  switch (type) {
    case RowType::kF32:
      return moe::RowType::kF32;
    case RowType::kBf16:
      return moe::RowType::kBf16;
    default:
      return moe::RowType::kF16;
  }
}

// NaNs of a type are one: which bits they have is nobody's promise.
inline void UniteNans(RowType type, moe::Bytes& rows) {
  const auto size = moe::ElementBytes(HostType(type));
  for (size_t at = 0; at + size <= rows.size(); at += size) {
    if (!std::isnan(moe::LoadValue(HostType(type), rows.data() + at))) continue;
    std::memset(rows.data() + at, 0xff, size);
  }
}

// What the host makes of a world's rows, with `bytes` of each scaled row from
// `offset` on, or the way back if `unscale`.
inline moe::World ScaledWorld(const moe::World& world,
                              const moe::ScaledRows& rows, int64_t offset,
                              int64_t bytes, bool unscale) {
  moe::World out = world;
  out.layout.row_bytes = bytes;
  for (moe::Bytes& x : out.x) {
    moe::Bytes row(world.layout.row_bytes), scaled(rows.row_bytes()), all;
    for (size_t at = 0; at < x.size(); at += row.size()) {
      std::memcpy(row.data(), x.data() + at, row.size());
      moe::ScaleRow(rows, row.data(), scaled.data());
      if (unscale) moe::UnscaleRow(rows, scaled.data(), row.data());
      const std::byte* const from =
          unscale ? row.data() : scaled.data() + offset;
      all.insert(all.end(), from, from + bytes);
    }
    x = all;
  }
  return out;
}

// x of ordinary numbers, of nothing, and now and then of what is no number:
// blocks of all kinds.
inline void FillNumbers(moe::Random& random, RowType type, moe::World& world) {
  const int64_t size = moe::ElementBytes(HostType(type));
  for (moe::Bytes& x : world.x) {
    for (size_t at = 0; at < x.size(); at += size) {
      double value = moe::RandomValue(random);
      const int64_t rare = moe::Uniform(random, 0, 999);
      if (rare == 0) value = std::numeric_limits<double>::infinity();
      if (rare == 1) value = -0.0;
      if (at / size / 256 % 3 == 0) value *= 0x1p-20;
      if (at / size / 256 % 7 == 0) value = 0;
      moe::StoreValue(HostType(type), value, x.data() + at);
    }
  }
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_TESTS_SCALED_WORLD_H_
