#include "engine/message_parts.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace jaxfabric {

std::vector<TransferFrame> CutIntoParts(uint64_t number,
                                        std::string_view message,
                                        uint64_t frame_bytes_max) {
  JF_CHECK(frame_bytes_max > TransferFrame::kHeaderBytes);
  const uint64_t room = frame_bytes_max - TransferFrame::kHeaderBytes;
  const uint64_t count =
      std::max<uint64_t>(1, (message.size() + room - 1) / room);
  std::vector<TransferFrame> frames;
  for (uint64_t i = 0; i < count; ++i) {
    frames.push_back({.type = TransferFrame::Type::kPart,
                      .a = number,
                      .b = i << 32 | count,
                      .body = std::string(message.substr(i * room, room))});
  }
  return frames;
}

Status MessageAssembler::Add(TransferFrame part,
                             std::vector<std::string>* complete) {
  const uint32_t index = static_cast<uint32_t>(part.b >> 32);
  const uint32_t count = static_cast<uint32_t>(part.b);
  Status broken(StatusCode::kDataLoss,
                "the peer sent a part of a message that cannot be");
  if (part.a < next_) return OkStatus();  // it came again
  if (index >= count || count > kPartsMax || part.a - next_ >= kAheadMax) {
    return broken;
  }
  Message& message = messages_[part.a];
  if (message.parts.empty()) {
    message.parts.resize(count);
    message.here.resize(count);
    message.missing = count;
    held_bytes_ += count * sizeof(std::string);
  }
  if (message.parts.size() != count) return broken;
  if (message.here[index]) return OkStatus();
  message.bytes += part.body.size();
  held_bytes_ += part.body.size();
  if (message.bytes > kTransferMessageBytesMax || held_bytes_ > kHeldBytesMax) {
    return broken;
  }
  message.parts[index] = std::move(part.body);
  message.here[index] = true;
  --message.missing;
  for (auto first = messages_.begin();
       first != messages_.end() && first->first == next_ &&
       first->second.missing == 0;
       first = messages_.erase(first), ++next_) {
    std::string whole;
    whole.reserve(first->second.bytes);
    for (const std::string& piece : first->second.parts) whole += piece;
    held_bytes_ -=
        whole.size() + first->second.parts.size() * sizeof(std::string);
    complete->push_back(std::move(whole));
  }
  return OkStatus();
}

}  // namespace jaxfabric
