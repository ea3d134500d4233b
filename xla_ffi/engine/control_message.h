// ControlMessage: the short two-sided messages between endpoints.

#ifndef JAXFABRIC_ENGINE_CONTROL_MESSAGE_H_
#define JAXFABRIC_ENGINE_CONTROL_MESSAGE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"

namespace jaxfabric {

struct ControlMessage {
  enum class Type : uint16_t {
    kCredits = 1,      // argument: mask of mailbox slots given back
    kWantCredits = 2,  // the sender of this waits for credits
    kAbort = 3,        // text: why the generation is over
    kGoodbye = 4,      // the sender closes its Fabric: no message follows
  };
  Type type = Type::kCredits;
  uint32_t generation = 0;
  uint64_t argument = 0;
  std::string text;

  // Texts are cut here, so that any transport's messages can hold them.
  static constexpr size_t kTextBytesMax = 1024;

  std::string Encode() const;
  static StatusOr<ControlMessage> Decode(std::string_view bytes);
};

// The argument of kAbort: a status code, and one more than the lost rank.
constexpr uint64_t AbortArgument(StatusCode code,
                                 std::optional<uint32_t> lost_rank) {
  const uint64_t rank = lost_rank ? uint64_t{*lost_rank} + 1 : 0;
  return static_cast<uint64_t>(code) << 32 | rank;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_CONTROL_MESSAGE_H_
