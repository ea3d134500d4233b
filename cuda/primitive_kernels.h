// The kernels of barrier, put and wait: their arguments and their launch.

#ifndef JAXFABRIC_CUDA_PRIMITIVE_KERNELS_H_
#define JAXFABRIC_CUDA_PRIMITIVE_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "group_state.h"

namespace jaxfabric::cuda {

// A put of `bytes` from `source`. Target and offset are in device memory: they
// may be results of the same program.
struct PutArguments {
  const char* source;
  int64_t bytes;
  const int32_t* target;  // rank; negative writes and counts nothing
  const int32_t* offset;  // in the window, in elements
  int64_t element_bytes;
  uint64_t window_begin;  // in the heap
  uint64_t window_bytes;
  int32_t counter;  // that the put adds 1 to, at the target
};

// Waits until `count` more puts have come, then copies the window out.
struct WaitArguments {
  char* out;
  uint64_t window_begin;
  uint64_t window_bytes;
  int32_t counter;
  uint64_t count;
};

cudaError_t LaunchBarrier(const Peers& peers, cudaStream_t stream);
cudaError_t LaunchPut(const Peers& peers, const PutArguments& put,
                      int blocks_max, cudaStream_t stream);
cudaError_t LaunchWait(const Peers& peers, const WaitArguments& wait,
                       int blocks_max, cudaStream_t stream);

// Loads the kernels on the current device: see moe_kernels.h.
cudaError_t PreloadPrimitiveKernels();

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_PRIMITIVE_KERNELS_H_
