#include "tests/softefa/progress.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace jaxfabric::softefa {
namespace {

// The caller's own calls usually come first; then the thread need not.
constexpr int64_t kIdleNs = 1'000'000;

struct Engine {
  std::condition_variable_any work;
  int64_t moved_ns = 0;
  std::thread thread;
};

// Never destroyed, as the thread never ends: it goes with the process.
Engine& TheEngine() {
  static auto* engine = new Engine;
  return *engine;
}

bool HasWork(const Host& host) {
  return std::any_of(host.queue_pairs.begin(), host.queue_pairs.end(),
                     [](const QueuePair* pair) {
                       return !pair->send_queue.empty() || !pair->late.empty();
                     });
}

void Run() {
  Host& host = TheHost();
  Engine& engine = TheEngine();
  std::unique_lock lock(host.mutex);
  for (;;) {
    engine.work.wait(lock, [&] { return HasWork(host); });
    engine.work.wait_for(lock, std::chrono::nanoseconds(kIdleNs));
    if (NowNs() - engine.moved_ns >= kIdleNs) Progress();
  }
}

}  // namespace

void Progress() {
  Host& host = TheHost();
  const int64_t now_ns = NowNs();
  TheEngine().moved_ns = now_ns;
  for (QueuePair* pair : host.queue_pairs) {
    if (host.faults.Of(pair->nic->gid, now_ns).state == NicState::kStalled) {
      continue;
    }
    Receive(*pair);
    Transmit(*pair, now_ns);
  }
}

void WakeEngine() {
  Engine& engine = TheEngine();
  if (!engine.thread.joinable()) engine.thread = std::thread(Run);
  if (HasWork(TheHost())) engine.work.notify_one();
}

}  // namespace jaxfabric::softefa
