// RandomId: 128 bits from the kernel's generator, which name one incarnation of
// an engine, or one handshake. No two are ever equal.

#ifndef JAXFABRIC_ENGINE_RANDOM_ID_H_
#define JAXFABRIC_ENGINE_RANDOM_ID_H_

#include <sys/random.h>

#include <array>
#include <compare>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>

#include "base/check.h"

namespace jaxfabric {

struct RandomId {
  std::array<uint64_t, 2> words = {};

  static RandomId Make() {
    RandomId id;
    // Up to 256 bytes come whole and are never interrupted.
    JF_CHECK(getrandom(id.words.data(), sizeof id.words, 0) == sizeof id.words);
    return id;
  }

  auto operator<=>(const RandomId&) const = default;
  // Eight digits: enough to tell engines apart in a log.
  std::string Short() const {
    char text[9];
    std::snprintf(text, sizeof text, "%08x", static_cast<uint32_t>(words[0]));
    return text;
  }
};

}  // namespace jaxfabric

template <>
struct std::hash<jaxfabric::RandomId> {
  size_t operator()(const jaxfabric::RandomId& id) const noexcept {
    return static_cast<size_t>(id.words[0]);  // random bits already
  }
};

#endif  // JAXFABRIC_ENGINE_RANDOM_ID_H_
