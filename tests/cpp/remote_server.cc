// The end of RemoteTransport that has the Transport: one process for each.

#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "base/shared_memory.h"
#include "base/unique_fd.h"
#include "tests/cpp/remote_message.h"
#include "tests/cpp/remote_transport.h"

namespace jaxfabric {
namespace {

template <typename T>
void PutResult(RemoteMessage& answer, const StatusOr<T>& result) {
  answer.PutStatus(result.status());
  if (result.ok()) answer.Put(*result);
}

// A Domain, and the memory that its rank has on the other host.
class ServedDomain {
 public:
  explicit ServedDomain(std::unique_ptr<Domain> domain)
      : domain_(std::move(domain)) {}

  void Introduce(RemoteMessage& answer) const {
    answer.Put(domain_->caps());
    answer.PutText(domain_->address().bytes);
  }

  void Answer(RemoteCall call, RemoteMessage& question, RemoteMessage& answer) {
    switch (call) {
      case RemoteCall::kRegister:
        return PutResult(answer, Register(question.Take<uint64_t>()));
      case RemoteCall::kUnregister:
        return answer.PutStatus(
            domain_->UnregisterMemory(question.Take<uint64_t>()));
      case RemoteCall::kAddPeer:
        return AddPeer(question, answer);
      case RemoteCall::kRemovePeer:
        domain_->RemovePeer(question.Take<PeerId>());
        return answer.PutText(domain_->address().bytes);
      case RemoteCall::kWrite:
      case RemoteCall::kWritePieces:
        return PutResult(answer, Write(call, question));
      case RemoteCall::kSend:
        return PutResult(answer, Send(question));
      case RemoteCall::kPoll:
        return Poll(question, answer);
      case RemoteCall::kMirror:
        return memory_->TakeChanges(question);
      default:
        JF_CHECK(false);
    }
  }

 private:
  StatusOr<uint64_t> Register(uint64_t bytes) {
    if (!memory_) {
      JF_ASSIGN_OR_RETURN(pages_, SharedMemory::Create("test-twin", bytes));
      memory_.emplace(pages_.data(), bytes);
    }
    return domain_->RegisterMemory({pages_.data(), bytes, pages_.fd()});
  }

  void AddPeer(RemoteMessage& question, RemoteMessage& answer) {
    const NetAddr address = {std::string(question.TakeText())};
    const auto peer = domain_->AddPeer(
        address, Deadline::AfterNanoseconds(question.Take<int64_t>()));
    answer.PutText(domain_->address().bytes);
    PutResult(answer, peer);
  }

  StatusOr<Posted> Write(RemoteCall call, RemoteMessage& question) {
    const auto peer = question.Take<PeerId>();
    const std::byte* const from = pages_.data() + question.Take<ptrdiff_t>();
    const LocalSpan local = {from, question.Take<uint64_t>()};
    const auto remote = question.Take<RemoteSpan>();
    const auto immediate = question.Take<std::optional<uint32_t>>();
    const auto cookie = question.Take<uint64_t>();
    const auto length_or_count = question.Take<uint64_t>();
    if (call == RemoteCall::kWrite) {
      return domain_->PostWriteImm(peer, local, remote, length_or_count,
                                   immediate, cookie);
    }
    std::vector<Piece> pieces;
    for (uint64_t i = 0; i < length_or_count; ++i) {
      pieces.push_back(question.Take<Piece>());
    }
    return domain_->PostPieces(peer, local, remote, pieces, immediate, cookie);
  }

  StatusOr<Posted> Send(RemoteMessage& question) {
    const auto peer = question.Take<PeerId>();
    const std::string_view message = question.TakeText();
    return domain_->PostSend(peer, message, question.Take<uint64_t>());
  }

  void Poll(RemoteMessage& question, RemoteMessage& answer) {
    std::vector<Completion> completions(question.Take<uint64_t>());
    completions.resize(domain_->Poll(completions));
    answer.Put(uint64_t{completions.size()});
    for (const Completion& completion : completions) {
      answer.Put(completion.kind);
      answer.Put(completion.peer);
      answer.Put(completion.cookie);
      answer.Put(completion.immediate);
      answer.PutText(completion.message);
      answer.PutStatus(completion.status);
    }
    if (!completions.empty() && memory_) memory_->PutChanges(answer);
  }

  SharedMemory pages_;
  std::optional<TwinMemory> memory_;
  std::unique_ptr<Domain> domain_;  // goes first
};

// Until the connection ends.
Status ServeOne(int socket, const OpenTransportFunction& open) {
  std::unique_ptr<Transport> transport;
  std::vector<std::unique_ptr<ServedDomain>> domains;
  for (;;) {
    JF_ASSIGN_OR_RETURN(RemoteMessage question,
                        ReceiveRemote(socket, /*for_ever=*/true));
    RemoteMessage answer;
    const auto call = question.Take<RemoteCall>();
    if (call == RemoteCall::kOpenTransport) {
      auto opened = open(std::string(question.TakeText()));
      answer.PutStatus(opened.status());
      if (opened.ok()) transport = *std::move(opened);
    } else if (call == RemoteCall::kOpenDomain) {
      auto opened = transport->OpenDomain();
      answer.PutStatus(opened.status());
      if (opened.ok()) {
        answer.Put(static_cast<uint32_t>(domains.size()));
        domains.push_back(std::make_unique<ServedDomain>(*std::move(opened)));
        domains.back()->Introduce(answer);
      }
    } else if (call == RemoteCall::kCloseDomain) {
      domains.at(question.Take<uint32_t>()) = nullptr;
    } else {
      domains.at(question.Take<uint32_t>())->Answer(call, question, answer);
    }
    JF_RETURN_IF_ERROR(SendRemote(socket, answer));
  }
}

}  // namespace

Status ServeTransports(const std::string& address, uint16_t port,
                       const OpenTransportFunction& open) {
  JF_ASSIGN_OR_RETURN(const UniqueFd listener, ListenRemote(address, port));
  signal(SIGCHLD, SIG_IGN);  // nobody asks how they ended
  std::printf("serves\n");
  std::fflush(stdout);
  for (;;) {
    const UniqueFd connection(
        accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!connection.valid()) continue;
    const pid_t child = fork();
    JF_CHECK(child >= 0);
    if (child > 0) continue;
    ServeOne(connection.get(), open).ok();  // the other end has gone: done
    _exit(0);
  }
}

}  // namespace jaxfabric
