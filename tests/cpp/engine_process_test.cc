// Engines of several processes, over shm. The test process itself has no
// threads, so that it may fork; each rank is a child.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>

#include "base/unique_fd.h"
#include "engine/engine.h"
#include "tests/cpp/engine_cluster.h"
#include "transport/shm.h"

namespace jaxfabric {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

using Part = std::function<void(Engine& engine, uint32_t rank)>;

void Tell(const UniqueFd& channel, const std::string& text) {
  JF_CHECK(send(channel.get(), text.data(), text.size(), MSG_NOSIGNAL) ==
           static_cast<ssize_t>(text.size()));
}
// What the other end told, or nothing if it has ended.
std::string Hear(const UniqueFd& channel) {
  pollfd wait = {.fd = channel.get(), .events = POLLIN, .revents = 0};
  JF_CHECK(poll(&wait, 1, static_cast<int>(kEnginePatienceSeconds * 1000)) ==
           1);
  std::array<char, 4096> buffer;
  const ssize_t bytes = recv(channel.get(), buffer.data(), buffer.size(), 0);
  JF_CHECK(bytes >= 0);
  return {buffer.data(), static_cast<size_t>(bytes)};
}

// Connects with all ranks, plays `part`, and stays until all have played it.
void RunRank(const UniqueFd& channel, uint32_t ranks, uint32_t rank,
             const Part& part) {
  auto engine = *Engine::Open(RankOptions(ranks, rank),
                              *OpenShmTransport({.job_secret = "test"}));
  Tell(channel, *engine->LocalAddress(rank));
  for (uint32_t other = 0; other < ranks; ++other) {
    const Status connected = engine->Connect(
        other, Hear(channel), Deadline::AfterSeconds(kEnginePatienceSeconds));
    EXPECT_TRUE(connected.ok()) << connected.message();
  }
  Tell(channel, "connected");
  Hear(channel);
  part(*engine, rank);
  Tell(channel, "played");
  Hear(channel);
}

// Plays `part` on each rank; returns how each process ended, as waitpid says.
std::vector<int> RunRanks(uint32_t ranks, const Part& part) {
  std::vector<pid_t> pids;
  std::vector<UniqueFd> channels;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    int ends[2];
    JF_CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    UniqueFd ours(ends[0]);
    UniqueFd theirs(ends[1]);
    const pid_t pid = fork();
    JF_CHECK(pid >= 0);
    if (pid == 0) {
      RunRank(theirs, ranks, rank, part);
      _exit(testing::Test::HasFailure() ? 1 : 0);
    }
    pids.push_back(pid);
    channels.push_back(std::move(ours));
  }
  std::vector<std::string> addresses;
  for (const UniqueFd& channel : channels) addresses.push_back(Hear(channel));
  for (const UniqueFd& channel : channels) {
    for (const std::string& address : addresses) Tell(channel, address);
  }
  for (const UniqueFd& channel : channels) Hear(channel);
  for (const UniqueFd& channel : channels) Tell(channel, "go");
  std::vector<bool> alive;
  for (const UniqueFd& channel : channels) {
    alive.push_back(!Hear(channel).empty());
  }
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    if (alive[rank]) Tell(channels[rank], "end");
  }
  std::vector<int> ends(ranks, -1);
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    waitpid(pids[rank], &ends[rank], 0);
  }
  return ends;
}

EngineCall AllToAll(uint32_t ranks, uint32_t rank, uint64_t sequence) {
  EngineCall call = {
      .rank = rank, .key = {1, sequence}, .bytes = [](uint32_t f, uint32_t t) {
        return uint64_t{f} * 1000 + t;
      }};
  for (uint32_t peer = 0; peer < ranks; ++peer) {
    if (peer != rank) call.peers.push_back(peer);
  }
  return call;
}

void ExpectCallWorks(Engine& engine, const EngineCall& call) {
  EndedCall ended = StartCall(engine, call);
  const Status status = Await(ended);
  EXPECT_TRUE(status.ok()) << status.message();
}

TEST(EngineProcessTest, CallsWorkBetweenProcesses) {
  const std::vector<int> ends = RunRanks(3, [](Engine& engine, uint32_t rank) {
    for (uint64_t i = 0; i < 100; ++i) {
      ExpectCallWorks(engine, AllToAll(3, rank, i));
    }
    EXPECT_TRUE(
        engine.Drain(Deadline::AfterSeconds(kEnginePatienceSeconds)).ok());
    engine.SayGoodbye();
    EXPECT_TRUE(engine.failure().ok()) << engine.failure().message();
  });
  EXPECT_THAT(ends, ElementsAre(0, 0, 0));
}

TEST(EngineProcessTest, AKilledProcessFailsTheOthersAtOnceAndIsNamed) {
  // A call that has ended on rank 1 may still be under way on the others.
  int ended[2];
  JF_CHECK(pipe2(ended, O_CLOEXEC) == 0);
  const UniqueFd hear(ended[0]), tell(ended[1]);
  const std::vector<int> ends = RunRanks(3, [&](Engine& engine, uint32_t rank) {
    for (uint64_t i = 0; i < 3; ++i) {
      ExpectCallWorks(engine, AllToAll(3, rank, i));
    }
    char byte = 0;
    if (rank == 1) {
      for (int i = 0; i < 2; ++i) JF_CHECK(read(hear.get(), &byte, 1) == 1);
      raise(SIGKILL);
    }
    JF_CHECK(write(tell.get(), &byte, 1) == 1);
    const int64_t begin_ns = MonotonicNanoseconds();
    EndedCall call = StartCall(engine, AllToAll(3, rank, 3));
    const Status status = Await(call);
    EXPECT_THAT(status.message(), HasSubstr("rank 1 is lost"));
    EXPECT_THAT(engine.lost_ranks(), ElementsAre(1));
    EXPECT_LT(MonotonicNanoseconds() - begin_ns,
              static_cast<int64_t>(kEnginePatienceSeconds * 0.5e9));
  });
  EXPECT_EQ(ends[0], 0);
  EXPECT_TRUE(WIFSIGNALED(ends[1]) && WTERMSIG(ends[1]) == SIGKILL);
  EXPECT_EQ(ends[2], 0);
}

}  // namespace
}  // namespace jaxfabric
