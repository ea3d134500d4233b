#include "transport/job_key.h"

#include <bit>
#include <cstring>

namespace jaxfabric {
namespace {

struct State {
  uint64_t v0, v1, v2, v3;

  void Round() {
    v0 += v1;
    v1 = std::rotl(v1, 13) ^ v0;
    v0 = std::rotl(v0, 32);
    v2 += v3;
    v3 = std::rotl(v3, 16) ^ v2;
    v0 += v3;
    v3 = std::rotl(v3, 21) ^ v0;
    v2 += v1;
    v1 = std::rotl(v1, 17) ^ v2;
    v2 = std::rotl(v2, 32);
  }

  void Absorb(uint64_t word) {
    v3 ^= word;
    Round();
    Round();
    v0 ^= word;
  }
};

}  // namespace

uint64_t SipHash24(uint64_t key_low, uint64_t key_high,
                   std::string_view bytes) {
  State state = {
      key_low ^ 0x736f'6d65'7073'6575, key_high ^ 0x646f'7261'6e64'6f6d,
      key_low ^ 0x6c79'6765'6e65'7261, key_high ^ 0x7465'6462'7974'6573};
  const uint64_t length_byte = static_cast<uint64_t>(bytes.size()) << 56;
  while (bytes.size() >= sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data(), sizeof(word));
    state.Absorb(word);
    bytes.remove_prefix(sizeof(word));
  }
  uint64_t last = 0;
  std::memcpy(&last, bytes.data(), bytes.size());
  state.Absorb(last | length_byte);
  state.v2 ^= 0xff;
  for (int i = 0; i < 4; ++i) state.Round();
  return state.v0 ^ state.v1 ^ state.v2 ^ state.v3;
}

// Secrets have any length; the key is two hashes of it under fixed keys.
JobKey::JobKey(std::string_view secret)
    : low_(SipHash24(0x6a66'2d6a'6f62, 1, secret)),
      high_(SipHash24(0x6a66'2d6a'6f62, 2, secret)) {}

uint64_t JobKey::Tag(std::string_view bytes) const {
  return SipHash24(low_, high_, bytes);
}

uint64_t JobKey::JobId() const { return Tag("jaxfabric job"); }

}  // namespace jaxfabric
