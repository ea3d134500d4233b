// OfiDomain: who is there, and who still lives.

#include "transport/ofi_domain.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <algorithm>
#include <cstring>
#include <utility>

namespace jaxfabric {
namespace {

// Domains that one Domain knows; who knows the secret is not trusted with all
// of our memory.
constexpr size_t kPeersMax = 1 << 16;

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kTendPeriodNs = 20 * kMillisecond;
// Together these bound how long a death stays unnoticed by those who wait.
constexpr int64_t kPingPeriodNs = 250 * kMillisecond;
constexpr int64_t kStuckNs = 100 * kMillisecond;
// What got no answer is said again.
constexpr int64_t kRepeatNs = 1000 * kMillisecond;
// Of two Domains that add each other, one leaves the first word to the other:
// libfabric's tcp was seen to lose a descriptor where connections cross (not in
// 60 crossings of a program of libfabric calls alone, so rarely), and each end
// then pays for two connections.
constexpr int64_t kCourtesyNs = 30 * kMillisecond;
constexpr int64_t kProbePeriodNs = 1000 * kMillisecond;
// A network may be away for seconds, a process stopped for as long. Operations
// have deadlines of their own; this is for hosts that vanish without a word.
constexpr int64_t kSilenceNs = 30'000 * kMillisecond;
// A peer that is about to renew its endpoint is back within milliseconds.
constexpr int64_t kPauseMaxNs = 5'000 * kMillisecond;
// What is posted to a peer that was removed may take so long to end by itself;
// then it is taken back.
constexpr int64_t kRemovedNs = 300 * kMillisecond;
// A loss is reported although posts are still open after this.
constexpr int64_t kLossDelayNs = 1000 * kMillisecond;
// Answers that wait for a peer to take them; it asks again for the others.
constexpr size_t kAnswersMax = 1024;
// Posts and farewells may take so long to leave when a Domain closes.
constexpr double kByeSeconds = 0.1;

bool IsOfAKey(OfiFrameKind kind) {
  return kind == OfiFrameKind::kAsk || kind == OfiFrameKind::kAnswer ||
         kind == OfiFrameKind::kGone;
}

}  // namespace

StatusOr<OfiPeer*> OfiDomain::TakeIn(const OfiAddress& address) {
  const auto found = peers_.find(address.nonce);
  if (found != peers_.end()) {
    OfiPeer& known = *found->second;
    if (address.generation > known.address.generation) {
      JF_RETURN_IF_ERROR(Move(known, address));
    } else if (address.generation == known.address.generation &&
               address != known.address) {
      return Status(StatusCode::kInvalidArgument,
                    "two addresses claim to be the same Domain");
    }
    return &known;
  }
  if (peers_.size() >= kPeersMax) {
    return Status(
        StatusCode::kResourceExhausted,
        "this Domain knows " + std::to_string(kPeersMax) + " peers already");
  }
  auto peer = std::make_unique<OfiPeer>();
  peer->address = address;
  JF_RETURN_IF_ERROR(Insert(*peer));
  peer->heard_ns = MonotonicNanoseconds();  // the benefit of the doubt
  OfiPeer* const result = peer.get();
  peers_[address.nonce] = std::move(peer);
  return result;
}

Status OfiDomain::Insert(OfiPeer& peer) {
  JF_RETURN_IF_ERROR(broken_);
  JF_ASSIGN_OR_RETURN(peer.fi_address,
                      endpoint_->Insert({peer.address.endpoint.data(),
                                         peer.address.endpoint_bytes}));
  by_source_[peer.fi_address] = &peer;
  return OkStatus();
}

// What comes from its former endpoint may still be on the way.
Status OfiDomain::Move(OfiPeer& peer, const OfiAddress& address) {
  if (peer.state == OfiPeer::State::kLost) return peer.lost;
  const fi_addr_t former = peer.fi_address;
  peer.address = address;
  JF_RETURN_IF_ERROR(Insert(peer));
  DropStaleFrames(peer);
  peer.former.push_back(former);
  peer.state = OfiPeer::State::kGreeting;
  peer.pauses_us = peer.pause_due = peer.has_paused = false;
  peer.moved_ns = MonotonicNanoseconds();
  peer.failures = 0;
  peer.stuck_ns = peer.repeat_ns = 0;
  peer.probe.reset();
  peer.must_listen.reset();
  return OkStatus();
}

void OfiDomain::Forget(OfiPeer* peer) {
  frames_waiting_ -= peer->frames.size();
  peer->former.push_back(peer->fi_address);
  for (const fi_addr_t address : peer->former) {
    if (by_source_.erase(address) > 0) endpoint_->Remove(address);
  }
  peers_.erase(peer->address.nonce);
}

StatusOr<PeerId> OfiDomain::AddPeer(const NetAddr& net_addr,
                                    Deadline deadline) {
  JF_ASSIGN_OR_RETURN(
      const OfiAddress address,
      ParseOfiAddress(net_addr, address_.provider, address_.job));
  const bool is_new = !peers_.contains(address.nonce);
  JF_ASSIGN_OR_RETURN(OfiPeer* const peer, TakeIn(address));
  JF_RETURN_IF_ERROR(peer->lost);
  if (fencing_.contains(peer->id)) {
    return Status(StatusCode::kUnavailable,
                  "what the peer posted earlier is still being kept out");
  }
  if (peer->id != kUnknownPeer) return peer->id;
  peer->id = static_cast<PeerId>(ids_.size());
  peer->condemned = false;
  peer->removed_ns = 0;
  ids_.push_back(peer);
  if (is_new && address.provider == OfiProvider::kTcp) {
    // Whoever calls must not wait for a network that says nothing.
    peer->must_listen = deadline;
    peer->probe.emplace(std::span<const std::byte>(address.endpoint.data(),
                                                   address.endpoint_bytes));
  }
  if (peer->state == OfiPeer::State::kGreeting) {
    const bool waits = address_.nonce > address.nonce;
    peer->repeat_ns = MonotonicNanoseconds() + (waits ? kCourtesyNs : 0);
    tended_ns_ = 0;  // the next Poll says hello
  }
  return peer->id;
}

// What the peer itself still posts arrives as before, from nobody. It is
// forgotten when it goes.
void OfiDomain::RemovePeer(PeerId id) {
  if (id >= ids_.size() || ids_[id] == nullptr) return;
  OfiPeer& peer = *std::exchange(ids_[id], nullptr);
  peer.id = kUnknownPeer;
  peer.loss_due = false;
  peer.regions.clear();
  peer.removed_ns = MonotonicNanoseconds();
}

void OfiDomain::Tell(OfiPeer& peer, OfiFrameKind kind, uint64_t argument,
                     std::string payload) {
  if (peer.state == OfiPeer::State::kLost) return;
  const bool is_queued =
      !IsOfAKey(kind) &&
      std::any_of(peer.frames.begin(), peer.frames.end(),
                  [kind](const auto& frame) { return frame.kind == kind; });
  if (is_queued) return;  // once says it all
  OfiPeer::Outgoing frame = {kind, argument, std::move(payload)};
  // Everything else waits until the peer is back.
  if (kind == OfiFrameKind::kPaused) {
    peer.frames.push_front(std::move(frame));
  } else {
    peer.frames.push_back(std::move(frame));
  }
  ++frames_waiting_;
}

// After one of the two has another endpoint: what was to be said of the former.
void OfiDomain::DropStaleFrames(OfiPeer& peer) {
  frames_waiting_ -= std::erase_if(
      peer.frames, [](const auto& frame) { return !IsOfAKey(frame.kind); });
}

bool OfiDomain::PumpFrame(OfiPeer& peer) {
  if (peer.frames.empty() || stopped_) return false;
  const OfiPeer::Outgoing& frame = peer.frames.front();
  // It is about to close the endpoint that this would go to.
  if (peer.pauses_us && !peer.pause_due &&
      frame.kind != OfiFrameKind::kPaused) {
    return false;
  }
  OfiOperation* const operation = operations_->TakeSend(0);
  if (operation == nullptr) return false;
  operation->kind = OfiOperation::Kind::kFrame;
  operation->peer = &peer;
  operation->frame = frame.kind;
  const size_t bytes =
      EncodeOfiFrame({frame.kind, address_.nonce, peer.address.nonce,
                      frame.argument, frame.payload},
                     key_, operation->buffer);
  const int64_t error =
      endpoint_->Send(peer.fi_address, operation->buffer,
                      operations_->descriptor(), bytes, operation);
  if (error != 0) {
    const StatusOr<Posted> refused = Refused(peer, operation, error);
    if (!refused.ok()) Lose(peer, refused.status(), /*tell=*/false);
    return false;
  }
  peer.frames.pop_front();
  --frames_waiting_;
  ++peer.open;
  peer.stuck_ns = 0;
  peer.spoke_ns = MonotonicNanoseconds();
  return true;
}

void OfiDomain::NoteRefusal(OfiPeer& peer) {
  if (peer.stuck_ns == 0) peer.stuck_ns = MonotonicNanoseconds();
}

void OfiDomain::OnFrame(const OfiFrame& frame) {
  if (frame.kind == OfiFrameKind::kHello) return OnHello(frame);
  const auto found = peers_.find(frame.sender);
  OfiPeer* const peer = found == peers_.end() ? nullptr : found->second.get();
  const bool lost = peer != nullptr && peer->state == OfiPeer::State::kLost;
  if (peer != nullptr && !lost) peer->heard_ns = MonotonicNanoseconds();
  // Its sender is told that a message has come, so it comes: also from a peer
  // that is lost, where its owner still has to fence it.
  if (lost && !(caps_.removal_fences && frame.kind == OfiFrameKind::kMessage)) {
    return;
  }
  if (frame.kind == OfiFrameKind::kMessage) {
    Completion completion;
    completion.kind = Completion::Kind::kMessage;
    completion.peer = peer == nullptr ? kUnknownPeer : peer->id;
    completion.message = std::string(frame.payload);
    ready_.push_back(std::move(completion));
    return;
  }
  if (peer == nullptr) return;
  switch (frame.kind) {
    case OfiFrameKind::kWelcome:
      // It may post from now on, and was not told so far.
      if (renewing_ && peer->state == OfiPeer::State::kGreeting) {
        Tell(*peer, OfiFrameKind::kPause, address_.generation);
      }
      peer->state = OfiPeer::State::kReady;
      peer->greeted = true;
      peer->must_listen.reset();
      AnswerPause(*peer);
      break;
    case OfiFrameKind::kPause:
      OnPause(*peer, frame.argument);
      break;
    case OfiFrameKind::kPaused:
      peer->has_paused = renewing_ && frame.argument == address_.generation;
      break;
    case OfiFrameKind::kAsk: {
      if (peer->frames.size() >= kAnswersMax) break;
      OfiRegion region;
      if (const MemoryRegion* ours = regions_.Find(frame.argument)) {
        region.provider_key = endpoint_->KeyOf(memory_.at(frame.argument));
        region.base = endpoint_->virtual_addresses()
                          ? reinterpret_cast<uintptr_t>(ours->base)
                          : 0;
        region.length = ours->length;
        peer->told.insert(frame.argument);
      }
      Tell(*peer, OfiFrameKind::kAnswer, frame.argument,
           std::string(reinterpret_cast<const char*>(&region), sizeof(region)));
      break;
    }
    case OfiFrameKind::kAnswer:
      OnAnswer(*peer, frame);
      break;
    case OfiFrameKind::kGone:
      peer->regions.erase(frame.argument);
      break;
    case OfiFrameKind::kBye:
      Lose(*peer,
           Status(StatusCode::kUnavailable,
                  "the peer closed its Domain, or has lost this one"),
           /*tell=*/false);
      break;
    default:
      break;
  }
}

void OfiDomain::OnHello(const OfiFrame& frame) {
  const auto address = ParseOfiAddress({std::string(frame.payload)},
                                       address_.provider, address_.job);
  if (!address.ok() || address->nonce != frame.sender) return;
  const StatusOr<OfiPeer*> taken = TakeIn(*address);
  if (!taken.ok()) return;
  OfiPeer& peer = **taken;
  if (peer.state == OfiPeer::State::kLost || peer.condemned ||
      address->generation < peer.address.generation) {
    return;
  }
  peer.heard_ns = MonotonicNanoseconds();
  // It has taken us in before it said hello.
  peer.state = OfiPeer::State::kReady;
  peer.must_listen.reset();
  peer.greeted = true;
  Tell(peer, OfiFrameKind::kWelcome);
  // It has not heard of this, at least not at its present endpoint.
  if (renewing_) Tell(peer, OfiFrameKind::kPause, address_.generation);
}

void OfiDomain::OnAnswer(OfiPeer& peer, const OfiFrame& frame) {
  const auto asked = peer.regions.find(frame.argument);
  if (asked == peer.regions.end() ||
      frame.payload.size() != sizeof(OfiRegion)) {
    return;
  }
  OfiRegion region;
  std::memcpy(&region, frame.payload.data(), sizeof(region));
  asked->second = region;
}

void OfiDomain::Lose(OfiPeer& peer, Status why, bool tell) {
  if (peer.state == OfiPeer::State::kLost) return;
  frames_waiting_ -= peer.frames.size();
  peer.frames.clear();
  if (tell && peer.state == OfiPeer::State::kReady) {
    Tell(peer, OfiFrameKind::kBye);
  }
  peer.state = OfiPeer::State::kLost;
  peer.lost = std::move(why);
  peer.lost_ns = MonotonicNanoseconds();
  peer.loss_due = peer.id != kUnknownPeer && !peer.condemned;
  peer.probe.reset();
  peer.must_listen.reset();
  ReportLoss(peer, peer.lost_ns);
}

void OfiDomain::ReportLoss(OfiPeer& peer, int64_t now_ns) {
  if (!peer.loss_due) return;
  if (peer.open > 0 && now_ns - peer.lost_ns < kLossDelayNs) return;
  peer.loss_due = false;
  Completion completion;
  completion.kind = Completion::Kind::kPeerLost;
  completion.peer = peer.id;
  completion.status = peer.lost;
  ready_.push_back(std::move(completion));
}

void OfiDomain::TendPeers() {
  const int64_t now_ns = MonotonicNanoseconds();
  if (now_ns - tended_ns_ < kTendPeriodNs) return;
  tended_ns_ = now_ns;
  endpoint_->DrainErrors();
  std::vector<OfiPeer*> gone;
  for (auto& [nonce, peer] : peers_) {
    if (peer->state != OfiPeer::State::kLost) TendPeer(*peer, now_ns);
    ReportLoss(*peer, now_ns);
    const bool removed = peer->id == kUnknownPeer;
    const bool lost = peer->state == OfiPeer::State::kLost;
    if (lost && now_ns - peer->lost_ns > kLossDelayNs) {
      frames_waiting_ -= peer->frames.size();  // a farewell that finds no way
      peer->frames.clear();
    }
    if (lost && removed && peer->open == 0 && peer->frames.empty()) {
      gone.push_back(peer.get());
    } else if (removed && peer->posts > 0 && caps_.removal_fences &&
               now_ns - peer->removed_ns > kRemovedNs) {
      peer->condemned = true;
      BeginRenewal();
    }
    if (!peer->former.empty() && peer->open == 0) {
      for (const fi_addr_t address : std::exchange(peer->former, {})) {
        if (by_source_.erase(address) > 0) endpoint_->Remove(address);
      }
    }
  }
  for (OfiPeer* peer : gone) Forget(peer);
}

void OfiDomain::TendPeer(OfiPeer& peer, int64_t now_ns) {
  if (now_ns - peer.heard_ns > kSilenceNs) {
    return Lose(
        peer, Status(StatusCode::kUnavailable,
                     "nothing was heard of " + DescribeEndpoint(peer.address) +
                         " for " + std::to_string(kSilenceNs / 1'000'000'000) +
                         " s: its host or the network is down"));
  }
  if (peer.pauses_us) {
    if (now_ns - peer.pauses_us_ns > kPauseMaxNs) {
      Lose(peer, Status(StatusCode::kUnavailable,
                        DescribeEndpoint(peer.address) +
                            " was about to open another endpoint, and did not "
                            "come back"));
      return;
    }
    // Until it was told that nothing is posted to it, it has to find us.
    if (!peer.pause_due) return;
  }
  if (peer.state == OfiPeer::State::kGreeting && !IsAnswered(peer)) return;
  // Between two endpoints nobody listens.
  if (peer.stuck_ns != 0 && !peer.pauses_us) ProbePeer(peer, now_ns);
  if (!peer.frames.empty() || peer.state == OfiPeer::State::kLost) return;
  if (now_ns >= peer.repeat_ns) {
    peer.repeat_ns = now_ns + kRepeatNs;
    if (peer.state == OfiPeer::State::kGreeting) {
      Tell(peer, OfiFrameKind::kHello, 0, net_addr_.bytes);
    }
    for (const auto& [key, region] : peer.regions) {
      if (!region.has_value()) Tell(peer, OfiFrameKind::kAsk, key);
    }
  }
  if (peer.state == OfiPeer::State::kReady && peer.frames.empty() &&
      now_ns - peer.spoke_ns > kPingPeriodNs) {
    Tell(peer, OfiFrameKind::kPing);
  }
}

// Whether somebody listens where a new peer is said to be.
bool OfiDomain::IsAnswered(OfiPeer& peer) {
  if (!peer.must_listen.has_value()) return true;
  const std::string where = DescribeEndpoint(peer.address);
  switch (peer.probe->Poll()) {
    case TcpProbe::Result::kListens:
      peer.probe.reset();
      peer.must_listen.reset();
      return true;
    case TcpProbe::Result::kRefused:
      Lose(peer, Status(StatusCode::kNotFound,
                        "stale ofi/tcp address: nobody listens at " + where +
                            "; its process has ended or closed its Domain"));
      return false;
    case TcpProbe::Result::kUnreachable:
      Lose(peer,
           Status(StatusCode::kUnavailable,
                  where + " cannot be reached from this host; choose "
                          "interfaces of one network with JAXFABRIC_NICS"));
      return false;
    case TcpProbe::Result::kPending:
      if (!peer.must_listen->Expired()) return false;
      Lose(peer, Status(StatusCode::kDeadlineExceeded,
                        "no answer from " + where +
                            " in time; is a firewall in between, or is it of "
                            "another network (JAXFABRIC_NICS)?"));
      return false;
  }
  return false;
}

void OfiDomain::ProbePeer(OfiPeer& peer, int64_t now_ns) {
  if (address_.provider != OfiProvider::kTcp) return;
  if (!peer.probe.has_value()) {
    if (now_ns - peer.stuck_ns < kStuckNs || now_ns < peer.next_probe_ns) {
      return;
    }
    peer.next_probe_ns = now_ns + kProbePeriodNs;
    peer.probe.emplace(std::span<const std::byte>(peer.address.endpoint.data(),
                                                  peer.address.endpoint_bytes));
  }
  const TcpProbe::Result result = peer.probe->Poll();
  if (result == TcpProbe::Result::kPending && now_ns < peer.next_probe_ns) {
    return;
  }
  peer.probe.reset();
  if (result == TcpProbe::Result::kRefused) {
    Lose(peer,
         Status(StatusCode::kUnavailable,
                "nobody listens at " + DescribeEndpoint(peer.address) +
                    " any more: its process has ended"),
         /*tell=*/false);
  }
}

void OfiDomain::SayBye() {
  for (auto& [nonce, peer] : peers_) {
    if (peer->state == OfiPeer::State::kReady) {
      Tell(*peer, OfiFrameKind::kBye);
    }
  }
  const auto busy = [this] {
    if (frames_waiting_ > 0) return true;
    for (const auto& [nonce, peer] : peers_) {
      if (peer->open > 0) return true;
    }
    return false;
  };
  const Deadline deadline = Deadline::AfterSeconds(kByeSeconds);
  OfiEvent event;
  while (busy() && !deadline.Expired()) {
    for (auto& [nonce, peer] : peers_) {
      while (PumpFrame(*peer)) continue;
    }
    if (endpoint_->Next(&event)) Handle(event);
  }
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
