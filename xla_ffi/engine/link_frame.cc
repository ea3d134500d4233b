#include "engine/link_frame.h"

#include <cstring>

#include "engine/immediate.h"

namespace jaxfabric {
namespace {

// offset 0 type u8, 1 link u8, 2 count u16, 4 epoch u32, 8 number u64,
// 16 counts (key u32, units u32) or the message; then the address
struct Header {
  uint8_t type;
  uint8_t link;
  uint16_t count;
  uint32_t epoch;
  uint64_t number;
};
static_assert(sizeof(Header) == LinkFrame::kHeaderBytes);
static_assert(sizeof(LinkCount) == 8);

}  // namespace

std::string LinkFrame::Encode() const {
  const Header header = {static_cast<uint8_t>(type), link,
                         static_cast<uint16_t>(counts.size()), epoch, number};
  const size_t counts_bytes = counts.size() * sizeof(LinkCount);
  std::string bytes(sizeof header + counts_bytes, '\0');
  std::memcpy(bytes.data(), &header, sizeof header);
  if (counts_bytes > 0) {
    std::memcpy(bytes.data() + sizeof header, counts.data(), counts_bytes);
  }
  return bytes + address;
}

std::optional<LinkFrame> LinkFrame::Decode(std::string_view bytes) {
  Header header;
  if (bytes.size() < sizeof header) return std::nullopt;
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.type > static_cast<uint8_t>(Type::kPong)) return std::nullopt;
  LinkFrame frame;
  frame.type = static_cast<Type>(header.type);
  frame.link = header.link;
  frame.epoch = header.epoch;
  frame.number = header.number;
  if (frame.type == Type::kMessage) {
    return header.count == 0 ? std::optional(frame) : std::nullopt;
  }
  const size_t counts_bytes = header.count * sizeof(LinkCount);
  const size_t address_bytes_max =
      frame.type == Type::kRevive || frame.type == Type::kRevived
          ? kAddressBytesMax
          : 0;
  if (header.count > kCountsMax ||
      bytes.size() < sizeof header + counts_bytes ||
      bytes.size() - sizeof header - counts_bytes > address_bytes_max) {
    return std::nullopt;
  }
  frame.counts.resize(header.count);
  if (counts_bytes > 0) {
    std::memcpy(frame.counts.data(), bytes.data() + sizeof header,
                counts_bytes);
  }
  frame.address = bytes.substr(sizeof header + counts_bytes);
  return frame;
}

LinkCount KeyOfImmediate(uint32_t word) {
  const Immediate immediate = Immediate::Decode(word);
  if (immediate.share == kRepairShare) return {immediate.id | kRepairKey, 1};
  return {immediate.id, static_cast<uint32_t>(immediate.Units())};
}

uint32_t RepairImmediate(uint32_t repair) {
  return Immediate{repair, kRepairShare}.Encode();
}

}  // namespace jaxfabric
