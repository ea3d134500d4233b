#include "transport/ofi.h"

#include <cstdlib>
#include <memory>
#include <string>

#include "tests/cpp/transport_conformance.h"
#include "transport/ofi_address.h"

namespace jaxfabric {
namespace {

constexpr char kSecret[] = "common secret";

std::string FromEnvironment(const char* name, const char* otherwise) {
  const char* const given = std::getenv(name);
  return given == nullptr || *given == '\0' ? otherwise : given;
}

// tcp over loopback; others on request, since they need a device.
std::string Provider() {
  return FromEnvironment("JAXFABRIC_TEST_OFI_PROVIDER", "tcp");
}

std::string Library() { return FromEnvironment("JAXFABRIC_LIBFABRIC", ""); }

std::unique_ptr<Transport> Open(const std::string& job_secret) {
  StatusOr<std::unique_ptr<Transport>> transport = OpenOfiTransport(
      {.provider = Provider(), .library = Library(), .job_secret = job_secret});
  EXPECT_TRUE(transport.ok()) << transport.status().message();
  return transport.ok() ? *std::move(transport) : nullptr;
}

#define SKIP_UNLESS_USABLE()                                         \
  do {                                                               \
    const TransportState state = OfiState(Provider(), Library());    \
    if (state.availability != Availability::kUsable) {               \
      GTEST_SKIP() << state.ToStatus("ofi/" + Provider()).message(); \
    }                                                                \
  } while (false)

std::vector<TransportFactory> Factories() {
  const TransportState state = OfiState(Provider(), Library());
  if (state.availability != Availability::kUsable) {
    std::fprintf(stderr, "ofi_test runs without a device: %s\n",
                 state.ToStatus("ofi/" + Provider()).message().c_str());
    return {};
  }
  return {{.name = "Plain",
           .open = Open,
           .kill = nullptr,
           .make_foreign = nullptr,
           // Only TCP can be asked whether somebody listens.
           .finds_stale_later = Provider() != "tcp"}};
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TransportConformance);
INSTANTIATE_TEST_SUITE_P(Ofi, TransportConformance,
                         testing::ValuesIn(Factories()), TransportFactoryName);

}  // namespace
}  // namespace jaxfabric
