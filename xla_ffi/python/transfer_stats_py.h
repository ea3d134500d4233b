// What Python gets of TransferEngineStats.

#ifndef JAXFABRIC_PYTHON_TRANSFER_STATS_PY_H_
#define JAXFABRIC_PYTHON_TRANSFER_STATS_PY_H_

#include <nanobind/nanobind.h>

#include "engine/transfer_stats.h"

namespace jaxfabric {

// Its fields by their names; `nics` is a list, `peers` a dict by number.
nanobind::dict ToPython(const TransferEngineStats& stats);

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_TRANSFER_STATS_PY_H_
