// Registered memory of this process, in a table that peers read. A key belongs
// to the NIC that it was registered on.

#ifndef JAXFABRIC_TESTS_SOFTEFA_MEMORY_REGION_H_
#define JAXFABRIC_TESTS_SOFTEFA_MEMORY_REGION_H_

#include <infiniband/verbs.h>

namespace jaxfabric::softefa {

// Whether `span` lies in memory of this process that its key names on `nic`.
bool IsRegistered(const ibv_sge& span, int nic);

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_MEMORY_REGION_H_
