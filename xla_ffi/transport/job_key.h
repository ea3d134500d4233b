// JobKey: shows that whoever wrote some bytes knows the job's secret.
//
// SipHash-2-4 (Aumasson and Bernstein), a keyed hash for short messages: who
// does not know the key can neither compute a tag nor learn the key from tags.

#ifndef JAXFABRIC_TRANSPORT_JOB_KEY_H_
#define JAXFABRIC_TRANSPORT_JOB_KEY_H_

#include <cstdint>
#include <string_view>

namespace jaxfabric {

class JobKey {
 public:
  explicit JobKey(std::string_view secret);

  uint64_t Tag(std::string_view bytes) const;
  // Names the job without giving its secret away.
  uint64_t JobId() const;

 private:
  uint64_t low_ = 0;
  uint64_t high_ = 0;
};

// The function itself, with a key of two words.
uint64_t SipHash24(uint64_t key_low, uint64_t key_high, std::string_view bytes);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_JOB_KEY_H_
