#include "transport/ofi_nic.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace jaxfabric {
namespace {

constexpr char kLoopback[] = "lo";
// Domains of one rank.
constexpr size_t kNicsMax = 8;

// Which provider of libfabric, and which of its fabrics, stand behind ours.
struct Names {
  const char* provider;
  const char* fabric;  // null: any
};

Names NamesOf(OfiProvider provider) {
  switch (provider) {
    case OfiProvider::kEfa:
      return {"efa", "efa"};
    case OfiProvider::kEfaDirect:
      return {"efa", "efa-direct"};
    case OfiProvider::kShm:
      return {"shm", nullptr};
    case OfiProvider::kTcp:
      break;
  }
  return {"tcp", nullptr};
}

OfiLibrary::Info Hints(const OfiLibrary& library, OfiProvider provider,
                       bool receives_for_data) {
  OfiLibrary::Info hints = library.NewInfo();
  const Names names = NamesOf(provider);
  hints->caps = FI_MSG | FI_SEND | FI_RECV | FI_RMA | FI_WRITE |
                FI_REMOTE_WRITE | FI_LOCAL_COMM | FI_SOURCE;
  // tcp itself, not a layer over it, is found on loopback only by those who do
  // not ask for this; all its interfaces can do it.
  const bool host_only =
      provider == OfiProvider::kShm || provider == OfiProvider::kTcp;
  if (!host_only) hints->caps |= FI_REMOTE_COMM;
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  if (receives_for_data) hints->mode |= FI_RX_CQ_DATA;
  hints->ep_attr->type = FI_EP_RDM;
  // libfabric frees what it finds here.
  hints->fabric_attr->prov_name = strdup(names.provider);
  if (names.fabric != nullptr) hints->fabric_attr->name = strdup(names.fabric);
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR |
                                FI_MR_ALLOCATED | FI_MR_PROV_KEY |
                                FI_MR_ENDPOINT;
  hints->domain_attr->threading = FI_THREAD_DOMAIN;
  hints->domain_attr->cq_data_size = sizeof(uint32_t);
  hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
  hints->tx_attr->msg_order = FI_ORDER_NONE;
  hints->rx_attr->msg_order = FI_ORDER_NONE;
  return hints;
}

std::string AddressOf(const fi_info& info) {
  char text[INET6_ADDRSTRLEN] = {};
  if (info.src_addr == nullptr) return "";
  if (info.addr_format == FI_SOCKADDR_IN) {
    const auto* in = static_cast<const sockaddr_in*>(info.src_addr);
    inet_ntop(AF_INET, &in->sin_addr, text, sizeof(text));
  } else if (info.addr_format == FI_SOCKADDR_IN6) {
    const auto* in = static_cast<const sockaddr_in6*>(info.src_addr);
    inet_ntop(AF_INET6, &in->sin6_addr, text, sizeof(text));
  }
  return text;
}

void AppendNics(const OfiLibrary& library, OfiProvider provider,
                const fi_info* list, std::vector<OfiNic>* nics) {
  const Names names = NamesOf(provider);
  for (const fi_info* info = list; info != nullptr; info = info->next) {
    const std::string_view found = info->fabric_attr->prov_name;
    // "tcp" itself before "tcp;ofi_rxm", which is all that libfabric 1 has.
    const bool exact = found == names.provider;
    const bool layered = found == std::string(names.provider) + ";ofi_rxm";
    if ((!exact && !layered) || info->domain_attr->name == nullptr) continue;
    if (names.fabric != nullptr &&
        std::string_view(info->fabric_attr->name) != names.fabric) {
      continue;
    }
    OfiNic nic = {info->domain_attr->name, AddressOf(*info),
                  library.Copy(info)};
    const bool known =
        std::any_of(nics->begin(), nics->end(), [&](const OfiNic& other) {
          return other.name == nic.name && other.address == nic.address;
        });
    if (!known) nics->push_back(std::move(nic));
  }
}

bool IsIpv6(const OfiNic& nic) {
  return nic.info->addr_format == FI_SOCKADDR_IN6;
}

}  // namespace

std::vector<OfiNic> FindOfiNics(const OfiLibrary& library, OfiProvider provider,
                                std::string* why) {
  std::vector<OfiNic> nics;
  // EFA without "unsolicited write receive" is found only by those who say that
  // they post receives for immediates.
  for (const bool receives_for_data : {false, true}) {
    int error = 0;
    const OfiLibrary::Info hints = Hints(library, provider, receives_for_data);
    const OfiLibrary::Info found = library.GetInfo(hints.get(), &error);
    if (found != nullptr) {
      AppendNics(library, provider, found.get(), &nics);
    } else {
      *why = library.ErrorText(error);
    }
    if (!nics.empty()) break;
  }
  // An interface has one address of each kind at least; the older kind first.
  std::stable_partition(nics.begin(), nics.end(),
                        [](const OfiNic& nic) { return !IsIpv6(nic); });
  return nics;
}

StatusOr<std::vector<OfiNic>> SelectOfiNics(
    std::vector<OfiNic> nics, OfiProvider provider,
    const std::vector<std::string>& wanted) {
  std::vector<std::string> names = wanted;
  if (names.empty() && provider == OfiProvider::kTcp) names = {kLoopback};
  if (names.size() > kNicsMax) {
    return Status(StatusCode::kInvalidArgument,
                  std::to_string(names.size()) +
                      " interfaces are named, and a rank uses at most " +
                      std::to_string(kNicsMax) +
                      "; name the best of them in JAXFABRIC_NICS");
  }
  std::vector<OfiNic> selected;
  for (const std::string& name : names) {
    const auto found =
        std::find_if(nics.begin(), nics.end(), [&](const OfiNic& nic) {
          return nic.info != nullptr &&
                 (nic.name == name || nic.address == name);
        });
    if (found == nics.end()) {
      std::string known;
      for (const OfiNic& nic : nics) {
        known += (known.empty() ? "" : ", ") + nic.name;
        if (!nic.address.empty()) known += " (" + nic.address + ")";
      }
      std::string text = "ofi/";
      text.append(OfiProviderName(provider))
          .append(" has no interface '")
          .append(name)
          .append("'; there are ")
          .append(known)
          .append("; set JAXFABRIC_NICS to some of them");
      return Status(StatusCode::kInvalidArgument, text);
    }
    selected.push_back(std::move(*found));
  }
  if (!names.empty()) return selected;
  for (OfiNic& nic : nics) {
    const bool known = std::any_of(
        selected.begin(), selected.end(),
        [&](const OfiNic& other) { return other.name == nic.name; });
    if (!known) selected.push_back(std::move(nic));
  }
  return selected;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
