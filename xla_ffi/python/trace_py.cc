#include "python/trace_py.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

namespace jaxfabric {

namespace nb = nanobind;

nb::tuple ToPython(const TraceRecording& recording) {
  nb::list events;
  for (const TraceEvent& event : recording.events) {
    // A label may be cut, or be a peer's: it need not be UTF-8.
    const nb::object label = nb::steal(PyUnicode_DecodeUTF8(
        event.label.data(), static_cast<Py_ssize_t>(event.label.size()),
        "replace"));
    events.append(nb::make_tuple(event.name, label, event.span, event.parent,
                                 event.begin_ns, event.end_ns, event.peer,
                                 event.nic, event.id, event.bytes,
                                 static_cast<int>(event.status)));
  }
  return nb::make_tuple(events, recording.dropped, recording.begin_ns,
                        recording.end_ns);
}

}  // namespace jaxfabric
