// What goes wrong on purpose: seeded disorder, and NICs that fail while the
// program runs.
//
// The file `faults` in SOFTEFA_DIR says which NICs are unwell, one line each:
// "HOST NIC STATE", where HOST is a number or *. A test replaces it atomically
// (rename) at any time; it takes effect within a few milliseconds. A state
// holds for traffic from the NIC, and the first three for traffic to it too:
//
//   up         as usual
//   stalled    nothing moves and nothing completes, until the state changes
//   down       everything fails with "unresponsive remote"
//   unacked    writes are delivered, data and immediate, but fail at the sender
//   late       writes fail at the sender and are delivered SOFTEFA_LATE_MS
//   later dying      each write is lost, unacked or well, by the toss of a
//   seeded die rate=G     as usual, at G Gbit/s
//
// `unacked`, `late` and `dying` are what a sender sees of a link that is killed
// between delivery and local completion.

#ifndef JAXFABRIC_TESTS_SOFTEFA_FAULTS_H_
#define JAXFABRIC_TESTS_SOFTEFA_FAULTS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/softefa/wire.h"

namespace jaxfabric::softefa {

enum class NicState { kUp, kStalled, kDown, kUnacked, kLate, kDying };

struct NicHealth {
  NicState state = NicState::kUp;
  std::optional<double> gigabits_per_second;
};

// The `faults` file as it is now, read at most once a millisecond.
class Faults {
 public:
  NicHealth Of(const Gid& gid, int64_t now_ns);

 private:
  struct Line {
    std::optional<uint32_t> host;
    int nic;
    NicHealth health;
  };
  void Refresh();

  std::vector<Line> lines_;
  int64_t refresh_ns_ = 0;
  uint64_t version_ = 0;  // of the file that `lines_` came from
};

// Disorder that depends on the seed alone, as far as processes run alike.
class Chaos {
 public:
  Chaos(uint64_t seed, uint32_t host) : on_(seed != 0), random_(seed ^ host) {}

  bool on() const { return on_; }
  size_t Below(size_t limit) { return random_() % limit; }
  std::mt19937_64& random() { return random_; }

 private:
  bool on_;
  std::mt19937_64 random_;
};

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_FAULTS_H_
