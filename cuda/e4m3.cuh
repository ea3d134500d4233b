// e4m3 with block scales: the numbers of one lane. The contract is in
// jaxfabric/moe/_plan.py, and xla_ffi/moe/block_scaled.h has the same bits:
// every product is rounded once, the reciprocal too.

#ifndef JAXFABRIC_CUDA_E4M3_CUH_
#define JAXFABRIC_CUDA_E4M3_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "device_memory.cuh"
#include "moe_shape.h"

namespace jaxfabric::cuda {

template <RowType kType>
inline constexpr int kElementBytes = kType == RowType::kF32 ? 4 : 2;

// Elements of a row that a lane has, which 16 lanes make a block of.
inline constexpr int kLaneElements = 8;
inline constexpr int kBlockLanes = kScaleBlock / kLaneElements;

// Those elements as they lie in memory.
template <RowType kType>
struct LaneRow {
  static constexpr int kVectors = kLaneElements * kElementBytes<kType> / 16;
  uint4 vectors[kVectors];
};

__device__ inline uint32_t Payload4(float a, float b, float c, float d) {
  const uint32_t low =
      __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high =
      __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// Magnitudes are compared as their bits, which order alike, with infinities and
// NaNs above all numbers.
template <RowType kType>
struct Magnitudes {
  static constexpr uint32_t kInfinity =
      kType == RowType::kF32 ? 0x7f800000
                             : (kType == RowType::kBf16 ? 0x7f80 : 0x7c00);

  __device__ static float ToFloat(uint32_t bits) {
    if constexpr (kType == RowType::kF32) {
      return __uint_as_float(bits);
    } else if constexpr (kType == RowType::kBf16) {
      return __uint_as_float(bits << 16);
    } else {
      return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    }
  }
};

// The largest of each pair of blocks that the halves of a warp have: all lanes
// get that of their own block. 16-bit numbers of two chunks go together.
template <RowType kType, int kChunks>
__device__ void LargestOfBlocks(const LaneRow<kType> (&in)[kChunks],
                                uint32_t (&most)[kChunks]) {
  static_assert(kChunks % 2 == 0);
  if constexpr (kType == RowType::kF32) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      most[c] = 0;
#pragma unroll
      for (const uint4& v : in[c].vectors) {
        most[c] = max(most[c], max(v.x & 0x7fffffff, v.y & 0x7fffffff));
        most[c] = max(most[c], max(v.z & 0x7fffffff, v.w & 0x7fffffff));
      }
    }
#pragma unroll
    for (int lanes = kBlockLanes / 2; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        most[c] = max(most[c], __shfl_xor_sync(kAllLanes, most[c], lanes));
      }
    }
  } else {
    uint32_t pairs[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint4& v = in[c].vectors[0];
      pairs[c] = __vmaxu2(__vmaxu2(v.x & 0x7fff7fff, v.y & 0x7fff7fff),
                          __vmaxu2(v.z & 0x7fff7fff, v.w & 0x7fff7fff));
    }
    uint32_t both[kChunks / 2];
#pragma unroll
    for (int i = 0; i < kChunks / 2; ++i) {
      both[i] = __vmaxu2(__byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x5410),
                         __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7632));
    }
#pragma unroll
    for (int lanes = kBlockLanes / 2; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int i = 0; i < kChunks / 2; ++i) {
        both[i] = __vmaxu2(both[i], __shfl_xor_sync(kAllLanes, both[i], lanes));
      }
    }
#pragma unroll
    for (int i = 0; i < kChunks / 2; ++i) {
      most[2 * i] = both[i] & 0xffff;
      most[2 * i + 1] = both[i] >> 16;
    }
  }
}

// 448 / amax, rounded to nearest, of an amax from 2^-100 on: the quotient of
// the significands by Newton's method, as the compiler's division has it but
// without its branch for what cannot be here.
__device__ inline float Reciprocal(float amax) {
  constexpr float kLargest = 448.0f;  // of e4m3
  const uint32_t bits = __float_as_uint(amax);
  const float divisor = __uint_as_float((bits & 0x7fffff) | 0x3f800000);
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
  inverse = __fmaf_rn(__fmaf_rn(-divisor, inverse, 1.0f), inverse, inverse);
  float quotient = __fmul_rn(kLargest, inverse);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float rest = __fmaf_rn(-divisor, quotient, kLargest);
    quotient = __fmaf_rn(rest, inverse, quotient);
  }
  // Exponents are far from their ends.
  return __uint_as_float(__float_as_uint(quotient) -
                         ((bits & 0x7f800000) - 0x3f800000));
}

// A lane's elements as floats, and the way back, rounded to nearest even.
template <RowType kType>
struct LaneFloats {
  float at[kLaneElements];

  __device__ static LaneFloats Of(const LaneRow<kType>& in) {
    LaneFloats out;
#pragma unroll
    for (int v = 0; v < LaneRow<kType>::kVectors; ++v) {
      const uint32_t words[4] = {in.vectors[v].x, in.vectors[v].y,
                                 in.vectors[v].z, in.vectors[v].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kType == RowType::kF32) {
          out.at[4 * v + i] = __uint_as_float(words[i]);
        } else if constexpr (kType == RowType::kBf16) {
          out.at[2 * i] = __uint_as_float(words[i] << 16);
          out.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
        } else {
          const auto half = [&](int upper) {
            return __half2float(__ushort_as_half(
                static_cast<uint16_t>(words[i] >> (16 * upper))));
          };
          out.at[2 * i] = half(0);
          out.at[2 * i + 1] = half(1);
        }
      }
    }
    return out;
  }

  __device__ LaneRow<kType> Round() const {
    LaneRow<kType> out;
#pragma unroll
    for (int v = 0; v < LaneRow<kType>::kVectors; ++v) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kType == RowType::kF32) {
          words[i] = __float_as_uint(at[4 * v + i]);
        } else if constexpr (kType == RowType::kBf16) {
          const uint32_t low =
              __bfloat16_as_ushort(__float2bfloat16_rn(at[2 * i]));
          const uint32_t high =
              __bfloat16_as_ushort(__float2bfloat16_rn(at[2 * i + 1]));
          words[i] = low | high << 16;
        } else {
          const uint32_t low = __half_as_ushort(__float2half_rn(at[2 * i]));
          const uint32_t high =
              __half_as_ushort(__float2half_rn(at[2 * i + 1]));
          words[i] = low | high << 16;
        }
      }
      out.vectors[v] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    return out;
  }
};

// A lane's part of a block.
struct LanePayload {
  uint2 bytes;
  float scale;
};

// What a block with the largest magnitude `most` is multiplied with, and its
// scale. Both are NaN for a block that is lost, which makes NaNs (0x7f) of all
// its payload.
struct BlockFactors {
  float reciprocal;
  float scale;
};

template <RowType kType>
__device__ BlockFactors FactorsOf(uint32_t most) {
  constexpr float kAmaxMin = 0x1p-100f;  // of blocks of next to nothing
  constexpr float kPerAmax = 1 / 448.0f;
  const float nan = __uint_as_float(0x7fc00000);
  const bool lost = most >= Magnitudes<kType>::kInfinity;
  const float amax = fmaxf(Magnitudes<kType>::ToFloat(most), kAmaxMin);
  return {lost ? nan : Reciprocal(amax),
          lost ? nan : __fmul_rn(amax, kPerAmax)};
}

template <RowType kType>
__device__ uint2 Quantize(const LaneRow<kType>& in, float reciprocal) {
  const LaneFloats<kType> values = LaneFloats<kType>::Of(in);
  float scaled[kLaneElements];
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    scaled[i] = __fmul_rn(values.at[i], reciprocal);
  }
  return {Payload4(scaled[0], scaled[1], scaled[2], scaled[3]),
          Payload4(scaled[4], scaled[5], scaled[6], scaled[7])};
}

template <RowType kType>
__device__ LaneRow<kType> Dequantize(const LanePayload& in) {
  LaneFloats<kType> values;
  const uint32_t words[2] = {in.bytes.x, in.bytes.y};
#pragma unroll
  for (int i = 0; i < kLaneElements / 2; ++i) {
    const auto pair =
        static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2)));
    const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    const float2 floats = __half22float2(__half2(halves));
    values.at[2 * i] = __fmul_rn(floats.x, in.scale);
    values.at[2 * i + 1] = __fmul_rn(floats.y, in.scale);
  }
  return values.Round();
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_E4M3_CUH_
