// ImmCounterTable: how many transfers have finished, by id. It is the only
// completion notice that a receiver has.

#ifndef JAXFABRIC_ENGINE_IMM_COUNTER_H_
#define JAXFABRIC_ENGINE_IMM_COUNTER_H_

#include <cstddef>
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
  // Who counts, where that is not known.
  static constexpr uint32_t kAnySource = ~uint32_t{0};

  // Counts `units` of a transfer under `id`. Callbacks whose count is reached
  // are moved to `ready`, for the caller to run outside its locks. No known
  // `source` holds more ids than are free for the others.
  Status Add(uint32_t id, uint64_t units,
             std::vector<std::function<void()>>* ready,
             uint32_t source = kAnySource);
  // A source will count no more. What it has counted stays as long as nobody
  // else needs the room.
  void Leave(uint32_t source);
  // Ids whose counts were dropped for that reason.
  uint64_t evicted() const;

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
  // For who has left, and for what somebody has given up to wait for.
  static constexpr uint32_t kNobody = kAnySource - 1;
  struct Counter {
    uint64_t units = 0;
    std::list<Expectation> expectations;
    bool early = false;  // nobody has waited for it since it came
    uint32_t holder = kAnySource;
    std::list<uint32_t>::iterator place;  // in left_, if kNobody holds it
  };
  using Counters = std::unordered_map<uint32_t, Counter>;

  // Meets the expectations of `id` that can be met, and forgets a counter that
  // says nothing any more. Needs mutex_.
  void SettleLocked(uint32_t id, std::vector<std::function<void()>>* ready);
  // All of these need mutex_. Whether `source` may hold one more id; drops what
  // nobody holds, if that helps.
  bool MakeRoomLocked(uint32_t source);
  void HoldLocked(uint32_t id, Counter& counter, uint32_t holder);
  void LetGoLocked(Counter& counter);
  void EraseLocked(Counters::iterator counter);

  mutable std::mutex mutex_;
  Counters counters_;                          // guarded by mutex_
  std::unordered_map<uint32_t, size_t> held_;  // by holder; by mutex_
  size_t early_ = 0;                           // guarded by mutex_
  std::list<uint32_t> left_;  // kNobody's, the oldest first; by mutex_
  uint64_t evicted_ = 0;      // guarded by mutex_
  std::unordered_map<Handle, uint32_t> id_by_handle_;  // guarded by mutex_
  Handle next_handle_ = 1;                             // guarded by mutex_
  bool over_ = false;                                  // guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_IMM_COUNTER_H_
