// The conformance suite of verbs between two hosts, each with half of the
// ranks:
//
//   verbs_hosts_test serve ADDRESS PORT DEVICE[,DEVICE...]   on one of them
//   verbs_hosts_test run ADDRESS PORT DEVICE[,DEVICE...]     on the other
//
// Tests that open many Domains of a Transport need to be alone with several
// devices, since a device reaches none but its own other end.
//
// tests/rxe do both. Without such words there are no tests.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "tests/cpp/remote_transport.h"
#include "tests/cpp/transport_conformance.h"
#include "transport/verbs.h"

namespace jaxfabric {
namespace {

struct Words {
  std::string role;
  std::string address;
  uint16_t port = 0;
  std::vector<std::string> devices;
};

Words& Given() {
  static auto* const words = new Words;
  return *words;
}

StatusOr<std::unique_ptr<Transport>> OpenHere(const std::string& job_secret) {
  // So that tests wait neither for lost packets nor for the dead as long as
  // users do. soft-RoCE counts each packet that overtakes another as a retry,
  // whatever arrives in between, and would break a large write: 7 is no limit.
  return OpenVerbsTransport(
      {.nics = Given().devices,
       .job_secret = job_secret,
       .settings = {.timeout = 14, .retry_count = 7, .patience_s = 5}});
}

// In turn, so that peers are on different hosts.
std::unique_ptr<Transport> Open(const std::string& job_secret) {
  static size_t opened = 0;
  auto transport =
      ++opened % 2 == 1
          ? OpenHere(job_secret)
          : OpenRemoteTransport(Given().address, Given().port, job_secret);
  EXPECT_TRUE(transport.ok()) << transport.status().message();
  return transport.ok() ? *std::move(transport) : nullptr;
}

std::vector<TransportFactory> Factories() {
  if (Given().role != "run") return {};
  return {{.name = "Hosts",
           .open = Open,
           .kill = nullptr,
           .make_foreign = nullptr,
           .finds_stale_later = true}};
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TransportConformance);
INSTANTIATE_TEST_SUITE_P(Verbs, TransportConformance,
                         testing::ValuesIn(Factories()), TransportFactoryName);

int Main(int argc, char** argv) {
  if (argc >= 5) {
    Given() = {argv[1],
               argv[2],
               static_cast<uint16_t>(std::strtoul(argv[3], nullptr, 10)),
               {}};
    std::istringstream text(argv[4]);
    for (std::string device; std::getline(text, device, ',');) {
      Given().devices.push_back(device);
    }
  }
  if (Given().role == "serve") {
    const Status failed =
        ServeTransports(Given().address, Given().port, OpenHere);
    std::fprintf(stderr, "%s\n", failed.message().c_str());
    return 1;
  }
  ConformanceRank::before_use = MirrorToOtherHost;
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

}  // namespace
}  // namespace jaxfabric

int main(int argc, char** argv) { return jaxfabric::Main(argc, argv); }
