#include "transport/ofi.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/unique_fd.h"
#include "tests/cpp/transport_conformance.h"
#include "transport/ofi_address.h"

#ifdef __SANITIZE_ADDRESS__
// Debian's libfabric 1.17 does not free what it holds of a broken connection.
extern "C" __attribute__((visibility("default"))) const char*
__lsan_default_suppressions() {
  return "leak:libfabric.so";
}
#endif

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

// Two ranks of one process, joined.
class OfiTest : public testing::Test {
 protected:
  void SetUp() override {
    const TransportState state = OfiState(Provider(), Library());
    if (state.availability != Availability::kUsable) {
      GTEST_SKIP() << state.ToStatus("ofi/" + Provider()).message();
    }
    for (int i = 0; i < 2; ++i) {
      transports_[i] = Open(kSecret);
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

TEST_F(OfiTest, WhoDoesNotKnowTheSecretIsNotAnswered) {
  const std::unique_ptr<Transport> transport = Open("a guess");
  ConformanceRank stranger(*transport, 4096);
  // It has learnt an address, and claims to be of its job.
  OfiAddress claimed;
  const std::string& bytes = ranks_[1]->domain().address().bytes;
  ASSERT_EQ(bytes.size(), sizeof(claimed));
  std::memcpy(&claimed, bytes.data(), sizeof(claimed));
  std::memcpy(
      &claimed.job,
      stranger.domain().address().bytes.data() + offsetof(OfiAddress, job),
      sizeof(claimed.job));
  const StatusOr<PeerId> peer =
      stranger.domain().AddPeer(ToNetAddr(claimed), Deadline::AfterSeconds(5));
  ASSERT_TRUE(peer.ok()) << peer.status().message();
  const Deadline deadline = Deadline::AfterSeconds(0.3);
  PollUntil([&] {
    stranger.Poll();
    for (const bool write : {true, false}) {
      const StatusOr<Posted> posted =
          write ? stranger.domain().PostWriteImm(*peer, stranger.Source(0),
                                                 ranks_[1]->Target(0), 8, 1, 1)
                : stranger.domain().PostSend(*peer, "let me in", 1);
      EXPECT_TRUE(!posted.ok() || *posted == Posted::kAgain);
    }
    return deadline.Expired();
  });
  EXPECT_TRUE(ranks_[1]->messages.empty() && ranks_[1]->immediates.empty());
  ExpectWorking();
}

TEST_F(OfiTest, BytesThatAreNotOfLibfabricDisturbNobody) {
  if (Provider() != "tcp") GTEST_SKIP() << "only tcp has a socket to write to";
  OfiAddress address;
  std::memcpy(&address, ranks_[1]->domain().address().bytes.data(),
              sizeof(address));
  ExpectWorking();
  std::mt19937 random(1);
  for (const size_t bytes : {1, 8, 20, 64, 1000, 100'000}) {
    std::string noise(bytes, '\0');
    for (char& byte : noise) byte = static_cast<char>(random());
    const UniqueFd intruder(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(
        connect(intruder.get(),
                reinterpret_cast<const sockaddr*>(address.endpoint.data()),
                address.endpoint_bytes),
        0);
    (void)send(intruder.get(), noise.data(), noise.size(),
               MSG_NOSIGNAL | MSG_DONTWAIT);
    ExpectWorking();
  }
  EXPECT_TRUE(ranks_[1]->messages.empty());
}

TEST_F(OfiTest, AKilledProcessIsNoticedByThoseWhoOnlyWait) {
  if (Provider() != "tcp") GTEST_SKIP() << "devices do not survive a fork";
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer hangs in a child of a process with threads";
#endif
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  const UniqueFd parent_end(ends[0]);
  const UniqueFd child_end(ends[1]);
  const NetAddr ours = ranks_[0]->domain().address();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const std::unique_ptr<Transport> transport = Open(kSecret);
    ConformanceRank rank(*transport, 4096);
    const std::string& address = rank.domain().address().bytes;
    JF_CHECK(send(child_end.get(), address.data(), address.size(), 0) ==
             static_cast<ssize_t>(address.size()));
    JF_CHECK(rank.domain().AddPeer(ours, Deadline::AfterSeconds(10)).ok());
    for (;;) rank.Poll();
  }
  char bytes[sizeof(OfiAddress)];
  EXPECT_EQ(recv(parent_end.get(), bytes, sizeof(bytes), 0),
            static_cast<ssize_t>(sizeof(bytes)));
  const StatusOr<PeerId> peer = ranks_[0]->domain().AddPeer(
      {std::string(bytes, sizeof(bytes))}, Deadline::AfterSeconds(10));
  EXPECT_TRUE(peer.ok()) << peer.status().message();
  EXPECT_TRUE(PollUntil([&] {  // joined
    const StatusOr<Posted> posted =
        ranks_[0]->domain().PostSend(*peer, "hello", 1);
    return posted.ok() && *posted == Posted::kPosted;
  }));
  EXPECT_TRUE(PollUntil([&] { return !ranks_[0]->done.empty(); }));
  const int64_t killed_ns = MonotonicNanoseconds();
  kill(child, SIGKILL);
  EXPECT_TRUE(PollUntil([&] { return !ranks_[0]->losses.empty(); }));
  EXPECT_LT(MonotonicNanoseconds() - killed_ns, 2'000'000'000);
  waitpid(child, nullptr, 0);
  ASSERT_EQ(ranks_[0]->losses.size(), 1u);
  EXPECT_EQ(ranks_[0]->losses[0].peer, *peer);
  ranks_[0]->losses.clear();
  ExpectWorking();
}

TEST(OfiStateTest, EachStateHasItsReasonAndFix) {
  const TransportState missing = OfiState("tcp", "/nowhere/libfabric.so.1");
  if (missing.availability != Availability::kNotBuilt) {
    EXPECT_EQ(missing.availability, Availability::kLibraryMissing);
  }
  EXPECT_GE(missing.reason.size(), 20u);
  EXPECT_GE(missing.fix.size(), 20u);
  const Status status = missing.ToStatus("ofi/tcp");
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("ofi/tcp"), std::string::npos);
  EXPECT_NE(status.message().find(missing.fix), std::string::npos);
  EXPECT_FALSE(
      OpenOfiTransport({.provider = "tcp", .library = "/nowhere/x.so"}).ok());
  EXPECT_FALSE(OpenOfiTransport({.provider = "pigeon"}).ok());
}

TEST_F(OfiTest, UnknownInterfacesAreRefusedWithThoseThereAre) {
  const auto refused = OpenOfiTransport({.provider = Provider(),
                                         .library = Library(),
                                         .nics = {"nosuch0"},
                                         .job_secret = kSecret});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.status().message().find("'nosuch0'"), std::string::npos);
}

}  // namespace
}  // namespace jaxfabric
