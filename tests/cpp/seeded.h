// A generator for property tests. A failure prints its seed, and
// JAXFABRIC_TEST_SEED repeats it.

#ifndef JAXFABRIC_TESTS_CPP_SEEDED_H_
#define JAXFABRIC_TESTS_CPP_SEEDED_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>

namespace jaxfabric {

class Seeded {
 public:
  Seeded()
      : seed_(Choose()),
        random_(seed_),
        trace_(__FILE__, __LINE__,
               "repeat with JAXFABRIC_TEST_SEED=" + std::to_string(seed_)) {}

  uint64_t seed() const { return seed_; }
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }
  std::mt19937_64& random() { return random_; }

 private:
  static uint64_t Choose() {
    if (const char* given = std::getenv("JAXFABRIC_TEST_SEED")) {
      return std::strtoull(given, nullptr, 10);
    }
    return std::random_device()();
  }

  const uint64_t seed_;
  std::mt19937_64 random_;
  testing::ScopedTrace trace_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_SEEDED_H_
