#include "engine/domain_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "engine/immediate.h"
#include "tests/cpp/group_node.h"
#include "tests/cpp/seeded.h"
#include "transport/fake.h"
#include "transport/shm.h"

namespace jaxfabric {
namespace {

// Random lists of pieces that do not overlap at the target, some empty, some
// odd, some several chunks long.
std::vector<std::vector<Piece>> RandomTransfers(Seeded& seeded,
                                                uint64_t bytes) {
  std::vector<std::vector<Piece>> transfers;
  uint64_t at = 0;
  while (at + 1 < bytes) {
    std::vector<Piece> pieces;
    for (uint64_t n = seeded.Below(4); n > 0; --n) {
      const uint64_t most = seeded.OneIn(4) ? 5000 : 70;
      const uint64_t length = std::min(seeded.Below(most), bytes - at);
      pieces.push_back({seeded.Below(bytes - length + 1), at, length});
      at += length + seeded.Below(3);  // bytes that nobody writes
      if (at >= bytes) break;
    }
    transfers.push_back(pieces);
    if (at >= bytes) break;
  }
  return transfers;
}

// Sends random transfers and checks counts and every byte, written or not.
void CheckRandomTransfers(Seeded& seeded, const FakeOptions& options,
                          size_t domains_here, size_t domains_there) {
  constexpr uint64_t kBytes = 40'000;
  GroupNode from(options, domains_here, kBytes);
  GroupNode to(options, domains_there, kBytes);
  from.Connect(1, to);
  to.Connect(0, from);
  for (uint64_t i = 0; i < kBytes; ++i) {
    from.source()[i] = static_cast<std::byte>(seeded.random()());
  }
  const auto transfers = RandomTransfers(seeded, kBytes);
  std::vector<std::byte> expected(kBytes, kPoison);
  std::vector<int> done(transfers.size(), 0);
  for (size_t i = 0; i < transfers.size(); ++i) {
    for (const Piece& piece : transfers[i]) {
      std::memcpy(expected.data() + piece.remote_offset,
                  from.source() + piece.local_offset, piece.length);
    }
    const auto submitted = from.group->SubmitWrite(
        1, from.local, to.remote, transfers[i], static_cast<uint32_t>(i),
        [&done, i](const Status& status) {
          EXPECT_TRUE(status.ok()) << status.message();
          ++done[i];
        });
    ASSERT_TRUE(submitted.ok()) << submitted.status().message();
    if (seeded.OneIn(4)) from.Poll();
  }
  const auto complete = [&] {
    for (size_t i = 0; i < transfers.size(); ++i) {
      if (done[i] == 0) return false;
      if (to.units[{0, static_cast<uint32_t>(i)}] < kTransferUnits) {
        return false;
      }
    }
    return true;
  };
  ASSERT_TRUE(PollUntil({&from, &to}, complete));
  for (int i = 0; i < 10; ++i) to.Poll();
  EXPECT_EQ(to.units.size(), transfers.size());
  for (const auto& [id, units] : to.units) {
    EXPECT_EQ(units, kTransferUnits) << "transfer " << id.second;
  }
  EXPECT_EQ(done, std::vector<int>(transfers.size(), 1));
  EXPECT_EQ(std::memcmp(to.target(), expected.data(), kBytes), 0);
}

class DomainGroupChaosTest
    : public testing::TestWithParam<std::pair<size_t, size_t>> {};

TEST_P(DomainGroupChaosTest, EveryTransferIsCountedOnceAndItsBytesAreRight) {
  Seeded seeded;
  const auto [here, there] = GetParam();
  for (const int64_t delay_max_ns : {0, 100'000}) {
    CheckRandomTransfers(seeded,
                         {.network = "group",
                          .seed = seeded.seed(),
                          .pieces_max = 5,
                          .delay_max_ns = delay_max_ns,
                          .again_share = 0.2,
                          .queue_depth = 8,
                          .write_bytes_max = 997},
                         here, there);
  }
}

// All of 1..4 by 1..4, and what is far from even.
std::vector<std::pair<size_t, size_t>> NumbersOfDomains() {
  std::vector<std::pair<size_t, size_t>> numbers = {{8, 8}, {8, 3}, {3, 8},
                                                    {8, 1}, {1, 8}, {5, 7}};
  for (size_t here = 1; here <= 4; ++here) {
    for (size_t there = 1; there <= 4; ++there) {
      numbers.emplace_back(here, there);
    }
  }
  return numbers;
}

INSTANTIATE_TEST_SUITE_P(Domains, DomainGroupChaosTest,
                         testing::ValuesIn(NumbersOfDomains()),
                         [](const auto& info) {
                           return std::to_string(info.param.first) + "To" +
                                  std::to_string(info.param.second);
                         });

// One sender and one receiver over a calm network.
class DomainGroupTest : public testing::Test {
 protected:
  static constexpr uint64_t kBytes = 1 << 16;

  void Open(size_t domains, FakeOptions options = {}) {
    options.network = "calm group";
    from = std::make_unique<GroupNode>(options, domains, kBytes);
    to = std::make_unique<GroupNode>(options, domains, kBytes);
    from->Connect(1, *to);
    to->Connect(0, *from);
    for (uint64_t i = 0; i < kBytes; ++i) {
      from->source()[i] = static_cast<std::byte>(i * 7 + i / 251);
    }
  }
  void Submit(const std::vector<Piece>& pieces, uint32_t id) {
    const auto submitted = from->group->SubmitWrite(
        1, from->local, to->remote, pieces, id,
        [this](const Status& s) { ended.push_back(s); });
    EXPECT_TRUE(submitted.ok()) << submitted.status().message();
  }
  uint64_t Units(uint32_t id) { return to->units[{0, id}]; }

  std::unique_ptr<GroupNode> from;
  std::unique_ptr<GroupNode> to;
  std::vector<Status> ended;
};

TEST_F(DomainGroupTest, FaultWriteOnTheWrongDomainAfterAnOddStart) {
  // Each Domain has keys of its own: a chunk that goes out on one with the key
  // of another is refused, whichever Domain a transfer starts on.
  Open(4, {.write_bytes_max = 100});
  for (uint32_t id = 0; id < 40; ++id) {
    const uint64_t at = uint64_t{id} * 800;
    Submit({{at, at, (1 + at / 800 % 7) * 100}}, id);
  }
  ASSERT_TRUE(PollUntil({from.get(), to.get()}, [&] {
    return ended.size() == 40 && to->units.size() == 40;
  }));
  for (const Status& status : ended) EXPECT_TRUE(status.ok());
  for (uint64_t id = 0; id < 40; ++id) {
    EXPECT_EQ(std::memcmp(to->target() + id * 800, from->source() + id * 800,
                          (1 + id % 7) * 100),
              0);
  }
}

TEST_F(DomainGroupTest, FaultTailOfAnOddLengthIsLost) {
  for (const size_t domains : {2, 3, 4, 7, 8}) {
    ended.clear();
    Open(domains, {.write_bytes_max = 1000});
    for (const uint64_t length : {1u, 999u, 1001u, 8001u, 13'337u}) {
      std::memset(to->target(), static_cast<int>(kPoison), kBytes);
      Submit({{3, 5, length}}, static_cast<uint32_t>(length));
      ASSERT_TRUE(PollUntil({from.get(), to.get()}, [&] {
        return Units(static_cast<uint32_t>(length)) == kTransferUnits;
      }));
      EXPECT_EQ(std::memcmp(to->target() + 5, from->source() + 3, length), 0);
      EXPECT_EQ(to->target()[4], kPoison);
      EXPECT_EQ(to->target()[5 + length], kPoison);
    }
  }
}

TEST_F(DomainGroupTest, FaultEmptyListOfDestinations) {
  Open(2);
  Submit({}, 1);
  Submit({{0, kBytes, 0}}, 2);
  Submit({{0, 0, 0}, {0, 0, 10}, {0, 0, 0}}, 3);
  ASSERT_TRUE(PollUntil({from.get(), to.get()}, [&] {
    return ended.size() == 3 &&
           Units(1) + Units(2) + Units(3) == 3 * kTransferUnits;
  }));
  EXPECT_EQ(Units(1), kTransferUnits);
  EXPECT_EQ(Units(2), kTransferUnits);
  EXPECT_EQ(Units(3), kTransferUnits);
}

TEST_F(DomainGroupTest, TooManyWritesForOneTransferAreRefused) {
  Open(1, {.write_bytes_max = 1});
  const std::vector<Piece> pieces(17, Piece{0, 0, kBytes});
  const auto refused =
      from->group->SubmitWrite(1, from->local, to->remote, pieces, 1, nullptr);
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(refused.status().message(), testing::HasSubstr("2^20"));
}

TEST_F(DomainGroupTest, AnUnknownPeerIsRefused) {
  Open(1);
  EXPECT_EQ(from->group
                ->SubmitWrite(9, from->local, to->remote, {}, 1,
                              [](const Status&) { FAIL(); })
                .status()
                .code(),
            StatusCode::kUnavailable);
  EXPECT_FALSE(from->group->AddPeer(2, {}, Deadline()).ok());
}

TEST_F(DomainGroupTest, FaultErrorCallbackWhileOtherWritesStillRun) {
  Open(2, {.seed = 3, .delay_max_ns = 3'000'000, .write_bytes_max = 100});
  // The second of twenty chunks is out of the target's bounds.
  std::vector<Piece> pieces(20, Piece{0, 0, 100});
  pieces[1].remote_offset = kBytes;
  bool over = false;
  Status ended_as;
  ASSERT_TRUE(from->group
                  ->SubmitWrite(1, from->local, to->remote, pieces, 1,
                                [&](Status status) {
                                  over = true;
                                  ended_as = std::move(status);
                                })
                  .ok());
  ASSERT_TRUE(PollUntil({from.get(), to.get()}, [&] { return over; }));
  EXPECT_FALSE(ended_as.ok());
  // Now the source is ours again: nothing that we store there may arrive.
  std::memset(from->source(), 0x77, 100);
  for (const Deadline wait = Deadline::AfterNanoseconds(5'000'000);
       !wait.Expired();) {
    from->Poll();
    to->Poll();
  }
  EXPECT_NE(to->target()[50], std::byte{0x77});
  EXPECT_LT(Units(1), kTransferUnits) << "a failed transfer was counted";
}

TEST_F(DomainGroupTest, WhatAPollCallsMayNotPoll) {
  Open(1, {.seed = 3, .delay_max_ns = 1'000'000, .write_bytes_max = 100});
  from->group->set_on_spoilt([this](uint32_t, uint32_t) { from->Poll(); });
  std::vector<Piece> pieces(20, Piece{0, 0, 100});
  pieces[1].remote_offset = kBytes;
  ASSERT_TRUE(from->group
                  ->SubmitWrite(1, from->local, to->remote, pieces, 1,
                                [](const Status&) {})
                  .ok());
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(PollUntil({from.get(), to.get()}, [] { return false; }),
               "polling_");
}

TEST_F(DomainGroupTest, AFullQueueToOnePeerBlocksNoOther) {
  const FakeOptions options = {.queue_depth = 4};
  Open(1, options);
  GroupNode quick({.network = "calm group", .queue_depth = 4}, 1, kBytes);
  from->Connect(2, quick);
  quick.Connect(0, *from);
  // Peer 1 never polls.
  for (uint32_t id = 0; id < 100; ++id) Submit({{0, 0, 10}}, id);
  for (int i = 0; i < 100; ++i) from->group->SubmitSend(1, "waits");
  for (uint32_t id = 0; id < 100; ++id) {
    ASSERT_TRUE(from->group
                    ->SubmitWrite(2, from->local, quick.remote,
                                  Pieces{{0, 0, 10}}, id, [](const Status&) {})
                    .ok());
  }
  from->group->SubmitSend(2, "goes");
  ASSERT_TRUE(PollUntil({from.get(), &quick}, [&] {
    return quick.units.size() == 100 && quick.messages.size() == 1;
  }));
  EXPECT_LT(ended.size(), 10u);
  EXPECT_FALSE(from->group->Idle());
  // Nothing for peer 1 is lost either.
  ASSERT_TRUE(PollUntil({from.get(), to.get()}, [&] {
    return to->units.size() == 100 && to->messages.size() == 100;
  }));
}

TEST_F(DomainGroupTest, ALostPeerFailsItsOwnTransfersOnly) {
  Open(2, {.queue_depth = 2, .write_bytes_max = 100});
  GroupNode other({.network = "calm group"}, 2, kBytes);
  from->Connect(2, other);
  other.Connect(0, *from);
  for (uint32_t id = 0; id < 20; ++id) Submit({{0, 0, 5000}}, id);
  size_t fine = 0;
  for (uint32_t id = 0; id < 20; ++id) {
    ASSERT_TRUE(from->group
                    ->SubmitWrite(2, from->local, other.remote,
                                  Pieces{{0, 0, 5000}}, id,
                                  [&](const Status& s) { fine += s.ok(); })
                    .ok());
  }
  from->group->SubmitSend(1, "never read");
  to->Kill();
  ASSERT_TRUE(PollUntil({from.get(), &other}, [&] {
    return ended.size() == 20 && fine == 20 && other.units.size() == 20;
  }));
  EXPECT_THAT(from->lost, testing::ElementsAre(1)) << "once, not per Domain";
  for (const Status& status : ended) {
    // What was under way when the first of its Domains died is not known.
    EXPECT_THAT(status.code(),
                testing::AnyOf(StatusCode::kUnavailable, StatusCode::kUnknown));
  }
  EXPECT_EQ(from->group
                ->SubmitWrite(1, from->local, to->remote, {}, 1,
                              [](const Status&) { FAIL(); })
                .status()
                .code(),
            StatusCode::kUnavailable);
  EXPECT_TRUE(from->group->Idle());
}

TEST_F(DomainGroupTest, WhoHasSentAllIsIdle) {
  Open(1, {.seed = 1, .delay_max_ns = 2'000'000});
  EXPECT_TRUE(from->group->Idle());
  from->group->SubmitSend(1, "hello");
  EXPECT_FALSE(from->group->Idle());
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return from->group->Idle(); }));
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return !to->messages.empty(); }));
  EXPECT_THAT(to->messages, testing::ElementsAre("hello"));
}

TEST_F(DomainGroupTest, ACancelledTransferEndsOnceNothingReadsItsSource) {
  Open(2, {.seed = 2, .delay_max_ns = 2'000'000, .write_bytes_max = 100});
  const auto handle = from->group->SubmitWrite(
      1, from->local, to->remote, Pieces{{0, 0, kBytes}}, 5,
      [this](const Status& s) { ended.push_back(s); });
  ASSERT_TRUE(handle.ok());
  EXPECT_TRUE(from->group->Cancel(*handle));
  EXPECT_TRUE(ended.empty()) << "its first chunks are still being read";
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return ended.size() == 1; }));
  EXPECT_EQ(ended[0].code(), StatusCode::kCancelled);
  EXPECT_EQ(from->Total().open_writes, 0u);
  EXPECT_FALSE(from->group->Cancel(*handle));
  EXPECT_LT(Units(5), kTransferUnits);
  // Part of it was counted: the id rests until the peer has dropped that.
  EXPECT_EQ(
      from->group
          ->SubmitWrite(1, from->local, to->remote, Pieces{{0, 0, 8}}, 5, {})
          .status()
          .code(),
      StatusCode::kFailedPrecondition);
  from->group->ReleaseId(1, 5);
  Submit({{0, 0, 8}}, 5);
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return ended.size() == 2; }));
  EXPECT_TRUE(ended[1].ok());
}

TEST_F(DomainGroupTest, ATransferThatNeverStartedLeavesItsIdAlone) {
  Open(1, {.seed = 1, .delay_max_ns = 1'000'000, .queue_depth = 2});
  for (uint32_t id = 0; id < 9; ++id) Submit({{0, 0, 8}}, id);
  const auto handle =
      from->group->SubmitWrite(1, from->local, to->remote, Pieces{{0, 0, 8}}, 9,
                               [this](const Status& s) { ended.push_back(s); });
  ASSERT_TRUE(handle.ok());
  EXPECT_TRUE(from->group->Cancel(*handle));
  ASSERT_EQ(ended.size(), 1u) << "at once";
  Submit({{0, 0, 8}}, 9);
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return ended.size() == 11; }));
}

TEST_F(DomainGroupTest, AWriteWithoutAnIdIsNotCounted) {
  Open(2);
  ASSERT_TRUE(from->group
                  ->SubmitWrite(1, from->local, to->remote,
                                Pieces{{0, 0, 5000}}, {},
                                [this](const Status& s) { ended.push_back(s); })
                  .ok());
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return ended.size() == 1; }));
  for (int i = 0; i < 10; ++i) to->Poll();
  EXPECT_TRUE(to->units.empty());
  EXPECT_EQ(std::memcmp(to->target(), from->source(), 5000), 0);
}

TEST_F(DomainGroupTest, ARemovedPeerMayComeBackUnderItsName) {
  Open(2, {.seed = 4, .delay_max_ns = 1'000'000, .write_bytes_max = 100});
  for (uint32_t id = 0; id < 10; ++id) Submit({{0, 0, 5000}}, id);
  Status said;
  from->group->SubmitSend(1, "perhaps", [&](const Status& s) { said = s; });
  from->group->RemovePeer(1);
  from->group->RemovePeer(1);
  from->group->RemovePeer(77);
  EXPECT_EQ(from->group->SubmitWrite(1, from->local, to->remote, {}, 1, nullptr)
                .status()
                .code(),
            StatusCode::kUnavailable);
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return ended.size() == 10; }));
  for (const Status& status : ended) {
    EXPECT_EQ(status.code(), StatusCode::kCancelled);
  }
  EXPECT_TRUE(from->group->Idle());
  EXPECT_TRUE(from->lost.empty()) << "who removes knows";
  from->Connect(1, *to);
  Submit({{0, 0, 5000}}, 99);
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return ended.size() == 11; }));
  EXPECT_TRUE(ended.back().ok());
}

TEST_F(DomainGroupTest, MemoryInUseIsNotUnregistered) {
  Open(2, {.seed = 5, .delay_max_ns = 500'000});
  Submit({{0, 0, 5000}}, 1);
  const Status refused = from->group->UnregisterMemory(from->local.keys);
  EXPECT_EQ(refused.code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(refused.message(), testing::HasSubstr("wait for it"));
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return ended.size() == 1; }));
  EXPECT_TRUE(from->group->UnregisterMemory(from->local.keys).ok());
  EXPECT_FALSE(from->group->UnregisterMemory(from->local.keys).ok());
  EXPECT_FALSE(from->group->UnregisterMemory({1}).ok());
}

TEST_F(DomainGroupTest, StrangersAreHeardButNotCounted) {
  Open(2);
  GroupNode stranger({.network = "calm group"}, 2, kBytes);
  stranger.Connect(5, *to);  // and `to` does not know it
  Status said(StatusCode::kUnknown, "");
  stranger.group->SubmitSend(5, "hello", [&](const Status& s) { said = s; });
  ASSERT_TRUE(stranger.group
                  ->SubmitWrite(5, stranger.local, to->remote,
                                Pieces{{0, 0, 8}}, 1, nullptr)
                  .ok());
  ASSERT_TRUE(PollUntil({&stranger, to.get()}, [&] {
    return to->strangers.size() == 1 && to->Total().strangers_dropped == 1;
  }));
  EXPECT_THAT(to->strangers, testing::ElementsAre("hello"));
  EXPECT_TRUE(said.ok());
  EXPECT_TRUE(to->messages.empty());
  EXPECT_TRUE(to->units.empty());
}

TEST_F(DomainGroupTest, WhereTheNicDoesNotNameSourcesTheIdMust) {
  Open(2, {.immediate_names_peer = false});
  Submit({{0, 0, 8}}, 3);
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return !to->units.empty(); }));
  EXPECT_EQ((to->units[{kUnknownPeer, 3}]), kTransferUnits);
}

TEST_F(DomainGroupTest, AFailedAddPeerLeavesNothingBehind) {
  Open(2);
  GroupNode third({.network = "calm group"}, 2, 64);
  const auto addresses = third.group->addresses();
  ASSERT_FALSE(from->group
                   ->AddPeer(3, {addresses[0], {"no address"}},
                             Deadline::AfterSeconds(1))
                   .ok());
  // Its Domain that was added would name it: then it is no stranger.
  const auto named = [&] {
    return third.group->AddPeer(7, from->group->addresses(), Deadline()).ok();
  };
  ASSERT_TRUE(named());
  third.group->SubmitSend(7, "hello");
  ASSERT_TRUE(PollUntil({&third, from.get()},
                        [&] { return from->strangers.size() == 1; }));
  from->Connect(3, third);
  third.Connect(7, *from);
  Status done(StatusCode::kInternal, "open");
  from->group->SubmitSend(3, "now", [&](Status status) { done = status; });
  ASSERT_TRUE(
      PollUntil({&third, from.get()}, [&] { return !third.messages.empty(); }));
  // One that was known under another name before stays.
  ASSERT_FALSE(from->group
                   ->AddPeer(4, {addresses[0], {"no address"}},
                             Deadline::AfterSeconds(1))
                   .ok());
  from->group->SubmitSend(3, "again", [&](Status status) { done = status; });
  ASSERT_TRUE(PollUntil({&third, from.get()},
                        [&] { return third.messages.size() == 2; }));
}

TEST_F(DomainGroupTest, AnAddressIsOfOnePeerUntilThatIsRemoved) {
  Open(1);
  const auto add = [&] {
    return from->group->AddPeer(9, to->group->addresses(), Deadline());
  };
  EXPECT_EQ(add().code(), StatusCode::kPermissionDenied);
  Status done(StatusCode::kInternal, "open");
  const auto note = [&](Status status) { done = status; };
  from->group->SubmitSend(1, "still here", note);
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return !to->messages.empty(); }));
  EXPECT_TRUE(done.ok()) << done.message();
  from->group->RemovePeer(1);
  ASSERT_TRUE(add().ok());
  from->group->SubmitSend(9, "by another name", note);
  ASSERT_TRUE(PollUntil({from.get(), to.get()},
                        [&] { return to->messages.size() == 2; }));
}

// The copies into its memory may not have ended.
TEST(DomainGroupMappedTest, ALostPeersAddressIsTakenUntilItIsRemoved) {
  const auto here = *OpenShmTransport({});
  const auto there = *OpenShmTransport({});
  const auto other = *there->OpenDomain();
  std::vector<std::unique_ptr<Domain>> domains;
  domains.push_back(*here->OpenDomain());
  DomainGroup group(std::move(domains));
  const auto add = [&](uint32_t name) {
    return group.AddPeer(name, {other->address()}, Deadline::AfterSeconds(5));
  };
  ASSERT_TRUE(add(1).ok());
  EXPECT_EQ(add(2).code(), StatusCode::kDeadlineExceeded);  // try again
  group.RemovePeer(1);
  EXPECT_TRUE(add(2).ok());
}

TEST_F(DomainGroupTest, WhatNoGroupSendsIsDropped) {
  Open(1);
  FakeOptions options = {.network = "calm group"};
  auto transport = *OpenFakeTransport(options);
  auto domain = *transport->OpenDomain();
  const auto peer =
      domain->AddPeer(to->group->addresses()[0], Deadline::AfterSeconds(1));
  ASSERT_TRUE(peer.ok());
  ASSERT_TRUE(
      to->group->AddPeer(8, {domain->address()}, Deadline::AfterSeconds(1))
          .ok());
  uint64_t sent = 0;
  for (const std::string& bytes :
       {std::string(), std::string("short"), std::string(16, '\xff'),
        std::string(1000, '\x01'), std::string(16, '\x01'),
        std::string(16, '\x07')}) {
    ASSERT_TRUE(domain->PostSend(*peer, bytes, ++sent).ok());
  }
  for (int i = 0; i < 100; ++i) to->Poll();
  EXPECT_TRUE(to->messages.empty());
  EXPECT_GE(to->Total().malformed_dropped, 3u);
  Submit({{0, 0, 8}}, 1);
  ASSERT_TRUE(
      PollUntil({from.get(), to.get()}, [&] { return ended.size() == 1; }));
}

}  // namespace
}  // namespace jaxfabric
