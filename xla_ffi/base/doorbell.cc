#include "base/doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace jaxfabric {
namespace {

// Not FUTEX_PRIVATE_FLAG: the word may be mapped by several processes.
void FutexWaitShared(std::atomic<uint32_t>* word, uint32_t expected,
                     int64_t duration_ns) {
  const timespec duration = {.tv_sec = duration_ns / 1'000'000'000,
                             .tv_nsec = duration_ns % 1'000'000'000};
  syscall(SYS_futex, word, FUTEX_WAIT, expected, &duration, nullptr, 0);
}

void FutexWakeShared(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

void Doorbell::Ring() {
  // seq_cst on both words, here and in Wait: either the ringer sees the
  // sleeper, or the sleeper sees the new sequence.
  words_->sequence.fetch_add(1, std::memory_order_seq_cst);
  if (words_->sleepers.load(std::memory_order_seq_cst) != 0) {
    Wake();
  }
}

void Doorbell::Wake() { FutexWakeShared(&words_->sequence); }

uint32_t Doorbell::Sequence() const {
  return words_->sequence.load(std::memory_order_acquire);
}

void Doorbell::Wait(uint32_t seen, Deadline deadline) {
  const int64_t duration_ns = deadline.RemainingNanoseconds();
  if (duration_ns == 0) return;
  words_->sleepers.fetch_add(1, std::memory_order_seq_cst);
  if (words_->sequence.load(std::memory_order_seq_cst) == seen) {
    FutexWaitShared(&words_->sequence, seen, duration_ns);
  }
  words_->sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace jaxfabric
