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

// What an operation is called, as in "single write of 4096 bytes under id 7 to
// peer 2 decode (1f2e3d4c)". That of a single write is put together only for
// who asks: hardly anybody does.
struct OperationLabel {
  // NOLINTNEXTLINE(google-explicit-constructor): so that texts are labels
  OperationLabel(std::string text) : text(std::move(text)) {}
  // NOLINTNEXTLINE(google-explicit-constructor)
  OperationLabel(const char* text) : text(text) {}
  OperationLabel(uint64_t bytes, std::optional<uint32_t> id)
      : bytes(bytes), id(id) {}
  std::string ToString() const;

  std::string text;  // empty: a single write
  uint64_t bytes = 0;
  std::optional<uint32_t> id;
  std::shared_ptr<const std::string> peer;  // where there is but one
};

class TransferFuture {
 public:
  using Callback = std::function<void(const Status&)>;

  // `number` is the engine's name for it.
  TransferFuture(OperationLabel label, uint64_t number, int64_t begin_ns)
      : label_(std::move(label)), number_(number), begin_ns_(begin_ns) {}

  std::string label() const { return label_.ToString(); }
  uint64_t number() const { return number_; }
  int64_t begin_ns() const { return begin_ns_; }

  bool done() const { return done_.load(std::memory_order_acquire); }
  // Null until it is done.
  const Status* outcome() const { return done() ? &status_ : nullptr; }
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
  const OperationLabel label_;
  const uint64_t number_;
  const int64_t begin_ns_;
  std::atomic<bool> done_{false};
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  Status status_;                    // guarded by mutex_ until done_
  uint32_t peer_ = kUnknownPeer;     // guarded by mutex_
  std::vector<Callback> callbacks_;  // guarded by mutex_
};

using TransferFuturePtr = std::shared_ptr<TransferFuture>;

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_FUTURE_H_
