#include "transport/ofi.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/unique_fd.h"
#include "tests/cpp/ofi_pair.h"
#include "tests/cpp/transport_conformance.h"
#include "transport/ofi_address.h"

namespace jaxfabric {
namespace {

std::vector<TransportFactory> Factories() {
  const TransportState state =
      OfiState(OfiProviderUnderTest(), OfiLibraryUnderTest());
  if (state.availability != Availability::kUsable) {
    std::fprintf(
        stderr, "ofi_test runs without a device: %s\n",
        state.ToStatus("ofi/" + OfiProviderUnderTest()).message().c_str());
    return {};
  }
  return {{.name = "Plain",
           .open = OpenOfi,
           .kill = nullptr,
           .make_foreign = nullptr,
           .finds_stale_later = true}};
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TransportConformance);
INSTANTIATE_TEST_SUITE_P(Ofi, TransportConformance,
                         testing::ValuesIn(Factories()), TransportFactoryName);

TEST_F(OfiTest, WhoDoesNotKnowTheSecretIsNotAnswered) {
  const std::unique_ptr<Transport> transport = OpenOfi("a guess");
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
    return deadline.Expired() && ranks_[1]->domain().refused_frames() > 0;
  });
  EXPECT_TRUE(ranks_[1]->messages.empty() && ranks_[1]->immediates.empty());
  EXPECT_GT(ranks_[1]->domain().refused_frames(), 0u);
  EXPECT_EQ(ranks_[0]->domain().refused_frames(), 0u);
  ExpectWorking();
}

TEST_F(OfiTest, BytesThatAreNotOfLibfabricDisturbNobody) {
  if (OfiProviderUnderTest() != "tcp")
    GTEST_SKIP() << "only tcp has a socket to write to";
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
  if (OfiProviderUnderTest() != "tcp")
    GTEST_SKIP() << "devices do not survive a fork";
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
    const std::unique_ptr<Transport> transport = OpenOfi(kOfiSecret);
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

TEST(OfiStateTest, AProcessHasOneDomainOverShm) {
  const TransportState state = OfiState("shm", OfiLibraryUnderTest());
  if (state.availability != Availability::kUsable) GTEST_SKIP() << state.reason;
  const auto transport =
      OpenOfiTransport({.provider = "shm", .library = OfiLibraryUnderTest()});
  ASSERT_TRUE(transport.ok()) << transport.status().message();
  for (int round = 0; round < 2; ++round) {
    const auto first = (*transport)->OpenDomain();
    ASSERT_TRUE(first.ok()) << first.status().message();
    const auto second = (*transport)->OpenDomain();
    EXPECT_EQ(second.status().code(), StatusCode::kUnimplemented);
    EXPECT_NE(second.status().message().find("joins processes"),
              std::string::npos);
  }
}

TEST_F(OfiTest, UnknownInterfacesAreRefusedWithThoseThereAre) {
  const auto refused = OpenOfiTransport({.provider = OfiProviderUnderTest(),
                                         .library = OfiLibraryUnderTest(),
                                         .nics = {"nosuch0"},
                                         .job_secret = kOfiSecret});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.status().message().find("'nosuch0'"), std::string::npos);
}

TEST_F(OfiTest, MoreInterfacesThanARankUsesAreRefused) {
  const auto refused = OpenOfiTransport({.provider = OfiProviderUnderTest(),
                                         .library = OfiLibraryUnderTest(),
                                         .nics = std::vector<std::string>(9),
                                         .job_secret = kOfiSecret});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.status().message().find("at most 8"), std::string::npos);
}

}  // namespace
}  // namespace jaxfabric
