// The kernels of barrier, put, put_pages, wait and exchange: their arguments
// and their launch.

#ifndef JAXFABRIC_CUDA_PRIMITIVE_KERNELS_H_
#define JAXFABRIC_CUDA_PRIMITIVE_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "group_state.h"

namespace jaxfabric::cuda {

// Where puts may write, and what they count.
struct WindowPlace {
  uint64_t begin;  // in the heap
  uint64_t bytes;
  int32_t counter;  // that a put adds 1 to, at its target
};

// Puts of `bytes` each. Targets and offsets are in device memory: they may be
// results of the same program.
struct PutArguments {
  const char* source;  // slice i begins at i * bytes
  int64_t bytes;
  int32_t slices;  // 1, or one for each rank
  const int32_t*
      target;  // rank of the only slice; null: slice i goes to rank i
  const int32_t* offset;  // [slices], in the window, in elements
  int64_t element_bytes;
  WindowPlace window;
  // A negative target or offset writes and counts nothing.
};

// One put of pages[source_index[i]] to page target_index[i] of the window, for
// each entry without a negative index.
struct PutPagesArguments {
  const char* pages;
  int64_t page_bytes;
  int32_t source_pages;
  int32_t window_pages;
  const int32_t* source_index;  // [entries]
  const int32_t* target_index;  // [entries]
  int32_t entries;
  const int32_t* target;  // rank; negative writes and counts nothing
  uint32_t* stamps;       // [window_pages] of this rank, zero at first
  WindowPlace window;
};

// Waits until `count` more puts have come, then copies the window out.
struct WaitArguments {
  char* out;
  WindowPlace window;
  uint64_t count;
};

// `x` to rank `to`, and into `y` what rank `from` sends; -1 is nobody, from
// whom come zeros. Ranks of the call's axes.
struct ExchangeArguments {
  const char* x;
  char* y;
  int64_t bytes;  // of either
  int32_t to;
  int32_t from;
};

// The room that it takes in a mailbox.
int64_t ExchangeMessageBytes(int64_t bytes);

cudaError_t LaunchBarrier(const Peers& peers, cudaStream_t stream);
cudaError_t LaunchPut(const Peers& peers, const PutArguments& put,
                      int blocks_max, cudaStream_t stream);
cudaError_t LaunchPutPages(const Peers& peers, const PutPagesArguments& put,
                           int blocks_max, cudaStream_t stream);
cudaError_t LaunchWait(const Peers& peers, const WaitArguments& wait,
                       int blocks_max, cudaStream_t stream);

cudaError_t LaunchExchange(const Peers& peers,
                           const ExchangeArguments& exchange, int blocks_max,
                           cudaStream_t stream);

// Load the kernels on the current device: see moe_kernels.h.
cudaError_t PreloadPrimitiveKernels();
cudaError_t PreloadExchangeKernel();

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_PRIMITIVE_KERNELS_H_
