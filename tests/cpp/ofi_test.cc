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
           .finds_stale_later = true}};
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
    return deadline.Expired() && ranks_[1]->domain().refused_frames() > 0;
  });
  EXPECT_TRUE(ranks_[1]->messages.empty() && ranks_[1]->immediates.empty());
  EXPECT_GT(ranks_[1]->domain().refused_frames(), 0u);
  EXPECT_EQ(ranks_[0]->domain().refused_frames(), 0u);
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

TEST_F(OfiTest, AFencedPeerIsKeptOutAndOthersGoOn) {
  Domain& domain = ranks_[1]->domain();
  if (!domain.caps().removal_fences) GTEST_SKIP() << "this one cannot fence";
  ConformanceRank third(*transports_[0], 4096);
  const PeerId back = ranks_[1]->Add(*ranks_[0]);
  const PeerId third_to_1 = third.Add(*ranks_[1]);
  const PeerId third_of_1 = ranks_[1]->Add(third);
  uint64_t cookie = 100;
  uint32_t number = 0;
  size_t posted = 0;
  // The third writes all the time, the one to be fenced until it is refused.
  const auto traffic = [&] {
    third.Poll();
    const auto its = third.domain().PostWriteImm(
        third_to_1, third.Source(0), ranks_[1]->Target(64), 8, number, number);
    ASSERT_TRUE(its.ok()) << its.status().message();
    if (*its == Posted::kPosted) ++number;
    const auto other = ranks_[0]->domain().PostWriteImm(
        peer_, ranks_[0]->Source(0), ranks_[1]->Target(0), 8, 7, ++cookie);
    if (other.ok() && *other == Posted::kPosted) ++posted;
  };
  ASSERT_TRUE(PollUntil([&] {
    traffic();
    return number > 100 && posted > 100;
  }));
  domain.FencePeer(back);
  ASSERT_TRUE(PollUntil([&] {
    traffic();
    return domain.IsFenced(back);
  }));
  const uint32_t before = number;
  ASSERT_TRUE(PollUntil([&] {
    traffic();
    return number > before + 100;
  }));
  const auto of = [&](PeerId peer) {
    return std::count_if(
        ranks_[1]->immediates.begin(), ranks_[1]->immediates.end(),
        [&](const Completion& arrival) { return arrival.peer == peer; });
  };
  // From here on nothing of it arrives, and it finds out.
  ASSERT_TRUE(PollUntil([&] {
    third.Poll();
    return third.done.size() == number &&
           ranks_[0]->done.size() + ranks_[0]->errors.size() >= posted &&
           !ranks_[0]->losses.empty();
  }));
  EXPECT_EQ(ranks_[0]->errors.size() + ranks_[0]->done.size(), posted);
  EXPECT_TRUE(PollUntil([&] {
    third.Poll();
    return of(third_of_1) == number;
  })) << of(third_of_1)
      << " of " << number;
  EXPECT_TRUE(third.errors.empty() && third.losses.empty());
  EXPECT_EQ(of(kUnknownPeer), 0);
  // What it was told to be done has been polled, under its name.
  EXPECT_GE(of(back), static_cast<int64_t>(ranks_[0]->done.size()));
  // And back again, from both sides.
  ranks_[0]->domain().FencePeer(peer_);
  ASSERT_TRUE(PollUntil([&] {
    third.Poll();
    return ranks_[0]->domain().IsFenced(peer_);
  }));
  ranks_[0]->losses.clear();
  ranks_[1]->losses.clear();
  peer_ = ranks_[0]->Add(*ranks_[1]);
  ranks_[1]->Add(*ranks_[0]);
  ExpectWorking();
}

// Ranks 0 and 1 write to each other, and both cut off others before either has
// polled: both renew their endpoints at once.
class OfiCrossingTest : public OfiTest {
 protected:
  void SetUp() override {
    OfiTest::SetUp();
    if (IsSkipped()) return;
    if (!ranks_[0]->domain().caps().removal_fences) {
      GTEST_SKIP() << "this one cannot fence";
    }
    back_ = ranks_[1]->Add(*ranks_[0]);
    dead_ = Join();
  }

  // A rank that is polled as long as it is among those awake.
  ConformanceRank* Join() {
    others_.push_back(std::make_unique<ConformanceRank>(
        *transports_[others_.size() % 2], 4096));
    ConformanceRank* const other = others_.back().get();
    for (const auto& rank : ranks_) {
      names_[other].push_back(rank->Add(*other));
      other->Add(*rank);
    }
    awake_.push_back(other);
    return other;
  }

  // Ranks 0 and 1 write and send to each other as much as they may.
  void Traffic() {
    for (ConformanceRank* other : awake_) other->Poll();
    for (const size_t i : {0, 1}) {
      Domain& domain = ranks_[i]->domain();
      const PeerId to = i == 0 ? peer_ : back_;
      for (const bool write : {true, false}) {
        const auto posted =
            write ? domain.PostWriteImm(to, ranks_[i]->Source(0),
                                        ranks_[1 - i]->Target(64), 8, 1, 1)
                  : domain.PostSend(to, "go on", 2);
        ASSERT_TRUE(posted.ok()) << posted.status().message();
        posted_[i] += *posted == Posted::kPosted;
      }
    }
  }
  bool More(size_t posts) {
    const size_t until[] = {posted_[0] + posts, posted_[1] + posts};
    return PollUntil([&] {
      Traffic();
      return HasFatalFailure() ||
             (posted_[0] >= until[0] && posted_[1] >= until[1]);
    });
  }
  bool FencedByBoth() {
    return PollUntil([&] {
      Traffic();
      return HasFatalFailure() ||
             (ranks_[0]->domain().IsFenced(names_[dead_][0]) &&
              ranks_[1]->domain().IsFenced(names_[dead_][1]));
    });
  }
  // All that ranks 0 and 1 have said to each other has come, and was called
  // done.
  void ExpectNothingLost() {
    EXPECT_TRUE(PollUntil([&] {
      return ranks_[0]->done.size() >= posted_[0] &&
             ranks_[1]->done.size() >= posted_[1] &&
             ranks_[1]->immediates.size() + ranks_[1]->messages.size() >=
                 posted_[0] &&
             ranks_[0]->immediates.size() + ranks_[0]->messages.size() >=
                 posted_[1];
    }));
    for (const auto& rank : ranks_) {
      EXPECT_TRUE(rank->errors.empty()) << rank->errors[0].status.message();
      EXPECT_TRUE(rank->losses.empty()) << rank->losses[0].status.message();
    }
  }

  PeerId back_ = kUnknownPeer;
  size_t posted_[2] = {};
  std::vector<std::unique_ptr<ConformanceRank>> others_;
  std::vector<ConformanceRank*> awake_;
  std::map<ConformanceRank*, std::vector<PeerId>> names_;
  ConformanceRank* dead_ = nullptr;
};

TEST_F(OfiCrossingTest, TwoThatCutOffAThirdAtOnceKeepEachOther) {
  ASSERT_TRUE(More(200));
  awake_.clear();
  for (const size_t i : {0, 1}) {
    ranks_[i]->domain().FencePeer(names_[dead_][i]);
  }
  const int64_t begin_ns = MonotonicNanoseconds();
  ASSERT_TRUE(FencedByBoth());
  ASSERT_TRUE(More(200));
  EXPECT_LT(MonotonicNanoseconds() - begin_ns, 2'000'000'000);
  ExpectNothingLost();
}

TEST_F(OfiCrossingTest, AFrozenFourthKeepsThemApartNoLonger) {
  ConformanceRank* const frozen = Join();
  ASSERT_TRUE(More(200));
  awake_.clear();
  for (const size_t i : {0, 1}) {
    ranks_[i]->domain().FencePeer(names_[dead_][i]);
  }
  const int64_t begin_ns = MonotonicNanoseconds();
  ASSERT_TRUE(FencedByBoth());
  ASSERT_TRUE(More(200));
  EXPECT_LT(MonotonicNanoseconds() - begin_ns, 3'000'000'000);
  ExpectNothingLost();
  // Once awake again, it finds both where they are now.
  awake_ = {frozen};
  for (const size_t i : {0, 1}) {
    EXPECT_TRUE(PollUntil([&] {
      frozen->Poll();
      const auto posted =
          ranks_[i]->domain().PostSend(names_[frozen][i], "awake?", 3);
      return posted.ok() && *posted == Posted::kPosted;
    })) << i
        << frozen->Describe();
  }
  EXPECT_TRUE(PollUntil([&] {
    frozen->Poll();
    return frozen->messages.size() == 2;
  })) << frozen->Describe()
      << ranks_[0]->Describe() << ranks_[1]->Describe();
  EXPECT_TRUE(frozen->losses.empty());
}

TEST_F(OfiTest, WritesToAFrozenProcessAreTakenBackOnceItIsRemoved) {
  if (Provider() != "tcp") GTEST_SKIP() << "devices do not survive a fork";
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer hangs in a child of a process with threads";
#endif
  if (!ranks_[0]->domain().caps().removal_fences) {
    GTEST_SKIP() << "this libfabric crashes when it is cut";
  }
  constexpr uint64_t kBytes = uint64_t{64} << 20;
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  const UniqueFd parent_end(ends[0]);
  const UniqueFd child_end(ends[1]);
  const NetAddr ours = ranks_[0]->domain().address();
  struct Introduction {
    OfiAddress address;
    uint64_t key;
  } introduction;
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const std::unique_ptr<Transport> transport = Open(kSecret);
    ConformanceRank rank(*transport, kBytes);
    std::memcpy(&introduction.address, rank.domain().address().bytes.data(),
                sizeof(OfiAddress));
    introduction.key = rank.key();
    JF_CHECK(send(child_end.get(), &introduction, sizeof(introduction), 0) > 0);
    JF_CHECK(rank.domain().AddPeer(ours, Deadline::AfterSeconds(10)).ok());
    for (;;) rank.Poll();
  }
  EXPECT_EQ(recv(parent_end.get(), &introduction, sizeof(introduction), 0),
            static_cast<ssize_t>(sizeof(introduction)));
  ConformanceRank writer(*transports_[0], kBytes);
  const auto peer = writer.domain().AddPeer(ToNetAddr(introduction.address),
                                            Deadline::AfterSeconds(10));
  ASSERT_TRUE(peer.ok()) << peer.status().message();
  const PeerId other = writer.Add(*ranks_[1]);
  uint64_t cookies = 0;
  const auto post = [&] {
    const auto posted = writer.domain().PostWriteImm(
        *peer, writer.Source(0), {introduction.key, 0, 0}, kBytes, 1, cookies);
    if (posted.ok() && *posted == Posted::kPosted) ++cookies;
  };
  EXPECT_TRUE(PollUntil([&] {
    writer.Poll();
    if (cookies == 0) post();
    return !writer.done.empty();
  }));
  EXPECT_TRUE(PollUntil([&] {
    writer.Poll();
    post();
    return cookies == 4;
  }));
  kill(child, SIGSTOP);
  uint32_t number = 0;
  // Another peer is written to all the time.
  const auto go_on = [&] {
    writer.Poll();
    const auto posted = writer.domain().PostWriteImm(
        other, writer.Source(0), ranks_[1]->Target(0), 8, number, 1000);
    EXPECT_TRUE(posted.ok()) << posted.status().message();
    if (posted.ok() && *posted == Posted::kPosted) ++number;
  };
  const int64_t removed_ns = MonotonicNanoseconds();
  writer.domain().RemovePeer(*peer);
  EXPECT_TRUE(PollUntil([&] {
    go_on();
    return std::count_if(writer.done.begin(), writer.done.end(),
                         [](uint64_t cookie) { return cookie < 1000; }) +
               writer.errors.size() ==
           cookies;
  }));
  EXPECT_LT(MonotonicNanoseconds() - removed_ns, 2'000'000'000);
  for (const Completion& error : writer.errors) EXPECT_LT(error.cookie, 1000u);
  const uint32_t before = number;
  EXPECT_TRUE(PollUntil([&] {
    go_on();
    return number > before + 100;
  }));
  EXPECT_TRUE(PollUntil([&] {
    writer.Poll();
    return ranks_[1]->immediates.size() == number;
  }));
  // No NIC reads it any more.
  EXPECT_TRUE(writer.domain().UnregisterMemory(writer.key()).ok());
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
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

TEST_F(OfiTest, MoreInterfacesThanARankUsesAreRefused) {
  const auto refused = OpenOfiTransport({.provider = Provider(),
                                         .library = Library(),
                                         .nics = std::vector<std::string>(9),
                                         .job_secret = kSecret});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.status().message().find("at most 8"), std::string::npos);
}

}  // namespace
}  // namespace jaxfabric
