// Credits: how many receives a peer keeps posted for us, and we for it.
//
// A write with an immediate, and a message, each take a receive of the target.
// Without one the network would stall: the target answers "receiver not ready",
// and the sender's whole queue waits. So nobody sends what has no receive. The
// target says how far its peer may count, by writing that number into a word of
// the peer's memory: such a write takes no receive itself.
//
// Counts are modulo 2^32; only differences matter, and those are small.

#ifndef JAXFABRIC_TRANSPORT_VERBS_CREDITS_H_
#define JAXFABRIC_TRANSPORT_VERBS_CREDITS_H_

#include <cstdint>

namespace jaxfabric {

// Of what we send.
class SendCredits {
 public:
  SendCredits() = default;
  // `quota`: receives that the peer keeps for us.
  explicit SendCredits(uint32_t quota) : quota_(quota), limit_(quota) {}

  bool available() const { return used_ != limit_; }
  void Use() { ++used_; }
  // What the peer has written. It was given `quota` once: a word that promises
  // more than that beyond what was sent, or less than before, says nothing.
  void Update(uint32_t word) {
    if (word - used_ <= quota_ && word - limit_ <= quota_) limit_ = word;
  }

 private:
  uint32_t quota_ = 0;
  uint32_t used_ = 0;
  uint32_t limit_ = 0;
};

// Of what the peer sends.
class ReceiveCredits {
 public:
  ReceiveCredits() = default;
  explicit ReceiveCredits(uint32_t quota) : quota_(quota), told_(quota) {}

  uint32_t quota() const { return quota_; }
  // A receive was used up, and another put in its place. False if the peer had
  // no right to it.
  bool Consume() {
    if (consumed_ == told_) return false;
    ++consumed_;
    return true;
  }
  // A quarter of the quota at a time, so that few words are written and the
  // sender never waits for the last.
  bool due() const { return consumed_ + quota_ - told_ >= (quota_ + 3) / 4; }
  // What the peer is to be told now.
  uint32_t Tell() { return told_ = consumed_ + quota_; }

 private:
  uint32_t quota_ = 0;
  uint32_t consumed_ = 0;
  uint32_t told_ = 0;
};

inline constexpr uint32_t kVerbsQuotaMax = 64;
inline constexpr uint32_t kVerbsQuotaMin = 4;

// The quota of a further peer, where `reserved` of `capacity` receives are
// promised already: the more peers there are, the less each of them gets. 0 if
// there is no room for it.
constexpr uint32_t ChooseQuota(uint32_t capacity, uint32_t reserved) {
  const uint32_t rest = capacity > reserved ? capacity - reserved : 0;
  if (rest < kVerbsQuotaMin) return 0;
  const uint32_t share = rest / 256;
  if (share < kVerbsQuotaMin) return kVerbsQuotaMin;
  return share > kVerbsQuotaMax ? kVerbsQuotaMax : share;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_VERBS_CREDITS_H_
