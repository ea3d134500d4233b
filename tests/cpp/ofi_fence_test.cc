// Peers that are cut off over libfabric, and what others notice of it.

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "base/check.h"
#include "base/unique_fd.h"
#include "tests/cpp/ofi_pair.h"
#include "tests/cpp/transport_conformance.h"
#include "transport/ofi_address.h"

namespace jaxfabric {
namespace {

// The suite runs in ofi_test.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TransportConformance);

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

// Two ranks, and one in a process of its own, which can be stopped.
class OfiFrozenTest : public OfiTest {
 protected:
  static constexpr uint64_t kBytes = uint64_t{64} << 20;
  // What the child does between two polls.
  using Round = std::function<void(ConformanceRank& rank, PeerId parent)>;

  void SetUp() override {
    OfiTest::SetUp();
    if (IsSkipped()) return;
    if (OfiProviderUnderTest() != "tcp") {
      GTEST_SKIP() << "devices do not survive a fork";
    }
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP()
        << "ThreadSanitizer hangs in a child of a process with threads";
#endif
    if (!ranks_[0]->domain().caps().removal_fences) {
      GTEST_SKIP() << "this libfabric crashes when it is cut";
    }
    rank_ = std::make_unique<ConformanceRank>(*transports_[0], kBytes);
    other_ = rank_->Add(*ranks_[1]);
  }
  void TearDown() override {
    if (child_ <= 0) return;
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
  }

  // Sets child_, and what rank_ needs to write to it.
  void Start(const Round& round) {
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    const UniqueFd parent_end(ends[0]);
    const UniqueFd child_end(ends[1]);
    const NetAddr ours = rank_->domain().address();
    struct Introduction {
      OfiAddress address;
      uint64_t key;
    } introduction;
    child_ = fork();
    ASSERT_GE(child_, 0);
    if (child_ == 0) {
      const std::unique_ptr<Transport> transport = OpenOfi(kOfiSecret);
      ConformanceRank rank(*transport, kBytes);
      std::memcpy(&introduction.address, rank.domain().address().bytes.data(),
                  sizeof(OfiAddress));
      introduction.key = rank.key();
      JF_CHECK(send(child_end.get(), &introduction, sizeof(introduction), 0) >
               0);
      const auto parent =
          rank.domain().AddPeer(ours, Deadline::AfterSeconds(10));
      JF_CHECK(parent.ok());
      for (;;) {
        rank.Poll();
        if (round) round(rank, *parent);
      }
    }
    ASSERT_EQ(recv(parent_end.get(), &introduction, sizeof(introduction), 0),
              static_cast<ssize_t>(sizeof(introduction)));
    const auto peer = rank_->domain().AddPeer(ToNetAddr(introduction.address),
                                              Deadline::AfterSeconds(10));
    ASSERT_TRUE(peer.ok()) << peer.status().message();
    peer_of_child_ = *peer;
    key_of_child_ = introduction.key;
  }

  // Another peer is written to all the time.
  void GoOn() {
    rank_->Poll();
    const auto posted = rank_->domain().PostWriteImm(
        other_, rank_->Source(0), ranks_[1]->Target(0), 8, number_, 1000);
    EXPECT_TRUE(posted.ok()) << posted.status().message();
    if (posted.ok() && *posted == Posted::kPosted) ++number_;
  }
  // And loses nothing.
  void ExpectOtherHasAll() {
    const uint32_t before = number_;
    EXPECT_TRUE(PollUntil([&] {
      GoOn();
      return number_ > before + 100;
    }));
    EXPECT_TRUE(PollUntil([&] {
      rank_->Poll();
      return ranks_[1]->immediates.size() == number_;
    }));
  }

  std::unique_ptr<ConformanceRank> rank_;
  PeerId other_ = kUnknownPeer;
  pid_t child_ = -1;
  PeerId peer_of_child_ = kUnknownPeer;
  uint64_t key_of_child_ = 0;
  uint32_t number_ = 0;
};

TEST_F(OfiFrozenTest, WritesToItAreTakenBackOnceItIsRemoved) {
  Start(nullptr);
  if (HasFatalFailure()) return;
  uint64_t cookies = 0;
  const auto post = [&] {
    const auto posted =
        rank_->domain().PostWriteImm(peer_of_child_, rank_->Source(0),
                                     {key_of_child_, 0, 0}, kBytes, 1, cookies);
    if (posted.ok() && *posted == Posted::kPosted) ++cookies;
  };
  ASSERT_TRUE(PollUntil([&] {
    rank_->Poll();
    if (cookies == 0) post();
    return !rank_->done.empty();
  }));
  ASSERT_TRUE(PollUntil([&] {
    rank_->Poll();
    post();
    return cookies == 4;
  }));
  kill(child_, SIGSTOP);
  const int64_t removed_ns = MonotonicNanoseconds();
  rank_->domain().RemovePeer(peer_of_child_);
  EXPECT_TRUE(PollUntil([&] {
    GoOn();
    return std::count_if(rank_->done.begin(), rank_->done.end(),
                         [](uint64_t cookie) { return cookie < 1000; }) +
               rank_->errors.size() ==
           cookies;
  }));
  EXPECT_LT(MonotonicNanoseconds() - removed_ns, 2'000'000'000);
  for (const Completion& error : rank_->errors) EXPECT_LT(error.cookie, 1000u);
  ExpectOtherHasAll();
  // No NIC reads it any more.
  EXPECT_TRUE(rank_->domain().UnregisterMemory(rank_->key()).ok());
}

TEST_F(OfiFrozenTest, WhatItHadBegunLandsNoMoreOnceTheRemovedAreFenced) {
  constexpr std::byte kIts{0x11};
  constexpr std::byte kOurs{0x22};
  const RemoteSpan target = rank_->Target(0);
  bool begun = false;
  Start([&](ConformanceRank& rank, PeerId parent) {
    if (begun) return;
    std::memset(rank.data(), static_cast<int>(kIts), kBytes);
    const auto posted = rank.domain().PostWriteImm(parent, rank.Source(0),
                                                   target, kBytes, 1, 1);
    begun = posted.ok() && *posted == Posted::kPosted;
  });
  if (HasFatalFailure()) return;
  ASSERT_TRUE(PollUntil([&] {
    rank_->Poll();
    return rank_->data()[0] == kIts;
  }));
  kill(child_, SIGSTOP);
  ASSERT_NE(rank_->data()[kBytes - 1], kIts);
  rank_->domain().RemovePeer(peer_of_child_);
  rank_->domain().FenceRemoved();
  ASSERT_TRUE(PollUntil([&] {
    GoOn();
    return rank_->domain().RemovedAreFenced();
  }));
  ASSERT_TRUE(rank_->domain().UnregisterMemory(rank_->key()).ok());
  std::memset(rank_->data(), static_cast<int>(kOurs), kBytes);
  kill(child_, SIGCONT);
  const Deadline late = Deadline::AfterSeconds(0.3);
  while (!late.Expired()) rank_->Poll();
  EXPECT_EQ(std::count(rank_->data(), rank_->data() + kBytes, kOurs),
            static_cast<int64_t>(kBytes));
  EXPECT_TRUE(rank_->losses.empty());
}

// A process may be busy with something else for a second.
TEST_F(OfiTest, WhoSleepsWhileAnotherIsCutOffLosesNothing) {
  constexpr uint64_t kBytes = uint64_t{32} << 20;
  if (!ranks_[0]->domain().caps().removal_fences) {
    GTEST_SKIP() << "this one cannot fence";
  }
  ConformanceRank awake(*transports_[0], kBytes);
  ConformanceRank asleep(*transports_[1], kBytes);
  const PeerId dead = awake.Add(*ranks_[1]);
  const PeerId there = awake.Add(asleep);
  const PeerId back = asleep.Add(awake);
  const auto both = [&] {
    awake.Poll();
    asleep.Poll();
  };
  const auto posts = [&](ConformanceRank& from, PeerId to,
                         const ConformanceRank& target, uint64_t bytes) {
    size_t posted = 0;
    EXPECT_TRUE(PollUntil([&] {
      both();
      const auto one =
          posted == 0 ? from.domain().PostWriteImm(
                            to, from.Source(0), target.Target(0), bytes, 1, 1)
                      : from.domain().PostSend(to, "behind it", 2);
      posted += one.ok() && *one == Posted::kPosted;
      return posted == 2;
    }));
  };
  posts(awake, there, asleep, 8);
  posts(asleep, back, awake, 8);
  EXPECT_TRUE(PollUntil([&] {
    both();
    const auto joined = awake.domain().PostSend(dead, "joined", 3);
    return awake.done.size() >= 3 && joined.ok();
  }));
  const NetAddr before = awake.domain().address();
  // Too long to be done before it wakes up, and with it what is behind it.
  const uint64_t bytes =
      std::min(kBytes, awake.domain().caps().write_bytes_max);
  const auto write = awake.domain().PostWriteImm(there, awake.Source(0),
                                                 asleep.Target(0), bytes, 1, 1);
  const auto message = awake.domain().PostSend(there, "behind it", 2);
  ASSERT_TRUE(write.ok() && *write == Posted::kPosted);
  ASSERT_TRUE(message.ok() && *message == Posted::kPosted);
  awake.domain().FencePeer(dead);
  const Deadline sleep = Deadline::AfterSeconds(1);
  while (!sleep.Expired()) awake.Poll();
  // A device needs nobody's help, and so there is nothing to wait for.
  if (OfiProviderUnderTest() == "tcp") {
    EXPECT_FALSE(awake.domain().IsFenced(dead));
  }
  EXPECT_TRUE(PollUntil([&] {
    both();
    return awake.domain().IsFenced(dead) && asleep.messages.size() == 2 &&
           asleep.immediates.size() == 2;
  })) << awake.Describe()
      << asleep.Describe();
  EXPECT_NE(awake.domain().address(), before);
  posts(awake, there, asleep, 8);
  posts(asleep, back, awake, 8);
  EXPECT_TRUE(PollUntil([&] {
    both();
    return asleep.done.size() == 4 && asleep.messages.size() == 3 &&
           awake.messages.size() == 2;
  })) << awake.Describe()
      << asleep.Describe();
  for (const ConformanceRank* rank : {&awake, &asleep}) {
    EXPECT_TRUE(rank->errors.empty()) << rank->errors[0].status.message();
    EXPECT_TRUE(rank->losses.empty()) << rank->losses[0].status.message();
  }
}

// Of two that renew at once, the one that goes first is stopped for longer than
// the other waits for its turn.
TEST_F(OfiCrossingTest, OneThatIsStoppedMeanwhileFindsTheOther) {
  if (OfiProviderUnderTest() != "tcp") GTEST_SKIP() << "it takes seconds";
  constexpr double kStoppedSeconds = 3.3;
  OfiAddress addresses[2];
  for (const size_t i : {0, 1}) {
    std::memcpy(&addresses[i], ranks_[i]->domain().address().bytes.data(),
                sizeof(OfiAddress));
  }
  const size_t first = addresses[0].nonce < addresses[1].nonce ? 0 : 1;
  ASSERT_TRUE(More(200));
  ASSERT_TRUE(PollUntil([&] {
    for (ConformanceRank* other : awake_) other->Poll();
    return ranks_[0]->done.size() >= posted_[0] &&
           ranks_[1]->done.size() >= posted_[1];
  }));
  awake_.clear();
  for (const size_t i : {0, 1}) {
    ranks_[i]->domain().FencePeer(names_[dead_][i]);
  }
  for (const auto& rank : ranks_) rank->Poll();
  const Deadline stopped = Deadline::AfterSeconds(kStoppedSeconds);
  while (!stopped.Expired()) ranks_[1 - first]->Poll();
  ASSERT_TRUE(FencedByBoth());
  ASSERT_TRUE(More(200));
  ExpectNothingLost();
}

}  // namespace
}  // namespace jaxfabric
