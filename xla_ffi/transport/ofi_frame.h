// OfiFrame: a two-sided message between ofi Domains.
//
// Frames join Domains, answer what lies behind a memory key, carry the owner's
// messages, and show that both ends live. Payload of writes never goes this
// way. Whoever does not know the job's secret cannot make one that is accepted.

#ifndef JAXFABRIC_TRANSPORT_OFI_FRAME_H_
#define JAXFABRIC_TRANSPORT_OFI_FRAME_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "transport/job_key.h"

namespace jaxfabric {

enum class OfiFrameKind : uint16_t {
  kHello = 1,    // payload: the sender's NetAddr; it wants to write to us
  kWelcome = 2,  // the sender of this has taken in our hello
  kMessage = 3,  // payload: a message of the Domain's owner
  kPing = 4,     // the sender lives
  kAsk = 5,      // argument: a memory key; which memory is it?
  kAnswer = 6,   // argument: that key; payload: OfiRegion
  kGone = 7,     // argument: a key that we asked for and that ends
  kBye = 8,      // the sender's Domain closes, or has lost us
  // The sender is about to close its endpoint and open another: post nothing to
  // it until it says hello. kPaused: all that was posted to it has ended.
  // Argument: the generation of that endpoint; they may come after a later one.
  kPause = 9,
  kPaused = 10,
};

// What a memory key stands for. Length 0: the target has no such region.
struct OfiRegion {
  uint64_t provider_key = 0;
  uint64_t base = 0;  // to be added to offsets
  uint64_t length = 0;
};
static_assert(sizeof(OfiRegion) == 24);

// Little-endian, as it lies in memory; the payload follows.
//   offset  0  magic          u32
//   offset  4  version        u16
//   offset  6  kind           u16  OfiFrameKind
//   offset  8  sender         u64  nonce of the sending Domain
//   offset 16  target         u64  nonce of the Domain it is meant for
//   offset 24  argument       u64  what the kind says
//   offset 32  payload_bytes  u32
//   offset 36  zero           u32
//   offset 40  tag            u64  JobKey::Tag of all the rest
struct OfiFrameHeader {
  uint32_t magic = 0;
  uint16_t version = 0;
  OfiFrameKind kind = OfiFrameKind::kPing;
  uint64_t sender = 0;
  uint64_t target = 0;
  uint64_t argument = 0;
  uint32_t payload_bytes = 0;
  uint32_t zero = 0;
  uint64_t tag = 0;
};
static_assert(sizeof(OfiFrameHeader) == 48);

inline constexpr uint32_t kOfiMessageBytesMax = 4096;
inline constexpr size_t kOfiFrameBytesMax =
    sizeof(OfiFrameHeader) + kOfiMessageBytesMax;

struct OfiFrame {
  OfiFrameKind kind = OfiFrameKind::kPing;
  uint64_t sender = 0;
  uint64_t target = 0;
  uint64_t argument = 0;
  std::string_view payload;
};

// Writes the frame to `bytes`, which has kOfiFrameBytesMax; returns its length.
size_t EncodeOfiFrame(const OfiFrame& frame, const JobKey& key,
                      std::byte* bytes);

// Nothing if it is not one of ours, or not of this job, or not for `target`.
// The payload lies in `bytes`.
std::optional<OfiFrame> DecodeOfiFrame(std::span<const std::byte> bytes,
                                       const JobKey& key, uint64_t target);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_OFI_FRAME_H_
