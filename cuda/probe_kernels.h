// Bare kernels: the least that a barrier and a put can cost, and the rate of
// the link. What the real ones are measured against, by the same route: in
// CUDA graphs by bench/, and in jitted programs by
// benchmarks/gpu_primitives.py.

#ifndef JAXFABRIC_CUDA_PROBE_KERNELS_H_
#define JAXFABRIC_CUDA_PROBE_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "group_state.h"
#include "primitive_kernels.h"

namespace jaxfabric::cuda {

enum class Probe : int64_t {
  kEmpty = 0,    // a kernel that does nothing
  kBarrier = 1,  // a flag to each peer, a spin on theirs
  kPut = 2,      // `bytes` to the next rank by one block, and a notice
  kStores = 3,   // `bytes` to the next rank by many blocks
  kPush = 4,     // the same and a copy to this rank, between two barriers
};

struct ProbeArguments {
  Probe probe;
  // Of which the first lines are for flags. kPush has place for its data twice.
  WindowPlace window;
  const char* source;
  int64_t bytes;  // a multiple of 16
};

inline constexpr int64_t kProbeData = int64_t{32} * kLineBytes;

cudaError_t LaunchProbe(const Peers& peers, const ProbeArguments& probe,
                        int blocks, cudaStream_t stream);
cudaError_t PreloadProbeKernels();

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_PROBE_KERNELS_H_
