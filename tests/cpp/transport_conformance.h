// The contract of transport/transport.h as tests. A transport is done when it
// passes them:
//
//   INSTANTIATE_TEST_SUITE_P(Shm, TransportConformance,
//                            testing::Values(ShmFactory()),
//                            TransportFactoryName);
//
// Payloads are random; a failure prints the seed, and JAXFABRIC_TEST_SEED
// repeats it. Nothing sleeps: all ranks are polled until what is expected has
// come, or a deadline prints their state.

#ifndef JAXFABRIC_TESTS_CPP_TRANSPORT_CONFORMANCE_H_
#define JAXFABRIC_TESTS_CPP_TRANSPORT_CONFORMANCE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "base/shared_memory.h"
#include "transport/transport.h"

namespace jaxfabric {

struct TransportFactory {
  std::string name;  // letters and digits
  // Opens a Transport; those with the same job secret can talk.
  std::function<std::unique_ptr<Transport>(const std::string& job_secret)> open;
  // Ends a Domain as if its process were killed. Null: it can only be closed.
  std::function<void(const Domain&)> kill;
  // A well-formed address that no process of this host ever published, as from
  // another network or host. Null: the transport has no such thing.
  std::function<NetAddr(const NetAddr&)> make_foreign;
  // An address whose Domain has ended is not refused but lost soon after.
  bool finds_stale_later = false;
};

// Naming a test by it also makes the linker take the tests from their archive.
std::string TransportFactoryName(
    const testing::TestParamInfo<TransportFactory>& info);

// For TransportFactoryName, which thereby brings in the tests of faults.
void LinkConformanceFaults();

// One Domain with memory of its own, and all that its polls brought.
class ConformanceRank {
 public:
  static constexpr double kPatienceSeconds = 30;

  ConformanceRank(Transport& transport, uint64_t bytes);

  // Called before any rank's Domain is used other than by Poll. For ranks whose
  // memory is on another host and only looks as if it were here.
  static inline std::function<void()> before_use;

  Domain& domain() {
    if (before_use) before_use();
    return *domain_;
  }
  // Closes the Domain; only what was polled before remains.
  void Close() { domain_.reset(); }
  bool open() const { return domain_ != nullptr; }

  uint64_t key() const { return key_; }
  std::byte* data() { return memory_.data(); }
  uint64_t size() const { return memory_.size(); }
  MemoryRegion Region() const {
    return {memory_.data(), memory_.size(), memory_.fd()};
  }
  LocalSpan Source(uint64_t offset) const {
    return {memory_.data() + offset, key_};
  }
  // As a peer's target.
  RemoteSpan Target(uint64_t offset) const {
    return {key_, reinterpret_cast<uint64_t>(memory_.data()), offset};
  }

  PeerId Add(ConformanceRank& other);

  // Called for each completion as it comes, after it was recorded.
  std::function<void(const Completion&)> on_completion;

  void Poll();
  std::string Describe() const;

  std::vector<uint64_t> done;  // cookies of kWriteDone and kSendDone
  std::vector<Completion> errors;
  std::vector<Completion> immediates;
  std::vector<Completion> messages;
  std::vector<Completion> losses;

 private:
  SharedMemory memory_;
  std::unique_ptr<Domain> domain_;
  uint64_t key_ = 0;
};

class TransportConformance : public testing::TestWithParam<TransportFactory> {
 protected:
  TransportConformance();
  ~TransportConformance() override;

  // A Transport of the common job.
  Transport& OpenTransport();
  // A rank with a Transport of its own.
  ConformanceRank& OpenRank(uint64_t bytes);
  ConformanceRank& OpenRank(Transport& transport, uint64_t bytes);

  // Polls all open ranks until `met` holds; fails with their state if that
  // takes too long. Returns whether it holds.
  bool DriveUntil(const std::function<bool()>& met);
  // Polls until a further round brings nothing, for what must not come. A
  // transport may be slow, so this can miss a fault, never invent one.
  void Settle();

  // Posts, polling all ranks as long as the answer is kAgain.
  testing::AssertionResult Write(ConformanceRank& from, PeerId peer,
                                 LocalSpan local, RemoteSpan remote,
                                 uint64_t length,
                                 std::optional<uint32_t> immediate,
                                 uint64_t cookie);
  testing::AssertionResult Send(ConformanceRank& from, PeerId peer,
                                const std::string& message, uint64_t cookie);

  // The write must fail: at once, or by kError with its cookie. It must bring
  // neither kWriteDone nor an immediate. Returns the failure.
  Status ExpectRefused(ConformanceRank& from, PeerId peer, LocalSpan local,
                       RemoteSpan remote, uint64_t length);

  void FillRandom(std::byte* data, uint64_t bytes);
  std::string RandomText(uint64_t bytes);
  uint64_t Random(uint64_t below) { return random_() % below; }

  const uint64_t seed_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Transport>> transports_;
  std::vector<std::unique_ptr<ConformanceRank>> ranks_;  // go first

 private:
  testing::ScopedTrace trace_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_TRANSPORT_CONFORMANCE_H_
