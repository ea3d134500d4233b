// On which cores a thread runs.

#ifndef JAXFABRIC_BASE_THREAD_CORES_H_
#define JAXFABRIC_BASE_THREAD_CORES_H_

#include <cstdint>
#include <vector>

namespace jaxfabric {

// Keeps the calling thread on those of `cores` that it may run on. If it may
// run on none of them, or none are given, it stays where it is.
void KeepThisThreadOn(const std::vector<uint32_t>& cores);

}  // namespace jaxfabric

#endif  // JAXFABRIC_BASE_THREAD_CORES_H_
