// TransportState: whether a transport can be used on this machine, and if not,
// why, and what to do about it.

#ifndef JAXFABRIC_TRANSPORT_AVAILABILITY_H_
#define JAXFABRIC_TRANSPORT_AVAILABILITY_H_

#include <string>

#include "base/status.h"

namespace jaxfabric {

enum class Availability {
  kNotBuilt,        // this build of jaxfabric does not contain it
  kLibraryMissing,  // the library that it opens at run time is not there
  kNoDevice,        // the library is there and finds nothing to drive
  kUsable,
};

constexpr const char* AvailabilityName(Availability availability) {
  switch (availability) {
    case Availability::kNotBuilt:
      return "not built";
    case Availability::kLibraryMissing:
      return "library missing";
    case Availability::kNoDevice:
      return "no device";
    case Availability::kUsable:
      return "usable";
  }
  return "unknown";
}

struct TransportState {
  Availability availability = Availability::kUsable;
  std::string reason;  // one sentence: what was found, or what is missing
  std::string fix;     // what to do; empty where it is usable

  // OK if usable; else kUnimplemented, with reason and fix.
  Status ToStatus(const std::string& transport) const {
    if (availability == Availability::kUsable) return OkStatus();
    return Status(StatusCode::kUnimplemented,
                  "transport '" + transport + "' (" +
                      AvailabilityName(availability) + "): " + reason + "; " +
                      fix);
  }
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_AVAILABILITY_H_
