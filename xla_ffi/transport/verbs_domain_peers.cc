// VerbsDomain: who is there, and joined.

#include "transport/verbs_domain.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <algorithm>
#include <utility>

namespace jaxfabric {
namespace {

// Domains that one Domain knows; who knows the secret is not trusted with all
// of our memory.
constexpr size_t kPeersMax = 1 << 16;
// Greetings that are looked at in one Poll; more of them are a flood.
constexpr size_t kGreetingsMax = 1024;

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kTendPeriodNs = 20 * kMillisecond;
constexpr int64_t kHelloPeriodMinNs = 40 * kMillisecond;
constexpr int64_t kHelloPeriodMaxNs = 640 * kMillisecond;
constexpr int64_t kSecond = 1000 * kMillisecond;
// For a peer whose device has not answered all along retry_count tries: it is
// not only slow.
constexpr int64_t kSilentPatienceNs = 2 * kSecond;
// An idle connection is written to, so that a death is noticed by those who
// only wait.
constexpr int64_t kWordPeriodNs = 250 * kMillisecond;
// Posts and farewells may take so long to leave when a Domain closes.
constexpr double kByeSeconds = 0.1;

}  // namespace

StatusOr<VerbsPeer*> VerbsDomain::TakeIn(const VerbsAddress& address) {
  const auto found = peers_.find(address.nonce);
  if (found != peers_.end()) {
    if (found->second->address != address) {
      return Status(StatusCode::kInvalidArgument,
                    "two addresses claim to be the same Domain");
    }
    return found->second.get();
  }
  if (peers_.size() >= kPeersMax) {
    return Status(
        StatusCode::kResourceExhausted,
        "this Domain knows " + std::to_string(kPeersMax) + " peers already");
  }
  auto peer = std::make_unique<VerbsPeer>();
  peer->address = address;
  JF_ASSIGN_OR_RETURN(peer->way, greeter_->FindWay(address));
  VerbsPeer* const result = peer.get();
  peers_[address.nonce] = std::move(peer);
  return result;
}

StatusOr<PeerId> VerbsDomain::AddPeer(const NetAddr& net_addr, Deadline) {
  JF_RETURN_IF_ERROR(failed_);
  JF_ASSIGN_OR_RETURN(
      const VerbsAddress address,
      ParseVerbsAddress(net_addr, address_.link_layer, address_.job));
  JF_ASSIGN_OR_RETURN(VerbsPeer* const peer, TakeIn(address));
  JF_RETURN_IF_ERROR(peer->lost);
  if (peer->id != kUnknownPeer) return peer->id;
  const bool is_new = peer->connection == nullptr;
  if (is_new) JF_RETURN_IF_ERROR(OpenConnection(*peer));
  // If it has greeted us, this is what it knows us by.
  peer->added = peer->connection->attempt();
  peer->id = static_cast<PeerId>(ids_.size());
  ids_.push_back(peer);
  if (address == address_) {
    if (is_new) JF_RETURN_IF_ERROR(JoinSelf(*peer));
  } else if (!peer->connection->confirmed()) {
    StartGreeting(*peer, PatienceNs());
  }
  return peer->id;
}

void VerbsDomain::RemovePeer(PeerId id) {
  if (id >= ids_.size() || ids_[id] == nullptr) return;
  VerbsPeer& peer = *std::exchange(ids_[id], nullptr);
  uint64_t joined = 0;
  if (peer.connection != nullptr) joined = peer.connection->remote_attempt();
  TakeDown(peer, Status(StatusCode::kCancelled, "the peer was removed"));
  peer.id = kUnknownPeer;
  peer.lost = OkStatus();
  peer.refused_up_to = peer.last_attempt;
  // It need not find out by waiting for our acknowledgements.
  if (joined != 0) Greet(peer, VerbsGreetingKind::kRemoved, joined);
}

Status VerbsDomain::OpenConnection(VerbsPeer& peer) {
  JF_ASSIGN_OR_RETURN(
      peer.connection,
      VerbsConnection::Open(*port_, *receives_, *buffers_, ++attempts_));
  numbers_[peer.connection->number()] = &peer;
  peer.broken = OkStatus();
  return OkStatus();
}

Status VerbsDomain::JoinSelf(VerbsPeer& peer) {
  VerbsGreeting greeting;
  greeting.sender = address_;
  peer.connection->Introduce(&greeting);
  JF_RETURN_IF_ERROR(peer.connection->Join(greeting));
  peer.connection->Confirm();
  return OkStatus();
}

void VerbsDomain::StartGreeting(VerbsPeer& peer, int64_t patience_ns) {
  const int64_t now_ns = MonotonicNanoseconds();
  peer.give_up_ns = now_ns + patience_ns;
  peer.hello_period_ns = kHelloPeriodMinNs;
  peer.hello_ns = now_ns + peer.hello_period_ns;
  Greet(peer, VerbsGreetingKind::kHello, 0);
}

void VerbsDomain::Greet(VerbsPeer& peer, VerbsGreetingKind kind,
                        uint64_t echo) {
  VerbsGreeting greeting;
  greeting.kind = kind;
  greeting.target = peer.address.nonce;
  greeting.added = peer.added;
  greeting.echo = echo;
  greeting.sender = address_;
  if (peer.connection != nullptr) peer.connection->Introduce(&greeting);
  SealGreeting(&greeting, key_);
  greeter_->Send(peer.way, peer.address, greeting);
}

void VerbsDomain::HandleGreetings() {
  size_t looked_at = 0;
  for (const VerbsGreeting& greeting : std::exchange(greetings_, {})) {
    if (++looked_at > kGreetingsMax) return;
    VerbsPeer* peer = nullptr;
    if (greeting.kind == VerbsGreetingKind::kHello) {
      const StatusOr<VerbsPeer*> taken = TakeIn(greeting.sender);
      if (taken.ok()) OnHello(**taken, greeting);
      continue;
    }
    const auto found = peers_.find(greeting.sender.nonce);
    if (found == peers_.end()) continue;
    peer = found->second.get();
    const bool answers = peer->connection != nullptr &&
                         greeting.echo == peer->connection->attempt();
    if (greeting.kind == VerbsGreetingKind::kBye) {
      Lose(*peer,
           Status(StatusCode::kUnavailable, "the peer closed its Domain"));
    } else if (!answers) {
      continue;
    } else if (greeting.kind == VerbsGreetingKind::kWelcome) {
      OnWelcome(*peer, greeting);
    } else {
      Lose(*peer, Status(StatusCode::kUnavailable,
                         "the peer has removed this Domain; it is joined again "
                         "once it is removed and added here, too"));
    }
  }
}

void VerbsDomain::OnHello(VerbsPeer& peer, const VerbsGreeting& greeting) {
  if (greeting.added <= peer.refused_up_to) {
    return Greet(peer, VerbsGreetingKind::kRefuse, greeting.attempt);
  }
  const bool is_repeated =
      peer.connection != nullptr &&
      peer.connection->remote_attempt() == greeting.attempt;
  if (!is_repeated) {
    if (greeting.attempt <= peer.last_attempt) return;  // it came late
    peer.last_attempt = greeting.attempt;
    if (peer.connection != nullptr && peer.connection->remote_attempt() != 0) {
      TakeDown(peer, Status(StatusCode::kUnavailable,
                            "verbs: the connection broke at its other end, " +
                                Describe(peer.address)));
    }
    if (peer.connection == nullptr && !OpenConnection(peer).ok()) return;
    const Status joined = peer.connection->Join(greeting);
    if (!joined.ok()) return Break(peer, joined);
    peer.give_up_ns = MonotonicNanoseconds() + PatienceNs();
  }
  Greet(peer, VerbsGreetingKind::kWelcome, greeting.attempt);
}

void VerbsDomain::OnWelcome(VerbsPeer& peer, const VerbsGreeting& greeting) {
  VerbsConnection& connection = *peer.connection;
  if (connection.remote_attempt() == 0) {
    if (greeting.attempt <= peer.last_attempt) return;
    peer.last_attempt = greeting.attempt;
    const Status joined = connection.Join(greeting);
    if (!joined.ok()) return Break(peer, joined);
  }
  if (connection.remote_attempt() != greeting.attempt) return;
  if (connection.confirmed()) return;
  connection.Confirm();
  Tell(peer, VerbsFrameKind::kJoined);
}

int64_t VerbsDomain::PatienceNs() const {
  return port_->settings().patience_s * kSecond;
}

void VerbsDomain::Break(VerbsPeer& peer, const Status& why, bool silent) {
  if (!peer.broken.ok()) return;
  peer.broken = why;
  peer.silent = silent;
  broken_.push_back(&peer);
}

void VerbsDomain::Mend() {
  while (!broken_.empty()) {
    VerbsPeer& peer = *broken_.back();
    broken_.pop_back();
    if (peer.broken.ok()) continue;  // it was taken down meanwhile
    TakeDown(peer, Status(peer.broken));
    if (!peer.wanted()) continue;
    Status opened = OpenConnection(peer);
    if (opened.ok() && peer.address == address_) opened = JoinSelf(peer);
    if (!opened.ok()) {
      Lose(peer, opened);
    } else if (!peer.connection->confirmed()) {
      StartGreeting(peer, peer.silent
                              ? std::min(kSilentPatienceNs, PatienceNs())
                              : PatienceNs());
    }
  }
}

void VerbsDomain::TakeDown(VerbsPeer& peer, const Status& why) {
  if (peer.connection == nullptr) return;
  const uint32_t number = peer.connection->number();
  peer.connection->Stop();
  // Some devices drop what is in the queue of a queue pair that ends, so what
  // has arrived is taken out before; others keep it, so the rest is taken out
  // after, before the number can be another's.
  while (PollQueue()) continue;
  peer.connection->Destroy();
  while (PollQueue()) continue;
  peer.connection->Abandon([&](const VerbsOperation& operation) {
    EndOperation(peer, operation, why);
  });
  numbers_.erase(number);
  peer.connection.reset();
  peer.broken = OkStatus();
  peer.frames.clear();
  peer.regions.clear();
  peer.told.clear();
}

void VerbsDomain::Lose(VerbsPeer& peer, const Status& why) {
  TakeDown(peer, why);
  if (!peer.wanted()) return;
  peer.lost = why;
  Completion completion;
  completion.kind = Completion::Kind::kPeerLost;
  completion.peer = peer.id;
  completion.status = why;
  ready_.push_back(std::move(completion));
}

void VerbsDomain::TendPeers() {
  const int64_t now_ns = MonotonicNanoseconds();
  if (now_ns - tended_ns_ < kTendPeriodNs) return;
  tended_ns_ = now_ns;
  const Status event = port_->TakeEvents();
  if (failed_.ok()) failed_ = event;
  for (auto& [nonce, peer] : peers_) {
    if (!failed_.ok()) {
      Lose(*peer, failed_);
    } else if (peer->connection != nullptr && peer->broken.ok()) {
      TendPeer(*peer, now_ns);
    }
  }
}

void VerbsDomain::TendPeer(VerbsPeer& peer, int64_t now_ns) {
  VerbsConnection& connection = *peer.connection;
  if (connection.confirmed()) {
    if (connection.open() > 0 || now_ns - peer.word_ns < kWordPeriodNs) return;
    peer.word_ns = now_ns;
    const Status posted = connection.PostWord();
    if (!posted.ok()) Break(peer, posted);
    return;
  }
  if (now_ns >= peer.give_up_ns) {
    return Lose(
        peer, Status(StatusCode::kUnavailable,
                     "no answer from " + Describe(peer.address) +
                         ": its process has ended, or it is of another "
                         "network than " +
                         port_->name() + " (JAXFABRIC_NICS)" + port_->Fault()));
  }
  if (!peer.wanted() || now_ns < peer.hello_ns) return;
  peer.hello_period_ns = std::min(2 * peer.hello_period_ns, kHelloPeriodMaxNs);
  peer.hello_ns = now_ns + peer.hello_period_ns;
  Greet(peer, VerbsGreetingKind::kHello, 0);
}

void VerbsDomain::SayBye() {
  const Deadline deadline = Deadline::AfterSeconds(kByeSeconds);
  const auto poll_until = [&](const auto& met) {
    while (!met() && !deadline.Expired()) {
      PollQueue();
      Pump();
    }
  };
  poll_until([this] { return posted_ == 0; });
  for (auto& [nonce, peer] : peers_) {
    if (peer->connection == nullptr || peer->address == address_) continue;
    // Twice, since nobody acknowledges it, and a network may lose one.
    for (int times = 0; times < 2; ++times) {
      Greet(*peer, VerbsGreetingKind::kBye, 0);
      poll_until([this] { return greeter_->HasRoom(); });
    }
  }
  poll_until([this] { return greeter_->idle(); });
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
