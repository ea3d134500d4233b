// MessageParts: messages of any size over a channel that carries small ones, in
// any order.

#ifndef JAXFABRIC_ENGINE_MESSAGE_PARTS_H_
#define JAXFABRIC_ENGINE_MESSAGE_PARTS_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "engine/transfer_frame.h"

namespace jaxfabric {

// More belongs into a write.
inline constexpr uint64_t kTransferMessageBytesMax = uint64_t{1} << 20;

// Cuts message `number` into frames of at most `frame_bytes_max`, header
// included.
std::vector<TransferFrame> CutIntoParts(uint64_t number,
                                        std::string_view message,
                                        uint64_t frame_bytes_max);

// Puts the parts of one peer's messages together, and the messages in order.
// What comes again is dropped.
class MessageAssembler {
 public:
  // How far ahead of the next message others may be. A NIC has fewer posts than
  // this under way, so only a peer that breaks the protocol goes beyond.
  static constexpr uint64_t kAheadMax = 1u << 16;
  static constexpr uint32_t kPartsMax = 1u << 12;
  static constexpr uint64_t kHeldBytesMax = uint64_t{256} << 20;

  // Appends to `complete` each message whose turn has come. An error means that
  // the peer does not keep to the protocol.
  Status Add(TransferFrame part, std::vector<std::string>* complete);
  // How many messages are complete.
  uint64_t next() const { return next_; }

 private:
  struct Message {
    std::vector<std::string> parts;
    std::vector<bool> here;
    uint32_t missing = 0;
    uint64_t bytes = 0;
  };

  uint64_t next_ = 0;
  uint64_t held_bytes_ = 0;
  std::map<uint64_t, Message> messages_;  // by number
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_MESSAGE_PARTS_H_
