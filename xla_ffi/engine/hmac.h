// HMAC-SHA256 (RFC 2104 over FIPS 180-4): how engines show that they know their
// job's token without saying it.
//
// Written here because it is the only cryptography that the project needs: a
// hundred lines that the standards' test vectors pin down, against a library to
// build, ship and update on every machine.

#ifndef JAXFABRIC_ENGINE_HMAC_H_
#define JAXFABRIC_ENGINE_HMAC_H_

#include <array>
#include <cstdint>
#include <string_view>

namespace jaxfabric {

using Sha256Digest = std::array<uint8_t, 32>;

Sha256Digest Sha256(std::string_view message);
Sha256Digest HmacSha256(std::string_view key, std::string_view message);

// In a time that does not depend on where they differ.
bool ConstantTimeEqual(std::string_view a, std::string_view b);

inline std::string_view AsBytes(const Sha256Digest& digest) {
  return {reinterpret_cast<const char*>(digest.data()), digest.size()};
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_HMAC_H_
