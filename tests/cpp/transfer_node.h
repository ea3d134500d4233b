// TransferNode: a TransferEngine with some memory, for the tests of the engine.

#ifndef JAXFABRIC_TESTS_CPP_TRANSFER_NODE_H_
#define JAXFABRIC_TESTS_CPP_TRANSFER_NODE_H_

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "engine/transfer_engine.h"
#include "transport/fake.h"
#include "transport/shm.h"

namespace jaxfabric {

inline constexpr double kPatienceSeconds = 30;
inline constexpr std::byte kPoison{0xa5};

inline Deadline Patience() { return Deadline::AfterSeconds(kPatienceSeconds); }

struct TransferNode {
  static constexpr uint64_t kBytes = 1 << 20;

  TransferNode(std::unique_ptr<Transport> transport,
               TransferEngineOptions options) {
    auto opened =
        TransferEngine::Open(std::move(options), std::move(transport));
    JF_CHECK(opened.ok());
    engine = *std::move(opened);
    region = *engine->AllocateMemory(kBytes);
    memory = engine->Memory(region);
    std::memset(data(), static_cast<int>(kPoison), kBytes);
    address = *engine->Describe(region);
  }

  std::byte* data() { return memory->data(); }
  // Connects, and returns this node's name for the other.
  uint32_t Connect(const TransferNode& other) {
    const auto future = engine->Connect(other.engine->address());
    if (!future.ok()) {
      ADD_FAILURE() << future.status().message();
      return 0;
    }
    const auto status = (*future)->Wait(Patience());
    EXPECT_TRUE(status && status->ok()) << (status ? status->message() : "");
    return (*future)->peer();
  }

  std::unique_ptr<TransferEngine> engine;
  RegionId region = 0;
  std::shared_ptr<SharedMemory> memory;
  RegionAddress address;
};

// How it ended; fails the test if it does not end.
inline Status EndOf(const TransferEngine::Submitted& submitted) {
  if (!submitted.ok()) return submitted.status();
  const auto status = (*submitted)->Wait(Patience());
  if (!status) {
    ADD_FAILURE() << "hangs: " << (*submitted)->label();
    return Status(StatusCode::kInternal, "hangs");
  }
  return *status;
}

inline testing::AssertionResult IsOk(const Status& status) {
  if (status.ok()) return testing::AssertionSuccess();
  return testing::AssertionFailure() << status.message();
}

inline testing::AssertionResult EndsWell(
    const TransferEngine::Submitted& submitted) {
  return IsOk(EndOf(submitted));
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_TRANSFER_NODE_H_
