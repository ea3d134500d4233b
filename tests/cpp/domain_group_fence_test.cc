// Links that fail under a DomainGroup: nothing is lost, nothing counted twice.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "engine/domain_group.h"
#include "engine/immediate.h"
#include "tests/cpp/group_node.h"
#include "tests/cpp/seeded.h"
#include "transport/fake_link.h"

namespace jaxfabric {
namespace {

constexpr uint64_t kSlotBytes = 4096;
constexpr uint32_t kSlots = 48;
constexpr std::byte kSpent{0xee};

FakeOptions Fencing(uint64_t seed) {
  return {.network = "fence",
          .seed = seed,
          .pieces_max = 3,
          .delay_max_ns = 200'000,
          .write_bytes_max = 512,
          .removal_fences = true,
          .clock_ns = SimulatedClock::Now};
}

// Transfers one way between two nodes, each into a slot of its own. A source is
// spoilt when its transfer is done, a target when it is counted: whoever reads
// or writes either later is found out.
class Flow {
 public:
  Flow(GroupNode& from, GroupNode& to, uint32_t peer, Seeded& seeded)
      : from_(from), to_(to), peer_(peer), seeded_(seeded) {
    std::memset(from.source(), 0, kSlots * kSlotBytes);
    to.on_units = [this](uint32_t, uint32_t id, uint64_t units) {
      OnUnits(id, units);
    };
  }

  // Transfers 2i and 2i + 1 have one id: they are waited for together.
  static uint32_t IdOf(uint32_t slot) { return slot / 2; }

  void SubmitOne() {
    if (submitted_ == kSlots) return;
    const uint32_t slot = submitted_++;
    const uint64_t at = slot * kSlotBytes;
    for (uint64_t i = 0; i < kSlotBytes; ++i) {
      from_.source()[at + i] = ByteOf(slot, i);
    }
    const uint64_t split = seeded_.Below(kSlotBytes);
    const auto submitted = from_.group->SubmitWrite(
        peer_, from_.local, to_.remote,
        Pieces{{at, at, split}, {at + split, at + split, kSlotBytes - split}},
        IdOf(slot), [this, at](const Status& status) {
          EXPECT_TRUE(status.ok()) << status.message();
          std::memset(from_.source() + at, static_cast<int>(kSpent),
                      kSlotBytes);
          ++done;
        });
    ASSERT_TRUE(submitted.ok()) << submitted.status().message();
    if (seeded_.OneIn(3)) {
      from_.group->SubmitSend(peer_, "message " + std::to_string(slot),
                              [this](const Status& status) {
                                EXPECT_TRUE(status.ok()) << status.message();
                                ++messages_done;
                              });
      ++messages;
    }
  }
  bool Complete() const {
    return submitted_ == kSlots && done == kSlots && counted == kSlots / 2 &&
           messages_done == messages && to_.messages.size() >= messages;
  }
  void Check() {
    EXPECT_EQ(done, kSlots);
    EXPECT_EQ(counted, kSlots / 2);
    for (const auto& [key, units] : to_.units) {
      EXPECT_EQ(units, 2 * kTransferUnits) << "id " << key.second;
    }
    for (uint64_t i = 0; i < kSlots * kSlotBytes; ++i) {
      ASSERT_EQ(to_.target()[i], kPoison) << "written after it was counted";
    }
    const std::set<std::string> different(to_.messages.begin(),
                                          to_.messages.end());
    EXPECT_EQ(different.size(), messages);
    EXPECT_EQ(to_.messages.size(), messages) << "a message came twice";
  }

  uint32_t done = 0;
  uint32_t counted = 0;
  uint32_t messages = 0;
  uint32_t messages_done = 0;

 private:
  static std::byte ByteOf(uint32_t slot, uint64_t i) {
    return static_cast<std::byte>((slot * 131 + i * 7 + i / 251) % 97);
  }
  void OnUnits(uint32_t id, uint64_t units) {
    ASSERT_LE(units, 2 * kTransferUnits) << "id " << id << " counted twice";
    if (units < 2 * kTransferUnits) return;
    ++counted;
    for (uint32_t slot = 2 * id; slot < 2 * id + 2; ++slot) {
      std::byte* const at = to_.target() + slot * kSlotBytes;
      for (uint64_t i = 0; i < kSlotBytes; ++i) {
        ASSERT_EQ(at[i], ByteOf(slot, i)) << "slot " << slot << " byte " << i;
      }
      std::memset(at, static_cast<int>(kPoison), kSlotBytes);
    }
  }

  GroupNode& from_;
  GroupNode& to_;
  const uint32_t peer_;
  Seeded& seeded_;
  uint32_t submitted_ = 0;
};

class DomainGroupFenceTest : public testing::Test {
 protected:
  void Open(size_t here, size_t there, const FakeOptions& options) {
    a = std::make_unique<GroupNode>(options, here, kSlots * kSlotBytes);
    b = std::make_unique<GroupNode>(options, there, kSlots * kSlotBytes);
    a->Connect(1, *b);
    b->Connect(0, *a);
  }
  // Link k of the two.
  std::pair<NetAddr, NetAddr> LinkOf(size_t k) const {
    const auto ours = a->group->addresses();
    const auto theirs = b->group->addresses();
    return {ours[k % ours.size()], theirs[k % theirs.size()]};
  }
  void Cut(size_t k, const FakeCut& cut) {
    const auto [ours, theirs] = LinkOf(k);
    ASSERT_TRUE(CutFakeLink(a->network, ours, theirs, cut));
  }
  void Stall(size_t k) {
    const auto [ours, theirs] = LinkOf(k);
    ASSERT_TRUE(StallFakeLink(a->network, ours, theirs));
  }
  void Heal(size_t k) {
    const auto [ours, theirs] = LinkOf(k);
    ASSERT_TRUE(HealFakeLink(a->network, ours, theirs));
  }
  void Finish(std::initializer_list<Flow*> flows) {
    const bool complete = clock.Run({a.get(), b.get()}, [&] {
      return std::all_of(flows.begin(), flows.end(),
                         [](Flow* flow) { return flow->Complete(); });
    });
    ASSERT_TRUE(complete) << "nothing more happens";
    clock.RunFor({a.get(), b.get()}, 0.01);  // what comes late
    for (Flow* flow : flows) flow->Check();
    EXPECT_TRUE(a->lost.empty());
    EXPECT_TRUE(b->lost.empty());
  }

  SimulatedClock clock;
  std::unique_ptr<GroupNode> a;
  std::unique_ptr<GroupNode> b;
};

// What may have become of the writes of a link that is cut.
struct Moment {
  const char* name;
  FakeCut cut;
};

class CutMomentTest : public DomainGroupFenceTest,
                      public testing::WithParamInterface<Moment> {};

TEST_P(CutMomentTest, EachTransferIsCountedOnceAndItsBytesAreRight) {
  Seeded first;
  uint64_t again = 0;
  for (uint64_t round = 0; round < 16; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    Seeded& seeded = first;
    const size_t here = 2 + seeded.Below(3);
    const size_t there = 2 + seeded.Below(3);
    Open(here, there, Fencing(seeded.seed() + round));
    Flow there_flow(*a, *b, 1, seeded);
    Flow back_flow(*b, *a, 0, seeded);
    const uint32_t cut_at = static_cast<uint32_t>(seeded.Below(kSlots));
    const size_t victim = seeded.Below(std::max(here, there));
    for (uint32_t i = 0; i < kSlots; ++i) {
      there_flow.SubmitOne();
      back_flow.SubmitOne();
      if (i == cut_at) Cut(victim, GetParam().cut);
      clock.RunFor({a.get(), b.get()},
                   static_cast<double>(seeded.Below(100)) * 1e-6);
    }
    Finish({&there_flow, &back_flow});
    again += a->Total().writes_again + b->Total().writes_again;
    EXPECT_EQ(a->Total().links_failed, 1u);
    EXPECT_EQ(b->Total().links_failed, 1u);
    if (HasFailure()) return;
  }
  EXPECT_GT(again, 0u) << "no cut hit anything";
}

INSTANTIATE_TEST_SUITE_P(
    Moments, CutMomentTest,
    testing::Values(Moment{"BeforeDelivery", {}},
                    Moment{"BetweenDeliveryAndCompletion", {.may_land = true}},
                    Moment{"InTheMiddle", {.may_land_partly = true}},
                    Moment{"LandingLate", {.may_land_late = true}},
                    Moment{"Any",
                           {.may_land = true,
                            .may_land_partly = true,
                            .may_land_late = true}},
                    Moment{"AnyAndReportedLost",
                           {.may_land = true,
                            .may_land_partly = true,
                            .may_land_late = true,
                            .report_lost = true}}),
    [](const auto& info) { return info.param.name; });

TEST_F(DomainGroupFenceTest, LinksThatFailAndHealAtRandom) {
  Seeded seeded;
  uint64_t revived = 0;
  for (uint64_t round = 0; round < 12; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    Open(4, 4, Fencing(seeded.seed() + round));
    Flow there_flow(*a, *b, 1, seeded);
    Flow back_flow(*b, *a, 0, seeded);
    // Link 0 lives; the others come and go, during fences and repairs too.
    std::array<bool, 4> cut = {};
    for (uint32_t i = 0; i < kSlots; ++i) {
      there_flow.SubmitOne();
      back_flow.SubmitOne();
      const size_t k = 1 + seeded.Below(3);
      if (seeded.OneIn(3)) {
        if (cut[k]) {
          Heal(k);
        } else {
          Cut(k, {.may_land = true,
                  .may_land_partly = true,
                  .may_land_late = true,
                  .report_lost = seeded.OneIn(2)});
        }
        cut[k] = !cut[k];
      }
      const double scale = seeded.OneIn(8) ? 1e-3 : 1e-6;
      clock.RunFor({a.get(), b.get()},
                   static_cast<double>(seeded.Below(300)) * scale);
    }
    Finish({&there_flow, &back_flow});
    revived += a->Total().links_revived;
    if (HasFailure()) return;
  }
  EXPECT_GT(revived, 0u);
}

TEST_F(DomainGroupFenceTest, ADeadLinkIsNotUsedUntilItHeals) {
  Seeded seeded;
  Open(2, 2, Fencing(1));
  Cut(1, {});
  Flow flow(*a, *b, 1, seeded);
  for (uint32_t i = 0; i < kSlots / 2; ++i) flow.SubmitOne();
  clock.RunFor({a.get(), b.get()}, 3);  // and it was probed meanwhile
  const auto before = a->group->stats();
  EXPECT_EQ(before[1].writes, 0u);
  EXPECT_GT(before[0].writes, 0u);
  Heal(1);
  clock.RunFor({a.get(), b.get()}, 6);
  EXPECT_EQ(a->Total().links_revived, 1u);
  EXPECT_EQ(b->Total().links_revived, 1u);
  for (uint32_t i = 0; i < kSlots / 2; ++i) flow.SubmitOne();
  Finish({&flow});
  EXPECT_GT(a->group->stats()[1].writes, 0u) << "not taken back";
}

TEST_F(DomainGroupFenceTest, ALinkThatHangsIsTakenForDead) {
  Seeded seeded;
  Open(2, 2, Fencing(2));
  Flow flow(*a, *b, 1, seeded);
  for (uint32_t i = 0; i < 4; ++i) flow.SubmitOne();
  Stall(1);
  for (uint32_t i = 4; i < kSlots; ++i) flow.SubmitOne();
  const int64_t start_ns = clock.Now();
  Finish({&flow});
  EXPECT_LT(clock.Now() - start_ns, 2'500'000'000);
  EXPECT_EQ(a->Total().links_failed, 1u);
}

TEST_F(DomainGroupFenceTest, APeerThatSleepsIsNotALinkThatHangs) {
  Seeded seeded;
  Open(2, 2, Fencing(3));
  Flow flow(*a, *b, 1, seeded);
  for (uint32_t i = 0; i < kSlots; ++i) flow.SubmitOne();
  Stall(0);
  Stall(1);
  clock.RunFor({a.get()}, 4);
  EXPECT_EQ(a->Total().links_failed, 0u);
  Heal(0);
  Heal(1);
  Finish({&flow});
}

TEST_F(DomainGroupFenceTest, ThePeerAnswersOnceItHasPolledWhatArrived) {
  FakeOptions options = Fencing(8);
  options.delay_max_ns = 0;
  options.write_bytes_max = kChunkBytes;
  Open(2, 2, options);
  Stall(0);
  const auto submit = [&](const std::vector<Piece>& pieces,
                          std::optional<uint32_t> id) {
    EXPECT_TRUE(
        a->group->SubmitWrite(1, a->local, b->remote, pieces, id, {}).ok());
    a->Poll();
  };
  // Link 0 has no room for more; all else takes link 1.
  for (int i = 0; i < 8; ++i) submit({{0, 0, 2 * kSplitBytes}}, std::nullopt);
  clock.RunFor({a.get()}, 0.1);
  submit(std::vector<Piece>(150, Piece{0, 0, 8}), 7);
  clock.RunFor({a.get()}, 0.1);
  EXPECT_GT(a->group->stats()[1].writes, 150u);
  submit(std::vector<Piece>(40, Piece{0, 0, 8}), 8);
  Cut(1, {.may_land = true});
  clock.RunFor({a.get()}, 0.1);
  EXPECT_GT(a->group->stats()[1].errors, 10u);
  // Now `b` wakes up: the question is there, and more than it polls at once.
  Heal(0);
  ASSERT_TRUE(clock.Run({a.get(), b.get()}, [&] {
    return b->units[{0, 7}] >= kTransferUnits &&
           b->units[{0, 8}] >= kTransferUnits;
  }));
  clock.RunFor({a.get(), b.get()}, 0.1);
  EXPECT_EQ((b->units[{0, 7}]), kTransferUnits);
  EXPECT_EQ((b->units[{0, 8}]), kTransferUnits);
}

TEST_F(DomainGroupFenceTest, TheLastLinkTakesThePeerAlong) {
  Open(2, 2, Fencing(4));
  std::vector<Status> ended;
  for (uint32_t id = 0; id < 20; ++id) {
    ASSERT_TRUE(a->group
                    ->SubmitWrite(1, a->local, b->remote, Pieces{{0, 0, 4096}},
                                  id,
                                  [&](const Status& s) { ended.push_back(s); })
                    .ok());
  }
  Cut(0, {.may_land = true});
  Cut(1, {.may_land = true});
  ASSERT_TRUE(clock.Run({a.get(), b.get()}, [&] {
    return ended.size() == 20 && a->lost.size() == 1 && b->lost.size() <= 1;
  }));
  for (const Status& status : ended) {
    EXPECT_EQ(status.code(), StatusCode::kUnavailable);
  }
  EXPECT_TRUE(a->group->Idle());
}

TEST_F(DomainGroupFenceTest, WithoutAFenceTheOutcomeIsUnknownAndItsIdIsNot) {
  FakeOptions options = Fencing(5);
  options.removal_fences = false;
  options.delay_max_ns = 0;
  Open(2, 2, options);
  std::vector<Status> ended;
  const auto submit = [&](uint32_t id) {
    return a->group->SubmitWrite(1, a->local, b->remote, Pieces{{0, 0, 4096}},
                                 id,
                                 [&](const Status& s) { ended.push_back(s); });
  };
  ASSERT_TRUE(submit(7).ok());
  Cut(1, {.may_land = true});
  ASSERT_TRUE(clock.Run({a.get(), b.get()}, [&] { return ended.size() == 1; }));
  EXPECT_EQ(ended[0].code(), StatusCode::kUnknown) << ended[0].message();
  EXPECT_THAT(ended[0].message(), testing::HasSubstr("may have arrived"));
  const auto refused = submit(7);
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(refused.status().message(), testing::HasSubstr("another id"));
  a->group->ReleaseId(1, 7);
  EXPECT_TRUE(submit(7).ok());
}

TEST_F(DomainGroupFenceTest, AStalledLinkKeepsNoMessages) {
  Open(2, 2, Fencing(9));
  for (size_t k = 0; k < 2; ++k) {
    ASSERT_TRUE(StallFakeLink(a->network, a->group->addresses()[k],
                              b->group->addresses()[k]));
    for (int i = 0; i < 5; ++i) a->group->SubmitSend(1, std::to_string(i));
    ASSERT_TRUE(clock.Run({a.get(), b.get()},
                          [&] { return b->messages.size() == 5 * (k + 1); }))
        << "link " << k;
    HealFakeLink(a->network, a->group->addresses()[k],
                 b->group->addresses()[k]);
    clock.RunFor({a.get(), b.get()}, 10);
  }
  EXPECT_TRUE(a->lost.empty() && b->lost.empty());
}

TEST_F(DomainGroupFenceTest, WithoutAFenceALostMessageIsALostPeer) {
  FakeOptions options = Fencing(8);
  options.removal_fences = false;
  Open(2, 2, options);
  std::vector<Status> said;
  for (int i = 0; i < 20; ++i) {
    a->group->SubmitSend(1, std::to_string(i),
                         [&](const Status& s) { said.push_back(s); });
  }
  Cut(0, {.report_lost = true});
  ASSERT_TRUE(clock.Run({a.get(), b.get()}, [&] {
    return said.size() == 20 && !a->lost.empty() && !b->lost.empty();
  }));
  EXPECT_LT(b->messages.size(), 20u);
}

TEST_F(DomainGroupFenceTest, APeerThatNeverSaysWhatItHolds) {
  Open(2, 2, Fencing(6));
  std::vector<Status> ended;
  ASSERT_TRUE(a->group
                  ->SubmitWrite(1, a->local, b->remote, Pieces{{0, 0, 8192}}, 1,
                                [&](const Status& s) { ended.push_back(s); })
                  .ok());
  Cut(1, {.may_land = true});
  // `b` does not poll any more, and nobody notices.
  ASSERT_TRUE(clock.Run({a.get()}, [&] { return ended.size() == 1; }));
  EXPECT_EQ(ended[0].code(), StatusCode::kUnknown);
  EXPECT_TRUE(a->lost.empty());
}

}  // namespace
}  // namespace jaxfabric
