// OpenTransport: from the names that Python gives transports to transports.

#ifndef JAXFABRIC_PYTHON_OPEN_TRANSPORT_H_
#define JAXFABRIC_PYTHON_OPEN_TRANSPORT_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

// `options` are the numbers that `kind` takes: of verbs its VerbsSettings, of
// the fake transport its chaos. `network` is the fake transport's, `libfabric`
// (a path) the ofi transports'; `nics` belong to both ofi and verbs.
StatusOr<std::unique_ptr<Transport>> OpenTransport(
    const std::string& kind, const std::string& secret,
    const std::map<std::string, double>& options, const std::string& network,
    const std::string& libfabric = "",
    const std::vector<std::string>& nics = {});

// The NICs of this host, evenly over its processes: to each the closest to its
// GPUs (PCI addresses), then to the core that it runs on. Nothing where `kind`
// has none to choose from.
std::vector<std::vector<std::string>> ShareNics(
    const std::string& kind, const std::string& libfabric,
    const std::vector<uint32_t>& cores,
    const std::vector<std::vector<std::string>>& gpus);

// Those NICs of this host that are closest to a process that has `gpus` and may
// run on `cores`. Nothing where `kind` has none to choose from.
std::vector<std::string> NearestNics(const std::string& kind,
                                     const std::string& libfabric,
                                     const std::vector<uint32_t>& cores,
                                     const std::vector<std::string>& gpus);

// The cores of the NUMA nodes of `nics`; see Topology::CoresNear.
std::vector<uint32_t> CoresNear(const std::vector<std::string>& nics);

// Name, state, reason and fix of each transport that users choose from.
using TransportRow =
    std::tuple<std::string, std::string, std::string, std::string>;
std::vector<TransportRow> TransportStates(const std::string& libfabric);

// What the first NIC of a transport says of itself, once it is really open.
StatusOr<DomainCaps> OpenForCaps(const std::string& kind,
                                 const std::string& libfabric);

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_OPEN_TRANSPORT_H_
