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

// `chaos` and `network` are options of the fake transport, `libfabric` (a path)
// and `nics` of the ofi transports; see OfiOptions.
StatusOr<std::unique_ptr<Transport>> OpenTransport(
    const std::string& kind, const std::string& secret,
    const std::map<std::string, double>& chaos, const std::string& network,
    const std::string& libfabric = "",
    const std::vector<std::string>& nics = {});

// The NICs of this host, evenly over its processes: to each the closest to the
// core that it runs on. Nothing where `kind` has none to choose from.
std::vector<std::vector<std::string>> ShareNics(
    const std::string& kind, const std::string& libfabric,
    const std::vector<uint32_t>& cores);

// Name, state, reason and fix of each transport that users choose from.
using TransportRow =
    std::tuple<std::string, std::string, std::string, std::string>;
std::vector<TransportRow> TransportStates(const std::string& libfabric);

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_OPEN_TRANSPORT_H_
