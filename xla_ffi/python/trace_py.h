// What Python gets of a TraceRecording.

#ifndef JAXFABRIC_PYTHON_TRACE_PY_H_
#define JAXFABRIC_PYTHON_TRACE_PY_H_

#include <nanobind/nanobind.h>

#include "engine/trace.h"

namespace jaxfabric {

// (events, dropped, begin_ns, end_ns); an event is a tuple of the fields of
// TraceEvent, in their order.
nanobind::tuple ToPython(const TraceRecording& recording);

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_TRACE_PY_H_
