#include "python/open_transport.h"

#include <cstdint>
#include <string_view>

#include "base/topology.h"
#include "transport/availability.h"
#include "transport/fake.h"
#include "transport/ofi.h"
#include "transport/shm.h"

namespace jaxfabric {
namespace {

constexpr std::string_view kOfiPrefix = "ofi/";
constexpr const char* kOfiProviders[] = {"efa-direct", "efa", "tcp", "shm"};

}  // namespace

StatusOr<std::unique_ptr<Transport>> OpenTransport(
    const std::string& kind, const std::string& secret,
    const std::map<std::string, double>& chaos, const std::string& network,
    const std::string& libfabric, const std::vector<std::string>& nics) {
  if (kind == "shm") return OpenShmTransport({.job_secret = secret});
  if (kind.starts_with(kOfiPrefix)) {
    return OpenOfiTransport({.provider = kind.substr(kOfiPrefix.size()),
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
    const auto found = chaos.find(name);
    return found == chaos.end() ? otherwise : found->second;
  };
  fake.seed = static_cast<uint64_t>(number("seed", 0));
  fake.pieces_max = static_cast<uint32_t>(number("pieces_max", 4));
  fake.delay_max_ns = static_cast<int64_t>(number("delay_max_s", 0) * 1e9);
  fake.again_share = number("again_share", 0);
  return OpenFakeTransport(fake);
}

std::vector<std::vector<std::string>> ShareNics(
    const std::string& kind, const std::string& libfabric,
    const std::vector<uint32_t>& cores) {
  if (!kind.starts_with(kOfiPrefix)) return {};
  // libfabric calls a device "rdmap0s6-rdm" that the system calls "rdmap0s6".
  std::map<std::string, std::string> nic_by_device;
  std::vector<std::string> devices;
  for (const std::string& nic :
       OfiNicNames(kind.substr(kOfiPrefix.size()), libfabric)) {
    devices.push_back(nic.substr(0, nic.rfind("-rdm")));
    nic_by_device[devices.back()] = nic;
  }
  std::vector<RankPlace> places;
  places.reserve(cores.size());
  for (const uint32_t core : cores) places.push_back({.core = core});
  auto shares = SplitNics(Topology::OfThisMachine(), devices, places);
  for (auto& share : shares) {
    for (std::string& device : share) device = nic_by_device[device];
  }
  return shares;
}

std::vector<TransportRow> TransportStates(const std::string& libfabric) {
  std::vector<TransportRow> rows = {{"shm",
                                     AvailabilityName(Availability::kUsable),
                                     "ranks of one host share memory", ""}};
  for (const char* provider : kOfiProviders) {
    const TransportState state = OfiState(provider, libfabric);
    rows.emplace_back(std::string(kOfiPrefix) + provider,
                      AvailabilityName(state.availability), state.reason,
                      state.fix);
  }
  return rows;
}

}  // namespace jaxfabric
