// Handshake: how two TransferEngines that were started apart come to trust each
// other.
//
//   initiator  adds the target's Domains from its address; sends Hello
//   target     verifies the Hello, and only then acts on it: adds the
//              initiator's Domains and answers Welcome
//   initiator  verifies the Welcome: connected
//
// Both are sealed with HMAC-SHA256 under the job's token. The initiator repeats
// its Hello, under the same nonce, until its deadline; so either message may be
// lost. The Hello names the one incarnation that it is for, and a target
// remembers nonces, so that neither can be replayed.

#ifndef JAXFABRIC_ENGINE_HANDSHAKE_H_
#define JAXFABRIC_ENGINE_HANDSHAKE_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <variant>

#include "base/status.h"
#include "engine/engine_address.h"
#include "engine/random_id.h"
#include "engine/recent_map.h"

namespace jaxfabric {

struct Hello {
  RandomId target;  // the engine that it is for
  RandomId nonce;
  EngineAddress sender;

  std::string Encode(std::string_view token) const;
  // kUnauthenticated: sealed with another token, or altered on the way.
  // kPermissionDenied: for another engine, or from another job.
  static StatusOr<Hello> Verify(std::string_view bytes, std::string_view token,
                                const EngineAddress& receiver);
};

struct Welcome {
  RandomId target;  // the initiator
  RandomId sender;
  RandomId echo;   // the Hello's nonce
  RandomId nonce;  // of the sender's own Hello, should it have sent one

  std::string Encode(std::string_view token) const;
  static StatusOr<Welcome> Verify(std::string_view bytes,
                                  std::string_view token);
};

// Nonces of accepted Hellos that are remembered. So many handshakes later, one
// could be replayed again: into an engine of the same incarnation, and with no
// effect but a peer that is never heard.
inline constexpr size_t kNoncesMax = 1u << 16;
using NonceMemory = RecentMap<RandomId, std::monostate>;

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_HANDSHAKE_H_
