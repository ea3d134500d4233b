// Engine: the local ranks of one Fabric, the thread that moves them forward,
// and the one place where a failure ends the generation.

#ifndef JAXFABRIC_ENGINE_ENGINE_H_
#define JAXFABRIC_ENGINE_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "engine/endpoint.h"
#include "engine/operation.h"
#include "transport/transport.h"

namespace jaxfabric {

struct EngineOptions {
  std::string name;  // of the Fabric, for error texts
  uint32_t ranks = 0;
  std::vector<uint32_t> local_ranks;
  uint32_t generation = 0;
  // 0: one on each NIC of the transport, up to DomainGroup::kDomainsMax.
  uint32_t domains_per_rank = 0;
  uint64_t mailbox_bytes = 0;
  uint64_t window_bytes = 0;
  double timeout_s = 30;
  // How long the worker looks again before it sleeps. More than a few
  // microseconds hurts where ranks outnumber cores.
  int64_t spin_ns = 5'000;
  // Where the worker runs; none: anywhere. See KeepThisThreadOn.
  std::vector<uint32_t> worker_cores;
};

class Engine {
 public:
  static StatusOr<std::unique_ptr<Engine>> Open(
      EngineOptions options, std::unique_ptr<Transport> transport);
  // Fails what is under way, waits for it to let go of its buffers, and ends
  // the worker.
  ~Engine();

  const EngineOptions& options() const { return options_; }
  // nullptr if `rank` is not local.
  Endpoint* endpoint(uint32_t rank);

  // Bytes that reach `rank`; to be published.
  StatusOr<std::string> LocalAddress(uint32_t rank) const;
  // Connects every local rank with `rank`, local or not.
  Status Connect(uint32_t rank, const std::string& address, Deadline deadline);

  // Memory at the same offset of every rank's windows, or kResourceExhausted.
  StatusOr<uint64_t> AllocateWindow(uint64_t bytes);

  // Starts an operation of `rank`, or says at once why there can be none.
  // timeout_s <= 0 stands for the Fabric's.
  StatusOr<OperationPtr> Begin(std::string label, double timeout_s,
                               Operation::Done done);

  // Ends the generation: everything under way fails with this status, and so
  // does everything to come. Peers are told unless they told us.
  void Fail(const Status& status, bool tell_peers);
  Status failure() const;
  std::vector<uint32_t> lost_ranks() const;

  // Waits until nothing posted here is on its way.
  Status Drain(Deadline deadline);
  // Before it is destroyed, also after a failure: peers that need nothing more
  // from here go on undisturbed, and do not take this rank for lost.
  void SayGoodbye();
  size_t operations_under_way() const;

 private:
  Engine(EngineOptions options, std::unique_ptr<Transport> transport);
  Status OpenEndpoints();
  void Work();
  void EndFailedAndExpired();
  bool Drained() const;
  int64_t SleepNs() const;
  void OnLost(Endpoint::Loss loss);
  std::vector<OperationPtr> LiveOperations() const;

  const EngineOptions options_;
  std::unique_ptr<Transport> transport_;
  std::map<uint32_t, std::unique_ptr<Endpoint>> endpoints_;

  mutable std::mutex mutex_;
  Status failure_;                    // guarded by mutex_
  std::vector<uint32_t> lost_ranks_;  // guarded by mutex_
  uint64_t windows_used_ = 0;         // guarded by mutex_
  uint64_t next_operation_ = 0;       // guarded by mutex_
  std::unordered_map<uint64_t, std::weak_ptr<Operation>>
      operations_;  // guarded by mutex_

  std::atomic<bool> stop_{false};
  std::thread worker_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_ENGINE_H_
