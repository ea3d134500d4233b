// LinkFrame: what a DomainGroup puts before every two-sided message, and what
// two groups say to each other about their links.
//
// A link that failed is fenced by both ends. Each end then asks the other what
// it holds of the writes whose fate it does not know (kFence, kFenced), sends
// again what is missing, and much later tries the link anew (kRevive, kRevived,
// kProbe, kProbed). Links are named by their number, equal at both ends, and
// the epoch of a link counts its fences.

#ifndef JAXFABRIC_ENGINE_LINK_FRAME_H_
#define JAXFABRIC_ENGINE_LINK_FRAME_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace jaxfabric {

// Units (or writes) that a link carried for one key; see KeyOfImmediate.
struct LinkCount {
  uint32_t key = 0;
  uint32_t units = 0;
  bool operator==(const LinkCount&) const = default;
};

struct LinkFrame {
  enum class Type : uint8_t {
    kMessage = 0,   // number: counts the messages; the user's bytes follow
    kFence = 1,     // link, epoch; counts: keys of writes of unknown fate
    kFenced = 2,    // link, epoch; counts: what arrived over the link for them;
                    // number: twice the messages that did, + 1 if counts fail
    kRevive = 3,    // link, epoch, address: expect me on this link
    kRevived = 4,   // link, epoch, address: you may come
    kProbe = 5,     // link, epoch; over the link itself
    kProbed = 6,    // link, epoch; over the link itself
    kRepair = 7,    // number; epoch: how many writes it has; counts: what
                    // they stand for together
    kRepaired = 8,  // number: all its writes are here, and are counted
    kPing = 9,      // link, number
    kPong = 10,     // link, number
  };
  Type type = Type::kMessage;
  uint8_t link = 0;
  uint32_t epoch = 0;
  uint64_t number = 0;
  std::vector<LinkCount> counts;
  std::string address;  // of the sender's Domain, as it is now

  static constexpr size_t kHeaderBytes = 16;
  static constexpr size_t kCountsMax = 128;
  static constexpr size_t kAddressBytesMax = 1024;

  std::string Encode() const;
  // None if malformed. The bytes of a kMessage follow its header.
  static std::optional<LinkFrame> Decode(std::string_view bytes);
};

// Immediates with this share count the writes of a repair, not a transfer.
inline constexpr uint32_t kRepairShare = 31;
inline constexpr uint32_t kRepairKey = 1u << 31;

// What a write with this immediate counts for, and how much: an id and its
// units, or a repair and 1.
LinkCount KeyOfImmediate(uint32_t word);
uint32_t RepairImmediate(uint32_t repair);

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_LINK_FRAME_H_
