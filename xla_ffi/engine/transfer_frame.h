// TransferFrame: the two-sided messages between TransferEngines.

#ifndef JAXFABRIC_ENGINE_TRANSFER_FRAME_H_
#define JAXFABRIC_ENGINE_TRANSFER_FRAME_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace jaxfabric {

// On the wire: magic u32, version u16, type u16, then
//   a   u64  kPart: number of the message    kBarrier: id of the barrier
//            kGoodbye: messages sent            kSpoilt, kUses: id
//            kWithdraw, kWithdrawn: number of the withdrawal
//   b   u64  kPart: index << 32 | parts      kBarrier: how often it has come
//            kGoodbye: transfers counted        kWithdraw: the region
//   body     the rest: a Hello, a Welcome, a part
//
// Any of them may come more than once, when a link has failed.
struct TransferFrame {
  enum class Type : uint16_t {
    kHello = 1,  // see handshake.h
    kWelcome = 2,
    kPart = 3,     // of a message of submit_send
    kBarrier = 4,  // the sender has come to a barrier
    kPing = 5,     // asks for kPong: is anybody there?
    kPong = 6,
    kGoodbye = 7,  // the sender takes leave: nothing follows
    kSpoilt = 8,   // see transfer_engine_spoilt.cc
    kUses = 9,
    kWithdraw = 10,  // see transfer_engine_withdraw.cc
    kWithdrawn = 11,
  };
  Type type = Type::kPing;
  uint64_t a = 0;
  uint64_t b = 0;
  std::string body;

  static constexpr uint16_t kVersion = 1;
  static constexpr size_t kHeaderBytes = 24;

  std::string Encode() const;
  // kFailedPrecondition: another version. kInvalidArgument: not a frame.
  static StatusOr<TransferFrame> Decode(std::string_view bytes);
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_FRAME_H_
