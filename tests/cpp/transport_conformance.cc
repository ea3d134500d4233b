#include "tests/cpp/transport_conformance.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <thread>

namespace jaxfabric {

std::string TransportFactoryName(
    const testing::TestParamInfo<TransportFactory>& info) {
  LinkConformanceFaults();
  return info.param.name;
}

namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr std::byte kPoison{0xa5};

bool AllPoison(const std::byte* data, uint64_t bytes) {
  return std::all_of(data, data + bytes,
                     [](std::byte value) { return value == kPoison; });
}

void ExpectEachOnce(std::vector<uint64_t> cookies, uint64_t count) {
  std::sort(cookies.begin(), cookies.end());
  ASSERT_EQ(cookies.size(), count);
  for (uint64_t i = 0; i < count; ++i) ASSERT_EQ(cookies[i], i);
}

}  // namespace

TEST_P(TransportConformance, WritesOfAllSizesArriveWholeBeforeTheirImmediate) {
  const uint64_t sizes[] = {
      0,        1,     2,     3,     7,    8,        63,
      64,       65,    255,   256,   1000, 4095,     4096,
      4097,     65535, 65536, 65537, kMiB, kMiB + 1, 3 * kMiB + 5,
      64 * kMiB};
  constexpr uint64_t kGuard = 64;
  ConformanceRank& from = OpenRank(65 * kMiB);
  ConformanceRank& to = OpenRank(65 * kMiB);
  const PeerId peer = from.Add(to);
  to.Add(from);
  FillRandom(from.data(), from.size());
  uint32_t immediate = 0;
  for (const uint64_t size : sizes) {
    SCOPED_TRACE("bytes: " + std::to_string(size));
    if (size > from.domain().caps().write_bytes_max) continue;
    const uint64_t source = Random(1000) | 1;
    const uint64_t target = kGuard + (Random(1000) | 1);
    std::memset(to.data() + target - kGuard, static_cast<int>(kPoison),
                size + 2 * kGuard);
    bool whole = false;
    // Compared at the very moment of the immediate.
    to.on_completion = [&](const Completion& completion) {
      if (completion.kind != Completion::Kind::kImmediate) return;
      whole = std::memcmp(to.data() + target, from.data() + source, size) == 0;
    };
    const size_t done = from.done.size();
    ++immediate;
    ASSERT_TRUE(Write(from, peer, from.Source(source), to.Target(target), size,
                      immediate, immediate));
    ASSERT_TRUE(DriveUntil([&] {
      return to.immediates.size() == immediate && from.done.size() > done;
    }));
    EXPECT_TRUE(whole);
    EXPECT_EQ(to.immediates.back().immediate, immediate);
    EXPECT_EQ(from.done.back(), immediate);
    EXPECT_TRUE(AllPoison(to.data() + target - kGuard, kGuard));
    EXPECT_TRUE(AllPoison(to.data() + target + size, kGuard));
  }
  Settle();
  EXPECT_EQ(to.immediates.size(), from.done.size()) << "one per write";
  EXPECT_TRUE(from.errors.empty() && from.immediates.empty());
}

TEST_P(TransportConformance, PiecesOfAWriteArriveBeforeItsImmediate) {
  constexpr uint64_t kPage = 5000;
  ConformanceRank& from = OpenRank(16 * kPage);
  ConformanceRank& to = OpenRank(16 * kPage);
  const PeerId peer = from.Add(to);
  to.Add(from);
  const uint32_t most = from.domain().caps().write_pieces_max;
  if (most == 1) GTEST_SKIP() << "a write has one piece over this transport";
  FillRandom(from.data(), from.size());
  // The first write also waits until the target has been told about.
  ASSERT_TRUE(Write(from, peer, from.Source(0), to.Target(0), 0, 0, 0));
  ASSERT_TRUE(DriveUntil([&] { return from.done.size() == 1; }));
  for (uint32_t count = 1; count <= most; ++count) {
    SCOPED_TRACE("pieces: " + std::to_string(count));
    std::memset(to.data(), static_cast<int>(kPoison), to.size());
    std::vector<Piece> pieces;
    for (uint32_t i = 0; i < count; ++i) {
      pieces.push_back({2 * i * kPage, (14 - 3 * i) * kPage, kPage - i});
    }
    bool whole = true;
    to.on_completion = [&](const Completion&) {
      for (const Piece& piece : pieces) {
        whole &=
            std::memcmp(to.data() + piece.remote_offset,
                        from.data() + piece.local_offset, piece.length) == 0;
      }
    };
    const auto posted =
        from.domain().PostPieces(peer, {from.data(), from.key()}, to.Target(0),
                                 pieces, /*immediate=*/count, count);
    ASSERT_TRUE(posted.ok()) << posted.status().message();
    ASSERT_EQ(*posted, Posted::kPosted);
    ASSERT_TRUE(DriveUntil([&] {
      return to.immediates.size() == count + 1 && from.done.size() == count + 1;
    }));
    EXPECT_TRUE(whole);
    EXPECT_EQ(to.immediates.back().immediate, count);
    for (const Piece& piece : pieces) {
      EXPECT_TRUE(AllPoison(to.data() + piece.remote_offset + piece.length,
                            kPage - piece.length));
    }
  }
  const Piece within_and_beyond[] = {{0, 0, kPage}, {0, 16 * kPage - 1, 2}};
  EXPECT_EQ(from.domain()
                .PostPieces(peer, {from.data(), from.key()}, to.Target(0),
                            within_and_beyond, 0, 0)
                .status()
                .code(),
            StatusCode::kOutOfRange);
}

TEST_P(TransportConformance, EightDomainsASideAreIndependent) {
  constexpr uint64_t kSlot = 1024;
  constexpr uint32_t kWrites = 96;
  for (const uint32_t domains : {1, 2, 4, 8}) {
    SCOPED_TRACE("domains a side: " + std::to_string(domains));
    ranks_.clear();
    Transport& left = OpenTransport();
    Transport& right = OpenTransport();
    std::vector<PeerId> peers;
    std::vector<size_t> arrived(domains, 0);
    for (uint32_t i = 0; i < domains; ++i) {
      ConformanceRank& from = OpenRank(left, kWrites * kSlot);
      ConformanceRank& to = OpenRank(right, kWrites * kSlot);
      peers.push_back(from.Add(to));
      FillRandom(from.data(), from.size());
      to.on_completion = [&, i](const Completion& completion) {
        if (completion.kind != Completion::Kind::kImmediate) return;
        const uint64_t offset = completion.immediate * kSlot;
        ASSERT_EQ(completion.immediate % domains, i) << "on the wrong Domain";
        ASSERT_EQ(std::memcmp(to.data() + offset, from.data() + offset, kSlot),
                  0);
        ++arrived[i];
      };
    }
    for (uint32_t i = 0; i < kWrites; ++i) {
      ConformanceRank& from = *ranks_[2 * (i % domains)];
      ConformanceRank& to = *ranks_[2 * (i % domains) + 1];
      ASSERT_TRUE(Write(from, peers[i % domains], from.Source(i * kSlot),
                        to.Target(i * kSlot), kSlot, i, i));
    }
    ASSERT_TRUE(DriveUntil([&] {
      size_t total = 0;
      for (uint32_t i = 0; i < domains; ++i) {
        total += arrived[i] + ranks_[2 * i]->done.size();
      }
      return total == 2 * kWrites;
    }));
  }
}

TEST_P(TransportConformance, OnlyWritesWithAnImmediateGiveOne) {
  constexpr uint32_t kWrites = 60;
  ConformanceRank& from = OpenRank(kMiB);
  ConformanceRank& to = OpenRank(kMiB);
  const PeerId peer = from.Add(to);
  FillRandom(from.data(), from.size());
  std::set<uint32_t> expected;
  for (uint32_t i = 0; i < kWrites; ++i) {
    std::optional<uint32_t> immediate;
    // All 32 bits must pass, zero and the highest included.
    if (i % 3 == 0) immediate = i == 0 ? 0 : ~uint32_t{0} - i;
    if (immediate) expected.insert(*immediate);
    ASSERT_TRUE(Write(from, peer, from.Source(i * 100), to.Target(i * 100), 100,
                      immediate, i));
  }
  ASSERT_TRUE(DriveUntil([&] {
    return from.done.size() == kWrites &&
           to.immediates.size() >= expected.size();
  }));
  Settle();
  ASSERT_EQ(to.immediates.size(), expected.size());
  for (const Completion& arrived : to.immediates) {
    EXPECT_EQ(expected.erase(arrived.immediate), 1u);
  }
  ExpectEachOnce(from.done, kWrites);
  EXPECT_TRUE(to.done.empty() && to.messages.empty());
}

TEST_P(TransportConformance, TheSourceMayBeReusedOnceDone) {
  constexpr uint64_t kSlot = 4097;
  constexpr uint32_t kWrites = 50;
  ConformanceRank& from = OpenRank(kSlot);
  ConformanceRank& to = OpenRank(kWrites * kSlot);
  const PeerId peer = from.Add(to);
  std::vector<std::string> payloads;
  for (uint32_t i = 0; i < kWrites; ++i) {
    payloads.push_back(RandomText(kSlot));
    std::memcpy(from.data(), payloads.back().data(), kSlot);
    ASSERT_TRUE(
        Write(from, peer, from.Source(0), to.Target(i * kSlot), kSlot, i, i));
    ASSERT_TRUE(DriveUntil([&] { return from.done.size() == i + 1; }));
    std::memset(from.data(), static_cast<int>(kPoison), kSlot);
  }
  ASSERT_TRUE(DriveUntil([&] { return to.immediates.size() == kWrites; }));
  for (uint32_t i = 0; i < kWrites; ++i) {
    EXPECT_EQ(std::memcmp(to.data() + i * kSlot, payloads[i].data(), kSlot), 0);
  }
}

TEST_P(TransportConformance, AFullQueueToOnePeerDoesNotBlockAnother) {
  ConformanceRank& from = OpenRank(kMiB);
  Transport& elsewhere = OpenTransport();
  ConformanceRank deaf(elsewhere, kMiB);  // not among ranks_: nobody polls it
  ConformanceRank& other = OpenRank(kMiB);
  const PeerId deaf_peer = from.Add(deaf);
  const PeerId other_peer = from.Add(other);
  const uint32_t enough = 4 * from.domain().caps().queue_depth;
  // It listens until it is reached, and no longer.
  ASSERT_TRUE(DriveUntil([&] {
    deaf.Poll();
    const StatusOr<Posted> first = from.domain().PostWriteImm(
        deaf_peer, from.Source(0), deaf.Target(0), 8, 0, 0);
    return first.ok() && *first == Posted::kPosted;
  }));
  uint32_t posted = 1;
  uint32_t refusals = 0;
  // Chaos may refuse a few; only a queue that is full refuses this often.
  while (posted < enough && refusals < 1000) {
    const StatusOr<Posted> result = from.domain().PostWriteImm(
        deaf_peer, from.Source(0), deaf.Target(0), 8, posted, posted);
    ASSERT_TRUE(result.ok()) << result.status().message();
    if (*result == Posted::kPosted) {
      ++posted;
    } else {
      ++refusals;
      from.Poll();
    }
  }
  ASSERT_TRUE(
      Write(from, other_peer, from.Source(0), other.Target(0), 8, 77, posted));
  ASSERT_TRUE(DriveUntil([&] { return other.immediates.size() == 1; }));
  // And nothing is lost once the deaf one listens again.
  ASSERT_TRUE(DriveUntil([&] {
    deaf.Poll();
    return deaf.immediates.size() == posted && from.done.size() == posted + 1;
  }));
  ExpectEachOnce(from.done, posted + 1);
}

TEST_P(TransportConformance, WhoNeverPollsIsStoppedAtTheQueueDepth) {
  ConformanceRank& from = OpenRank(64);
  ConformanceRank& to = OpenRank(64);
  const PeerId peer = from.Add(to);
  const uint32_t depth = from.domain().caps().queue_depth;
  ASSERT_TRUE(Write(from, peer, from.Source(0), to.Target(0), 8, 0, 0));
  ASSERT_TRUE(DriveUntil([&] { return from.done.size() == 1; }));
  from.done.clear();
  uint32_t posted = 0;
  for (uint32_t i = 0; i < 4 * depth + 100; ++i) {
    const StatusOr<Posted> result = from.domain().PostWriteImm(
        peer, from.Source(0), to.Target(0), 8, std::nullopt, posted);
    ASSERT_TRUE(result.ok()) << result.status().message();
    if (*result == Posted::kPosted) ++posted;
  }
  EXPECT_LE(posted, depth);
  EXPECT_GE(posted, 1u);
  ASSERT_TRUE(DriveUntil([&] { return from.done.size() == posted; }));
  ASSERT_TRUE(Write(from, peer, from.Source(0), to.Target(0), 8, 1, posted));
}

TEST_P(TransportConformance, AStormOfPostsLosesAndDoublesNothing) {
  ConformanceRank& from = OpenRank(kMiB);
  ConformanceRank& to = OpenRank(kMiB);
  const PeerId peer = from.Add(to);
  FillRandom(from.data(), from.size());
  const uint32_t writes = 3 * from.domain().caps().queue_depth + 11;
  for (uint32_t i = 0; i < writes; ++i) {
    const uint64_t size = Random(2000);
    const uint64_t offset = Random(kMiB - size);
    ASSERT_TRUE(
        Write(from, peer, from.Source(offset), to.Target(offset), size, i, i));
  }
  ASSERT_TRUE(DriveUntil([&] {
    return from.done.size() >= writes && to.immediates.size() >= writes;
  }));
  Settle();
  ExpectEachOnce(from.done, writes);
  std::vector<uint64_t> arrived;
  for (const Completion& one : to.immediates) arrived.push_back(one.immediate);
  ExpectEachOnce(arrived, writes);
}

TEST_P(TransportConformance, MessagesKeepTheirBoundsAndBytes) {
  ConformanceRank& from = OpenRank(4096);
  ConformanceRank& to = OpenRank(4096);
  const PeerId peer = from.Add(to);
  const PeerId back = to.Add(from);
  const uint32_t most = from.domain().caps().message_bytes_max;
  ASSERT_GE(most, 1024u);
  std::map<std::string, int> expected;
  uint64_t cookie = 0;
  for (const uint32_t size :
       {0u, 1u, 2u, 63u, 64u, 65u, 1000u, most - 1, most, most, 0u}) {
    const std::string message = RandomText(size);
    ++expected[message];
    ASSERT_TRUE(Send(from, peer, message, cookie++));
  }
  ASSERT_TRUE(DriveUntil([&] {
    return to.messages.size() >= cookie && from.done.size() >= cookie;
  }));
  Settle();
  ASSERT_EQ(to.messages.size(), cookie);
  for (const Completion& arrived : to.messages) {
    EXPECT_EQ(arrived.peer, back);
    EXPECT_GT(expected[arrived.message]--, 0);
  }
  ExpectEachOnce(from.done, cookie);
  const StatusOr<Posted> too_large =
      from.domain().PostSend(peer, std::string(most + 1, 'x'), cookie);
  ASSERT_FALSE(too_large.ok());
  EXPECT_FALSE(too_large.status().message().empty());
}

TEST_P(TransportConformance, ManyReachOneAndAreToldApart) {
  constexpr uint32_t kSources = 6;
  constexpr uint32_t kWrites = 40;
  constexpr uint64_t kSlot = 512;
  ConformanceRank& to = OpenRank(kSources * kWrites * kSlot);
  std::vector<PeerId> peers;
  std::map<PeerId, uint32_t> source_of;
  for (uint32_t s = 0; s < kSources; ++s) {
    // The even ones share the target's Transport.
    ConformanceRank& from = s % 2 == 0
                                ? OpenRank(*transports_[0], kWrites * kSlot)
                                : OpenRank(kWrites * kSlot);
    FillRandom(from.data(), from.size());
    peers.push_back(from.Add(to));
    source_of[to.Add(from)] = s;
  }
  ASSERT_EQ(source_of.size(), kSources);
  to.on_completion = [&](const Completion& completion) {
    ASSERT_EQ(completion.kind, Completion::Kind::kImmediate);
    const uint32_t source = completion.immediate / kWrites;
    const uint64_t slot = completion.immediate % kWrites;
    if (to.domain().caps().immediate_names_peer) {
      ASSERT_EQ(source_of.at(completion.peer), source);
    } else {
      ASSERT_EQ(completion.peer, kUnknownPeer);
    }
    ASSERT_EQ(std::memcmp(to.data() + completion.immediate * kSlot,
                          ranks_[1 + source]->data() + slot * kSlot, kSlot),
              0);
  };
  for (uint32_t i = 0; i < kWrites; ++i) {
    for (uint32_t s = 0; s < kSources; ++s) {
      ConformanceRank& from = *ranks_[1 + s];
      const uint32_t slot = s * kWrites + i;
      ASSERT_TRUE(Write(from, peers[s], from.Source(i * kSlot),
                        to.Target(slot * kSlot), kSlot, slot, i));
    }
  }
  ASSERT_TRUE(
      DriveUntil([&] { return to.immediates.size() == kSources * kWrites; }));
}

TEST_P(TransportConformance, AnInitiatorHasAPeerIdOnceItIsAdded) {
  ConformanceRank& from = OpenRank(64);
  ConformanceRank& to = OpenRank(64);
  if (to.domain().caps().target_must_know_initiator) {
    GTEST_SKIP() << "its target must know the initiator first";
  }
  const bool by_immediate = to.domain().caps().immediate_names_peer;
  const PeerId peer = from.Add(to);
  const auto receive = [&](uint32_t round) {
    EXPECT_TRUE(
        Write(from, peer, from.Source(0), to.Target(0), 8, round, round));
    if (!by_immediate) {
      EXPECT_TRUE(Send(from, peer, "who am I?", round));
    }
    DriveUntil([&] {
      return to.immediates.size() == round &&
             (by_immediate || to.messages.size() == round);
    });
    if (by_immediate) return to.immediates.back().peer;
    EXPECT_EQ(to.immediates.back().peer, kUnknownPeer);
    return to.messages.back().peer;
  };
  EXPECT_EQ(receive(1), kUnknownPeer);
  const PeerId back = to.Add(from);
  EXPECT_EQ(receive(2), back);
  to.domain().RemovePeer(back);
  if (to.domain().caps().removal_fences) return;  // then nothing comes
  EXPECT_EQ(receive(3), kUnknownPeer);
}

TEST_P(TransportConformance, TrafficOfAllKindsBothWaysAtOnce) {
  constexpr uint64_t kSlot = 8192;
  constexpr uint32_t kSlots = 16;
  constexpr uint32_t kRounds = 400;
  ConformanceRank& left = OpenRank(2 * kSlots * kSlot);
  ConformanceRank& right = OpenRank(2 * kSlots * kSlot);
  const PeerId peers[] = {left.Add(right), right.Add(left)};
  // Half of each memory is sources, half is the other side's targets. A slot
  // is used again when its write is done here and has arrived there.
  uint32_t sizes[2][kSlots] = {};
  int busy[2][kSlots] = {};
  std::map<std::string, int> messages;
  for (int side = 0; side < 2; ++side) {
    ConformanceRank& self = *ranks_[side];
    ConformanceRank& other = *ranks_[1 - side];
    self.on_completion = [&, side](const Completion& completion) {
      if (completion.kind == Completion::Kind::kWriteDone) {
        --busy[side][completion.cookie];
      } else if (completion.kind == Completion::Kind::kMessage) {
        EXPECT_GT(messages[completion.message]--, 0);
      } else if (completion.kind == Completion::Kind::kImmediate) {
        const uint32_t slot = completion.immediate;
        EXPECT_EQ(
            std::memcmp(self.data() + (kSlots + slot) * kSlot,
                        other.data() + slot * kSlot, sizes[1 - side][slot]),
            0);
        --busy[1 - side][slot];
      }
    };
  }
  for (uint32_t round = 0; round < kRounds; ++round) {
    const int side = static_cast<int>(Random(2));
    ConformanceRank& self = *ranks_[side];
    if (Random(4) == 0) {
      const std::string message = RandomText(8 + Random(1000));
      ++messages[message];
      ASSERT_TRUE(Send(self, peers[side], message, 0));
      continue;
    }
    const auto slot = static_cast<uint32_t>(Random(kSlots));
    ASSERT_TRUE(DriveUntil([&] { return busy[side][slot] == 0; }));
    busy[side][slot] = 2;
    sizes[side][slot] = static_cast<uint32_t>(Random(kSlot + 1));
    FillRandom(self.data() + slot * kSlot, sizes[side][slot]);
    ASSERT_TRUE(Write(self, peers[side], self.Source(slot * kSlot),
                      ranks_[1 - side]->Target((kSlots + slot) * kSlot),
                      sizes[side][slot], slot, slot));
  }
  ASSERT_TRUE(DriveUntil([&] {
    return left.done.size() + right.done.size() == kRounds &&
           left.immediates.size() + right.immediates.size() +
                   left.messages.size() + right.messages.size() ==
               kRounds;
  }));
}

TEST_P(TransportConformance, ARankWritesToItself) {
  ConformanceRank& rank = OpenRank(4096);
  const PeerId self = rank.Add(rank);
  FillRandom(rank.data(), 1000);
  ASSERT_TRUE(Write(rank, self, rank.Source(0), rank.Target(2000), 1000, 5, 6));
  ASSERT_TRUE(DriveUntil(
      [&] { return rank.immediates.size() + rank.done.size() == 2; }));
  if (rank.domain().caps().immediate_names_peer) {
    EXPECT_EQ(rank.immediates[0].peer, self);
  }
  EXPECT_EQ(std::memcmp(rank.data(), rank.data() + 2000, 1000), 0);
}

TEST_P(TransportConformance, DirectStoresAreVisibleWithALaterImmediate) {
  ConformanceRank& from = OpenRank(4096);
  ConformanceRank& to = OpenRank(4096);
  const PeerId peer = from.Add(to);
  Domain& domain = from.domain();
  std::byte* const target = domain.DirectPointer(peer, to.Target(101), 1000);
  ASSERT_EQ(target != nullptr, domain.caps().direct_store);
  EXPECT_EQ(domain.DirectPointer(peer, to.Target(4000), 97), nullptr);
  EXPECT_EQ(domain.DirectPointer(peer, to.Target(~uint64_t{0}), 2), nullptr);
  EXPECT_EQ(domain.DirectPointer(peer + 1, to.Target(0), 1), nullptr);
  EXPECT_EQ(domain.DirectPointer(peer, {to.key() + 1, 0, 0}, 1), nullptr);
  if (target == nullptr) return;
  const std::string payload = RandomText(1000);
  std::memcpy(target, payload.data(), payload.size());
  ASSERT_TRUE(Write(from, peer, from.Source(0), to.Target(0), 0, 1, 1));
  ASSERT_TRUE(DriveUntil([&] { return to.immediates.size() == 1; }));
  EXPECT_EQ(std::memcmp(to.data() + 101, payload.data(), payload.size()), 0);
}

TEST_P(TransportConformance, TheDoorbellWakesThoseWhoSleep) {
  constexpr uint32_t kRounds = 100;
  Transport* sides[] = {&OpenTransport(), &OpenTransport()};
  ConformanceRank* ranks[] = {&OpenRank(*sides[0], 4096),
                              &OpenRank(*sides[1], 4096)};
  const PeerId peers[] = {ranks[0]->Add(*ranks[1]), ranks[1]->Add(*ranks[0])};
  // Ping-pong by two threads that never poll without being rung for: a missed
  // ring leaves both asleep until the deadline.
  const Deadline deadline =
      Deadline::AfterSeconds(ConformanceRank::kPatienceSeconds);
  std::atomic<int> players = 2;  // that have not posted all
  const auto play = [&](int side) {
    ConformanceRank& self = *ranks[side];
    ConformanceRank& other = *ranks[1 - side];
    // Its last post may need this side's polls when this side has posted all.
    for (uint32_t i = 0;
         players.load(std::memory_order_acquire) > 0 && !deadline.Expired();) {
      const uint32_t seen = sides[side]->doorbell().Sequence();
      self.Poll();
      const bool my_turn =
          i < kRounds && self.immediates.size() == i + (side == 0 ? 0 : 1);
      if (my_turn && self.done.size() == i) {
        const StatusOr<Posted> posted = self.domain().PostWriteImm(
            peers[side], self.Source(0), other.Target(8), 8, i, i);
        ASSERT_TRUE(posted.ok()) << posted.status().message();
        if (*posted == Posted::kPosted && ++i == kRounds) {
          players.fetch_sub(1, std::memory_order_release);
        }
        continue;
      }
      // A device that cannot ring is looked at in short intervals, and so is
      // the end of the other player.
      const int64_t interval_ns =
          i == kRounds ? 1'000'000 : sides[side]->poll_interval_ns();
      sides[side]->doorbell().Wait(
          seen, interval_ns == 0 ? deadline
                                 : Deadline::AfterNanoseconds(interval_ns));
    }
  };
  std::thread second(play, 1);
  play(0);
  second.join();
  EXPECT_FALSE(deadline.Expired()) << "a ring was missed";
  EXPECT_TRUE(DriveUntil([&] {
    return ranks[0]->immediates.size() + ranks[1]->immediates.size() ==
           2 * kRounds;
  }));
}

}  // namespace jaxfabric
