// RowSums: weighted sums of row segments, with the same bits as the host's
// SumRows: float32, products rounded before they are added, the first term
// starts the sum, the end rounded to nearest even.

#ifndef JAXFABRIC_CUDA_ROW_SUMS_CUH_
#define JAXFABRIC_CUDA_ROW_SUMS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "moe_shape.h"
#include "row_segments.cuh"

namespace jaxfabric::cuda {

// Elements in a 64-bit word, and the way between them and floats.
template <RowType kType>
struct Elements;

template <>
struct Elements<RowType::kF32> {
  static constexpr int kPerWord = 2;
  __device__ static float Get(uint64_t word, int i) {
    return __uint_as_float(static_cast<uint32_t>(word >> (32 * i)));
  }
  __device__ static uint64_t Put(float value, int i) {
    return static_cast<uint64_t>(__float_as_uint(value)) << (32 * i);
  }
};

template <>
struct Elements<RowType::kBf16> {
  static constexpr int kPerWord = 4;
  __device__ static float Get(uint64_t word, int i) {
    const auto bits = static_cast<uint32_t>(word >> (16 * i)) & 0xffffu;
    return __uint_as_float(bits << 16);
  }
  __device__ static uint64_t Put(float value, int i) {
    const uint64_t bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
    return bits << (16 * i);
  }
};

template <>
struct Elements<RowType::kF16> {
  static constexpr int kPerWord = 4;
  __device__ static float Get(uint64_t word, int i) {
    const auto bits = static_cast<uint16_t>(word >> (16 * i));
    return __half2float(__ushort_as_half(bits));
  }
  __device__ static uint64_t Put(float value, int i) {
    const uint64_t bits = __half_as_ushort(__float2half_rn(value));
    return bits << (16 * i);
  }
};

// The sum of some segments of one place in their rows. It begins as -0.0, the
// number that changes nothing when it is added to, so that the first term
// starts the sum without a branch.
template <RowType kType, int kPackets>
class RowSum {
  using E = Elements<kType>;

 public:
  __device__ RowSum() {
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
#pragma unroll
      for (int i = 0; i < E::kPerWord; ++i) {
        sums_[p][0][i] = sums_[p][1][i] = -0.0f;
      }
    }
  }

  // Adds `factor` times the segment, or the segment itself.
  __device__ void Add(const Segment<kPackets>& segment, bool weighted,
                      float factor) {
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      AddWord(segment.words[p].low, weighted, factor, sums_[p][0]);
      AddWord(segment.words[p].high, weighted, factor, sums_[p][1]);
    }
    empty_ = false;
  }

  // The rounded sum; zeros if nothing was added.
  __device__ Segment<kPackets> Round() const {
    Segment<kPackets> out = {};
    if (empty_) return out;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      out.words[p] = {RoundWord(sums_[p][0]), RoundWord(sums_[p][1])};
    }
    return out;
  }

 private:
  __device__ void AddWord(uint64_t word, bool weighted, float factor,
                          float (&sums)[E::kPerWord]) {
#pragma unroll
    for (int i = 0; i < E::kPerWord; ++i) {
      float term = E::Get(word, i);
      if (weighted) term = __fmul_rn(term, factor);
      sums[i] = __fadd_rn(sums[i], term);
    }
  }

  __device__ static uint64_t RoundWord(const float (&sums)[E::kPerWord]) {
    uint64_t word = 0;
#pragma unroll
    for (int i = 0; i < E::kPerWord; ++i) word |= E::Put(sums[i], i);
    return word;
  }

  float sums_[kPackets][2][E::kPerWord];
  bool empty_ = true;
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_ROW_SUMS_CUH_
