#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "base/check.h"
#include "tests/cpp/transport_conformance.h"

namespace jaxfabric {
namespace {

uint64_t ChooseSeed() {
  if (const char* given = std::getenv("JAXFABRIC_TEST_SEED")) {
    return std::strtoull(given, nullptr, 10);
  }
  return std::random_device()();
}

}  // namespace

ConformanceRank::ConformanceRank(Transport& transport, uint64_t bytes) {
  StatusOr<SharedMemory> memory = SharedMemory::Create("test-heap", bytes);
  JF_CHECK(memory.ok());
  memory_ = *std::move(memory);
  StatusOr<std::unique_ptr<Domain>> domain = transport.OpenDomain();
  JF_CHECK(domain.ok());
  domain_ = *std::move(domain);
  const StatusOr<uint64_t> key = domain_->RegisterMemory(Region());
  JF_CHECK(key.ok());
  key_ = *key;
}

PeerId ConformanceRank::Add(ConformanceRank& other) {
  const StatusOr<PeerId> peer = domain_->AddPeer(
      other.domain().address(), Deadline::AfterSeconds(kPatienceSeconds));
  EXPECT_TRUE(peer.ok()) << peer.status().message();
  return peer.ok() ? *peer : kUnknownPeer;
}

void ConformanceRank::Poll() {
  std::array<Completion, 7> completions;
  const size_t count = domain_->Poll(completions);
  ASSERT_LE(count, completions.size());
  for (size_t i = 0; i < count; ++i) {
    const Completion& completion = completions[i];
    switch (completion.kind) {
      case Completion::Kind::kWriteDone:
      case Completion::Kind::kSendDone:
        done.push_back(completion.cookie);
        break;
      case Completion::Kind::kImmediate:
        immediates.push_back(completion);
        break;
      case Completion::Kind::kMessage:
        messages.push_back(completion);
        break;
      case Completion::Kind::kError:
        errors.push_back(completion);
        break;
      case Completion::Kind::kPeerLost:
        losses.push_back(completion);
        break;
    }
    if (on_completion) on_completion(completion);
  }
}

std::string ConformanceRank::Describe() const {
  std::ostringstream text;
  text << (open() ? "open" : "closed") << ", done " << done.size()
       << ", immediates " << immediates.size() << ", messages "
       << messages.size() << ", losses " << losses.size() << ", errors "
       << errors.size();
  for (const Completion& error : errors) {
    text << "\n    cookie " << error.cookie << ": " << error.status.message();
  }
  for (const Completion& loss : losses) {
    text << "\n    lost peer " << loss.peer << ": " << loss.status.message();
  }
  return text.str();
}

TransportConformance::TransportConformance()
    : seed_(ChooseSeed()),
      random_(seed_),
      trace_(__FILE__, __LINE__,
             "repeat with JAXFABRIC_TEST_SEED=" + std::to_string(seed_)) {}

TransportConformance::~TransportConformance() = default;

Transport& TransportConformance::OpenTransport() {
  transports_.push_back(GetParam().open("common secret"));
  JF_CHECK(transports_.back() != nullptr);
  return *transports_.back();
}

ConformanceRank& TransportConformance::OpenRank(uint64_t bytes) {
  return OpenRank(OpenTransport(), bytes);
}

ConformanceRank& TransportConformance::OpenRank(Transport& transport,
                                                uint64_t bytes) {
  ranks_.push_back(std::make_unique<ConformanceRank>(transport, bytes));
  return *ranks_.back();
}

bool TransportConformance::DriveUntil(const std::function<bool()>& met) {
  const Deadline deadline =
      Deadline::AfterSeconds(ConformanceRank::kPatienceSeconds);
  while (!met()) {
    if (deadline.Expired()) {
      std::ostringstream text;
      for (size_t i = 0; i < ranks_.size(); ++i) {
        text << "\n  rank " << i << ": " << ranks_[i]->Describe();
      }
      ADD_FAILURE() << "nothing more came within "
                    << ConformanceRank::kPatienceSeconds << " s:" << text.str();
      return false;
    }
    for (const auto& rank : ranks_) {
      if (rank->open()) rank->Poll();
    }
  }
  return true;
}

void TransportConformance::Settle() {
  constexpr int kIdleRounds = 200;
  size_t seen = 0;
  for (int idle = 0; idle < kIdleRounds; ++idle) {
    size_t total = 0;
    for (const auto& rank : ranks_) {
      if (rank->open()) rank->Poll();
      total += rank->done.size() + rank->immediates.size() +
               rank->messages.size() + rank->errors.size() +
               rank->losses.size();
    }
    if (total != seen) idle = 0;
    seen = total;
  }
}

testing::AssertionResult TransportConformance::Write(
    ConformanceRank& from, PeerId peer, LocalSpan local, RemoteSpan remote,
    uint64_t length, std::optional<uint32_t> immediate, uint64_t cookie) {
  StatusOr<Posted> posted = Posted::kAgain;
  const bool accepted = DriveUntil([&] {
    posted = from.domain().PostWriteImm(peer, local, remote, length, immediate,
                                        cookie);
    return !posted.ok() || *posted == Posted::kPosted;
  });
  if (!accepted) return testing::AssertionFailure() << "kAgain for ever";
  if (posted.ok()) return testing::AssertionSuccess();
  return testing::AssertionFailure() << posted.status().message();
}

testing::AssertionResult TransportConformance::Send(ConformanceRank& from,
                                                    PeerId peer,
                                                    const std::string& message,
                                                    uint64_t cookie) {
  StatusOr<Posted> posted = Posted::kAgain;
  const bool accepted = DriveUntil([&] {
    posted = from.domain().PostSend(peer, message, cookie);
    return !posted.ok() || *posted == Posted::kPosted;
  });
  if (!accepted) return testing::AssertionFailure() << "kAgain for ever";
  if (posted.ok()) return testing::AssertionSuccess();
  return testing::AssertionFailure() << posted.status().message();
}

Status TransportConformance::ExpectRefused(ConformanceRank& from, PeerId peer,
                                           LocalSpan local, RemoteSpan remote,
                                           uint64_t length) {
  constexpr uint64_t kCookie = 0xbad;
  constexpr uint32_t kImmediate = 0xbadbad;
  const size_t errors = from.errors.size();
  const size_t losses = from.losses.size();
  StatusOr<Posted> posted = Posted::kAgain;
  DriveUntil([&] {
    posted = from.domain().PostWriteImm(peer, local, remote, length, kImmediate,
                                        kCookie);
    return !posted.ok() || *posted == Posted::kPosted;
  });
  Status failure = posted.status();
  if (posted.ok()) {
    DriveUntil([&] { return from.errors.size() > errors; });
    if (from.errors.size() == errors) return OkStatus();
    EXPECT_EQ(from.errors.back().cookie, kCookie);
    failure = from.errors.back().status;
  }
  Settle();
  EXPECT_FALSE(failure.message().empty());
  EXPECT_EQ(std::count(from.done.begin(), from.done.end(), kCookie), 0);
  EXPECT_LE(from.errors.size(), errors + 1);
  EXPECT_EQ(from.losses.size(), losses) << "a bad write costs no peer";
  for (const auto& rank : ranks_) {
    for (const Completion& arrived : rank->immediates) {
      EXPECT_NE(arrived.immediate, kImmediate);
    }
  }
  return failure;
}

void TransportConformance::FillRandom(std::byte* data, uint64_t bytes) {
  uint64_t at = 0;
  for (; at + sizeof(uint64_t) <= bytes; at += sizeof(uint64_t)) {
    const uint64_t word = random_();
    std::memcpy(data + at, &word, sizeof(word));
  }
  const uint64_t word = random_();
  std::memcpy(data + at, &word, bytes - at);
}

std::string TransportConformance::RandomText(uint64_t bytes) {
  std::string text(bytes, '\0');
  FillRandom(reinterpret_cast<std::byte*>(text.data()), bytes);
  return text;
}

}  // namespace jaxfabric
