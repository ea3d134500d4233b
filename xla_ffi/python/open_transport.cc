#include "python/open_transport.h"

#include <cstdint>
#include <string_view>

#include "base/topology.h"
#include "transport/availability.h"
#include "transport/fake.h"
#include "transport/ofi.h"
#include "transport/shm.h"
#include "transport/verbs.h"

namespace jaxfabric {
namespace {

constexpr std::string_view kOfiPrefix = "ofi/";
constexpr const char kVerbs[] = "verbs";
constexpr const char* kOfiProviders[] = {"efa-direct", "efa", "tcp", "shm"};

std::string ProviderOf(const std::string& kind) {
  return kind.substr(kOfiPrefix.size());
}

// Of the NICs that `kind` has to choose from.
std::vector<std::string> NicNames(const std::string& kind,
                                  const std::string& libfabric) {
  if (kind == kVerbs) return VerbsNicNames("");
  if (!kind.starts_with(kOfiPrefix)) return {};
  return OfiNicNames(ProviderOf(kind), libfabric);
}

}  // namespace

StatusOr<std::unique_ptr<Transport>> OpenTransport(
    const std::string& kind, const std::string& secret,
    const std::map<std::string, double>& options, const std::string& network,
    const std::string& libfabric, const std::vector<std::string>& nics) {
  if (kind == "shm") return OpenShmTransport({.job_secret = secret});
  if (kind == kVerbs) {
    JF_ASSIGN_OR_RETURN(const VerbsSettings settings,
                        ParseVerbsSettings(options));
    return OpenVerbsTransport(
        {.nics = nics, .job_secret = secret, .settings = settings});
  }
  if (kind.starts_with(kOfiPrefix)) {
    return OpenOfiTransport({.provider = ProviderOf(kind),
                             .library = libfabric,
                             .nics = nics,
                             .job_secret = secret});
  }
  if (kind != "fake") {
    return Status(StatusCode::kUnimplemented,
                  "there is no transport '" + kind + "'");
  }
  FakeOptions fake;
  fake.network = network;
  fake.job_secret = secret;
  const auto number = [&](const char* name, double otherwise) {
    const auto found = options.find(name);
    return found == options.end() ? otherwise : found->second;
  };
  fake.seed = static_cast<uint64_t>(number("seed", 0));
  fake.pieces_max = static_cast<uint32_t>(number("pieces_max", 4));
  fake.delay_max_ns = static_cast<int64_t>(number("delay_max_s", 0) * 1e9);
  fake.again_share = number("again_share", 0);
  return OpenFakeTransport(fake);
}

std::vector<std::vector<std::string>> ShareNics(
    const std::string& kind, const std::string& libfabric,
    const std::vector<uint32_t>& cores,
    const std::vector<std::vector<std::string>>& gpus) {
  const std::vector<std::string> nics = NicNames(kind, libfabric);
  if (nics.empty()) return {};
  std::vector<RankPlace> places(cores.size());
  for (size_t i = 0; i < cores.size(); ++i) {
    places[i].core = cores[i];
    if (i < gpus.size()) places[i].gpus = gpus[i];
  }
  return SplitNics(Topology::OfThisMachine(), nics, places);
}

std::vector<std::string> NearestNics(const std::string& kind,
                                     const std::string& libfabric,
                                     const std::vector<uint32_t>& cores,
                                     const std::vector<std::string>& gpus) {
  const std::vector<std::string> nics = NicNames(kind, libfabric);
  if (nics.empty()) return {};
  return Topology::OfThisMachine().Nearest(nics, cores, gpus);
}

std::vector<uint32_t> CoresNear(const std::vector<std::string>& nics) {
  if (nics.empty()) return {};
  return Topology::OfThisMachine().CoresNear(nics);
}

std::vector<TransportRow> TransportStates(const std::string& libfabric) {
  std::vector<TransportRow> rows = {{"shm",
                                     AvailabilityName(Availability::kUsable),
                                     "ranks of one host share memory", ""}};
  const auto add = [&](const std::string& kind, const TransportState& state) {
    rows.emplace_back(kind, AvailabilityName(state.availability), state.reason,
                      state.fix);
  };
  add(kVerbs, VerbsState(""));
  for (const char* provider : kOfiProviders) {
    add(std::string(kOfiPrefix) + provider, OfiState(provider, libfabric));
  }
  return rows;
}

StatusOr<DomainCaps> OpenForCaps(const std::string& kind,
                                 const std::string& libfabric) {
  JF_ASSIGN_OR_RETURN(const std::unique_ptr<Transport> transport,
                      OpenTransport(kind, "", {}, "", libfabric));
  JF_ASSIGN_OR_RETURN(const std::unique_ptr<Domain> domain,
                      transport->OpenDomain());
  return domain->caps();
}

}  // namespace jaxfabric
