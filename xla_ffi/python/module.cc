// _native: the extension module. The only place that knows Python.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "handlers/handlers.h"
#include "python/block_quantise_py.h"
#include "python/fabric_py.h"
#include "python/page_pool_py.h"
#include "python/transfer_engine_py.h"

namespace nb = nanobind;

namespace {

template <typename Handler>
nb::capsule Target(Handler* handler) {
  // A function as an object pointer is what XLA takes capsules to hold.
  return nb::capsule(reinterpret_cast<void*>(handler));  // NOLINT
}

nb::dict Targets() {
  nb::dict targets;
  targets["jaxfabric_put"] = Target(&jaxfabric::JaxfabricPut);
  targets["jaxfabric_put_pages"] = Target(&jaxfabric::JaxfabricPutPages);
  targets["jaxfabric_scatter"] = Target(&jaxfabric::JaxfabricScatter);
  targets["jaxfabric_send_layer"] = Target(&jaxfabric::JaxfabricSendLayer);
  targets["jaxfabric_signal"] = Target(&jaxfabric::JaxfabricSignal);
  targets["jaxfabric_wait"] = Target(&jaxfabric::JaxfabricWait);
  targets["jaxfabric_barrier"] = Target(&jaxfabric::JaxfabricBarrier);
  targets["jaxfabric_exchange"] = Target(&jaxfabric::JaxfabricExchange);
  targets["jaxfabric_route"] = Target(&jaxfabric::JaxfabricRoute);
  targets["jaxfabric_route_start"] = Target(&jaxfabric::JaxfabricRouteStart);
  targets["jaxfabric_route_done"] = Target(&jaxfabric::JaxfabricRouteDone);
  targets["jaxfabric_replay"] = Target(&jaxfabric::JaxfabricReplay);
  targets["jaxfabric_reduce"] = Target(&jaxfabric::JaxfabricReduce);
  targets["jaxfabric_reduce_start"] = Target(&jaxfabric::JaxfabricReduceStart);
  targets["jaxfabric_reduce_done"] = Target(&jaxfabric::JaxfabricReduceDone);
  return targets;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("ffi_api_version", &jaxfabric::FfiApiVersion);
  m.def("targets", &Targets);
  jaxfabric::RegisterFabric(m);
  jaxfabric::RegisterTransferEngine(m);
  jaxfabric::RegisterPagePool(m);
  jaxfabric::RegisterBlockQuantise(m);
}
