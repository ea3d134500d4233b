#include "tests/cpp/remote_transport.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <set>
#include <utility>

#include "base/unique_fd.h"
#include "tests/cpp/remote_message.h"

namespace jaxfabric {
namespace {

class RemoteDomain;

// All that there are, for MirrorToOtherHost. A test's threads use several.
struct OpenDomains {
  std::mutex mutex;
  std::set<RemoteDomain*> all;
};

OpenDomains& Opened() {
  static auto* const opened = new OpenDomains;
  return *opened;
}

// A connection to a process that has one Transport.
class RemoteLink {
 public:
  explicit RemoteLink(UniqueFd socket) : socket_(std::move(socket)) {}

  // Threads take turns, also with the twins of their memory.
  std::recursive_mutex& mutex() { return mutex_; }

  RemoteMessage Ask(const RemoteMessage& question) {
    const std::lock_guard lock(mutex_);
    Status status = SendRemote(socket_.get(), question);
    if (status.ok()) {
      StatusOr<RemoteMessage> answer = ReceiveRemote(socket_.get());
      if (answer.ok()) return *std::move(answer);
      status = answer.status();
    }
    std::fprintf(stderr, "remote_transport: %s\n", status.message().c_str());
    std::abort();
  }

 private:
  std::recursive_mutex mutex_;
  const UniqueFd socket_;
};

class RemoteDomain final : public Domain {
 public:
  RemoteDomain(RemoteLink* link, RemoteMessage& opened)
      : link_(link), number_(opened.Take<uint32_t>()) {
    caps_ = opened.Take<DomainCaps>();
    caps_.transport = "remote";  // the pointer was the other process's
    address_.bytes = opened.TakeText();
    const std::lock_guard lock(Opened().mutex);
    Opened().all.insert(this);
  }
  ~RemoteDomain() override {
    {
      const std::lock_guard lock(Opened().mutex);
      Opened().all.erase(this);
    }
    link_->Ask(Question(RemoteCall::kCloseDomain));
  }

  const DomainCaps& caps() const override { return caps_; }
  const NetAddr& address() const override { return address_; }

  StatusOr<uint64_t> RegisterMemory(const MemoryRegion& region) override {
    if (!memory_) memory_.emplace(region.base, region.length);
    JF_CHECK(memory_->data() == region.base);  // a rank has one region
    RemoteMessage question = Question(RemoteCall::kRegister);
    question.Put(region.length);
    return Answered<uint64_t>(question);
  }
  Status UnregisterMemory(uint64_t key) override {
    RemoteMessage question = Question(RemoteCall::kUnregister);
    question.Put(key);
    return link_->Ask(question).TakeStatus();
  }
  StatusOr<PeerId> AddPeer(const NetAddr& address, Deadline deadline) override {
    RemoteMessage question = Question(RemoteCall::kAddPeer);
    question.PutText(address.bytes);
    question.Put(deadline.RemainingNanoseconds());
    RemoteMessage answer = link_->Ask(question);
    address_.bytes = answer.TakeText();
    JF_RETURN_IF_ERROR(answer.TakeStatus());
    return answer.Take<PeerId>();
  }
  void RemovePeer(PeerId peer) override {
    RemoteMessage question = Question(RemoteCall::kRemovePeer);
    question.Put(peer);
    address_.bytes = link_->Ask(question).TakeText();
  }
  StatusOr<Posted> PostWriteImm(PeerId peer, LocalSpan local, RemoteSpan remote,
                                uint64_t length,
                                std::optional<uint32_t> immediate,
                                uint64_t cookie) override {
    RemoteMessage question = Question(RemoteCall::kWrite);
    PutWrite(question, peer, local, remote, immediate, cookie);
    question.Put(length);
    return Answered<Posted>(question);
  }
  StatusOr<Posted> PostPieces(PeerId peer, LocalSpan local, RemoteSpan remote,
                              std::span<const Piece> pieces,
                              std::optional<uint32_t> immediate,
                              uint64_t cookie) override {
    RemoteMessage question = Question(RemoteCall::kWritePieces);
    PutWrite(question, peer, local, remote, immediate, cookie);
    question.Put(uint64_t{pieces.size()});
    for (const Piece& piece : pieces) question.Put(piece);
    return Answered<Posted>(question);
  }
  StatusOr<Posted> PostSend(PeerId peer, std::string_view message,
                            uint64_t cookie) override {
    RemoteMessage question = Question(RemoteCall::kSend);
    question.Put(peer);
    question.PutText(message);
    question.Put(cookie);
    return Answered<Posted>(question);
  }

  size_t Poll(std::span<Completion> completions) override {
    const std::lock_guard lock(link_->mutex());
    RemoteMessage question = Question(RemoteCall::kPoll);
    question.Put(uint64_t{completions.size()});
    RemoteMessage answer = link_->Ask(question);
    const auto count = answer.Take<uint64_t>();
    JF_CHECK(count <= completions.size());
    for (Completion& completion : completions.first(count)) {
      completion.kind = answer.Take<Completion::Kind>();
      completion.peer = answer.Take<PeerId>();
      completion.cookie = answer.Take<uint64_t>();
      completion.immediate = answer.Take<uint32_t>();
      completion.message = answer.TakeText();
      completion.status = answer.TakeStatus();
    }
    if (count > 0 && memory_) memory_->TakeChanges(answer);
    return count;
  }

  std::byte* DirectPointer(PeerId, RemoteSpan, uint64_t) override {
    return nullptr;
  }

  void Mirror() {
    const std::lock_guard lock(link_->mutex());
    RemoteMessage question = Question(RemoteCall::kMirror);
    if (memory_ && memory_->PutChanges(question)) link_->Ask(question);
  }

 private:
  RemoteMessage Question(RemoteCall call) const {
    RemoteMessage question;
    question.Put(call);
    question.Put(number_);
    return question;
  }

  template <typename T>
  StatusOr<T> Answered(const RemoteMessage& question) {
    RemoteMessage answer = link_->Ask(question);
    JF_RETURN_IF_ERROR(answer.TakeStatus());
    return answer.Take<T>();
  }

  void PutWrite(RemoteMessage& question, PeerId peer, LocalSpan local,
                RemoteSpan remote, std::optional<uint32_t> immediate,
                uint64_t cookie) {
    question.Put(peer);
    question.Put(local.data - memory_->data());
    question.Put(local.key);
    question.Put(remote);
    question.Put(immediate);
    question.Put(cookie);
  }

  RemoteLink* const link_;
  const uint32_t number_;
  DomainCaps caps_;
  NetAddr address_;
  std::optional<TwinMemory> memory_;
};

class RemoteTransport final : public Transport {
 public:
  explicit RemoteTransport(UniqueFd socket) : link_(std::move(socket)) {}

  Status Open(const std::string& job_secret) {
    RemoteMessage question;
    question.Put(RemoteCall::kOpenTransport);
    question.PutText(job_secret);
    return link_.Ask(question).TakeStatus();
  }

  StatusOr<std::unique_ptr<Domain>> OpenDomain() override {
    RemoteMessage question;
    question.Put(RemoteCall::kOpenDomain);
    RemoteMessage answer = link_.Ask(question);
    JF_RETURN_IF_ERROR(answer.TakeStatus());
    return std::unique_ptr<Domain>(
        std::make_unique<RemoteDomain>(&link_, answer));
  }

  Doorbell& doorbell() override { return doorbell_; }
  // It never rings: nobody tells from there.
  int64_t poll_interval_ns() const override { return 1'000'000; }

 private:
  RemoteLink link_;
  DoorbellWords words_ = {};
  Doorbell doorbell_{&words_};
};

}  // namespace

StatusOr<std::unique_ptr<Transport>> OpenRemoteTransport(
    const std::string& address, uint16_t port, const std::string& job_secret) {
  JF_ASSIGN_OR_RETURN(UniqueFd socket, ConnectRemote(address, port));
  auto transport = std::make_unique<RemoteTransport>(std::move(socket));
  JF_RETURN_IF_ERROR(transport->Open(job_secret));
  return std::unique_ptr<Transport>(std::move(transport));
}

void MirrorToOtherHost() {
  const std::lock_guard lock(Opened().mutex);
  for (RemoteDomain* const domain : Opened().all) domain->Mirror();
}

}  // namespace jaxfabric
