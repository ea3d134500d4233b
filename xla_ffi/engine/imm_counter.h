// ImmCounterTable: how many transfers have finished, by id. It is the only
// completion notice that a receiver has.

#ifndef JAXFABRIC_ENGINE_IMM_COUNTER_H_
#define JAXFABRIC_ENGINE_IMM_COUNTER_H_

#include <cstdint>
#include <functional>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"

namespace jaxfabric {

class ImmCounterTable {
 public:
  using Handle = uint64_t;

  // Ids that may hold counts which nobody has waited for yet. Beyond it a peer
  // floods us, and Add says so.
  static constexpr size_t kIdsMax = 1u << 16;

  // Counts `units` of a transfer under `id`. Callbacks whose count is reached
  // are moved to `ready`, for the caller to run outside its locks.
  Status Add(uint32_t id, uint64_t units,
             std::vector<std::function<void()>>* ready);

  // Consumes `transfers` finished transfers of `id` as soon as they are there;
  // earlier callers of the same id come first. Returns 0 if they are there
  // already (`callback` is then dropped), else a handle for Cancel.
  Handle Expect(uint32_t id, uint64_t transfers,
                std::function<void()> callback);

  // Forgets an expectation; false if it was met or never there. Nothing that it
  // waited for is consumed: it may be what later callers wait for, whose
  // callbacks are then moved to `ready`.
  bool Cancel(Handle handle, std::vector<std::function<void()>>* ready);

  // Forgets all expectations, and those to come: who calls Expect later has
  // failed meanwhile. Returns their callbacks for the caller to destroy outside
  // its locks.
  std::vector<std::function<void()>> TakeExpectations();

  // Takes back up to `units` that will never become a transfer.
  void Drop(uint32_t id, uint64_t units);
  // Whether a part of a transfer has arrived under `id`.
  bool HasPart(uint32_t id) const;

  // Whole transfers that have arrived under `id` and were not consumed.
  uint64_t Transfers(uint32_t id) const;

 private:
  struct Expectation {
    Handle handle;
    uint64_t units;
    std::function<void()> callback;
  };
  struct Counter {
    uint64_t units = 0;
    std::list<Expectation> expectations;
  };

  // Meets the expectations of `id` that can be met, and forgets a counter that
  // says nothing any more. Needs mutex_.
  void SettleLocked(uint32_t id, std::vector<std::function<void()>>* ready);

  mutable std::mutex mutex_;
  std::unordered_map<uint32_t, Counter> counters_;     // guarded by mutex_
  std::unordered_map<Handle, uint32_t> id_by_handle_;  // guarded by mutex_
  Handle next_handle_ = 1;                             // guarded by mutex_
  bool over_ = false;                                  // guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_IMM_COUNTER_H_
