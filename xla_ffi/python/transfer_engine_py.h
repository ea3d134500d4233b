// Python's hold on one TransferEngine.

#ifndef JAXFABRIC_PYTHON_TRANSFER_ENGINE_PY_H_
#define JAXFABRIC_PYTHON_TRANSFER_ENGINE_PY_H_

#include <nanobind/nanobind.h>

namespace jaxfabric {

void RegisterTransferEngine(nanobind::module_& m);

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_TRANSFER_ENGINE_PY_H_
