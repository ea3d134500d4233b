#include "transport/verbs.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/unique_fd.h"
#include "tests/cpp/transport_conformance.h"
#include "transport/verbs_library.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS
#include "transport/verbs_buffers.h"
#include "transport/verbs_connection.h"
#include "transport/verbs_frame.h"
#include "transport/verbs_greeter.h"
#include "transport/verbs_receives.h"
#endif

namespace jaxfabric {
namespace {

constexpr char kSecret[] = "common secret";
// So that tests do not wait for the dead as long as users do.
constexpr VerbsSettings kSettings = {.timeout = 14, .patience_s = 3};

const TransportState& State() {
  static const TransportState state = VerbsState("");
  return state;
}

// Devices to open Transports on, in turn, as in "left,right"; they must reach
// each other. None given: each port that there is, with itself.
std::vector<std::string> DevicesInTurn() {
  std::vector<std::string> names;
  const char* const given = std::getenv("JAXFABRIC_TEST_VERBS_DEVICES");
  std::istringstream text(given == nullptr ? "" : given);
  for (std::string name; std::getline(text, name, ',');) names.push_back(name);
  return names;
}

std::unique_ptr<Transport> Open(const std::vector<std::string>& nics,
                                const std::string& job_secret) {
  StatusOr<std::unique_ptr<Transport>> transport = OpenVerbsTransport(
      {.nics = nics, .job_secret = job_secret, .settings = kSettings});
  EXPECT_TRUE(transport.ok()) << transport.status().message();
  return transport.ok() ? *std::move(transport) : nullptr;
}

TransportFactory Factory(const std::string& name,
                         const std::vector<std::string>& in_turn) {
  const auto next = std::make_shared<size_t>(0);
  const auto open = [=](const std::string& job_secret) {
    return Open({in_turn[(*next)++ % in_turn.size()]}, job_secret);
  };
  return {.name = name,
          .open = open,
          .kill = nullptr,
          .make_foreign = nullptr,
          // Nobody answers for a queue pair that has ended.
          .finds_stale_later = true};
}

std::vector<TransportFactory> MakeFactories() {
  if (State().availability != Availability::kUsable) {
    std::fprintf(stderr, "verbs_test runs without a device: %s\n",
                 State().ToStatus("verbs").message().c_str());
    return {};
  }
  const std::vector<std::string> devices = DevicesInTurn();
  if (!devices.empty()) return {Factory("Cable", devices)};
  std::vector<TransportFactory> factories;
  for (const std::string& port : VerbsNicNames("")) {
    factories.push_back(
        Factory("Rail" + std::to_string(factories.size()), {port}));
  }
  return factories;
}

const std::vector<TransportFactory>& Factories() {
  static const auto* const factories =
      new std::vector<TransportFactory>(MakeFactories());
  return *factories;
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TransportConformance);
INSTANTIATE_TEST_SUITE_P(Verbs, TransportConformance,
                         testing::ValuesIn(Factories()), TransportFactoryName);

// How often a receiver of this host was found unready, by the devices' own
// counters; they are the only witness, since a sender just tries again.
uint64_t TimesNotReady() {
  uint64_t times = 0;
  std::error_code none;
  for (const auto& device :
       std::filesystem::directory_iterator("/sys/class/infiniband", none)) {
    for (const auto& counter : std::filesystem::directory_iterator(
             device.path() / "ports/1/hw_counters", none)) {
      if (counter.path().filename().string().find("rnr") == std::string::npos) {
        continue;
      }
      uint64_t value = 0;
      if (std::ifstream(counter.path()) >> value) times += value;
    }
  }
  return times;
}

// Of all tests of this program, the storms of the conformance suite included.
class NoReceiverIsEverUnready : public testing::Environment {
 public:
  void SetUp() override { before_ = TimesNotReady(); }
  void TearDown() override { EXPECT_EQ(TimesNotReady(), before_); }

 private:
  uint64_t before_ = 0;
};
const auto* const kNoReceiverIsEverUnready =
    testing::AddGlobalTestEnvironment(new NoReceiverIsEverUnready);

// Two ranks of one process; rank 0 has added rank 1.
class VerbsTest : public testing::Test {
 protected:
  void SetUp() override {
    if (State().availability != Availability::kUsable) {
      GTEST_SKIP() << State().ToStatus("verbs").message();
    }
    for (int i = 0; i < 2; ++i) OpenRank(i);
    peer_ = ranks_[0]->Add(*ranks_[1]);
  }

  void OpenRank(int i) {
    transports_[i] = Factories()[0].open(kSecret);
    ranks_[i] = std::make_unique<ConformanceRank>(*transports_[i], 4096);
  }

  bool PollUntil(const std::function<bool()>& met) {
    const Deadline deadline =
        Deadline::AfterSeconds(ConformanceRank::kPatienceSeconds);
    while (!met()) {
      if (deadline.Expired()) return false;
      for (const auto& rank : ranks_) {
        if (rank != nullptr) rank->Poll();
      }
    }
    return true;
  }

  // Whether a write was posted.
  bool Post(ConformanceRank& from, PeerId peer, RemoteSpan to) {
    const StatusOr<Posted> posted =
        from.domain().PostWriteImm(peer, from.Source(0), to, 8, 1, 1);
    return posted.ok() && *posted == Posted::kPosted;
  }

  void ExpectWorking() {
    const size_t before = ranks_[1]->immediates.size();
    const size_t done = ranks_[0]->done.size();
    EXPECT_TRUE(PollUntil(
        [&] { return Post(*ranks_[0], peer_, ranks_[1]->Target(8)); }));
    EXPECT_TRUE(PollUntil([&] {
      return ranks_[1]->immediates.size() > before &&
             ranks_[0]->done.size() > done;
    }));
    EXPECT_TRUE(ranks_[0]->losses.empty() && ranks_[1]->losses.empty());
  }

  std::unique_ptr<Transport> transports_[2];
  std::unique_ptr<ConformanceRank> ranks_[2];
  PeerId peer_ = kUnknownPeer;
};

TEST_F(VerbsTest, AKilledProcessIsNoticedByThoseWhoOnlyWait) {
  // Forked before any device is open: a child would inherit what the parent
  // has registered.
  for (auto& rank : ranks_) rank.reset();
  for (auto& transport : transports_) transport.reset();
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  const UniqueFd parent_end(ends[0]);
  const UniqueFd child_end(ends[1]);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  char bytes[256];
  if (child == 0) {
    const ssize_t size = recv(child_end.get(), bytes, sizeof(bytes), 0);
    JF_CHECK(size > 0);
    const std::unique_ptr<Transport> transport = Factories()[0].open(kSecret);
    ConformanceRank rank(*transport, 4096);
    const std::string& address = rank.domain().address().bytes;
    JF_CHECK(send(child_end.get(), address.data(), address.size(), 0) ==
             static_cast<ssize_t>(address.size()));
    const NetAddr parent = {std::string(bytes, static_cast<size_t>(size))};
    JF_CHECK(rank.domain().AddPeer(parent, Deadline::AfterSeconds(10)).ok());
    for (;;) rank.Poll();
  }
  for (int i = 0; i < 2; ++i) OpenRank(i);
  peer_ = ranks_[0]->Add(*ranks_[1]);
  const std::string& ours = ranks_[0]->domain().address().bytes;
  ASSERT_EQ(send(parent_end.get(), ours.data(), ours.size(), 0),
            static_cast<ssize_t>(ours.size()));
  const ssize_t size = recv(parent_end.get(), bytes, sizeof(bytes), 0);
  ASSERT_GT(size, 0);
  const StatusOr<PeerId> peer = ranks_[0]->domain().AddPeer(
      {std::string(bytes, static_cast<size_t>(size))},
      Deadline::AfterSeconds(10));
  ASSERT_TRUE(peer.ok()) << peer.status().message();
  EXPECT_TRUE(PollUntil([&] {  // joined
    const StatusOr<Posted> posted =
        ranks_[0]->domain().PostSend(*peer, "hello", 1);
    return posted.ok() && *posted == Posted::kPosted;
  }));
  EXPECT_TRUE(PollUntil([&] { return !ranks_[0]->done.empty(); }));
  const int64_t killed_ns = MonotonicNanoseconds();
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(PollUntil([&] { return !ranks_[0]->losses.empty(); }));
  EXPECT_LT(MonotonicNanoseconds() - killed_ns, 15'000'000'000);
  ASSERT_EQ(ranks_[0]->losses.size(), 1u);
  EXPECT_EQ(ranks_[0]->losses[0].peer, *peer);
  EXPECT_NE(ranks_[0]->losses[0].status.message().find("its process has ended"),
            std::string::npos)
      << ranks_[0]->losses[0].status.message();
  ranks_[0]->losses.clear();
  ExpectWorking();
}

// The keys are right when they are asked for, and wrong when the writes come:
// the device refuses them, and that costs the queue pair.
TEST_F(VerbsTest, ABrokenConnectionIsRebuiltUnderTheSamePeerId) {
  ExpectWorking();
  const size_t arrived = ranks_[1]->immediates.size();
  ASSERT_TRUE(ranks_[1]->domain().UnregisterMemory(ranks_[1]->key()).ok());
  size_t posted = 0;
  for (int i = 0; i < 20; ++i) {
    if (Post(*ranks_[0], peer_, ranks_[1]->Target(8))) ++posted;
  }
  ASSERT_GT(posted, 0u);
  const size_t ended = ranks_[0]->done.size() + posted;
  ASSERT_TRUE(PollUntil([&] {
    return ranks_[0]->done.size() + ranks_[0]->errors.size() == ended;
  }));
  EXPECT_EQ(ranks_[0]->errors.size(), posted);
  for (const Completion& error : ranks_[0]->errors) {
    EXPECT_NE(error.status.message().find("remote access error"),
              std::string::npos)
        << error.status.message();
  }
  EXPECT_EQ(ranks_[1]->immediates.size(), arrived);
  const StatusOr<uint64_t> key =
      ranks_[1]->domain().RegisterMemory(ranks_[1]->Region());
  ASSERT_TRUE(key.ok());
  EXPECT_TRUE(PollUntil([&] { return Post(*ranks_[0], peer_, {*key, 0, 8}); }));
  EXPECT_TRUE(
      PollUntil([&] { return ranks_[1]->immediates.size() > arrived; }));
  EXPECT_TRUE(ranks_[0]->losses.empty());
}

TEST_F(VerbsTest, NothingOfARemovedPeerLandsAnyMore) {
  const PeerId back = ranks_[1]->Add(*ranks_[0]);
  std::mt19937 random(1);
  for (int round = 0; round < 20; ++round) {
    ExpectWorking();
    size_t posted = 0;
    std::memset(ranks_[0]->data(), round, 4096);
    for (int i = 0; i < 50; ++i) {
      const StatusOr<Posted> result = ranks_[0]->domain().PostWriteImm(
          peer_, ranks_[0]->Source(0), ranks_[1]->Target(0), 4096, 2, 1);
      if (result.ok() && *result == Posted::kPosted) ++posted;
      if (random() % 8 == 0) ranks_[0]->Poll();
    }
    ranks_[1]->domain().RemovePeer(round == 0 ? back : back + round);
    std::memset(ranks_[1]->data(), 0xa5, 4096);
    ASSERT_TRUE(PollUntil([&] { return !ranks_[0]->losses.empty(); }));
    EXPECT_TRUE(std::all_of(ranks_[1]->data(), ranks_[1]->data() + 4096,
                            [](std::byte b) { return b == std::byte{0xa5}; }));
    EXPECT_FALSE(Post(*ranks_[0], peer_, ranks_[1]->Target(0)));
    EXPECT_EQ(ranks_[0]->losses[0].peer, peer_);
    ranks_[0]->losses.clear();
    ranks_[0]->domain().RemovePeer(peer_);
    peer_ = ranks_[0]->Add(*ranks_[1]);
    ASSERT_EQ(ranks_[1]->Add(*ranks_[0]), back + round + 1);
    ranks_[0]->errors.clear();
  }
  for (const Completion& arrived : ranks_[1]->immediates) {
    EXPECT_NE(arrived.peer, kUnknownPeer) << "before its peer was removed";
  }
}

// Rank 0 has not removed rank 1, but was removed by it: it must not come back
// by itself, however often it tries.
TEST_F(VerbsTest, WhoWasRemovedStaysOut) {
  const PeerId back = ranks_[1]->Add(*ranks_[0]);
  ExpectWorking();
  ranks_[1]->domain().RemovePeer(back);
  ASSERT_TRUE(PollUntil([&] { return ranks_[0]->losses.size() == 1; }));
  const auto again = ranks_[0]->domain().AddPeer(ranks_[1]->domain().address(),
                                                 Deadline::AfterSeconds(1));
  ASSERT_FALSE(again.ok());
  EXPECT_NE(again.status().message().find("has removed this Domain"),
            std::string::npos)
      << again.status().message();
}

TEST_F(VerbsTest, UnknownDevicesAndAddressesAreRefusedWithThoseThereAre) {
  const auto refused =
      OpenVerbsTransport({.nics = {"nosuch0"}, .job_secret = kSecret});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.status().message().find("'nosuch0'"), std::string::npos);
  const auto transport = OpenVerbsTransport(
      {.job_secret = kSecret, .settings = {.gid_index = 99}});
  ASSERT_TRUE(transport.ok());
  const auto domain = (*transport)->OpenDomain();
  ASSERT_FALSE(domain.ok());
  EXPECT_NE(domain.status().message().find("it has 0 = "), std::string::npos)
      << domain.status().message();
}

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

// A greeter that says what it likes.
class VerbsIntruderTest : public VerbsTest {
 protected:
  void SetUp() override {
    VerbsTest::SetUp();
    if (IsSkipped()) return;
    const auto library = VerbsLibrary::Load("");
    ASSERT_TRUE(library.ok());
    std::string why;
    const auto names = FindVerbsPorts(**library, &why);
    std::string device =
        Factories()[0].name == "Cable" ? DevicesInTurn()[0] : names[0].device;
    auto port = VerbsPort::Open(**library, {device, 1}, kSettings);
    ASSERT_TRUE(port.ok()) << port.status().message();
    port_ = *std::move(port);
    auto greeter = VerbsGreeter::Open(*port_, 0, uint64_t{1} << 60);
    ASSERT_TRUE(greeter.ok()) << greeter.status().message();
    greeter_ = *std::move(greeter);
    address_ = AddressOf(*ranks_[0]);
    address_.nonce = 4711;
    address_.queue_pair = greeter_->number();
    address_.queue_key = greeter_->queue_key();
    address_.gid = port_->gid();
  }

  static VerbsAddress AddressOf(ConformanceRank& rank) {
    VerbsAddress address;
    const std::string& bytes = rank.domain().address().bytes;
    JF_CHECK(bytes.size() == sizeof(address));
    std::memcpy(&address, bytes.data(), sizeof(address));
    return address;
  }

  void Send(ConformanceRank& to, const VerbsGreeting& greeting) {
    const VerbsAddress address = AddressOf(to);
    const auto way = greeter_->FindWay(address);
    ASSERT_TRUE(way.ok()) << way.status().message();
    greeter_->Send(*way, address, greeting);
    for (const auto& rank : ranks_) rank->Poll();
    ASSERT_TRUE(PollUntil([&] {
      Listen();
      return greeter_->idle();
    }));
  }

  // Takes in what came to the intruder.
  void Listen() {
    ibv_wc work = {};
    while (ibv_poll_cq(port_->queue(), 1, &work) > 0) {
      const uint64_t index = work.wr_id & ((uint64_t{1} << 60) - 1);
      if (work.wr_id >> 60 == 0) {
        greeter_->SendDone(index);
        continue;
      }
      ++heard_;
      const auto greeting =
          OpenGreeting(greeter_->Received(index, work.byte_len),
                       JobKey(kSecret), address_.nonce, address_.link_layer);
      if (greeting.has_value()) {
        last_ = greeting->kind;
        last_greeting_ = *greeting;
      }
      greeter_->Repost(index);
    }
  }

  VerbsGreeting Noise() {
    VerbsGreeting noise;
    for (size_t i = 0; i < sizeof(noise); ++i) {
      reinterpret_cast<std::byte*>(&noise)[i] =
          static_cast<std::byte>(random_());
    }
    return noise;
  }

  VerbsGreeting HelloTo(ConformanceRank& to) {
    VerbsGreeting hello;
    hello.target = AddressOf(to).nonce;
    hello.attempt = hello.added = 1;
    hello.queue_pair = 77;
    hello.quota = 4;
    hello.mtu = 3;
    hello.sender = address_;
    return hello;
  }

  std::unique_ptr<VerbsPort> port_;
  std::unique_ptr<VerbsGreeter> greeter_;
  VerbsAddress address_;
  size_t heard_ = 0;
  VerbsGreetingKind last_ = VerbsGreetingKind::kBye;
  VerbsGreeting last_greeting_;
  std::mt19937 random_{1};
};

TEST_F(VerbsIntruderTest, NoiseAndGuessesAreNotAnswered) {
  ExpectWorking();
  for (int i = 0; i < 50; ++i) {
    Send(*ranks_[1], Noise());
    VerbsGreeting guess = HelloTo(*ranks_[1]);
    SealGreeting(&guess, JobKey("a guess"));
    Send(*ranks_[1], guess);
  }
  ExpectWorking();
  Listen();
  EXPECT_EQ(heard_, 0u);
  EXPECT_TRUE(ranks_[1]->messages.empty());
}

// A queue pair that is joined with one that does not exist.
TEST_F(VerbsIntruderTest, APeerThatAnswersWithGarbageIsLostAndOthersGoOn) {
  const NetAddr address = ToNetAddr(address_);
  const StatusOr<PeerId> peer =
      ranks_[0]->domain().AddPeer(address, Deadline::AfterSeconds(10));
  ASSERT_TRUE(peer.ok()) << peer.status().message();
  ASSERT_TRUE(PollUntil([&] {
    Listen();
    return heard_ > 0;  // its hello
  }));
  const Deadline deadline = Deadline::AfterSeconds(20);
  while (ranks_[0]->losses.empty()) {
    ASSERT_FALSE(deadline.Expired());
    Send(*ranks_[0], Noise());
    VerbsGreeting welcome = HelloTo(*ranks_[0]);
    welcome.kind = VerbsGreetingKind::kWelcome;
    welcome.echo = 1 + random_() % 4;
    welcome.quota = 1'000'000;
    SealGreeting(&welcome, JobKey(kSecret));
    Send(*ranks_[0], welcome);
  }
  EXPECT_EQ(ranks_[0]->losses[0].peer, *peer);
  EXPECT_NE(ranks_[0]->losses[0].status.message().find("no answer"),
            std::string::npos);
  ranks_[0]->losses.clear();
  ExpectWorking();
}

TEST_F(VerbsIntruderTest, ASecondGreetingForTheSamePairChangesNothing) {
  ExpectWorking();
  // Repeated by the network, or by somebody who has overheard it: the first
  // hello of rank 0, whose connection is joined.
  VerbsGreeting again = HelloTo(*ranks_[1]);
  again.sender = AddressOf(*ranks_[0]);
  SealGreeting(&again, JobKey(kSecret));
  for (int i = 0; i < 20; ++i) {
    Send(*ranks_[1], again);
    ExpectWorking();
  }
  // And once that connection has had a successor.
  ranks_[0]->domain().RemovePeer(peer_);
  peer_ = ranks_[0]->Add(*ranks_[1]);
  ExpectWorking();
  for (int i = 0; i < 20; ++i) {
    Send(*ranks_[1], again);
    ExpectWorking();
  }
  EXPECT_TRUE(ranks_[0]->errors.empty() && ranks_[1]->errors.empty());
  // One Domain cannot pretend to be another.
  again.sender.queue_pair = greeter_->number();
  again.attempt = again.added = 100;
  SealGreeting(&again, JobKey(kSecret));
  Send(*ranks_[1], again);
  ExpectWorking();
  EXPECT_TRUE(ranks_[0]->errors.empty() && ranks_[1]->errors.empty());
}

TEST_F(VerbsIntruderTest, AHelloFromBeforeARemovalIsRefused) {
  const auto answer = [&](uint64_t attempt, uint64_t added) {
    VerbsGreeting hello = HelloTo(*ranks_[1]);
    hello.attempt = attempt;
    hello.added = added;
    SealGreeting(&hello, JobKey(kSecret));
    const size_t before = heard_;
    Send(*ranks_[1], hello);
    EXPECT_TRUE(PollUntil([&] {
      Listen();
      return heard_ > before;
    }));
    return last_;
  };
  EXPECT_EQ(answer(5, 5), VerbsGreetingKind::kWelcome);
  const StatusOr<PeerId> peer = ranks_[1]->domain().AddPeer(
      ToNetAddr(address_), Deadline::AfterSeconds(10));
  ASSERT_TRUE(peer.ok()) << peer.status().message();
  ranks_[1]->domain().RemovePeer(*peer);
  ASSERT_TRUE(PollUntil([&] {
    Listen();
    return last_ == VerbsGreetingKind::kRemoved;
  }));
  EXPECT_EQ(answer(6, 5), VerbsGreetingKind::kRefuse);
  EXPECT_EQ(answer(7, 7), VerbsGreetingKind::kWelcome);
  ExpectWorking();
}

// Who says hello and is never heard of again holds no queue pair for long.
TEST_F(VerbsIntruderTest, HalfOfAConnectionIsGivenUp) {
  VerbsGreeting hello = HelloTo(*ranks_[1]);
  SealGreeting(&hello, JobKey(kSecret));
  Send(*ranks_[1], hello);
  ASSERT_TRUE(PollUntil([&] {
    Listen();
    return heard_ > 0;  // its welcome
  }));
  const Deadline given_up = Deadline::AfterSeconds(kSettings.patience_s + 1);
  ASSERT_TRUE(PollUntil([&] { return given_up.Expired(); }));
  ExpectWorking();
  EXPECT_TRUE(ranks_[1]->errors.empty());
}

// Answers wait for its credits, which it never gives.
TEST_F(VerbsIntruderTest, WhoAsksOnAndOnAndTakesNoAnswersIsCutOff) {
  constexpr size_t kAnswersMax = 1024;  // as VerbsDomain keeps
  constexpr size_t kMany = 2 * kAnswersMax;
  auto buffers = VerbsBuffers::Open(*port_, 1);
  ASSERT_TRUE(buffers.ok()) << buffers.status().message();
  auto receives = VerbsReceives::Open(*port_, uint64_t{2} << 60);
  ASSERT_TRUE(receives.ok()) << receives.status().message();
  auto opened = VerbsConnection::Open(*port_, **receives, **buffers, 1);
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  VerbsConnection& connection = **opened;
  VerbsGreeting hello = HelloTo(*ranks_[1]);
  connection.Introduce(&hello);
  SealGreeting(&hello, JobKey(kSecret));
  Send(*ranks_[1], hello);
  ASSERT_TRUE(PollUntil([&] {
    Listen();
    return last_ == VerbsGreetingKind::kWelcome;
  }));
  ASSERT_TRUE(connection.Join(last_greeting_).ok());

  const auto buffer = (*buffers)->TakeFrame(0);
  ASSERT_TRUE(buffer.has_value());
  size_t asked = 0;
  bool cut_off = false;
  const auto ask = [&] {
    const uint32_t bytes = EncodeVerbsFrame({VerbsFrameKind::kAsk, ++asked, ""},
                                            (*buffers)->frame(*buffer));
    ASSERT_TRUE(
        connection.PostFrame({VerbsOperation::Kind::kFrame, 0, *buffer}, bytes)
            .ok());
    ASSERT_TRUE(connection.Flush().ok());
  };
  EXPECT_TRUE(PollUntil([&] {
    ibv_wc work = {};
    while (ibv_poll_cq(port_->queue(), 1, &work) > 0) {
      if (work.qp_num != connection.number()) continue;
      cut_off |= work.status != IBV_WC_SUCCESS;
      connection.Finish(work.wr_id, [](const VerbsOperation&, bool) {});
    }
    if (!cut_off && asked < kMany && connection.HasRoom() &&
        connection.HasCredit()) {
      ask();
    }
    return cut_off || (asked == kMany && connection.open() == 0);
  }));
  EXPECT_TRUE(cut_off);
  EXPECT_GE(asked, kAnswersMax);
  ExpectWorking();
}

#endif  // JAXFABRIC_HAVE_LIBIBVERBS

}  // namespace
}  // namespace jaxfabric
