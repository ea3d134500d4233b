// Engines that play a fabric, and calls between their ranks whose every byte is
// checked.

#ifndef JAXFABRIC_TESTS_CPP_ENGINE_CLUSTER_H_
#define JAXFABRIC_TESTS_CPP_ENGINE_CLUSTER_H_

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace jaxfabric {

inline constexpr double kEnginePatienceSeconds = 60;

inline EngineOptions RankOptions(uint32_t ranks, uint32_t rank) {
  return {.name = "test",
          .ranks = ranks,
          .local_ranks = {rank},
          .generation = 1,
          .mailbox_bytes = 1 << 16,
          .window_bytes = 1 << 16,
          .timeout_s = kEnginePatienceSeconds};
}

// Byte `i` of what `source` sends to `destination` under `key`.
inline std::byte MessageByte(uint32_t source, uint32_t destination,
                             MatchKey key, uint64_t i) {
  const uint64_t mixed = (source * 31 + destination * 17 + key.channel * 7 +
                          key.sequence * 3 + i * 13) *
                         0x9e3779b97f4a7c15;
  return static_cast<std::byte>(mixed >> 56);
}

// A call that waits for one message from each of `peers`, after it has sent
// one to each.
struct EngineCall {
  // How long a message is; the same on all ranks.
  using Bytes = std::function<uint64_t(uint32_t from, uint32_t to)>;

  uint32_t rank = 0;
  MatchKey key;
  std::vector<uint32_t> peers;
  Bytes bytes;
  double timeout_s = 0;
  bool sends = true;
  bool waits = true;
};

using EndedCall = std::future<Status>;

inline void CheckArrivals(const EngineCall& call,
                          const std::vector<Arrival>& arrivals) {
  ASSERT_EQ(arrivals.size(), call.peers.size());
  for (size_t i = 0; i < arrivals.size(); ++i) {
    const Arrival& arrival = arrivals[i];
    ASSERT_EQ(arrival.source, call.peers[i]);
    ASSERT_EQ(arrival.key, call.key);
    ASSERT_EQ(arrival.length, call.bytes(arrival.source, call.rank));
    for (uint64_t at = 0; at < arrival.length; ++at) {
      ASSERT_EQ(arrival.data[at],
                MessageByte(arrival.source, call.rank, call.key, at))
          << "byte " << at << " of " << arrival.length << " from rank "
          << arrival.source;
    }
  }
}

inline Outgoing MessageOf(const EngineCall& call, uint32_t peer,
                          const OperationPtr& operation) {
  const uint64_t bytes = call.bytes(call.rank, peer);
  return {.destination = peer,
          .key = call.key,
          .bytes = bytes,
          .label = "test call",
          .pack =
              [from = call.rank, peer, key = call.key, bytes](std::byte* to) {
                for (uint64_t i = 0; i < bytes; ++i) {
                  to[i] = MessageByte(from, peer, key, i);
                }
              },
          .operation = operation};
}

inline EndedCall StartCall(Engine& engine, const EngineCall& call) {
  auto ended = std::make_shared<std::promise<Status>>();
  EndedCall future = ended->get_future();
  const auto begun = engine.Begin(
      "test call", call.timeout_s,
      [ended](Status status) { ended->set_value(std::move(status)); });
  if (!begun.ok()) {
    ended->set_value(begun.status());
    return future;
  }
  OperationPtr operation = *begun;
  Endpoint* const endpoint = engine.endpoint(call.rank);
  operation->SetWaitingFor(
      [endpoint, key = call.key] { return endpoint->DescribeMissing(key); });
  if (call.sends) {
    for (const uint32_t peer : call.peers) {
      endpoint->Send(MessageOf(call, peer, operation));
    }
  }
  if (!call.waits) return future;
  auto finish = [endpoint, call,
                 operation](const std::vector<Arrival>& arrivals) {
    CheckArrivals(call, arrivals);
    for (const Arrival& arrival : arrivals) endpoint->Release(arrival);
  };
  std::vector<Arrival> now;
  if (endpoint->Expect(call.key, call.peers, operation, finish, &now)) {
    finish(now);
  }
  return future;
}

inline Status Await(EndedCall& call) {
  const auto patience =
      std::chrono::duration<double>(2 * kEnginePatienceSeconds);
  if (call.wait_for(patience) != std::future_status::ready) {
    return Status(StatusCode::kDeadlineExceeded, "the test gave up");
  }
  return call.get();
}

// One engine per rank, each with a Transport of its own, all connected.
class EngineCluster {
 public:
  using OpenTransport = std::function<std::unique_ptr<Transport>()>;
  using Configure = std::function<void(EngineOptions&)>;

  EngineCluster(uint32_t ranks, const OpenTransport& open_transport,
                const Configure& configure = nullptr) {
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      EngineOptions options = RankOptions(ranks, rank);
      if (configure) configure(options);
      auto engine = Engine::Open(options, open_transport());
      JF_CHECK(engine.ok());
      engines_.push_back(*std::move(engine));
    }
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      const std::string address = *engines_[rank]->LocalAddress(rank);
      for (auto& engine : engines_) {
        const Status connected = engine->Connect(
            rank, address, Deadline::AfterSeconds(kEnginePatienceSeconds));
        EXPECT_TRUE(connected.ok()) << connected.message();
      }
    }
  }

  uint32_t ranks() const { return static_cast<uint32_t>(engines_.size()); }
  Engine& operator[](uint32_t rank) { return *engines_[rank]; }
  void Close(uint32_t rank) { engines_[rank].reset(); }

  std::vector<uint32_t> Others(uint32_t rank) const {
    std::vector<uint32_t> others;
    for (uint32_t other = 0; other < ranks(); ++other) {
      if (other != rank) others.push_back(other);
    }
    return others;
  }
  // `rank`'s part in a call of all ranks, every message `bytes` long.
  EndedCall Start(uint32_t rank, MatchKey key, uint64_t bytes,
                  double timeout_s = 0) {
    return StartCall((*this)[rank],
                     {.rank = rank,
                      .key = key,
                      .peers = Others(rank),
                      .bytes = [bytes](uint32_t, uint32_t) { return bytes; },
                      .timeout_s = timeout_s});
  }
  void ExpectCallWorks(MatchKey key, uint64_t bytes) {
    std::vector<EndedCall> calls;
    for (uint32_t rank = 0; rank < ranks(); ++rank) {
      calls.push_back(Start(rank, key, bytes));
    }
    for (EndedCall& call : calls) {
      const Status status = Await(call);
      EXPECT_TRUE(status.ok()) << status.message();
    }
  }

 private:
  std::vector<std::unique_ptr<Engine>> engines_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_ENGINE_CLUSTER_H_
