// One endpoint against a peer that is played by hand, so that it can be late,
// wrong or hostile.

#include "engine/endpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <future>
#include <memory>

#include "transport/fake.h"

namespace jaxfabric {
namespace {

using testing::HasSubstr;

constexpr double kPatienceSeconds = 30;
constexpr uint32_t kGeneration = 3;
constexpr uint32_t kOwnRank = 0;
constexpr uint32_t kPeerRank = 1;
constexpr MatchKey kKey = {.channel = 5, .sequence = 0};
constexpr HeapLayout kHeap = {
    .ranks = 2, .mailbox_bytes = 4096, .window_bytes = 1000};

// Its device can keep no more memory in place.
class FullDomain final : public Domain {
 public:
  const DomainCaps& caps() const override { return caps_; }
  const NetAddr& address() const override { return address_; }
  StatusOr<uint64_t> RegisterMemory(const MemoryRegion&) override {
    return Status(StatusCode::kResourceExhausted, "cannot pin it");
  }
  Status UnregisterMemory(uint64_t) override { return OkStatus(); }
  StatusOr<PeerId> AddPeer(const NetAddr&, Deadline) override { return 0u; }
  void RemovePeer(PeerId) override {}
  StatusOr<Posted> PostWriteImm(PeerId, LocalSpan, RemoteSpan, uint64_t,
                                std::optional<uint32_t>, uint64_t) override {
    return Posted::kAgain;
  }
  StatusOr<Posted> PostSend(PeerId, std::string_view, uint64_t) override {
    return Posted::kAgain;
  }
  size_t Poll(std::span<Completion>) override { return 0; }
  std::byte* DirectPointer(PeerId, RemoteSpan, uint64_t) override {
    return nullptr;
  }

 private:
  DomainCaps caps_;
  NetAddr address_;
};

TEST(EndpointOpenTest, TooMuchMemoryIsAnErrorThatNamesTheSettings) {
  std::vector<std::unique_ptr<Domain>> domains;
  domains.push_back(std::make_unique<FullDomain>());
  const auto opened = Endpoint::Open(
      {.rank = kOwnRank, .generation = kGeneration, .heap = kHeap},
      std::move(domains), [](const Endpoint::Loss&) {});
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.status().code(), StatusCode::kResourceExhausted);
  const std::string& text = opened.status().message();
  for (const char* part :
       {"window_bytes=1000", "mailbox_bytes=4096", "cannot pin it"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
}

class EndpointTest : public testing::Test {
 protected:
  explicit EndpointTest(int64_t delay_max_ns = 0) {
    transport_ = *OpenFakeTransport(
        {.network = "endpoint", .delay_max_ns = delay_max_ns});
    peer_transport_ = *OpenFakeTransport({.network = "endpoint"});
    std::vector<std::unique_ptr<Domain>> domains;
    domains.push_back(*transport_->OpenDomain());
    endpoint_ = *Endpoint::Open(
        {.rank = kOwnRank, .generation = kGeneration, .heap = kHeap},
        std::move(domains),
        [this](Endpoint::Loss loss) { losses_.push_back(std::move(loss)); });
    domains.clear();
    domains.push_back(*peer_transport_->OpenDomain());
    heap_ = *SharedMemory::Create("test-peer", kHeap.TotalBytes());
    peer_ = std::make_unique<DomainGroup>(std::move(domains));
    keys_ = *peer_->RegisterMemory({heap_.data(), heap_.size(), heap_.fd()});
    EXPECT_TRUE(endpoint_->Connect(kPeerRank, PeerAddress(), Deadline()).ok());
    EXPECT_TRUE(
        peer_->AddPeer(kOwnRank, endpoint_->address().domains, Deadline())
            .ok());
  }

  RankAddress PeerAddress() const {
    return {kGeneration, peer_->addresses(), {0, heap_.size(), keys_}};
  }

  void DriveUntil(const std::function<bool()>& met) {
    const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
    while (!met()) {
      ASSERT_FALSE(deadline.Expired()) << "nothing more happens";
      Drive();
    }
  }
  void Drive() {
    endpoint_->Progress();
    std::vector<DomainGroup::Event> events;
    peer_->Poll(&events);
    for (const DomainGroup::Event& event : events) {
      if (event.kind == DomainGroup::Event::Kind::kImmediate) {
        const Immediate immediate = Immediate::Decode(event.immediate);
        transfer_ids_.push_back(immediate.id);
        units_ += immediate.Units();
      } else if (event.kind == DomainGroup::Event::Kind::kMessage) {
        controls_.push_back(*ControlMessage::Decode(event.message));
      }
    }
  }
  void Settle() {
    for (int i = 0; i < 20; ++i) Drive();
  }

  // What an honest peer writes for a message without bytes.
  static MailboxDescriptor Descriptor(uint32_t generation = kGeneration) {
    MailboxDescriptor descriptor = {};
    descriptor.magic = kDescriptorMagic;
    descriptor.generation = generation;
    descriptor.channel = kKey.channel;
    descriptor.sequence = kKey.sequence;
    std::strcpy(descriptor.label, "barrier");
    return descriptor;
  }
  // The peer writes `descriptor` into `slot` of its mailbox and counts it.
  void PeerWrites(const MailboxDescriptor& descriptor, uint32_t slot = 0) {
    const uint64_t at = kHeap.Descriptor(kOwnRank, slot);
    std::memcpy(heap_.data() + at, &descriptor, sizeof descriptor);
    PeerCounts({kPeerRank, IdKind::kMailbox, slot},
               {{at, kHeap.Descriptor(kPeerRank, slot), sizeof descriptor}});
  }
  void PeerCounts(TransferId id, const std::vector<Piece>& pieces = {}) {
    const RankAddress own = endpoint_->address();
    ASSERT_TRUE(peer_
                    ->SubmitWrite(kOwnRank, {heap_.data(), heap_.size(), keys_},
                                  own.heap, pieces, id.Encode(),
                                  [](const Status&) {})
                    .ok());
  }
  void PeerSays(ControlMessage::Type type, uint64_t argument,
                const std::string& text = "",
                uint32_t generation = kGeneration) {
    peer_->SubmitSend(
        kOwnRank, ControlMessage{type, generation, argument, text}.Encode());
  }

  // An operation whose end can be awaited.
  OperationPtr Begin(double timeout_s = 30) {
    ended_ = std::make_shared<std::promise<Status>>();
    return std::make_shared<Operation>("call", timeout_s,
                                       [ended = ended_](Status status) {
                                         ended->set_value(std::move(status));
                                       });
  }
  Status Ended() {
    auto future = ended_->get_future();
    for (const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
         !deadline.Expired();) {
      Drive();
      if (future.wait_for(std::chrono::milliseconds(0)) ==
          std::future_status::ready) {
        return future.get();
      }
    }
    return Status(StatusCode::kDeadlineExceeded, "the test gave up");
  }
  Outgoing Message(const OperationPtr& operation, uint64_t bytes) {
    return {.destination = kPeerRank,
            .key = kKey,
            .bytes = bytes,
            .label = "call",
            .pack = [bytes](std::byte* to) { std::memset(to, 1, bytes); },
            .operation = operation};
  }
  // Waits for the peer's message under kKey.
  bool Expect(const OperationPtr& operation) {
    std::vector<Arrival> now;
    return endpoint_->Expect(
        kKey, {kPeerRank}, operation,
        [this, operation](std::vector<Arrival> arrivals) {
          for (const Arrival& one : arrivals) endpoint_->Release(one);
        },
        &now);
  }
  // Whole transfers that the peer got.
  uint64_t Transfers() const { return units_ / kTransferUnits; }
  PeerStats Stats() { return endpoint_->stats().at(kPeerRank); }

  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Transport> peer_transport_;
  SharedMemory heap_;  // the peer's
  std::vector<uint64_t> keys_;
  std::unique_ptr<DomainGroup> peer_;
  std::vector<uint32_t> transfer_ids_;  // one for each write that came
  uint64_t units_ = 0;
  std::vector<ControlMessage> controls_;
  std::vector<Endpoint::Loss> losses_;
  std::shared_ptr<std::promise<Status>> ended_;
  std::unique_ptr<Endpoint> endpoint_;
};

TEST_F(EndpointTest, AMessageCompletesTheCallThatExpectsIt) {
  EXPECT_FALSE(Expect(Begin()));
  EXPECT_THAT(endpoint_->DescribeMissing(kKey), HasSubstr("rank 1"));
  PeerWrites(Descriptor());
  EXPECT_TRUE(Ended().ok());
  EXPECT_EQ(Stats().messages_received, 1u);
}

TEST_F(EndpointTest, UnmatchedMessagesAreNamed) {
  EXPECT_FALSE(Expect(Begin()));
  MailboxDescriptor other = Descriptor();
  other.channel = 99;
  PeerWrites(other);
  Settle();
  EXPECT_THAT(endpoint_->DescribeMissing(kKey),
              HasSubstr("barrier from rank 1"));
  PeerWrites(Descriptor(), /*slot=*/1);
  EXPECT_TRUE(Ended().ok());
}

TEST_F(EndpointTest, StaleGenerationsAreDroppedAndCounted) {
  EXPECT_FALSE(Expect(Begin()));
  for (uint32_t slot = 0; slot < 4; ++slot) {
    PeerWrites(Descriptor(kGeneration - 1), slot);
  }
  PeerSays(ControlMessage::Type::kAbort, 0, "old", kGeneration - 1);
  Settle();
  EXPECT_EQ(Stats().stale_dropped, 5u);
  EXPECT_EQ(Stats().messages_received, 0u);
  EXPECT_TRUE(losses_.empty());
  PeerWrites(Descriptor());
  EXPECT_TRUE(Ended().ok());
}

TEST_F(EndpointTest, StaleCreditsFreeNothing) {
  endpoint_->Send(Message(Begin(), kHeap.mailbox_bytes));
  EXPECT_TRUE(Ended().ok());
  MailboxDescriptor stale = Descriptor(kGeneration - 1);
  stale.credits = ~uint64_t{0};
  PeerWrites(stale);
  PeerSays(ControlMessage::Type::kCredits, ~uint64_t{0}, "", kGeneration - 1);
  Settle();
  EXPECT_EQ(Transfers(), 1u);
  endpoint_->Send(Message(Begin(), kHeap.mailbox_bytes));
  Settle();
  EXPECT_EQ(Transfers(), 1u) << "the unread message was overwritten";
  endpoint_->DropWaiting();
  EXPECT_TRUE(Ended().ok());
}

TEST_F(EndpointTest, AWaitingSenderAsksForCreditAndIsServed) {
  endpoint_->Send(Message(Begin(), kHeap.mailbox_bytes));
  EXPECT_TRUE(Ended().ok());
  endpoint_->Send(Message(Begin(), 1));
  DriveUntil([&] { return !controls_.empty() && Transfers() == 1; });
  EXPECT_EQ(controls_[0].type, ControlMessage::Type::kWantCredits);
  EXPECT_THAT(endpoint_->DescribeMissing(kKey), HasSubstr("credit to send"));
  PeerSays(ControlMessage::Type::kCredits, 1);
  EXPECT_TRUE(Ended().ok());
  DriveUntil([&] { return Transfers() == 2; });
}

// Its writes are confirmed late, so that credits come before.
class LateEndpointTest : public EndpointTest {
 protected:
  LateEndpointTest() : EndpointTest(/*delay_max_ns=*/10'000'000) {}
};

TEST_F(LateEndpointTest, CreditThatComesBeforeTheWriteIsDoneServesToo) {
  const uint64_t messages = 16;
  for (uint64_t i = 0; i < messages; ++i) {
    endpoint_->Send(Message(Begin(), kHeap.mailbox_bytes));
  }
  for (uint64_t i = 1; i <= messages; ++i) {
    DriveUntil([&] { return Transfers() == i; });
    ASSERT_FALSE(testing::Test::HasFailure()) << "after " << i - 1;
    PeerSays(ControlMessage::Type::kCredits, 1);
  }
  EXPECT_TRUE(Ended().ok());
}

TEST_F(EndpointTest, WantedCreditsComeWithTheNextRelease) {
  EXPECT_FALSE(Expect(Begin()));
  PeerSays(ControlMessage::Type::kWantCredits, 0);
  Settle();
  EXPECT_TRUE(controls_.empty()) << "there is none to give";
  PeerWrites(Descriptor(), /*slot=*/9);
  EXPECT_TRUE(Ended().ok());
  DriveUntil([&] { return !controls_.empty(); });
  EXPECT_EQ(controls_[0].type, ControlMessage::Type::kCredits);
  EXPECT_EQ(controls_[0].argument, uint64_t{1} << 9);
}

TEST_F(EndpointTest, AMessageLargerThanTheMailboxIsRefused) {
  endpoint_->Send(Message(Begin(), kHeap.mailbox_bytes + 1));
  const Status status = Ended();
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(status.message(), HasSubstr("JAXFABRIC_MAILBOX_BYTES"));
  EXPECT_THAT(status.message(), HasSubstr("rank 1"));
}

TEST_F(EndpointTest, HostileDescriptorsLoseThePeer) {
  std::vector<MailboxDescriptor> hostile(5, Descriptor());
  hostile[0].magic = 0;
  hostile[1].length = kHeap.mailbox_bytes + 1;
  hostile[2].offset = kHeap.mailbox_bytes + 1;
  hostile[3].offset = ~uint64_t{0};
  hostile[3].length = 2;
  hostile[4].length = ~uint64_t{0};
  for (uint32_t i = 0; i < hostile.size(); ++i) {
    losses_.clear();
    PeerWrites(hostile[i], i);
    DriveUntil([&] { return !losses_.empty(); });
    EXPECT_EQ(losses_[0].rank, kPeerRank);
    EXPECT_EQ(losses_[0].status.code(), StatusCode::kDataLoss);
    EXPECT_THAT(losses_[0].status.message(), HasSubstr("rank 1 sent"));
  }
  EXPECT_EQ(Stats().messages_received, 0u);
}

TEST_F(EndpointTest, HostileImmediatesLoseThePeer) {
  const TransferId hostile[] = {
      {kPeerRank + 1, IdKind::kMailbox, 0},          // another's
      {kOwnRank, IdKind::kWindow, 0},                // ours
      {kPeerRank, static_cast<IdKind>(2), 0},        // no such kind
      {kPeerRank, IdKind::kMailbox, kMailboxSlots},  // no such slot
      {kPeerRank, IdKind::kMailbox, kSlotsMax - 1},
  };
  for (const TransferId& id : hostile) {
    losses_.clear();
    PeerCounts(id);
    DriveUntil([&] { return !losses_.empty(); });
    EXPECT_EQ(losses_[0].rank, kPeerRank);
    EXPECT_EQ(losses_[0].status.code(), StatusCode::kDataLoss);
  }
}

TEST_F(EndpointTest, NonsenseAsAControlMessageLosesThePeer) {
  peer_->SubmitSend(kOwnRank, "nonsense");
  DriveUntil([&] { return !losses_.empty(); });
  EXPECT_EQ(losses_[0].rank, kPeerRank);
}

TEST_F(EndpointTest, AnAbortNamesWhoGaveUpAndWhoIsLost) {
  PeerSays(ControlMessage::Type::kAbort,
           AbortArgument(StatusCode::kDeadlineExceeded, std::nullopt), "late");
  DriveUntil([&] { return losses_.size() == 1; });
  EXPECT_TRUE(losses_[0].told);
  EXPECT_EQ(losses_[0].rank, std::nullopt);
  EXPECT_EQ(losses_[0].status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(losses_[0].status.message(), "rank 1 gave up: late");
  // A peer cannot make us believe that we are lost, nor somebody who is not.
  for (const uint32_t rank : {kOwnRank, 2u, ~0u - 1}) {
    losses_.clear();
    PeerSays(ControlMessage::Type::kAbort, uint64_t{rank} + 1);
    DriveUntil([&] { return losses_.size() == 1; });
    EXPECT_EQ(losses_[0].rank, std::nullopt);
    EXPECT_FALSE(losses_[0].status.ok());
  }
}

TEST_F(EndpointTest, AGoodbyeIsNoFailureUnlessThePeerIsNeeded) {
  PeerSays(ControlMessage::Type::kGoodbye, 0);
  Settle();
  EXPECT_TRUE(losses_.empty());
  EXPECT_FALSE(Expect(Begin()));
  ASSERT_EQ(losses_.size(), 1u);
  EXPECT_EQ(losses_[0].rank, kPeerRank);
  EXPECT_THAT(losses_[0].status.message(), HasSubstr("closed its Fabric"));
  losses_.clear();
  endpoint_->Send(Message(Begin(), 0));
  EXPECT_EQ(losses_.size(), 1u);
  endpoint_->DropWaiting();
}

TEST_F(EndpointTest, AGoodbyeEndsACallThatAwaitsThePeer) {
  EXPECT_FALSE(Expect(Begin()));
  PeerSays(ControlMessage::Type::kGoodbye, 0);
  DriveUntil([&] { return !losses_.empty(); });
  EXPECT_EQ(losses_[0].rank, kPeerRank);
  endpoint_->DropWaiting();
}

TEST_F(EndpointTest, AGoodbyeMayOvertakeTheLastMessage) {
  EXPECT_FALSE(Expect(Begin()));
  PeerSays(ControlMessage::Type::kGoodbye, /*argument=*/1);
  Settle();
  EXPECT_TRUE(losses_.empty()) << "one message is still on its way";
  PeerWrites(Descriptor());
  EXPECT_TRUE(Ended().ok());
  EXPECT_TRUE(losses_.empty());
}

TEST_F(EndpointTest, PutsArriveInTheWindowAndAreCounted) {
  const std::string text(999, 'p');
  endpoint_->Put(
      kPeerRank,
      {{reinterpret_cast<const std::byte*>(text.data()), 1, text.size()}},
      /*slot=*/77, Begin());
  EXPECT_TRUE(Ended().ok());
  DriveUntil([&] { return Transfers() == 1; });
  const TransferId id = TransferId::Decode(transfer_ids_[0]);
  EXPECT_EQ(id.source, kOwnRank);
  EXPECT_EQ(id.kind, IdKind::kWindow);
  EXPECT_EQ(id.slot, 77u);
  const std::byte* const window = heap_.data() + kHeap.Windows();
  EXPECT_EQ(std::memcmp(window + 1, text.data(), text.size()), 0);
  EXPECT_EQ(window[0], std::byte{0});
}

TEST_F(EndpointTest, PartsOfAPutAreOneTransfer) {
  const std::string text = "abcdef";
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  // The first two meet in the target's memory, the third stands alone.
  endpoint_->Put(kPeerRank,
                 {{bytes + 2, 8, 2}, {bytes, 10, 2}, {bytes + 4, 0, 2}},
                 /*slot=*/9, Begin());
  EXPECT_TRUE(Ended().ok());
  DriveUntil([&] { return Transfers() == 1; });
  const std::byte* const window = heap_.data() + kHeap.Windows();
  EXPECT_EQ(std::memcmp(window, "ef\0\0\0\0\0\0cdab\0", 13), 0);
}

TEST_F(EndpointTest, AWriteThatFailsWhileItsPeerLivesIsReported) {
  ASSERT_TRUE(peer_->UnregisterMemory(keys_).ok());
  const std::byte one{1};
  endpoint_->Put(kPeerRank, {{&one, 0, 1}}, /*slot=*/9, Begin());
  DriveUntil([&] { return !losses_.empty(); });
  EXPECT_FALSE(losses_[0].rank.has_value());
  EXPECT_THAT(losses_[0].status.message(),
              HasSubstr("a write to rank 1 failed"));
}

TEST_F(EndpointTest, APutAsLargeAsAllWindowsFits) {
  // The windows' size is no multiple of a cache line.
  const std::string text(kHeap.window_bytes, 'p');
  for (int i = 0; i < 3; ++i) {
    endpoint_->Put(
        kPeerRank,
        {{reinterpret_cast<const std::byte*>(text.data()), 0, text.size()}}, 1,
        Begin());
    EXPECT_TRUE(Ended().ok());
  }
  DriveUntil([&] { return Transfers() == 3; });
}

TEST_F(EndpointTest, PutsToItselfAreCounted) {
  const std::byte one{1};
  endpoint_->Put(kOwnRank, {{&one, 999, 1}}, 5, Begin());
  EXPECT_TRUE(Ended().ok());
  EXPECT_EQ(endpoint_->window_counters().Transfers(5), 1u);
  EXPECT_EQ(endpoint_->heap()[kHeap.Windows() + 999], one);
}

TEST_F(EndpointTest, ConnectRefusesWhatCannotWork) {
  RankAddress address = PeerAddress();
  EXPECT_EQ(endpoint_->Connect(2, address, Deadline()).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(endpoint_->Connect(kOwnRank, address, Deadline()).code(),
            StatusCode::kInvalidArgument);
  ++address.generation;
  EXPECT_THAT(endpoint_->Connect(1, address, Deadline()).message(),
              HasSubstr("generation 4, not 3"));
  address = PeerAddress();
  ++address.heap.length;
  EXPECT_THAT(endpoint_->Connect(1, address, Deadline()).message(),
              HasSubstr("same jaxfabric settings"));
}

TEST_F(EndpointTest, SequencesCountPerChannel) {
  EXPECT_EQ(endpoint_->NextSequence(1), 0u);
  EXPECT_EQ(endpoint_->NextSequence(1), 1u);
  EXPECT_EQ(endpoint_->NextSequence(2), 0u);
  EXPECT_TRUE(endpoint_->EnterChannel(1));
  EXPECT_FALSE(endpoint_->EnterChannel(1));
  EXPECT_TRUE(endpoint_->EnterChannel(2));
  endpoint_->LeaveChannel(1);
  EXPECT_TRUE(endpoint_->EnterChannel(1));
}

TEST(EndpointOptionsTest, MoreRanksThanIdsHaveRoomForAreRefused) {
  auto transport = *OpenFakeTransport({.network = "endpoint options"});
  std::vector<std::unique_ptr<Domain>> domains;
  domains.push_back(*transport->OpenDomain());
  const auto opened = Endpoint::Open(
      {.rank = 0, .heap = {.ranks = kRanksMax + 1, .mailbox_bytes = 64}},
      std::move(domains), [](const Endpoint::Loss&) {});
  EXPECT_EQ(opened.status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace jaxfabric
