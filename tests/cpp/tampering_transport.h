// TamperingTransport: another transport, whose messages a test may see, alter
// and lose.

#ifndef JAXFABRIC_TESTS_CPP_TAMPERING_TRANSPORT_H_
#define JAXFABRIC_TESTS_CPP_TAMPERING_TRANSPORT_H_

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "transport/transport.h"

namespace jaxfabric {

// False loses the message; its sender believes that it was sent.
using Tamper = std::function<bool(std::string& message)>;
// What AddPeer says instead of trying, where it is an error.
using RefuseAdd = std::function<Status()>;

// Software that does peers' writes, and goes on when they are gone.
struct Emulation {
  bool fences = false;             // they can be cut off
  std::atomic<int> asked{0};       // how often that was asked for
  std::atomic<bool> fenced{true};  // and whether it is done
};

class TamperingDomain final : public Domain {
 public:
  TamperingDomain(std::unique_ptr<Domain> real, const Tamper* tamper,
                  const RefuseAdd* refuse_add, Emulation* emulation,
                  Doorbell* doorbell)
      : real_(std::move(real)),
        tamper_(tamper),
        refuse_add_(refuse_add),
        emulation_(emulation),
        doorbell_(doorbell),
        caps_(real_->caps()) {
    caps_.writes_outlive_regions = emulation != nullptr;
    caps_.removal_fences |= emulation != nullptr && emulation->fences;
  }

  const DomainCaps& caps() const override { return caps_; }
  const NetAddr& address() const override { return real_->address(); }
  StatusOr<uint64_t> RegisterMemory(const MemoryRegion& region) override {
    return real_->RegisterMemory(region);
  }
  Status UnregisterMemory(uint64_t key) override {
    return real_->UnregisterMemory(key);
  }
  StatusOr<PeerId> AddPeer(const NetAddr& address, Deadline deadline) override {
    if (*refuse_add_) JF_RETURN_IF_ERROR((*refuse_add_)());
    return real_->AddPeer(address, deadline);
  }
  void RemovePeer(PeerId peer) override { real_->RemovePeer(peer); }
  void FenceRemoved() override {
    emulation_->asked.fetch_add(1, std::memory_order_relaxed);
  }
  bool RemovedAreFenced() const override {
    return emulation_->fenced.load(std::memory_order_relaxed);
  }
  StatusOr<Posted> PostWriteImm(PeerId peer, LocalSpan local, RemoteSpan remote,
                                uint64_t length,
                                std::optional<uint32_t> immediate,
                                uint64_t cookie) override {
    return real_->PostWriteImm(peer, local, remote, length, immediate, cookie);
  }
  StatusOr<Posted> PostSend(PeerId peer, std::string_view message,
                            uint64_t cookie) override {
    std::string altered(message);
    if ((*tamper_)(altered)) return real_->PostSend(peer, altered, cookie);
    lost_.push_back(cookie);
    doorbell_->Ring();
    return Posted::kPosted;
  }
  size_t Poll(std::span<Completion> completions) override {
    size_t count = 0;
    for (; count < completions.size() && !lost_.empty(); ++count) {
      completions[count].kind = Completion::Kind::kSendDone;
      completions[count].cookie = lost_.front();
      completions[count].status = OkStatus();
      lost_.pop_front();
    }
    return count + real_->Poll(completions.subspan(count));
  }
  Status MapMemory(PeerId peer, uint64_t key, Deadline deadline) override {
    return real_->MapMemory(peer, key, deadline);
  }
  std::byte* DirectPointer(PeerId peer, RemoteSpan remote,
                           uint64_t length) override {
    return real_->DirectPointer(peer, remote, length);
  }

 private:
  const std::unique_ptr<Domain> real_;
  const Tamper* const tamper_;
  const RefuseAdd* const refuse_add_;
  Emulation* const emulation_;
  Doorbell* const doorbell_;
  DomainCaps caps_;
  std::deque<uint64_t> lost_;
};

class TamperingTransport final : public Transport {
 public:
  TamperingTransport(std::unique_ptr<Transport> real, Tamper tamper,
                     RefuseAdd refuse_add = nullptr,
                     Emulation* emulation = nullptr)
      : real_(std::move(real)),
        tamper_(std::move(tamper)),
        refuse_add_(std::move(refuse_add)),
        emulation_(emulation) {}

  StatusOr<std::unique_ptr<Domain>> OpenDomain() override {
    JF_ASSIGN_OR_RETURN(auto domain, real_->OpenDomain());
    return std::unique_ptr<Domain>(std::make_unique<TamperingDomain>(
        std::move(domain), &tamper_, &refuse_add_, emulation_, &doorbell()));
  }
  Doorbell& doorbell() override { return real_->doorbell(); }

 private:
  const std::unique_ptr<Transport> real_;
  const Tamper tamper_;
  const RefuseAdd refuse_add_;
  Emulation* const emulation_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_TAMPERING_TRANSPORT_H_
