// OfiNic: an interface that libfabric can drive with one of our providers.

#ifndef JAXFABRIC_TRANSPORT_OFI_NIC_H_
#define JAXFABRIC_TRANSPORT_OFI_NIC_H_

#include "transport/ofi_library.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <string>
#include <vector>

#include "base/status.h"
#include "transport/ofi_address.h"

namespace jaxfabric {

struct OfiNic {
  std::string name;     // "eth0", "rdmap0s6-rdm"
  std::string address;  // its IP address, or empty
  OfiLibrary::Info info;
};

// In the order in which libfabric gives them. Empty if there is none; `why`
// then holds libfabric's word for it.
std::vector<OfiNic> FindOfiNics(const OfiLibrary& library, OfiProvider provider,
                                std::string* why);

// Those that `wanted` names, in its order; see OfiOptions::nics.
StatusOr<std::vector<OfiNic>> SelectOfiNics(
    std::vector<OfiNic> nics, OfiProvider provider,
    const std::vector<std::string>& wanted);

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
#endif  // JAXFABRIC_TRANSPORT_OFI_NIC_H_
