// Loads and stores whose order or scope the C++ of nvcc does not express, in
// PTX. Names say order and scope: Relaxed/Acquire/Release, Gpu/System.

#ifndef JAXFABRIC_CUDA_DEVICE_MEMORY_CUH_
#define JAXFABRIC_CUDA_DEVICE_MEMORY_CUH_

#include <cstdint>

namespace jaxfabric::cuda {

inline constexpr uint32_t kAllLanes = 0xffffffffu;
inline constexpr int kLanes = 32;

__device__ inline uint64_t LoadAcquireSystem(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(at)
               : "memory");
  return value;
}

__device__ inline uint64_t LoadRelaxedSystem(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(at)
               : "memory");
  return value;
}

__device__ inline void StoreReleaseSystem(uint64_t* at, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;"
               :
               : "l"(at), "l"(value)
               : "memory");
}

__device__ inline void StoreRelaxedSystem(uint64_t* at, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;"
               :
               : "l"(at), "l"(value)
               : "memory");
}

__device__ inline void AddReleaseSystem(uint64_t* at, uint64_t value) {
  asm volatile("red.release.sys.global.add.u64 [%0], %1;"
               :
               : "l"(at), "l"(value)
               : "memory");
}

__device__ inline uint32_t LoadAcquireGpu(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(at)
               : "memory");
  return value;
}

__device__ inline uint32_t LoadRelaxedGpu(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(at)
               : "memory");
  return value;
}

__device__ inline void StoreReleaseGpu(uint32_t* at, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;"
               :
               : "l"(at), "r"(value)
               : "memory");
}

__device__ inline uint64_t LoadAcquireGpu(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(at)
               : "memory");
  return value;
}

__device__ inline void StoreReleaseGpu(uint64_t* at, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;"
               :
               : "l"(at), "l"(value)
               : "memory");
}

// Returns the value before.
__device__ inline uint32_t AddAcquireReleaseGpu(uint32_t* at, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(value)
               : "memory");
  return before;
}

// For counts that order nothing. Returns the value before.
__device__ inline uint32_t AddRelaxedGpu(uint32_t* at, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(value)
               : "memory");
  return before;
}

// Data that nobody writes while the kernel runs, so that the compiler may move
// the load. Not L1::no_allocate: what is read so, again and again, loses its
// place in L2 little by little (docs/design/0009-cuda.md).
__device__ inline uint4 LoadRow(const void* at) {
  uint4 v;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(at));
  return v;
}

// Data that is read once, where the load stands.
__device__ inline uint4 LoadStreamingNow(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

__device__ inline void StoreStreaming(void* at, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ inline uint64_t GlobalNanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_DEVICE_MEMORY_CUH_
