// OfiBell: rings a Doorbell when a completion queue's descriptor has news.
//
// Its thread only sleeps and rings: it never touches libfabric. A descriptor is
// looked at once after each Arm, so that it cannot keep the thread awake.

#ifndef JAXFABRIC_TRANSPORT_OFI_BELL_H_
#define JAXFABRIC_TRANSPORT_OFI_BELL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "base/doorbell.h"
#include "base/status.h"
#include "base/unique_fd.h"

namespace jaxfabric {

class OfiBell {
 public:
  // One watched descriptor.
  class Watch {
   public:
    // Whether Arm was called and nothing has come since.
    bool armed() const { return armed_.load(std::memory_order_acquire); }

   private:
    friend class OfiBell;
    int fd_ = -1;
    uint64_t number_ = 0;
    std::atomic<bool> armed_{false};
  };

  static StatusOr<std::unique_ptr<OfiBell>> Open(Doorbell* doorbell);
  ~OfiBell();

  // `fd` stays open until Remove.
  StatusOr<Watch*> Add(int fd);
  // Rings once when the descriptor is, or becomes, readable.
  void Arm(Watch* watch);
  void Remove(Watch* watch);

 private:
  explicit OfiBell(Doorbell* doorbell) : doorbell_(doorbell) {}
  void Run();

  Doorbell* const doorbell_;
  UniqueFd epoll_;
  UniqueFd stop_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::unique_ptr<Watch>>
      watches_;               // guarded by mutex_
  uint64_t next_number_ = 1;  // guarded by mutex_; 0 is stop_
  std::thread thread_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_OFI_BELL_H_
