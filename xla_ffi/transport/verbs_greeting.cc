#include "transport/verbs_greeting.h"

#include <cstring>

#include "transport/verbs_credits.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kMagic = 0x4756'584a;  // "JXVG"
constexpr uint16_t kVersion = 1;
constexpr uint32_t kTwentyFourBits = (1u << 24) - 1;
constexpr uint32_t kMtuMin = 1;  // IBV_MTU_256
constexpr uint32_t kMtuMax = 5;  // IBV_MTU_4096

uint64_t TagOf(VerbsGreeting greeting, const JobKey& key) {
  greeting.tag = 0;
  return key.Tag({reinterpret_cast<const char*>(&greeting), sizeof(greeting)});
}

bool IsSane(const VerbsGreeting& greeting) {
  switch (greeting.kind) {
    case VerbsGreetingKind::kHello:
    case VerbsGreetingKind::kWelcome:
      return greeting.attempt > 0 && greeting.added <= greeting.attempt &&
             greeting.queue_pair > 1 &&
             greeting.queue_pair <= kTwentyFourBits &&
             greeting.sequence <= kTwentyFourBits &&
             greeting.quota >= kVerbsQuotaMin &&
             greeting.quota <= kVerbsQuotaMax && greeting.mtu >= kMtuMin &&
             greeting.mtu <= kMtuMax &&
             (greeting.word_address & (sizeof(uint32_t) - 1)) == 0;
    case VerbsGreetingKind::kRefuse:
    case VerbsGreetingKind::kRemoved:
    case VerbsGreetingKind::kBye:
      return true;
  }
  return false;
}

}  // namespace

void SealGreeting(VerbsGreeting* greeting, const JobKey& key) {
  greeting->magic = kMagic;
  greeting->version = kVersion;
  greeting->zero = 0;
  greeting->tag = TagOf(*greeting, key);
}

std::optional<VerbsGreeting> OpenGreeting(std::span<const std::byte> bytes,
                                          const JobKey& key, uint64_t target,
                                          VerbsLinkLayer link_layer) {
  VerbsGreeting greeting;
  if (bytes.size() != sizeof(greeting)) return std::nullopt;
  std::memcpy(&greeting, bytes.data(), sizeof(greeting));
  if (greeting.magic != kMagic || greeting.version != kVersion ||
      greeting.zero != 0 || greeting.target != target ||
      greeting.tag != TagOf(greeting, key) || !IsSane(greeting) ||
      !ParseVerbsAddress(ToNetAddr(greeting.sender), link_layer, key.JobId())
           .ok()) {
    return std::nullopt;
  }
  return greeting;
}

}  // namespace jaxfabric
