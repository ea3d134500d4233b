// What a segment that travelled as e4m3 becomes in the program's results, from
// a warp's part of shared memory.

#ifndef JAXFABRIC_CUDA_SCALED_OUTPUT_CUH_
#define JAXFABRIC_CUDA_SCALED_OUTPUT_CUH_

#include <cstdint>

#include "device_memory.cuh"
#include "dispatch_work.cuh"
#include "e4m3.cuh"
#include "scaled_segment.cuh"

namespace jaxfabric::cuda {

template <RowType kType>
class ScaledOutput {
  using S = ScaledSegment<kType>;

 public:
  __device__ static void Write(const DispatchWork& w, const TokenRows& rows,
                               int s) {
    if (w.shape.keep) {
      WritePayload(w, rows, s);
    } else {
      WriteRows(w, rows, s);
    }
    __syncwarp();  // all have read before the buffer is filled again
  }

  __device__ static void Zero(const DispatchWork& w, int64_t row, int s) {
    const MoeShape& shape = w.shape;
    const int size = shape.keep ? 1 : kElementBytes<kType>;
    const int64_t begin = int64_t{s} * kSegmentPayload * size;
    const int64_t end =
        min(begin + int64_t{kSegmentPayload} * size, shape.row_bytes);
    char* const out = w.io.tokens + row * shape.row_bytes;
    const int step = w.aligned ? 16 : 1;
    for (int64_t at = begin + w.lane * step; at < end; at += kLanes * step) {
      if (w.aligned) {
        StoreStreaming(out + at, make_uint4(0, 0, 0, 0));
      } else {
        out[at] = 0;
      }
    }
    if (shape.keep && w.lane < S::BlocksOf(shape, s)) {
      ScalesOf(w, row, s)[w.lane] = 0.0f;
    }
  }

 private:
  __device__ static float* ScalesOf(const DispatchWork& w, int64_t row, int s) {
    return w.io.scales + row * w.shape.scale_blocks + s * kSegmentBlocks;
  }

  // Calls put(row) for each place of a row.
  template <typename Put>
  __device__ static void ForEachPlace(const MoeShape& shape,
                                      const TokenRows& rows, Put put) {
    if (!shape.expand) return put(static_cast<int64_t>(rows.unique));
    for (uint32_t left = rows.kept; left != 0; left &= left - 1) {
      put(static_cast<int64_t>(
          __shfl_sync(kAllLanes, rows.row, __ffs(left) - 1)));
    }
  }

  // The buffer's segment as it is, and its scales.
  __device__ static void WritePayload(const DispatchWork& w,
                                      const TokenRows& rows, int s) {
    const MoeShape& shape = w.shape;
    const int begin = s * kSegmentPayload;
    const int bytes = min(kSegmentPayload, shape.hidden - begin);
    const int blocks = S::BlocksOf(shape, s);
    const float scale = w.lane < blocks ? S::BufferScales(w, s)[w.lane] : 0.0f;
    ForEachPlace(shape, rows, [&](int64_t row) {
      char* const out = w.io.tokens + row * shape.row_bytes + begin;
      if (w.aligned) {
#pragma unroll
        for (int i = 0; i < kSegmentPayload / 16 / kLanes; ++i) {
          const int at = (i * kLanes + w.lane) * 16;
          if (at >= bytes) continue;
          StoreStreaming(out + at,
                         *reinterpret_cast<const uint4*>(S::Buffer(w) + at));
        }
      } else {
        for (int at = w.lane; at < bytes; at += kLanes)
          out[at] = S::Buffer(w)[at];
      }
      if (w.lane < blocks) ScalesOf(w, row, s)[w.lane] = scale;
    });
  }

  // The buffer's segment as rows of the type that was sent.
  __device__ static void WriteRows(const DispatchWork& w, const TokenRows& rows,
                                   int s) {
    constexpr int kSize = kElementBytes<kType>;
    const MoeShape& shape = w.shape;
    const float* const scales = S::BufferScales(w, s);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int element = S::ElementAt(w, s, c);
      const bool inside = element < shape.hidden;
      LanePayload in = {{0, 0}, 0.0f};
      if (inside) {
        in.bytes = *reinterpret_cast<const uint2*>(
            S::Buffer(w) + c * S::kChunkElements + w.lane * kLaneElements);
        in.scale = scales[2 * c + w.lane / kBlockLanes];
      }
      const LaneRow<kType> values = Dequantize<kType>(in);
      ForEachPlace(shape, rows, [&](int64_t row) {
        char* const out =
            w.io.tokens + row * shape.row_bytes + int64_t{element} * kSize;
        if (w.aligned) {
#pragma unroll
          for (int v = 0; v < S::kVectors; ++v) {
            if (inside) StoreStreaming(out + v * 16, values.vectors[v]);
          }
        } else {
          StoreBytes(out, values, shape.hidden - element);
        }
      });
    }
  }

  __device__ __noinline__ static void StoreBytes(char* at,
                                                 LaneRow<kType> values,
                                                 int left) {
    const auto* const bytes = reinterpret_cast<const char*>(&values);
    for (int b = 0; b < min(left * kElementBytes<kType>, S::kVectors * 16);
         ++b) {
      at[b] = bytes[b];
    }
  }
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_SCALED_OUTPUT_CUH_
