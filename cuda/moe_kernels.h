// The kernels of dispatch, combine and replay: their arguments and their
// launch.

#ifndef JAXFABRIC_CUDA_MOE_KERNELS_H_
#define JAXFABRIC_CUDA_MOE_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "group_state.h"
#include "moe_shape.h"

namespace jaxfabric::cuda {

// How much of the device a kernel takes.
struct Grid {
  int blocks;       // of 512 threads; all of them must be resident at once
  int send_blocks;  // that only send, while the others receive; 0: all do both
  int segments_per_item;  // of a row that a warp takes at a time
  // Dispatch: the receiving blocks make one plan together, in global memory,
  // for many tokens; else each makes the whole plan in its shared memory.
  bool plan_together;
  // Dispatch of scaled rows, once per rank, planned together: a sending warp
  // places this rank's own rows too, from so many items on, when it may expect
  // the plan. 0: receivers place all of them.
  int items_before_plan;
};

// Operands and results of dispatch; all in device memory of this rank.
struct DispatchBuffers {
  const char* x;         // [T, D]
  const int32_t* ids;    // [T, K]
  const float* weights;  // [T, K]
  char* tokens;          // [R, D], or [N*T, D] unique rows
  float* scales;         // [R or N*T, blocks] if shape.keep
  int32_t* group_sizes;  // [L]
  float* row_weights;    // [R]
  int32_t* row_index;    // [R], or null if shape.expand
  int32_t* recv_count;   // [N]
  int32_t* slot_row;     // [N*T, S]
  int32_t* sent;         // [N]
  int32_t* dropped;      // scalar
};

// Operands and results of combine.
struct CombineBuffers {
  const char* rows;           // [R, D], or [N*T, D] unique rows
  const float* row_weights;   // [R] or null
  const float* scalars;       // [R] or null
  const int32_t* ids;         // [T, K]
  const int32_t* recv_count;  // [N]
  const int32_t* slot_row;    // [N*T, S]
  char* y;                    // [T, D]
  float* slot_scalars;        // [T, K] or null
};

// Operands and result of replay.
struct ReplayBuffers {
  const char* x;              // [T, D]
  const int32_t* ids;         // [T, K]
  const int32_t* recv_count;  // [N]
  const int32_t* slot_row;    // [N*T, S]
  char* rows;                 // [R, D], or [N*T, D] unique rows
};

// Device memory that a dispatch of this shape needs for its plan.
size_t PlanBytes(const MoeShape& shape, Grid grid);

// What suits the shape: the measured choice, within `blocks_max`.
Grid DispatchGrid(const MoeShape& shape, int blocks_max);
Grid CombineGrid(const MoeShape& shape, int blocks_max);

// What they do is peers.phase: both halves of a call, or one of them. A first
// half needs no results, a second half sends nothing.
// `workspace` is PlanBytes() of this rank, used by one kernel at a time.
cudaError_t LaunchDispatch(const Peers& peers, const MoeShape& shape, Grid grid,
                           const DispatchBuffers& buffers, char* workspace,
                           cudaStream_t stream);
cudaError_t LaunchCombine(const Peers& peers, const MoeShape& shape, Grid grid,
                          const CombineBuffers& buffers, cudaStream_t stream);
cudaError_t LaunchReplay(const Peers& peers, const MoeShape& shape, int blocks,
                         const ReplayBuffers& buffers, cudaStream_t stream);

// Load the kernels on the current device and let them have the shared memory
// that they may ask for: a kernel that is loaded while another spins would wait
// for it.
cudaError_t PreloadDispatchKernels();
cudaError_t PreloadCombineKernels();
cudaError_t PreloadReplayKernels();

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_MOE_KERNELS_H_
