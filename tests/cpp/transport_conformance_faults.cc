// The part of the conformance suite where something goes wrong.

#include <algorithm>
#include <cstring>
#include <set>

#include "tests/cpp/transport_conformance.h"

namespace jaxfabric {

void LinkConformanceFaults() {}

TEST_P(TransportConformance, BadKeysAndRangesAreRefused) {
  ConformanceRank& from = OpenRank(4096);
  ConformanceRank& to = OpenRank(4096);
  ConformanceRank& neighbour = OpenRank(*transports_[1], 4096);
  const PeerId peer = from.Add(to);
  from.Add(neighbour);
  const LocalSpan source = from.Source(0);
  // So that a key may also be refused from what is remembered.
  ASSERT_TRUE(Write(from, peer, source, to.Target(0), 8, std::nullopt, 1));

  EXPECT_FALSE(ExpectRefused(from, peer, source, {to.key() + 1, 0, 0}, 8).ok());
  EXPECT_FALSE(ExpectRefused(from, peer, source, {from.key(), 0, 0}, 8).ok());
  EXPECT_FALSE(ExpectRefused(from, peer, source, neighbour.Target(0), 8).ok())
      << "a key of another Domain of the same process";
  EXPECT_FALSE(ExpectRefused(from, peer, source, to.Target(4089), 8).ok());
  EXPECT_FALSE(ExpectRefused(from, peer, source, to.Target(0), 4097).ok());
  EXPECT_FALSE(
      ExpectRefused(from, peer, source, to.Target(~uint64_t{0} - 3), 8).ok());
  EXPECT_FALSE(
      ExpectRefused(from, peer, from.Source(4089), to.Target(0), 8).ok());
  EXPECT_FALSE(
      ExpectRefused(from, peer, {from.data(), to.key()}, to.Target(0), 8).ok());
  EXPECT_FALSE(ExpectRefused(from, peer + 7, source, to.Target(0), 8).ok());

  // None of this hurt the connection.
  ASSERT_TRUE(Write(from, peer, source, to.Target(0), 4096, 42, 2));
  ASSERT_TRUE(DriveUntil([&] { return to.immediates.size() == 1; }));
}

TEST_P(TransportConformance, UnregisteredMemoryIsOutOfReach) {
  ConformanceRank& from = OpenRank(4096);
  ConformanceRank& to = OpenRank(4096);
  const PeerId peer = from.Add(to);
  ASSERT_TRUE(to.domain().UnregisterMemory(to.key()).ok());
  EXPECT_FALSE(to.domain().UnregisterMemory(to.key()).ok());
  EXPECT_FALSE(ExpectRefused(from, peer, from.Source(0), to.Target(0), 8).ok());
  const StatusOr<uint64_t> again = to.domain().RegisterMemory(to.Region());
  ASSERT_TRUE(again.ok());
  EXPECT_NE(*again, to.key()) << "keys are not used again";
  ASSERT_TRUE(Write(from, peer, from.Source(0), {*again, 0, 0}, 8, 1, 1));
  ASSERT_TRUE(DriveUntil([&] { return to.immediates.size() == 1; }));
}

TEST_P(TransportConformance, BadAddressesAreRefusedEachWithItsSentence) {
  ConformanceRank& from = OpenRank(64);
  ConformanceRank& to = OpenRank(64);
  const std::string good = to.domain().address().bytes;
  std::unique_ptr<Transport> closed = GetParam().open("common secret");
  const NetAddr stale = ConformanceRank(*closed, 64).domain().address();
  std::vector<NetAddr> bad = {{""},
                              {"x"},
                              {std::string(good.size(), '\xff')},
                              {good.substr(0, good.size() - 1)},
                              {good + "x"},
                              stale};
  closed = nullptr;
  bad.push_back(stale);  // and now its whole Transport has ended
  if (GetParam().make_foreign) {
    bad.push_back(GetParam().make_foreign(to.domain().address()));
  }
  std::set<std::string> sentences;
  for (const NetAddr& address : bad) {
    const StatusOr<PeerId> peer =
        from.domain().AddPeer(address, Deadline::AfterSeconds(5));
    if (address == stale && GetParam().finds_stale_later) {
      if (!peer.ok()) continue;  // it was found out meanwhile
      ASSERT_TRUE(DriveUntil([&] { return from.losses.size() == 1; }));
      EXPECT_EQ(from.losses[0].peer, *peer);
      continue;
    }
    ASSERT_FALSE(peer.ok());
    EXPECT_GE(peer.status().message().size(), 20u);
    EXPECT_NE(peer.status().code(), StatusCode::kDeadlineExceeded);
    sentences.insert(peer.status().message());
  }
  EXPECT_GE(sentences.size(), 3u);
  // Not disturbed by any of them.
  const PeerId peer = from.Add(to);
  ASSERT_TRUE(Write(from, peer, from.Source(0), to.Target(0), 8, 1, 1));
  ASSERT_TRUE(DriveUntil([&] { return to.immediates.size() == 1; }));
}

TEST_P(TransportConformance, AnotherJobIsRefused) {
  std::unique_ptr<Transport> stranger = GetParam().open("common secreT");
  ASSERT_NE(stranger, nullptr);
  ConformanceRank& to = OpenRank(64);
  ConformanceRank theirs(*stranger, 64);
  const StatusOr<PeerId> inward =
      theirs.domain().AddPeer(to.domain().address(), Deadline::AfterSeconds(5));
  ASSERT_FALSE(inward.ok());
  EXPECT_EQ(inward.status().code(), StatusCode::kUnauthenticated);
  const StatusOr<PeerId> outward =
      to.domain().AddPeer(theirs.domain().address(), Deadline::AfterSeconds(5));
  ASSERT_FALSE(outward.ok());
  EXPECT_EQ(outward.status().code(), StatusCode::kUnauthenticated);
}

TEST_P(TransportConformance, TheSameAddressIsTheSamePeer) {
  ConformanceRank& from = OpenRank(64);
  ConformanceRank& to = OpenRank(64);
  ConformanceRank& other = OpenRank(64);
  const PeerId first = from.Add(to);
  EXPECT_EQ(from.Add(to), first);
  const PeerId second = from.Add(other);
  EXPECT_NE(second, first);
  EXPECT_EQ(from.Add(to), first);
  from.domain().RemovePeer(first);
  const PeerId again = from.Add(to);
  EXPECT_NE(again, first) << "ids are not used again";
  EXPECT_NE(again, second);
  ASSERT_TRUE(Write(from, again, from.Source(0), to.Target(0), 8, 1, 1));
  ASSERT_TRUE(DriveUntil([&] { return to.immediates.size() == 1; }));
}

TEST_P(TransportConformance, AddPeerKeepsAnExpiredDeadline) {
  ConformanceRank& from = OpenRank(64);
  ConformanceRank& to = OpenRank(64);
  const int64_t start_ns = MonotonicNanoseconds();
  const StatusOr<PeerId> peer =
      from.domain().AddPeer(to.domain().address(), Deadline());
  EXPECT_LT(MonotonicNanoseconds() - start_ns, 2'000'000'000);
  if (!peer.ok()) {
    EXPECT_EQ(peer.status().code(), StatusCode::kDeadlineExceeded);
  }
  // An attempt that failed leaves nothing behind.
  const PeerId again = from.Add(to);
  ASSERT_TRUE(Write(from, again, from.Source(0), to.Target(0), 8, 1, 1));
  ASSERT_TRUE(DriveUntil([&] { return to.immediates.size() == 1; }));
}

TEST_P(TransportConformance, RemovePeerEndsOpenPosts) {
  constexpr uint32_t kWrites = 20;
  ConformanceRank& from = OpenRank(4096);
  ConformanceRank& to = OpenRank(4096);
  const PeerId peer = from.Add(to);
  uint32_t posted = 0;
  for (uint32_t i = 0; i < kWrites; ++i) {
    const StatusOr<Posted> result = from.domain().PostWriteImm(
        peer, from.Source(0), to.Target(0), 100, i, posted);
    ASSERT_TRUE(result.ok());
    if (*result == Posted::kPosted) ++posted;
  }
  from.domain().RemovePeer(peer);
  from.domain().RemovePeer(peer);  // no more than once
  ASSERT_TRUE(DriveUntil(
      [&] { return from.done.size() + from.errors.size() >= posted; }));
  Settle();
  std::vector<uint64_t> cookies = from.done;
  for (const Completion& error : from.errors) cookies.push_back(error.cookie);
  std::sort(cookies.begin(), cookies.end());
  ASSERT_EQ(cookies.size(), posted);
  for (uint32_t i = 0; i < posted; ++i) EXPECT_EQ(cookies[i], i);
  // What was said to be done has arrived.
  EXPECT_GE(to.immediates.size(), from.done.size());
  EXPECT_TRUE(from.losses.empty());
  EXPECT_FALSE(from.domain()
                   .PostWriteImm(peer, from.Source(0), to.Target(0), 8, 1, 1)
                   .ok());
  EXPECT_FALSE(from.domain().PostSend(peer, "late", 1).ok());
}

TEST_P(TransportConformance, AClosedPeerIsLostAfterAllItSent) {
  constexpr uint32_t kWrites = 20;
  ConformanceRank& leaving = OpenRank(4096);
  ConformanceRank& staying = OpenRank(4096);
  ConformanceRank& third = OpenRank(*transports_[1], 4096);
  const PeerId peer = leaving.Add(staying);
  const PeerId lost = staying.Add(leaving);
  const PeerId third_peer = staying.Add(third);
  third.Add(leaving);
  size_t arrived_before_loss = 0;
  staying.on_completion = [&](const Completion& completion) {
    if (completion.kind == Completion::Kind::kPeerLost) {
      arrived_before_loss = staying.immediates.size();
    }
  };
  // Done means that it has arrived, even if nobody there has looked yet: only
  // the leaving one is polled, where that is enough. A small queue takes fewer.
  const auto poll = [&] {
    leaving.Poll();
    if (leaving.domain().caps().target_must_poll) staying.Poll();
  };
  uint32_t posted = 0;
  for (int tries = 0; tries < 100'000 && posted < kWrites; ++tries) {
    const StatusOr<Posted> result = leaving.domain().PostWriteImm(
        peer, leaving.Source(0), staying.Target(0), 100, posted, posted);
    ASSERT_TRUE(result.ok()) << result.status().message();
    if (*result == Posted::kPosted) ++posted;
    poll();
  }
  const Deadline deadline =
      Deadline::AfterSeconds(ConformanceRank::kPatienceSeconds);
  while (leaving.done.size() < posted && !deadline.Expired()) poll();
  ASSERT_EQ(leaving.done.size(), posted);
  ASSERT_GT(posted, 0u);
  leaving.Close();
  // Of the same Transport: once it knows, the staying one has been told too,
  // and finds the loss together with what was sent before.
  while (third.losses.empty() && !deadline.Expired()) third.Poll();
  ASSERT_TRUE(DriveUntil(
      [&] { return staying.losses.size() == 1 && third.losses.size() == 1; }));
  EXPECT_EQ(staying.losses[0].peer, lost);
  EXPECT_FALSE(staying.losses[0].status.message().empty());
  EXPECT_EQ(arrived_before_loss, posted);
  EXPECT_EQ(staying.immediates.size(), posted);

  // Nothing goes there any more, and each way to try says why.
  EXPECT_FALSE(staying.domain().PostSend(lost, "anyone?", 1).ok());
  EXPECT_FALSE(
      ExpectRefused(staying, lost, staying.Source(0), leaving.Target(0), 8)
          .ok());
  // Survivors go on.
  ASSERT_TRUE(
      Write(staying, third_peer, staying.Source(0), third.Target(0), 8, 1, 1));
  ASSERT_TRUE(DriveUntil([&] { return third.immediates.size() == 1; }));
  Settle();
  EXPECT_EQ(staying.losses.size(), 1u) << "told once";
}

TEST_P(TransportConformance, AKilledPeerIsLostAndItsPostsEnd) {
  if (!GetParam().kill) GTEST_SKIP() << "this transport has no kill switch";
  constexpr uint32_t kWrites = 20;
  ConformanceRank& victim = OpenRank(4096);
  ConformanceRank& staying = OpenRank(4096);
  ConformanceRank& third = OpenRank(4096);
  const PeerId peer = victim.Add(staying);
  const PeerId lost = staying.Add(victim);
  const PeerId third_peer = staying.Add(third);
  const auto post = [](ConformanceRank& from, PeerId to, ConformanceRank& at) {
    uint32_t posted = 0;
    for (uint32_t i = 0; i < kWrites; ++i) {
      const StatusOr<Posted> result = from.domain().PostWriteImm(
          to, from.Source(0), at.Target(0), 64, i, posted);
      if (result.ok() && *result == Posted::kPosted) ++posted;
    }
    return posted;
  };
  const uint32_t theirs = post(victim, peer, staying);
  const uint32_t ours = post(staying, lost, victim);
  GetParam().kill(victim.domain());
  ASSERT_TRUE(DriveUntil([&] {
    return staying.losses.size() == 1 &&
           staying.done.size() + staying.errors.size() == ours &&
           victim.done.size() + victim.errors.size() == theirs;
  }));
  EXPECT_EQ(staying.losses[0].peer, lost);
  EXPECT_FALSE(victim.domain().PostSend(peer, "I live", 1).ok());
  EXPECT_FALSE(staying.domain().PostSend(lost, "do you?", 1).ok());
  ASSERT_TRUE(Write(staying, third_peer, staying.Source(0), third.Target(0), 8,
                    1, ours));
  ASSERT_TRUE(DriveUntil([&] { return third.immediates.size() == 1; }));
  EXPECT_FALSE(
      third.domain()
          .AddPeer(victim.domain().address(), Deadline::AfterSeconds(1))
          .ok());
}

}  // namespace jaxfabric
