// VerbsFrame: a two-sided message over a joined pair of queue pairs.
//
// Frames carry the owner's messages and answer what lies behind a memory key.
// They need no tag: only a Domain that was greeted under the job's secret knows
// the queue pair and its sequence, as with the writes beside them.

#ifndef JAXFABRIC_TRANSPORT_VERBS_FRAME_H_
#define JAXFABRIC_TRANSPORT_VERBS_FRAME_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>

namespace jaxfabric {

enum class VerbsFrameKind : uint32_t {
  kJoined = 1,   // the sender's end can receive: now both may send
  kMessage = 2,  // payload: a message of the Domain's owner
  kAsk = 3,      // argument: a memory key; which memory is it?
  kAnswer = 4,   // argument: that key; payload: VerbsRegion
  kGone = 5,     // argument: a key that we asked for and that ends
};

// What a memory key stands for. Length 0: the target has no such region.
struct VerbsRegion {
  uint64_t base = 0;
  uint64_t length = 0;
  uint32_t remote_key = 0;
  uint32_t zero = 0;
};
static_assert(sizeof(VerbsRegion) == 24);

// Little-endian, as it lies in memory; the payload follows.
//   offset  0  kind           u32  VerbsFrameKind
//   offset  4  payload_bytes  u32
//   offset  8  argument       u64  what the kind says
struct VerbsFrameHeader {
  VerbsFrameKind kind = VerbsFrameKind::kJoined;
  uint32_t payload_bytes = 0;
  uint64_t argument = 0;
};
static_assert(sizeof(VerbsFrameHeader) == 16);

inline constexpr uint32_t kVerbsFrameBytesMax = 2048;
inline constexpr uint32_t kVerbsMessageBytesMax =
    kVerbsFrameBytesMax - sizeof(VerbsFrameHeader);

struct VerbsFrame {
  VerbsFrameKind kind = VerbsFrameKind::kJoined;
  uint64_t argument = 0;
  std::string_view payload;
};

// `payload` is at most kVerbsMessageBytesMax, and `bytes` has
// kVerbsFrameBytesMax. Returns the frame's length.
inline uint32_t EncodeVerbsFrame(const VerbsFrame& frame, std::byte* bytes) {
  VerbsFrameHeader header;
  header.kind = frame.kind;
  header.payload_bytes = static_cast<uint32_t>(frame.payload.size());
  header.argument = frame.argument;
  std::memcpy(bytes, &header, sizeof(header));
  if (!frame.payload.empty()) {
    std::memcpy(bytes + sizeof(header), frame.payload.data(),
                frame.payload.size());
  }
  return static_cast<uint32_t>(sizeof(header)) + header.payload_bytes;
}

// Nothing if it is no frame. The payload lies in `bytes`.
inline std::optional<VerbsFrame> DecodeVerbsFrame(
    std::span<const std::byte> bytes) {
  VerbsFrameHeader header;
  if (bytes.size() < sizeof(header)) return std::nullopt;
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.payload_bytes != bytes.size() - sizeof(header)) {
    return std::nullopt;
  }
  return VerbsFrame{header.kind, header.argument,
                    std::string_view(reinterpret_cast<const char*>(
                                         bytes.data() + sizeof(header)),
                                     header.payload_bytes)};
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_VERBS_FRAME_H_
