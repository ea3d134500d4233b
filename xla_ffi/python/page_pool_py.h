// PagePool for Python.

#ifndef JAXFABRIC_PYTHON_PAGE_POOL_PY_H_
#define JAXFABRIC_PYTHON_PAGE_POOL_PY_H_

#include <nanobind/nanobind.h>

namespace jaxfabric {

// After RegisterTransferEngine, which knows watchers.
void RegisterPagePool(nanobind::module_& m);

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_PAGE_POOL_PY_H_
