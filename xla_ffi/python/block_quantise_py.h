// QuantiseBlocks for Python.

#ifndef JAXFABRIC_PYTHON_BLOCK_QUANTISE_PY_H_
#define JAXFABRIC_PYTHON_BLOCK_QUANTISE_PY_H_

#include <nanobind/nanobind.h>

namespace jaxfabric {

void RegisterBlockQuantise(nanobind::module_& m);

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_BLOCK_QUANTISE_PY_H_
