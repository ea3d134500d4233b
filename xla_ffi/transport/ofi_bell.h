// OfiBell: a Doorbell that completion queues ring by their descriptors.
//
// Whoever waits sleeps on the descriptors themselves, so that news of a NIC
// wakes it without another thread in between. After Unmute it takes a moment
// until they wake somebody again: who has just polled often polls again soon,
// and a thread that wakes up in between would be in its way. The moment is one
// to two times as long as the bell was mute: that says how fast things go here.
// It is up to eight times as long where that is long, since each setting of the
// timer is a system call.

#ifndef JAXFABRIC_TRANSPORT_OFI_BELL_H_
#define JAXFABRIC_TRANSPORT_OFI_BELL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/deadline.h"
#include "base/doorbell.h"
#include "base/status.h"
#include "base/unique_fd.h"

namespace jaxfabric {

class OfiBell final : public Doorbell {
 public:
  static StatusOr<std::unique_ptr<OfiBell>> Open();
  OfiBell(const OfiBell&) = delete;
  OfiBell& operator=(const OfiBell&) = delete;

  // While `fd` is readable, Wait returns at once. It stays open until Remove.
  Status Add(int fd);
  void Remove(int fd);

  void Wait(uint32_t seen, Deadline deadline) override;
  void Mute() override;
  void Unmute() override;
  // Somebody polls, and Wait returns some time after it has ended: until then
  // descriptors need not become readable.
  bool muted() const { return mutes_.load(std::memory_order_acquire) > 0; }

 private:
  OfiBell() : Doorbell(&own_words_) {}
  void Wake() override;
  void Listen();
  void ListenLocked(bool listens);  // needs mutex_
  void SetTimer(int64_t after_ns) const;

  DoorbellWords own_words_ = {};
  UniqueFd epoll_;
  UniqueFd rung_;   // readable once Wake was called
  UniqueFd timer_;  // readable some time after Unmute
  std::mutex mutex_;
  std::vector<int> fds_;             // guarded by mutex_
  std::atomic<uint32_t> mutes_ = 0;  // written under mutex_
  int64_t muted_ns_ = 0;             // since when; guarded by mutex_
  int64_t timer_ns_ = 0;             // when it ends; guarded by mutex_
  bool listens_ = true;              // to fds_; guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_OFI_BELL_H_
