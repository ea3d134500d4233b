// Event ring: how one initiating Domain tells one target Domain what arrived.
//
// Single producer (the initiator, whose owner serialises its calls), single
// consumer (the target). The memory belongs to both; neither trusts the other:
// each keeps its own index to itself, reads the other's once per use, and
// checks it. One memfd per ring, so that no initiator can touch another's.

#ifndef JAXFABRIC_TRANSPORT_SHM_RING_H_
#define JAXFABRIC_TRANSPORT_SHM_RING_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "base/cache_line.h"
#include "transport/transport.h"

namespace jaxfabric {

// Enough for a burst of shards; 256 slots keep a ring at one MiB of messages,
// of which only touched pages exist.
inline constexpr uint32_t kShmRingEntries = 256;
inline constexpr uint32_t kShmMessageBytes = 4096;

enum class ShmEntryKind : uint32_t { kImmediate = 1, kMessage = 2 };

//   offset  0  kind       u32  ShmEntryKind
//   offset  4  immediate  u32  kImmediate: the immediate
//   offset  8  length     u32  kMessage: bytes of this entry's payload slot
//   offset 12  reserved   u32  0
struct ShmRingEntry {
  std::atomic<uint32_t> kind;
  std::atomic<uint32_t> immediate;
  std::atomic<uint32_t> length;
  std::atomic<uint32_t> reserved;
};
static_assert(sizeof(ShmRingEntry) == 16);

// Entry and payload slot of index i are number i % kShmRingEntries.
//   offset    0  tail     u32  producer: entries written, wraps
//   offset   64  head     u32  consumer: entries taken, wraps
//   offset 4096  entries  16 B each
//   offset 8192  payload  4096 B each
struct ShmRingLayout {
  alignas(kCacheLineBytes) std::atomic<uint32_t> tail;
  alignas(kCacheLineBytes) std::atomic<uint32_t> head;
  alignas(4096) ShmRingEntry entries[kShmRingEntries];
  alignas(4096) char payload[kShmRingEntries][kShmMessageBytes];
};
static_assert(offsetof(ShmRingLayout, tail) == 0);
static_assert(offsetof(ShmRingLayout, head) == 64);
static_assert(offsetof(ShmRingLayout, entries) == 4096);
static_assert(offsetof(ShmRingLayout, payload) == 8192);
static_assert(sizeof(ShmRingLayout) == 8192 + 256 * 4096);
static_assert((kShmRingEntries & (kShmRingEntries - 1)) == 0,
              "indices wrap at 2^32");

// kNonsense: the other side wrote what no correct peer writes. The ring must
// not be used again.
enum class ShmRingResult { kDone, kNotNow, kNonsense };

class ShmRingWriter {
 public:
  explicit ShmRingWriter(std::byte* memory)
      : ring_(reinterpret_cast<ShmRingLayout*>(memory)) {}

  // kNotNow: the ring is full.
  ShmRingResult HasRoom() {
    if (tail_ - seen_head_ < kShmRingEntries) return ShmRingResult::kDone;
    seen_head_ = ring_->head.load(std::memory_order_acquire);
    const uint32_t used = tail_ - seen_head_;
    if (used > kShmRingEntries) return ShmRingResult::kNonsense;
    return used < kShmRingEntries ? ShmRingResult::kDone
                                  : ShmRingResult::kNotNow;
  }

  // Both need HasRoom() == kDone. All stores before are visible to the
  // consumer when it takes the entry.
  void PushImmediate(uint32_t immediate) {
    Publish(ShmEntryKind::kImmediate, immediate, 0);
  }
  void PushMessage(std::string_view message) {
    std::memcpy(ring_->payload[tail_ % kShmRingEntries], message.data(),
                message.size());
    Publish(ShmEntryKind::kMessage, 0, static_cast<uint32_t>(message.size()));
  }

 private:
  void Publish(ShmEntryKind kind, uint32_t immediate, uint32_t length) {
    ShmRingEntry& entry = ring_->entries[tail_ % kShmRingEntries];
    entry.kind.store(static_cast<uint32_t>(kind), std::memory_order_relaxed);
    entry.immediate.store(immediate, std::memory_order_relaxed);
    entry.length.store(length, std::memory_order_relaxed);
    ring_->tail.store(++tail_, std::memory_order_release);
  }

  ShmRingLayout* ring_;
  uint32_t tail_ = 0;
  uint32_t seen_head_ = 0;
};

class ShmRingReader {
 public:
  explicit ShmRingReader(std::byte* memory)
      : ring_(reinterpret_cast<ShmRingLayout*>(memory)) {}

  // Takes one entry: sets kind, immediate and message of `out`. kNotNow: the
  // ring is empty.
  ShmRingResult Pop(Completion& out) {
    const uint32_t used = ring_->tail.load(std::memory_order_acquire) - head_;
    if (used == 0) return ShmRingResult::kNotNow;
    if (used > kShmRingEntries) return ShmRingResult::kNonsense;
    const ShmRingEntry& entry = ring_->entries[head_ % kShmRingEntries];
    // Each word is read once: a peer that changes it afterwards changes
    // nothing here.
    const uint32_t kind = entry.kind.load(std::memory_order_relaxed);
    const uint32_t immediate = entry.immediate.load(std::memory_order_relaxed);
    const uint32_t length = entry.length.load(std::memory_order_relaxed);
    out.message.clear();
    out.immediate = 0;
    if (kind == static_cast<uint32_t>(ShmEntryKind::kImmediate) &&
        length == 0) {
      out.kind = Completion::Kind::kImmediate;
      out.immediate = immediate;
    } else if (kind == static_cast<uint32_t>(ShmEntryKind::kMessage) &&
               length <= kShmMessageBytes) {
      out.kind = Completion::Kind::kMessage;
      out.message.assign(ring_->payload[head_ % kShmRingEntries], length);
    } else {
      return ShmRingResult::kNonsense;
    }
    ring_->head.store(++head_, std::memory_order_release);
    return ShmRingResult::kDone;
  }

 private:
  ShmRingLayout* ring_;
  uint32_t head_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_SHM_RING_H_
