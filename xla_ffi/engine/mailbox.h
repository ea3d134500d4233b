// Mailboxes: where one rank's messages to another lie.
//
// Each (source, destination) pair has a region in the destination's heap: a
// table of descriptors, one per slot, and a data area. The source owns both: it
// picks a free slot and a free span, writes the message and its descriptor, and
// counts one transfer under the slot's id. It uses them again only after the
// destination has given the slot back (a credit), so a message is never
// overwritten and any number of calls may be under way, in any order.

#ifndef JAXFABRIC_ENGINE_MAILBOX_H_
#define JAXFABRIC_ENGINE_MAILBOX_H_

#include <compare>
#include <cstddef>
#include <cstdint>

#include "base/cache_line.h"

namespace jaxfabric {

// One bit per slot in credit masks.
inline constexpr uint32_t kMailboxSlots = 64;
inline constexpr uint32_t kDescriptorMagic = 0x4a464d42;
inline constexpr size_t kLabelBytes = 64;

// Which execution of which call site: the same on all ranks that take part.
struct MatchKey {
  uint64_t channel = 0;
  uint64_t sequence = 0;
  auto operator<=>(const MatchKey&) const = default;
};

// Written by the source, read by the destination as hostile.
//   offset  0  magic       u32
//   offset  4  generation  u32   of the Fabric; other generations are dropped
//   offset  8  channel     u64
//   offset 16  sequence    u64
//   offset 24  offset      u64   of the message in the data area
//   offset 32  length      u64   bytes of the message
//   offset 40  credits     u64   slots of the opposite direction given back
//   offset 48  run_id      i64   XLA's, for diagnosis only
//   offset 56  (reserved)  u64
//   offset 64  label       char[64]  the call, for error texts; may lack a NUL
struct alignas(kCacheLineBytes) MailboxDescriptor {
  uint32_t magic;
  uint32_t generation;
  uint64_t channel;
  uint64_t sequence;
  uint64_t offset;
  uint64_t length;
  uint64_t credits;
  int64_t run_id;
  uint64_t reserved;
  char label[kLabelBytes];
};
static_assert(sizeof(MailboxDescriptor) == 128);
static_assert(offsetof(MailboxDescriptor, credits) == 40);
static_assert(offsetof(MailboxDescriptor, label) == 64);

// Offsets inside a heap of `ranks` mailboxes followed by the windows.
struct HeapLayout {
  uint32_t ranks = 0;
  uint64_t mailbox_bytes = 0;  // the data area of each
  uint64_t window_bytes = 0;   // all windows together

  static constexpr uint64_t kTableBytes =
      kMailboxSlots * sizeof(MailboxDescriptor);

  constexpr uint64_t MailboxStride() const {
    return AlignUp(kTableBytes + mailbox_bytes, 4096);
  }
  constexpr uint64_t Descriptor(uint32_t source, uint32_t slot) const {
    return source * MailboxStride() + slot * sizeof(MailboxDescriptor);
  }
  constexpr uint64_t Data(uint32_t source) const {
    return source * MailboxStride() + kTableBytes;
  }
  constexpr uint64_t Windows() const { return ranks * MailboxStride(); }
  constexpr uint64_t TotalBytes() const { return Windows() + window_bytes; }
};

// A message that has come. It lies in memory that its source can still write:
// whoever reads it copies first and checks what it copied.
struct Arrival {
  uint32_t source = 0;
  uint32_t slot = 0;
  MatchKey key;
  const std::byte* data = nullptr;
  uint64_t length = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_MAILBOX_H_
