#include "transport/ofi_frame.h"

#include <cstring>

#include "base/check.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kMagic = 0x4d46'584a;  // "JXFM"
constexpr uint16_t kVersion = 1;

// The header's tag is zero while it is computed.
uint64_t TagOf(const std::byte* frame, size_t bytes, const JobKey& key) {
  return key.Tag({reinterpret_cast<const char*>(frame), bytes});
}

}  // namespace

size_t EncodeOfiFrame(const OfiFrame& frame, const JobKey& key,
                      std::byte* bytes) {
  JF_CHECK(frame.payload.size() <= kOfiMessageBytesMax);
  OfiFrameHeader header;
  header.magic = kMagic;
  header.version = kVersion;
  header.kind = frame.kind;
  header.sender = frame.sender;
  header.target = frame.target;
  header.argument = frame.argument;
  header.payload_bytes = static_cast<uint32_t>(frame.payload.size());
  const size_t length = sizeof(header) + frame.payload.size();
  std::memcpy(bytes, &header, sizeof(header));
  if (!frame.payload.empty()) {
    std::memcpy(bytes + sizeof(header), frame.payload.data(),
                frame.payload.size());
  }
  header.tag = TagOf(bytes, length, key);
  std::memcpy(bytes, &header, sizeof(header));
  return length;
}

std::optional<OfiFrame> DecodeOfiFrame(std::span<const std::byte> bytes,
                                       const JobKey& key, uint64_t target) {
  OfiFrameHeader header;
  if (bytes.size() < sizeof(header) || bytes.size() > kOfiFrameBytesMax) {
    return std::nullopt;
  }
  std::byte copy[kOfiFrameBytesMax];
  std::memcpy(copy, bytes.data(), bytes.size());
  std::memcpy(&header, copy, sizeof(header));
  if (header.magic != kMagic || header.version != kVersion ||
      header.zero != 0 || header.target != target ||
      header.payload_bytes != bytes.size() - sizeof(header)) {
    return std::nullopt;
  }
  constexpr uint64_t kNoTag = 0;
  std::memcpy(copy + offsetof(OfiFrameHeader, tag), &kNoTag, sizeof(kNoTag));
  if (TagOf(copy, bytes.size(), key) != header.tag) return std::nullopt;
  const auto* payload =
      reinterpret_cast<const char*>(bytes.data() + sizeof(header));
  return OfiFrame{header.kind, header.sender, header.target, header.argument,
                  std::string_view(payload, header.payload_bytes)};
}

}  // namespace jaxfabric
