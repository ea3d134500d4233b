// Doorbell: wakes sleeping threads, also from another process.
//
// The words may lie in shared memory. std::atomic::wait is no use there:
// libstdc++ waits on a private futex, which no other process can wake.

#ifndef JAXFABRIC_BASE_DOORBELL_H_
#define JAXFABRIC_BASE_DOORBELL_H_

#include <atomic>
#include <cstdint>

#include "base/cache_line.h"
#include "base/deadline.h"

namespace jaxfabric {

// Two words on a cache line of their own:
//   offset 0  sequence  u32  counts rings (wraps)
//   offset 4  sleepers  u32  threads asleep, or about to be
struct alignas(kCacheLineBytes) DoorbellWords {
  std::atomic<uint32_t> sequence;
  std::atomic<uint32_t> sleepers;
};
static_assert(sizeof(DoorbellWords) == kCacheLineBytes);
static_assert(std::atomic<uint32_t>::is_always_lock_free);

class Doorbell {
 public:
  explicit Doorbell(DoorbellWords* words) : words_(words) {}
  virtual ~Doorbell() = default;
  Doorbell(const Doorbell&) = default;
  Doorbell& operator=(const Doorbell&) = default;

  // Says that there is something to look at. Everything written before is
  // visible to a thread that returns from Wait because of it.
  void Ring();

  // To be taken before looking for work, and handed to Wait if there is none:
  // a ring in between is then not lost.
  uint32_t Sequence() const;

  // Returns when the sequence differs from `seen`, at the deadline, or early
  // for no reason at all.
  virtual void Wait(uint32_t seen, Deadline deadline);

  // From Mute to Unmute the caller polls: devices that wake sleepers by
  // themselves need not. Calls may nest.
  virtual void Mute() {}
  virtual void Unmute() {}

 protected:
  // Wakes all who are in Wait.
  virtual void Wake();

  DoorbellWords* words() const { return words_; }

 private:
  DoorbellWords* words_;
};

// Mutes a doorbell as long as it lives.
class DoorbellMute {
 public:
  explicit DoorbellMute(Doorbell& doorbell) : doorbell_(doorbell) {
    doorbell_.Mute();
  }
  ~DoorbellMute() { doorbell_.Unmute(); }
  DoorbellMute(const DoorbellMute&) = delete;
  DoorbellMute& operator=(const DoorbellMute&) = delete;

 private:
  Doorbell& doorbell_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_BASE_DOORBELL_H_
