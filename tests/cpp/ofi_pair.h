// OfiTest: two ranks over libfabric in one process, joined.

#ifndef JAXFABRIC_TESTS_CPP_OFI_PAIR_H_
#define JAXFABRIC_TESTS_CPP_OFI_PAIR_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>

#include "tests/cpp/transport_conformance.h"
#include "transport/ofi.h"

#ifdef __SANITIZE_ADDRESS__
// libfabric does not free all that it holds of a broken connection.
extern "C" __attribute__((visibility("default"))) const char*
__lsan_default_suppressions() {
  return "leak:libfabric.so";
}
#endif

namespace jaxfabric {

inline constexpr char kOfiSecret[] = "common secret";

inline std::string FromEnvironment(const char* name, const char* otherwise) {
  const char* const given = std::getenv(name);
  return given == nullptr || *given == '\0' ? otherwise : given;
}

// tcp over loopback; others on request, since they need a device.
inline std::string OfiProviderUnderTest() {
  return FromEnvironment("JAXFABRIC_TEST_OFI_PROVIDER", "tcp");
}

inline std::string OfiLibraryUnderTest() {
  return FromEnvironment("JAXFABRIC_LIBFABRIC", "");
}

inline std::unique_ptr<Transport> OpenOfi(const std::string& job_secret) {
  StatusOr<std::unique_ptr<Transport>> transport =
      OpenOfiTransport({.provider = OfiProviderUnderTest(),
                        .library = OfiLibraryUnderTest(),
                        .job_secret = job_secret});
  EXPECT_TRUE(transport.ok()) << transport.status().message();
  return transport.ok() ? *std::move(transport) : nullptr;
}

class OfiTest : public testing::Test {
 protected:
  void SetUp() override {
    const TransportState state =
        OfiState(OfiProviderUnderTest(), OfiLibraryUnderTest());
    if (state.availability != Availability::kUsable) {
      GTEST_SKIP() << state.ToStatus("ofi/" + OfiProviderUnderTest()).message();
    }
    for (int i = 0; i < 2; ++i) {
      transports_[i] = OpenOfi(kOfiSecret);
      ranks_[i] = std::make_unique<ConformanceRank>(*transports_[i], 4096);
    }
    peer_ = ranks_[0]->Add(*ranks_[1]);
  }

  bool PollUntil(const std::function<bool()>& met) {
    const Deadline deadline =
        Deadline::AfterSeconds(ConformanceRank::kPatienceSeconds);
    while (!met()) {
      if (deadline.Expired()) return false;
      for (const auto& rank : ranks_) rank->Poll();
    }
    return true;
  }

  void ExpectWorking() {
    const size_t before = ranks_[1]->immediates.size();
    EXPECT_TRUE(PollUntil([&] {
      const StatusOr<Posted> posted = ranks_[0]->domain().PostWriteImm(
          peer_, ranks_[0]->Source(0), ranks_[1]->Target(8), 8, 1, 1);
      return posted.ok() && *posted == Posted::kPosted;
    }));
    EXPECT_TRUE(
        PollUntil([&] { return ranks_[1]->immediates.size() > before; }));
    EXPECT_TRUE(ranks_[0]->losses.empty() && ranks_[1]->losses.empty());
  }

  std::unique_ptr<Transport> transports_[2];
  std::unique_ptr<ConformanceRank> ranks_[2];
  PeerId peer_ = kUnknownPeer;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_OFI_PAIR_H_
