#include "transport/shm.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <optional>
#include <utility>

#include "tests/cpp/transport_conformance.h"
#include "transport/shm_address.h"
#include "transport/shm_control.h"
#include "transport/shm_ring.h"

namespace jaxfabric {
namespace {

constexpr double kPatienceSeconds = ConformanceRank::kPatienceSeconds;
constexpr char kSecret[] = "common secret";

std::unique_ptr<Transport> Open(const std::string& job_secret) {
  StatusOr<std::unique_ptr<Transport>> transport =
      OpenShmTransport({.job_secret = job_secret});
  EXPECT_TRUE(transport.ok()) << transport.status().message();
  return transport.ok() ? *std::move(transport) : nullptr;
}

NetAddr ElsewhereFrom(const NetAddr& here) {
  ShmAddress address = *ParseShmAddress(here);
  ++address.host;
  return ToNetAddr(address);
}

INSTANTIATE_TEST_SUITE_P(Shm, TransportConformance,
                         testing::Values(TransportFactory{
                             .name = "Plain",
                             .open = Open,
                             .kill = nullptr,
                             .make_foreign = ElsewhereFrom}),
                         TransportFactoryName);

// What ranks of two processes tell each other before they connect.
struct Card {
  char address[sizeof(ShmAddress)] = {};
  uint64_t key = 0;

  static Card Of(ConformanceRank& rank) {
    Card card;
    const std::string& bytes = rank.domain().address().bytes;
    JF_CHECK(bytes.size() == sizeof(card.address));
    std::memcpy(card.address, bytes.data(), bytes.size());
    card.key = rank.key();
    return card;
  }
  NetAddr net_addr() const { return {std::string(address, sizeof(address))}; }
};

// A forked process with a rank of its own, which plays `part`. To be started
// while this process has no threads.
class ChildRank {
 public:
  explicit ChildRank(
      const std::function<void(ConformanceRank&, ChildRank&)>& part) {
    int ends[2];
    JF_CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    pid_ = fork();
    JF_CHECK(pid_ >= 0);
    channel_ = UniqueFd(ends[pid_ == 0 ? 1 : 0]);
    close(ends[pid_ == 0 ? 0 : 1]);
    if (pid_ != 0) return;
    {
      const std::unique_ptr<Transport> transport = Open(kSecret);
      ConformanceRank rank(*transport, 1 << 16);
      Tell(Card::Of(rank));
      part(rank, *this);
    }
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  ~ChildRank() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }

  void Tell(const Card& card) {
    JF_CHECK(send(channel_.get(), &card, sizeof(card), MSG_NOSIGNAL) ==
             sizeof(card));
  }
  Card Hear() {
    pollfd wait = {.fd = channel_.get(), .events = POLLIN, .revents = 0};
    JF_CHECK(poll(&wait, 1, static_cast<int>(kPatienceSeconds * 1000)) == 1);
    Card card;
    JF_CHECK(recv(channel_.get(), &card, sizeof(card), 0) == sizeof(card));
    return card;
  }

  void Signal(int signal) { kill(pid_, signal); }
  // Returns once all of its threads stand still.
  void Stop() {
    kill(pid_, SIGSTOP);
    JF_CHECK(waitpid(pid_, nullptr, WUNTRACED) == pid_);
  }
  // Until it has ended; returns whether it found all well.
  bool Succeeded() {
    int status = -1;
    waitpid(std::exchange(pid_, 0), &status, 0);
    return status == 0;
  }

 private:
  pid_t pid_ = 0;
  UniqueFd channel_;
};

bool PollUntil(ConformanceRank& rank, const std::function<bool()>& met) {
  const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
  while (!met()) {
    if (deadline.Expired()) {
      ADD_FAILURE() << rank.Describe();
      return false;
    }
    rank.Poll();
  }
  return true;
}

PeerId Connect(ConformanceRank& rank, const Card& card) {
  const StatusOr<PeerId> peer = rank.domain().AddPeer(
      card.net_addr(), Deadline::AfterSeconds(kPatienceSeconds));
  EXPECT_TRUE(peer.ok()) << peer.status().message();
  return peer.ok() ? *peer : kUnknownPeer;
}

void IdleForever(ConformanceRank&, ChildRank& channel) {
  channel.Hear();
  for (;;) pause();
}

TEST(ShmProcessTest, TwoProcessesEchoPayload) {
  constexpr uint32_t kRounds = 300;
  ChildRank child([](ConformanceRank& rank, ChildRank& channel) {
    const Card parent = channel.Hear();
    const PeerId peer = Connect(rank, parent);
    for (uint32_t i = 1; i <= kRounds; ++i) {
      if (!PollUntil(rank, [&] { return rank.immediates.size() == i; })) return;
      const uint32_t bytes = rank.immediates.back().immediate;
      EXPECT_EQ(rank.immediates.back().peer, peer);
      const StatusOr<Posted> posted = rank.domain().PostWriteImm(
          peer, rank.Source(1), {parent.key, 0, 30'000}, bytes, bytes, i);
      EXPECT_TRUE(posted.ok() && *posted == Posted::kPosted);
    }
    // The other side closes last, so that it is no loss to it.
    PollUntil(rank, [&] { return rank.losses.size() == 1; });
    EXPECT_NE(rank.losses[0].status.message().find("closed"),
              std::string::npos);
  });
  const std::unique_ptr<Transport> transport = Open(kSecret);
  ConformanceRank rank(*transport, 1 << 16);
  child.Tell(Card::Of(rank));
  const Card other = child.Hear();
  const PeerId peer = Connect(rank, other);
  std::mt19937 random(1);
  for (uint32_t i = 1; i <= kRounds; ++i) {
    const uint32_t bytes = random() % 30'000;
    for (uint32_t b = 0; b < bytes; ++b) {
      rank.data()[b] = static_cast<std::byte>(random());
    }
    const StatusOr<Posted> posted = rank.domain().PostWriteImm(
        peer, rank.Source(0), {other.key, 0, 1}, bytes, bytes, i);
    ASSERT_TRUE(posted.ok()) << posted.status().message();
    ASSERT_TRUE(PollUntil(rank, [&] { return rank.immediates.size() == i; }));
    ASSERT_EQ(rank.immediates.back().immediate, bytes);
    ASSERT_EQ(std::memcmp(rank.data(), rank.data() + 30'000, bytes), 0);
  }
  rank.Close();
  EXPECT_TRUE(child.Succeeded());
}

TEST(ShmProcessTest, AKilledProcessIsNoticedWithin100Ms) {
  // The best of a few: a busy machine may keep any one of them waiting.
  int64_t best_ns = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < 5; ++i) {
    ChildRank child(IdleForever);
    const std::unique_ptr<Transport> transport = Open(kSecret);
    ConformanceRank rank(*transport, 1 << 16);
    const Card other = child.Hear();
    const PeerId peer = Connect(rank, other);
    child.Signal(SIGKILL);
    const int64_t start_ns = MonotonicNanoseconds();
    const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
    while (rank.losses.empty() && !deadline.Expired()) {
      const uint32_t seen = transport->doorbell().Sequence();
      rank.Poll();
      if (rank.losses.empty()) transport->doorbell().Wait(seen, deadline);
    }
    ASSERT_EQ(rank.losses.size(), 1u);
    best_ns = std::min(best_ns, MonotonicNanoseconds() - start_ns);
    EXPECT_EQ(rank.losses[0].peer, peer);
    EXPECT_NE(rank.losses[0].status.message().find("without a word"),
              std::string::npos);
    EXPECT_FALSE(rank.domain().PostSend(peer, "anyone?", 1).ok());
    EXPECT_FALSE(rank.domain()
                     .AddPeer(other.net_addr(), Deadline::AfterSeconds(1))
                     .ok());
    // A process that knew nothing of it finds the address stale.
    ConformanceRank fresh(*transport, 64);
    const StatusOr<PeerId> stale =
        fresh.domain().AddPeer(other.net_addr(), Deadline::AfterSeconds(1));
    // Its listener may close a moment after its connections.
    EXPECT_TRUE(stale.status().code() == StatusCode::kNotFound ||
                stale.status().code() == StatusCode::kUnavailable)
        << stale.status().message();
  }
  EXPECT_LT(best_ns, 100'000'000);
}

TEST(ShmProcessTest, AddPeerKeepsItsDeadlineWithAStoppedProcess) {
  ChildRank child([](ConformanceRank& rank, ChildRank& channel) {
    channel.Hear();
    PollUntil(rank, [&] { return rank.immediates.size() == 1; });
  });
  const std::unique_ptr<Transport> transport = Open(kSecret);
  ConformanceRank rank(*transport, 1 << 16);
  const Card other = child.Hear();
  child.Tell({});
  child.Stop();
  const int64_t start_ns = MonotonicNanoseconds();
  const StatusOr<PeerId> peer = rank.domain().AddPeer(
      other.net_addr(), Deadline::AfterNanoseconds(100'000'000));
  const int64_t took_ns = MonotonicNanoseconds() - start_ns;
  EXPECT_EQ(peer.status().code(), StatusCode::kDeadlineExceeded);
  EXPECT_GE(took_ns, 100'000'000);
  EXPECT_LT(took_ns, 3'000'000'000);
  child.Signal(SIGCONT);
  const PeerId again = Connect(rank, other);
  const StatusOr<Posted> posted = rank.domain().PostWriteImm(
      again, rank.Source(0), {other.key, 0, 0}, 8, 1, 1);
  EXPECT_TRUE(posted.ok()) << posted.status().message();
  EXPECT_TRUE(child.Succeeded());
}

TEST(ShmProcessTest, AddPeerEndsWhenTheProcessIsKilledMeanwhile) {
  ChildRank child(IdleForever);
  const std::unique_ptr<Transport> transport = Open(kSecret);
  ConformanceRank rank(*transport, 64);
  const Card other = child.Hear();
  child.Stop();
  std::future<StatusOr<PeerId>> adding = std::async(std::launch::async, [&] {
    return rank.domain().AddPeer(other.net_addr(),
                                 Deadline::AfterSeconds(kPatienceSeconds));
  });
  child.Signal(SIGKILL);
  const StatusOr<PeerId> peer = adding.get();
  ASSERT_FALSE(peer.ok());
  EXPECT_NE(peer.status().code(), StatusCode::kDeadlineExceeded)
      << peer.status().message();
}

class ShmTest : public testing::Test {
 protected:
  // A connection of one's own making to the Transport of `target`.
  UniqueFd Intrude(ConformanceRank& target) {
    const ShmAddress address = *ParseShmAddress(target.domain().address());
    StatusOr<UniqueFd> socket =
        ShmConnect(address.process, Deadline::AfterSeconds(5));
    EXPECT_TRUE(socket.ok()) << socket.status().message();
    return *std::move(socket);
  }

  static ShmReceived AwaitReply(int socket) {
    pollfd wait = {.fd = socket, .events = POLLIN, .revents = 0};
    poll(&wait, 1, static_cast<int>(kPatienceSeconds * 1000));
    return ShmReceive(socket);
  }

  static ShmControlMessage AttachTo(ConformanceRank& target,
                                    ConformanceRank& as) {
    ShmControlMessage attach;
    attach.kind = ShmControlKind::kAttach;
    attach.target = *ParseShmAddress(target.domain().address());
    attach.sender = *ParseShmAddress(as.domain().address());
    attach.SetText(kSecret);
    return attach;
  }

  void ExpectWorking() {
    const PeerId peer = left_.Add(right_);
    const StatusOr<Posted> posted = left_.domain().PostWriteImm(
        peer, left_.Source(0), right_.Target(0), 8, 1, 1);
    ASSERT_TRUE(posted.ok()) << posted.status().message();
    const size_t before = right_.immediates.size();
    PollUntil(right_, [&] { return right_.immediates.size() > before; });
  }

  const std::unique_ptr<Transport> left_transport_ = Open(kSecret);
  const std::unique_ptr<Transport> right_transport_ = Open(kSecret);
  ConformanceRank left_{*left_transport_, 4096};
  ConformanceRank right_{*right_transport_, 4096};
};

TEST_F(ShmTest, NonsenseInARingCostsThePeerAndNothingElse) {
  ConformanceRank evil(*left_transport_, 64);
  const PeerId lost = right_.Add(evil);
  const UniqueFd socket = Intrude(right_);
  ASSERT_TRUE(ShmSend(socket.get(), AttachTo(right_, evil), {},
                      Deadline::AfterSeconds(5))
                  .ok());
  ShmReceived reply = AwaitReply(socket.get());
  ASSERT_EQ(reply.kind, ShmReceived::Kind::kMessage);
  ASSERT_EQ(reply.message.code, 0u) << reply.message.Text();
  StatusOr<SharedMemory> memory =
      SharedMemory::Attach(std::move(reply.fds[0]), sizeof(ShmRingLayout));
  ASSERT_TRUE(memory.ok());
  auto* ring = reinterpret_cast<ShmRingLayout*>(memory->data());
  ring->tail.store(0x7777'7777, std::memory_order_release);
  ASSERT_TRUE(PollUntil(right_, [&] { return !right_.losses.empty(); }));
  EXPECT_EQ(right_.losses[0].peer, lost);
  EXPECT_NE(right_.losses[0].status.message().find("nonsense"),
            std::string::npos);
  ExpectWorking();
}

TEST_F(ShmTest, NonsenseOnTheControlSocketEndsOnlyThatConnection) {
  const ShmControlMessage good = AttachTo(right_, left_);
  std::vector<std::string> offers = {"x", std::string(5000, 'x')};
  const auto offer = [&](auto change) {
    ShmControlMessage message = good;
    change(message);
    offers.emplace_back(reinterpret_cast<const char*>(&message),
                        sizeof(message));
  };
  offer([](ShmControlMessage& m) { m.magic ^= 1; });
  offer([](ShmControlMessage& m) { ++m.version; });
  offer([](ShmControlMessage& m) { m.text_bytes = kShmTextBytes + 1; });
  offer([](ShmControlMessage& m) { m.kind = ShmControlKind{99}; });
  offer([](ShmControlMessage& m) { m.kind = ShmControlKind::kReply; });
  for (const std::string& bytes : offers) {
    const UniqueFd socket = Intrude(right_);
    ASSERT_EQ(send(socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(bytes.size()));
    EXPECT_EQ(AwaitReply(socket.get()).kind, ShmReceived::Kind::kEnded);
  }
  ExpectWorking();
}

TEST_F(ShmTest, WithoutTheSecretThereIsNoMemory) {
  const UniqueFd socket = Intrude(right_);
  ShmControlMessage ask;
  ask.kind = ShmControlKind::kMapRegion;
  ask.target = *ParseShmAddress(right_.domain().address());
  ask.key = right_.key();
  ShmControlMessage attach = AttachTo(right_, left_);
  for (const char* guess : {"", "common secre", "common secret!", "x"}) {
    attach.text_bytes = 0;
    attach.SetText(guess);
    for (const ShmControlMessage& message : {attach, ask}) {
      ASSERT_TRUE(
          ShmSend(socket.get(), message, {}, Deadline::AfterSeconds(5)).ok());
      const ShmReceived reply = AwaitReply(socket.get());
      ASSERT_EQ(reply.kind, ShmReceived::Kind::kMessage);
      EXPECT_EQ(reply.message.code,
                static_cast<uint32_t>(StatusCode::kUnauthenticated));
      EXPECT_FALSE(reply.fds[0].valid());
    }
  }
  ExpectWorking();
}

TEST_F(ShmTest, PeersMaxIsKeptAndFreedPlacesAreUsedAgain) {
  const std::unique_ptr<Transport> small =
      *OpenShmTransport({.job_secret = kSecret, .peers_max = 2});
  ConformanceRank target(*small, 64);
  const NetAddr address = target.domain().address();
  const auto add = [&] {
    return right_.domain().AddPeer(address, Deadline::AfterSeconds(5));
  };
  const auto has_room = [&] { return add().ok(); };
  ConformanceRank second(*left_transport_, 64);
  const PeerId peer = left_.Add(target);
  second.Add(target);  // keeps the connection of the left Transport in use
  EXPECT_EQ(add().status().code(), StatusCode::kResourceExhausted);
  left_.domain().RemovePeer(peer);
  ASSERT_TRUE(PollUntil(target, has_room));
  // A process that goes without a word leaves its place too.
  right_.domain().RemovePeer(*add());
  std::optional<UniqueFd> socket = Intrude(target);
  ASSERT_TRUE(PollUntil(target, [&] {
    EXPECT_TRUE(ShmSend(socket->get(), AttachTo(target, left_), {},
                        Deadline::AfterSeconds(5))
                    .ok());
    return AwaitReply(socket->get()).message.code == 0;
  }));
  EXPECT_EQ(add().status().code(), StatusCode::kResourceExhausted);
  socket.reset();
  EXPECT_TRUE(PollUntil(target, has_room));
}

TEST_F(ShmTest, OnlySealedMemfdsAreRegistered) {
  Domain& domain = left_.domain();
  std::byte plain[64];
  const StatusOr<uint64_t> no_fd = domain.RegisterMemory({plain, 64, -1});
  EXPECT_EQ(no_fd.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(no_fd.status().message().find("memfd"), std::string::npos);
  const UniqueFd unsealed(memfd_create("test", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(unsealed.get(), 64), 0);
  EXPECT_FALSE(domain.RegisterMemory({plain, 64, unsealed.get()}).ok());
  MemoryRegion longer = left_.Region();
  ++longer.length;
  EXPECT_FALSE(domain.RegisterMemory(longer).ok());
}

TEST_F(ShmTest, SecretsThatDoNotFitAreRefused) {
  EXPECT_TRUE(OpenShmTransport({.job_secret = std::string(256, 's')}).ok());
  EXPECT_FALSE(OpenShmTransport({.job_secret = std::string(257, 's')}).ok());
}

size_t MappingsOf(const std::string& name) {
  std::ifstream maps("/proc/self/maps");
  size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find("memfd:" + name) != std::string::npos) ++count;
  }
  return count;
}

TEST_F(ShmTest, DomainsShareOneMappingAndUnregisteredRegionsGo) {
  ConformanceRank second(*left_transport_, 4096);
  StatusOr<SharedMemory> window = SharedMemory::Create("test-window", 4096);
  ASSERT_TRUE(window.ok());
  const auto publish = [&] {
    return *right_.domain().RegisterMemory(
        {window->data(), window->size(), window->fd()});
  };
  const PeerId peers[] = {left_.Add(right_), second.Add(right_)};
  const auto write = [&](uint64_t key) {
    EXPECT_TRUE(left_.domain()
                    .PostWriteImm(peers[0], left_.Source(0), {key, 0, 0}, 8,
                                  std::nullopt, 1)
                    .ok());
    EXPECT_TRUE(second.domain()
                    .PostWriteImm(peers[1], second.Source(0), {key, 0, 0}, 8,
                                  std::nullopt, 1)
                    .ok());
  };
  ASSERT_EQ(MappingsOf("test-window"), 1u);
  uint64_t key = publish();
  write(key);
  EXPECT_EQ(MappingsOf("test-window"), 2u);
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(right_.domain().UnregisterMemory(key).ok());
    key = publish();
    write(key);
  }
  // One registration may still be on its way out.
  EXPECT_LE(MappingsOf("test-window"), 4u);
}

TEST(ShmLeakTest, DescriptorsAndMappingsGoWithTheTransports) {
  const auto descriptors = [] {
    size_t count = 0;
    for ([[maybe_unused]] const auto& entry :
         std::filesystem::directory_iterator("/proc/self/fd")) {
      ++count;
    }
    return count;
  };
  const size_t before = descriptors();
  for (int i = 0; i < 3; ++i) {
    const std::unique_ptr<Transport> transports[] = {Open(kSecret),
                                                     Open(kSecret)};
    ConformanceRank ranks[] = {
        {*transports[0], 4096}, {*transports[1], 4096}, {*transports[1], 4096}};
    for (ConformanceRank& from : ranks) {
      for (ConformanceRank& to : ranks) {
        const PeerId peer = from.Add(to);
        EXPECT_TRUE(
            from.domain()
                .PostWriteImm(peer, from.Source(0), to.Target(0), 8, 1, 1)
                .ok());
      }
    }
  }
  EXPECT_EQ(descriptors(), before);
  EXPECT_EQ(MappingsOf("jaxfabric-ring"), 0u);
  EXPECT_EQ(MappingsOf("jaxfabric-doorbell"), 0u);
  EXPECT_EQ(MappingsOf("test-heap"), 0u);
}

}  // namespace
}  // namespace jaxfabric
