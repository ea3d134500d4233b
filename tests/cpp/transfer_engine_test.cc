#include "engine/transfer_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <numeric>
#include <ostream>

#include "base/registry.h"
#include "engine/immediate.h"
#include "tests/cpp/seeded.h"
#include "tests/cpp/transfer_node.h"

namespace jaxfabric {
namespace {

using testing::HasSubstr;

// Over which transport, and how many NICs on each side.
struct Case {
  const char* name;
  bool fake = false;
  FakeOptions options = {};
  uint32_t nics_here = 1;
  uint32_t nics_there = 1;
};

void PrintTo(const Case& shown, std::ostream* out) { *out << shown.name; }

const FakeOptions kChaos = {.pieces_max = 5,
                            .delay_max_ns = 200'000,
                            .again_share = 0.2,
                            .queue_depth = 8,
                            .write_bytes_max = 4099};

const Case kCases[] = {
    {"Shm"},
    {"ShmThreeNicsToTwo", false, {}, 3, 2},
    {"Fake", true},
    {"Chaos", true, kChaos},
    {"ChaosFourNics", true, kChaos, 4, 4},
    {"ChaosOneNicToEight", true, kChaos, 1, 8},
    {"ChaosFiveNicsToTwo", true, kChaos, 5, 2},
};

class TransferEngineTest : public testing::TestWithParam<Case> {
 protected:
  std::unique_ptr<TransferNode> Open(uint32_t nics = GetParam().nics_here,
                                     TransferEngineOptions options = {}) {
    std::unique_ptr<Transport> transport;
    if (GetParam().fake) {
      FakeOptions fake = GetParam().options;
      fake.network = "transfer";
      fake.seed = seeded_.seed();
      transport = *OpenFakeTransport(fake);
    } else {
      transport = *OpenShmTransport({});
    }
    options.job = "test";
    options.token = "secret";
    options.name = "node" + std::to_string(next_node_++);
    options.nics = nics;
    return std::make_unique<TransferNode>(std::move(transport), options);
  }
  void OpenPair() {
    a_ = Open();
    b_ = Open(GetParam().nics_there);
    peer_ = a_->Connect(*b_);
    for (uint64_t i = 0; i < TransferNode::kBytes; ++i) {
      a_->data()[i] = static_cast<std::byte>(seeded_.random()());
    }
  }
  TransferEngine::Submitted Write(uint64_t from, uint64_t to, uint64_t length,
                                  std::optional<uint32_t> id) {
    return a_->engine->SubmitSingleWrite(a_->region, from, b_->address, to,
                                         length, id);
  }
  testing::AssertionResult Comes(uint32_t id, uint64_t transfers = 1) {
    return EndsWell(b_->engine->ExpectImmCount(id, transfers));
  }

  Seeded seeded_;
  std::unique_ptr<TransferNode> a_;
  std::unique_ptr<TransferNode> b_;
  uint32_t peer_ = 0;
  int next_node_ = 0;
};

INSTANTIATE_TEST_SUITE_P(Transports, TransferEngineTest,
                         testing::ValuesIn(kCases),
                         [](const auto& info) { return info.param.name; });

TEST_P(TransferEngineTest, ASingleWriteIsOneCountAndAllItsBytes) {
  OpenPair();
  uint64_t at = 3;
  uint32_t id = 0;
  for (const uint64_t length : {0u, 1u, 4099u, 4100u, 100'003u, 500'000u}) {
    ASSERT_TRUE(EndsWell(Write(at, at, length, ++id)));
    ASSERT_TRUE(Comes(id));
    EXPECT_EQ(std::memcmp(b_->data() + at, a_->data() + at, length), 0);
    EXPECT_EQ(b_->data()[at + length], kPoison) << "beyond " << length;
    at += length + 1;
  }
  EXPECT_EQ(b_->data()[2], kPoison);
  for (uint32_t i = 1; i <= id; ++i) EXPECT_EQ(b_->engine->ImmCount(i), 0u);
}

TEST_P(TransferEngineTest, BothSidesWriteOnceOneHasConnected) {
  OpenPair();
  ASSERT_TRUE(EndsWell(a_->engine->SubmitSend(peer_, "hello")));
  const auto message = b_->engine->inbox().Take(Patience());
  ASSERT_TRUE(message);
  ASSERT_TRUE(EndsWell(b_->engine->SubmitSend(message->peer, "yourself")));
  ASSERT_TRUE(EndsWell(
      b_->engine->SubmitSingleWrite(b_->region, 0, a_->address, 77, 1000, 5)));
  ASSERT_TRUE(EndsWell(a_->engine->ExpectImmCount(5, 1)));
  EXPECT_EQ(a_->data()[77], kPoison);
  EXPECT_EQ(a_->engine->inbox().Take(Patience())->text, "yourself");
}

TEST_P(TransferEngineTest, RandomPagedWritesEqualAModel) {
  OpenPair();
  for (uint32_t round = 0; round < 6; ++round) {
    std::memset(b_->data(), static_cast<int>(kPoison), TransferNode::kBytes);
    const uint64_t page = 1 + seeded_.Below(3000);
    const uint64_t slots = TransferNode::kBytes / (page + 7) - 2;
    const uint64_t count = std::min<uint64_t>(seeded_.Below(200), slots);
    PageList from = {{}, page, seeded_.Below(7)};
    PageList to = {std::vector<uint64_t>(slots), page + 7, seeded_.Below(7)};
    std::iota(to.indices.begin(), to.indices.end(), 0);
    if (!seeded_.OneIn(3)) {
      std::shuffle(to.indices.begin(), to.indices.end(), seeded_.random());
    } else {
      to.stride = page;  // pages that follow each other
    }
    to.indices.resize(count);
    std::vector<std::byte> expected(TransferNode::kBytes, kPoison);
    for (uint64_t i = 0; i < count; ++i) {
      from.indices.push_back(seeded_.OneIn(2) ? i : seeded_.Below(slots));
      std::memcpy(expected.data() + to.offset + to.indices[i] * to.stride,
                  a_->data() + from.offset + from.indices[i] * page, page);
    }
    ASSERT_TRUE(EndsWell(a_->engine->SubmitPagedWrites(
        a_->region, from, b_->address, to, page, round)));
    ASSERT_TRUE(Comes(round));
    ASSERT_EQ(std::memcmp(b_->data(), expected.data(), expected.size()), 0);
    EXPECT_EQ(b_->engine->ImmCount(round), 0u);
  }
}

TEST_P(TransferEngineTest, ManyTransfersUnderWayAreEachCountedOnce) {
  OpenPair();
  std::vector<TransferEngine::Submitted> writes;
  for (uint32_t i = 0; i < 300; ++i) {
    writes.push_back(Write(i * 3000, i * 3000, i * 9 % 3000, i / 100));
  }
  for (const auto& write : writes) ASSERT_TRUE(EndsWell(write));
  for (uint32_t id = 0; id < 3; ++id) ASSERT_TRUE(Comes(id, 100));
  for (uint64_t i = 0; i < 300; ++i) {
    EXPECT_EQ(
        std::memcmp(b_->data() + i * 3000, a_->data() + i * 3000, i * 9 % 3000),
        0);
  }
  for (uint32_t id = 0; id < 3; ++id) {
    EXPECT_EQ(b_->engine->ImmCount(id), 0u);
  }
}

TEST_P(TransferEngineTest, AWriteWithoutAnIdIsNotCounted) {
  OpenPair();
  ASSERT_TRUE(EndsWell(Write(0, 0, 100'000, std::nullopt)));
  ASSERT_TRUE(EndsWell(Write(0, 500'000, 10, 9)));
  ASSERT_TRUE(Comes(9));
  EXPECT_EQ(b_->engine->stats().peers.begin()->second.transfers_received, 1u);
}

TEST_P(TransferEngineTest, MessagesComeWholeAndInOrder) {
  OpenPair();
  std::vector<std::string> sent;
  for (const size_t size : {0, 1, 4071, 4072, 4073, 100'000, 1 << 20}) {
    sent.push_back(std::string(size, static_cast<char>('a' + sent.size())));
  }
  for (int i = 0; i < 50; ++i) sent.push_back(std::to_string(i));
  for (const std::string& text : sent) {
    ASSERT_TRUE(a_->engine->SubmitSend(peer_, text).ok());
  }
  for (const std::string& text : sent) {
    const auto message = b_->engine->inbox().Take(Patience());
    ASSERT_TRUE(message);
    ASSERT_EQ(message->text.size(), text.size());
    ASSERT_TRUE(message->text == text);
  }
  EXPECT_TRUE(IsOk(a_->engine->Drain(Patience())));
}

TEST_P(TransferEngineTest, MessagesGoToTheCallback) {
  OpenPair();
  const auto all = std::make_shared<std::promise<std::string>>();
  std::string seen;
  b_->engine->SubmitRecvs([&seen, all](TransferMessage message) {
    seen += message.text;
    if (seen.size() == 3) all->set_value(seen);
  });
  for (const char* text : {"a", "b", "c"}) {
    ASSERT_TRUE(EndsWell(a_->engine->SubmitSend(peer_, text)));
  }
  EXPECT_EQ(all->get_future().get(), "abc");
}

TEST_P(TransferEngineTest, FaultTailOfAnOddLengthScatterIsLost) {
  OpenPair();
  auto c = Open();
  a_->Connect(*c);
  std::vector<ScatterTarget> targets;
  uint64_t at = 1;
  for (const uint64_t length : {1u, 8191u, 0u, 12'345u, 99'999u}) {
    targets.push_back({b_->address, at, at, length});
    targets.push_back({c->address, at, at, length});
    at += length + 1;
  }
  ASSERT_TRUE(EndsWell(a_->engine->SubmitScatter(a_->region, targets, 4)));
  ASSERT_TRUE(Comes(4, 5));
  ASSERT_TRUE(EndsWell(c->engine->ExpectImmCount(4, 5)));
  for (const ScatterTarget& target : targets) {
    for (TransferNode* node : {b_.get(), c.get()}) {
      EXPECT_EQ(std::memcmp(node->data() + target.target_offset,
                            a_->data() + target.source_offset, target.length),
                0);
      EXPECT_EQ(node->data()[target.target_offset + target.length], kPoison);
    }
  }
}

TEST_P(TransferEngineTest, FaultEmptyListOfDestinations) {
  OpenPair();
  EXPECT_TRUE(EndsWell(a_->engine->SubmitScatter(a_->region, {}, 1)));
  const auto group = a_->engine->AddPeerGroup({});
  ASSERT_TRUE(group.ok());
  EXPECT_TRUE(EndsWell(a_->engine->SubmitBarrier(*group, 1)));
  EXPECT_TRUE(EndsWell(a_->engine->ExpectImmCount(1, 0)));
  // No pages are a transfer too.
  EXPECT_TRUE(EndsWell(
      a_->engine->SubmitPagedWrites(a_->region, {}, b_->address, {}, 4096, 1)));
  EXPECT_TRUE(Comes(1));
}

TEST_P(TransferEngineTest, CountsThatComeEarlyAreKept) {
  OpenPair();
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(EndsWell(Write(0, 0, 10'000, 8)));
  const Deadline deadline = Patience();
  while (b_->engine->ImmCount(8) < 3 && !deadline.Expired()) {
  }
  EXPECT_TRUE(Comes(8, 2));
  EXPECT_EQ(b_->engine->ImmCount(8), 1u);
  EXPECT_TRUE(Comes(8, 1));
}

TEST_P(TransferEngineTest, AnExpectationCallsBackOnce) {
  OpenPair();
  std::atomic<int> calls{0};
  const auto expected = b_->engine->ExpectImmCount(2, 3);
  ASSERT_TRUE(expected.ok());
  (*expected)->OnDone([&](const Status& status) {
    EXPECT_TRUE(status.ok());
    calls.fetch_add(1, std::memory_order_release);
  });
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(EndsWell(Write(0, 0, 5000, 2)));
  ASSERT_TRUE(EndsWell(expected));
  ASSERT_TRUE(Comes(2));
  const Deadline deadline = Patience();
  while (calls.load(std::memory_order_acquire) == 0 && !deadline.Expired()) {
  }
  EXPECT_EQ(calls.load(std::memory_order_acquire), 1);
}

TEST_P(TransferEngineTest, ABarrierWaitsForTheSlowestHoweverFastTheOthers) {
  OpenPair();
  auto c = Open();
  TransferNode* nodes[] = {a_.get(), b_.get(), c.get()};
  PeerGroupId groups[3];
  for (int i = 0; i < 3; ++i) {
    std::vector<uint32_t> others;
    for (int j = 0; j < 3; ++j) {
      if (j != i) others.push_back(nodes[i]->Connect(*nodes[j]));
    }
    groups[i] = *nodes[i]->engine->AddPeerGroup(others);
  }
  const auto come = [&](int i) {
    return nodes[i]->engine->SubmitBarrier(groups[i], 6);
  };
  for (int round = 0; round < 20; ++round) {
    // a comes twice; its second must not stand for c's first.
    const auto a1 = come(0);
    const auto a2 = come(0);
    const auto b1 = come(1);
    Deadline soon = Deadline::AfterNanoseconds(1'000'000);
    EXPECT_FALSE((*b1)->Wait(soon));
    EXPECT_FALSE((*a1)->done());
    const auto c1 = come(2);
    for (const auto& met : {a1, b1, c1}) ASSERT_TRUE(EndsWell(met));
    EXPECT_FALSE((*a2)->done());
    const auto b2 = come(1);
    const auto c2 = come(2);
    for (const auto& met : {a2, b2, c2}) ASSERT_TRUE(EndsWell(met));
  }
}

TEST_P(TransferEngineTest, ForeignMemoryCanBeWrittenFrom) {
  OpenPair();
  std::vector<char> mine(10'000, 'm');
  const auto region = a_->engine->RegisterMemory(
      reinterpret_cast<std::byte*>(mine.data()), mine.size());
  ASSERT_TRUE(region.ok()) << region.status().message();
  ASSERT_TRUE(EndsWell(
      a_->engine->SubmitSingleWrite(*region, 5, b_->address, 1, 9'990, 1)));
  ASSERT_TRUE(Comes(1));
  EXPECT_EQ(static_cast<char>(b_->data()[9'990]), 'm');
  EXPECT_EQ(b_->data()[9'991], kPoison);
  const auto described = a_->engine->Describe(*region);
  if (a_->engine->caps().direct_store) {
    EXPECT_THAT(described.status().message(), HasSubstr("alloc()"));
  } else {
    EXPECT_TRUE(described.ok());
  }
  EXPECT_TRUE(EndsWell(a_->engine->UnregisterMemory(*region)));
}

TEST_P(TransferEngineTest, UnregisteringWaitsForTransfersAndEndsThem) {
  OpenPair();
  std::vector<TransferEngine::Submitted> writes;
  for (uint32_t i = 0; i < 20; ++i) {
    writes.push_back(Write(0, i * 50'000, 50'000, std::nullopt));
  }
  const auto gone = a_->engine->UnregisterMemory(a_->region);
  const auto late = Write(0, 0, 1, std::nullopt);
  EXPECT_EQ(late.status().code(), StatusCode::kNotFound);
  ASSERT_TRUE(EndsWell(gone));
  for (const auto& write : writes) {
    EXPECT_TRUE((*write)->done());
    EXPECT_TRUE(EndsWell(write));
  }
  EXPECT_EQ(EndOf(a_->engine->UnregisterMemory(a_->region)).code(),
            StatusCode::kNotFound);
}

TEST_P(TransferEngineTest, AWriteIntoWhatWasUnregisteredFailsAlone) {
  OpenPair();
  const RegionId other = *b_->engine->AllocateMemory(1000);
  const RegionAddress address = *b_->engine->Describe(other);
  ASSERT_TRUE(EndsWell(b_->engine->UnregisterMemory(other)));
  const Status refused =
      EndOf(a_->engine->SubmitSingleWrite(a_->region, 0, address, 0, 100, 3));
  EXPECT_FALSE(refused.ok());
  EXPECT_THAT(refused.message(), HasSubstr("single write of 100 bytes"));
  EXPECT_TRUE(EndsWell(Write(0, 0, 100, 4)));
  EXPECT_TRUE(Comes(4));
  EXPECT_EQ(b_->engine->ImmCount(3), 0u);
}

TEST_P(TransferEngineTest, AWatcherReportsBumps) {
  OpenPair();
  std::atomic<uint64_t> sum{0};
  const auto all = std::make_shared<std::promise<void>>();
  const auto watcher =
      a_->engine->AllocWatcher([&sum, all](uint64_t before, uint64_t after) {
        EXPECT_LT(before, after);
        const uint64_t add = after - before;
        if (sum.fetch_add(add, std::memory_order_relaxed) + add == 100) {
          all->set_value();
        }
      });
  ASSERT_TRUE(watcher.ok());
  const auto found = Registry<Watcher>::Get().Find((*watcher)->id());
  ASSERT_NE(found, nullptr);
  for (int i = 0; i < 100; ++i) found->Bump();
  EXPECT_EQ(all->get_future().wait_for(std::chrono::seconds(30)),
            std::future_status::ready);
  a_->engine->FreeWatcher(*watcher);
  EXPECT_EQ(Registry<Watcher>::Get().Find((*watcher)->id()), nullptr);
  (*watcher)->Bump();
  EXPECT_EQ((*watcher)->value(), 101u);
}

TEST_P(TransferEngineTest, WhatIsSubmittedAtCloseEnds) {
  OpenPair();
  std::vector<TransferEngine::Submitted> pending;
  pending.push_back(a_->engine->ExpectImmCount(1, 1));
  for (uint32_t i = 0; i < 20; ++i) {
    pending.push_back(Write(0, i * 50'000, 50'000, std::nullopt));
  }
  a_->engine.reset();
  EXPECT_THAT(EndOf(pending[0]).message(), HasSubstr("closed"));
  for (const auto& future : pending) EXPECT_TRUE((*future)->done());
}

}  // namespace
}  // namespace jaxfabric
