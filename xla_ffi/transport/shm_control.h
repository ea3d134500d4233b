// Control messages of the shm transport, and the sockets they travel on.
//
// Only set-up, region look-ups and farewells go this way; no payload, and no
// notice of it. Abstract SOCK_SEQPACKET sockets: messages keep their bounds, no
// file is left behind, and the kernel vouches for the user at the other end.

#ifndef JAXFABRIC_TRANSPORT_SHM_CONTROL_H_
#define JAXFABRIC_TRANSPORT_SHM_CONTROL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/deadline.h"
#include "base/status.h"
#include "base/unique_fd.h"
#include "transport/shm_address.h"

namespace jaxfabric {

// From the initiator (who connected):
//   kAttach     sender's Domain wants to reach `target`; `text` is the job
//               secret. Reply: descriptors of the ring and of the doorbell.
//   kDetach     sender's Domain needs `target` no more. No reply.
//   kMapRegion  for `key` of `target`. Reply: its descriptor and `length`.
// From the target (who accepted):
//   kReply         to the request with this `serial`; `code` is a StatusCode
//                  and `text` its message.
//   kDomainClosed  `target` was closed on purpose.
//   kRegionGone    `key` was unregistered.
enum class ShmControlKind : uint32_t {
  kAttach = 1,
  kDetach = 2,
  kMapRegion = 3,
  kReply = 4,
  kDomainClosed = 5,
  kRegionGone = 6,
};

inline constexpr size_t kShmTextBytes = 256;

// One shape for all kinds; what a kind does not use is zero.
//   offset   0  magic       u64  kShmMagic
//   offset   8  version     u32  kShmVersion
//   offset  12  kind        u32  ShmControlKind
//   offset  16  serial      u64  chosen by the requester
//   offset  24  key         u64
//   offset  32  length      u64
//   offset  40  target      ShmAddress
//   offset  88  sender      ShmAddress
//   offset 136  code        u32
//   offset 140  text_bytes  u32
//   offset 144  text        char[256]
struct ShmControlMessage {
  uint64_t magic = kShmMagic;
  uint32_t version = kShmVersion;
  ShmControlKind kind = ShmControlKind::kReply;
  uint64_t serial = 0;
  uint64_t key = 0;
  uint64_t length = 0;
  ShmAddress target;
  ShmAddress sender;
  uint32_t code = 0;
  uint32_t text_bytes = 0;
  char text[kShmTextBytes] = {};

  // Cuts what does not fit.
  void SetText(std::string_view value);
  std::string_view Text() const;
};
static_assert(sizeof(ShmControlMessage) == 400);
static_assert(offsetof(ShmControlMessage, text) == 144);

struct ShmReceived {
  enum class Kind {
    kMessage,
    kNothing,   // no message is waiting
    kEnded,     // the other end is closed
    kNonsense,  // it is not one of ours
  };
  Kind kind = Kind::kNothing;
  ShmControlMessage message;
  std::array<UniqueFd, 2> fds;
};

StatusOr<UniqueFd> ShmListen(const std::array<uint64_t, 2>& process);

// Fails at once when nobody listens. The other end belongs to this user.
StatusOr<UniqueFd> ShmConnect(const std::array<uint64_t, 2>& process,
                              Deadline deadline);

// Whether the process at the other end runs as this process's user.
bool ShmPeerIsSameUser(int socket);

Status ShmSend(int socket, const ShmControlMessage& message,
               std::span<const int> fds, Deadline deadline);

// Does not wait.
ShmReceived ShmReceive(int socket);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_SHM_CONTROL_H_
