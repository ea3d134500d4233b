// TransferFuture: the outcome of one operation of a TransferEngine.
//
// Once it is done, no NIC touches the operation's buffers any more, whatever
// the outcome.

#ifndef JAXFABRIC_ENGINE_TRANSFER_FUTURE_H_
#define JAXFABRIC_ENGINE_TRANSFER_FUTURE_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

class TransferFuture {
 public:
  using Callback = std::function<void(const Status&)>;

  // `label` says what it is, as in "single write of 4096 bytes under id 7".
  // `number` is the engine's name for it.
  TransferFuture(std::string label, uint64_t number)
      : label_(std::move(label)),
        number_(number),
        begin_ns_(MonotonicNanoseconds()) {}

  const std::string& label() const { return label_; }
  uint64_t number() const { return number_; }
  int64_t begin_ns() const { return begin_ns_; }

  bool done() const { return done_.load(std::memory_order_acquire); }
  // Nothing if it is not done by `deadline`; it then goes on.
  std::optional<Status> Wait(Deadline deadline) const;
  // What Connect yields, and the peer whose loss is the failure; else
  // kUnknownPeer.
  uint32_t peer() const;

  // Runs once, on the CallbackQueue; may block.
  void OnDone(Callback callback);

  // For the engine. The first outcome counts.
  void Finish(const Status& status, uint32_t peer = kUnknownPeer);

 private:
  const std::string label_;
  const uint64_t number_;
  const int64_t begin_ns_;
  std::atomic<bool> done_{false};
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  Status status_;                    // guarded by mutex_
  uint32_t peer_ = kUnknownPeer;     // guarded by mutex_
  std::vector<Callback> callbacks_;  // guarded by mutex_
};

using TransferFuturePtr = std::shared_ptr<TransferFuture>;

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_FUTURE_H_
