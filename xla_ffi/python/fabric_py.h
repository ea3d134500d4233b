// Python's hold on one Fabric.

#ifndef JAXFABRIC_PYTHON_FABRIC_PY_H_
#define JAXFABRIC_PYTHON_FABRIC_PY_H_

#include <nanobind/nanobind.h>

namespace jaxfabric {

void RegisterFabric(nanobind::module_& m);

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_FABRIC_PY_H_
