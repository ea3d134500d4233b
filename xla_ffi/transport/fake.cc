#include "transport/fake.h"

#include <string>
#include <utility>

#include "transport/fake_network.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kMessageBytesMax = 4096;

class FakeDomain final : public Domain {
 public:
  FakeDomain(std::shared_ptr<FakeNetwork> network, const FakeOptions* options,
             Doorbell* doorbell)
      : network_(std::move(network)) {
    caps_.transport = "fake";
    caps_.write_bytes_max = options->write_bytes_max;
    caps_.message_bytes_max = kMessageBytesMax;
    caps_.queue_depth = options->queue_depth;
    caps_.immediate_names_peer = options->immediate_names_peer;
    caps_.removal_fences = options->removal_fences;
    port_.options = options;
    port_.doorbell = doorbell;
    network_->Enter(&port_);
    address_ = network_->AddressOf(port_);
  }
  ~FakeDomain() override { network_->Leave(&port_); }

  const DomainCaps& caps() const override { return caps_; }
  const NetAddr& address() const override { return address_; }

  StatusOr<uint64_t> RegisterMemory(const MemoryRegion& region) override {
    return network_->AddRegion(port_, region);
  }
  Status UnregisterMemory(uint64_t key) override {
    return network_->RemoveRegion(port_, key);
  }
  StatusOr<PeerId> AddPeer(const NetAddr& address, Deadline) override {
    return network_->AddPeer(port_, address);
  }
  void RemovePeer(PeerId peer) override { network_->RemovePeer(port_, peer); }

  StatusOr<Posted> PostWriteImm(PeerId peer, LocalSpan local, RemoteSpan remote,
                                uint64_t length,
                                std::optional<uint32_t> immediate,
                                uint64_t cookie) override {
    JF_RETURN_IF_ERROR(CheckSize("a write", length, caps_.write_bytes_max));
    auto post = std::make_shared<FakePost>();
    post->peer = peer;
    post->local = local;
    post->remote = remote;
    post->length = length;
    post->immediate = immediate;
    post->cookie = cookie;
    return network_->Post(port_, std::move(post));
  }

  StatusOr<Posted> PostSend(PeerId peer, std::string_view message,
                            uint64_t cookie) override {
    JF_RETURN_IF_ERROR(
        CheckSize("a message", message.size(), kMessageBytesMax));
    auto post = std::make_shared<FakePost>();
    post->peer = peer;
    post->message = std::string(message);
    post->cookie = cookie;
    return network_->Post(port_, std::move(post));
  }

  size_t Poll(std::span<Completion> completions) override {
    return network_->Poll(port_, completions);
  }
  std::byte* DirectPointer(PeerId, RemoteSpan, uint64_t) override {
    return nullptr;
  }

 private:
  static Status CheckSize(const char* what, uint64_t bytes, uint64_t limit) {
    if (bytes <= limit) return OkStatus();
    return Status(StatusCode::kInvalidArgument,
                  std::string(what) + " of " + std::to_string(bytes) +
                      " bytes exceeds the fake transport's " +
                      std::to_string(limit));
  }

  const std::shared_ptr<FakeNetwork> network_;
  DomainCaps caps_;
  FakePort port_;
  NetAddr address_;
};

class FakeTransport final : public Transport {
 public:
  explicit FakeTransport(FakeOptions options)
      : options_(std::move(options)), network_(FakeNetwork::Join(options_)) {}

  StatusOr<std::unique_ptr<Domain>> OpenDomain() override {
    return std::unique_ptr<Domain>(
        std::make_unique<FakeDomain>(network_, &options_, &doorbell_));
  }
  Doorbell& doorbell() override { return doorbell_; }

 private:
  const FakeOptions options_;
  DoorbellWords words_ = {};
  Doorbell doorbell_{&words_};
  const std::shared_ptr<FakeNetwork> network_;
};

}  // namespace

StatusOr<std::unique_ptr<Transport>> OpenFakeTransport(FakeOptions options) {
  if (options.pieces_max == 0 || options.queue_depth == 0 ||
      options.delay_max_ns < 0 || options.again_share < 0 ||
      options.again_share > 0.99) {
    return Status(StatusCode::kInvalidArgument,
                  "FakeOptions: pieces_max and queue_depth are at least 1, "
                  "delay_max_ns at least 0, again_share 0 to 0.99");
  }
  return std::unique_ptr<Transport>(
      std::make_unique<FakeTransport>(std::move(options)));
}

bool KillFakeDomain(const std::string& network, const NetAddr& address) {
  const std::shared_ptr<FakeNetwork> found = FakeNetwork::Find(network);
  return found != nullptr && found->Kill(address);
}

}  // namespace jaxfabric
