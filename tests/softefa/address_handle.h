// Address handles: the peers that a NIC knows. A target accepts RDMA only from
// an initiator for which it has a handle, which is why the engine's address
// exchange goes both ways; and completions name their sender by handle number.

#ifndef JAXFABRIC_TESTS_SOFTEFA_ADDRESS_HANDLE_H_
#define JAXFABRIC_TESTS_SOFTEFA_ADDRESS_HANDLE_H_

#include <infiniband/verbs.h>

#include <cstdint>
#include <optional>

#include "tests/softefa/wire.h"

namespace jaxfabric::softefa {

Gid GidOf(const ibv_ah* handle);

// The number of this process's handle for `gid` on a NIC, if there is one.
std::optional<uint16_t> HandleNumber(int nic, const Gid& gid);

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_ADDRESS_HANDLE_H_
