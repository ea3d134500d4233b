// Immediates: which transfer a write belongs to, and what share of it.
//
// An immediate is `id << 5 | k` and adds 2^(20-k) units to its counter; 2^20
// units are one transfer. A transfer posted as n writes, 2^(k-1) < n <= 2^k,
// lets 2^k - n of them carry k-1 and the others k, which sums to exactly one.
// So receivers count transfers without knowing how a sender split them.
//
// An id belongs to one source, kind and slot:
//   bits 17..26  source rank
//   bits 15..16  kind
//   bits  0..14  slot: what the kind says

#ifndef JAXFABRIC_ENGINE_IMMEDIATE_H_
#define JAXFABRIC_ENGINE_IMMEDIATE_H_

#include <bit>
#include <cstdint>

namespace jaxfabric {

inline constexpr uint32_t kShareBits = 5;
inline constexpr uint32_t kUnitBits = 20;
inline constexpr uint64_t kTransferUnits = uint64_t{1} << kUnitBits;
inline constexpr uint32_t kIdBits = 32 - kShareBits;
// More writes than this cannot share one transfer.
inline constexpr uint32_t kWritesPerTransferMax = 1u << kUnitBits;

inline constexpr uint32_t kSlotBits = 15;
inline constexpr uint32_t kSlotsMax = 1u << kSlotBits;
inline constexpr uint32_t kKindBits = 2;
inline constexpr uint32_t kRanksMax = 1u << (kIdBits - kSlotBits - kKindBits);

enum class IdKind : uint32_t {
  kMailbox = 0,  // slot: index of the mailbox slot
  kWindow = 1,   // slot: window << 8 | id given by the user
};

struct TransferId {
  uint32_t source = 0;
  IdKind kind = IdKind::kMailbox;
  uint32_t slot = 0;

  constexpr uint32_t Encode() const {
    return source << (kKindBits + kSlotBits) |
           static_cast<uint32_t>(kind) << kSlotBits | slot;
  }
  static constexpr TransferId Decode(uint32_t id) {
    return {.source = id >> (kKindBits + kSlotBits),
            .kind = static_cast<IdKind>(id >> kSlotBits & 3),
            .slot = id & (kSlotsMax - 1)};
  }
};

struct Immediate {
  uint32_t id = 0;
  uint32_t share = 0;  // k

  constexpr uint32_t Encode() const { return id << kShareBits | share; }
  static constexpr Immediate Decode(uint32_t word) {
    return {.id = word >> kShareBits, .share = word & ((1u << kShareBits) - 1)};
  }
  // 0 for a share that no sender of ours writes.
  constexpr uint64_t Units() const {
    return share > kUnitBits ? 0 : kTransferUnits >> share;
  }
};

// The share that write `index` of a transfer of `count` writes carries.
constexpr uint32_t ShareOfWrite(uint32_t index, uint32_t count) {
  const uint32_t k = static_cast<uint32_t>(std::bit_width(count - 1));
  const uint32_t larger = (1u << k) - count;
  return index < larger ? k - 1 : k;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_IMMEDIATE_H_
