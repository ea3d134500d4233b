// EngineAddress: what a TransferEngine publishes so that others can reach it.

#ifndef JAXFABRIC_ENGINE_ENGINE_ADDRESS_H_
#define JAXFABRIC_ENGINE_ENGINE_ADDRESS_H_

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "engine/random_id.h"
#include "transport/transport.h"

namespace jaxfabric {

struct EngineAddress {
  RandomId id;       // of this incarnation: a restarted engine has another
  std::string job;   // engines of one job only talk to each other
  std::string name;  // for error texts
  std::vector<NetAddr> domains;
  // Says which token the publisher has, without saying the token: who has
  // another one notices before a byte is sent.
  std::string seal;

  static constexpr size_t kNameBytesMax = 128;
  // Whether it may be a job or a name: UTF-8 without control characters.
  static bool IsText(std::string_view bytes);

  // "decode@host (1f2e3d4c)"
  std::string Describe() const { return name + " (" + id.Short() + ")"; }

  // Computes the seal.
  std::string Encode(std::string_view token) const;
  // Refuses malformed bytes and other versions with a sentence.
  static StatusOr<EngineAddress> Decode(std::string_view bytes);
  // Whether it was encoded with this token, and is as it was then.
  bool IsSealedWith(std::string_view token) const;

 private:
  std::string Body() const;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_ENGINE_ADDRESS_H_
