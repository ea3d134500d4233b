// OfiDomain: another endpoint in the place of the present one.
//
// libfabric cannot take back what is posted to one peer, nor keep out what one
// peer has posted: only closing the endpoint does either, and for all peers at
// once. So the others pause first:
//
//   kPause   to all peers; from now on nothing is posted to anybody
//   kPaused  each peer, once all that it had posted here has ended
//            Then, or when those who are silent have had time enough, all that
//            has come is read, and the endpoint is closed: what was open ends
//            with an error, and peers that are to be cut off are forgotten.
//   kHello   from the new endpoint, whose address has a higher generation
//
// Of two Domains that do this at once, the one with the smaller nonce goes
// first: else each would greet the other where it is no longer. The other waits
// for it longer than it waits for those who are silent.

#include "transport/ofi_domain.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <algorithm>
#include <utility>

namespace jaxfabric {
namespace {

constexpr int64_t kMillisecond = 1'000'000;
// So long, peers may take to pause. A peer that lives takes one round trip.
constexpr int64_t kPatienceNs = 500 * kMillisecond;
// The same for one that loses what it was sent when the endpoint is closed: its
// process may be busy, or stopped for a moment. Others wait meanwhile.
constexpr int64_t kOpenPatienceNs = 2000 * kMillisecond;
// The same for one that renews its own endpoint first, and waits for others;
// and for all together. Whoever fences gives up only after that.
constexpr int64_t kTurnPatienceNs = 3000 * kMillisecond;
// The same for those that are to be cut off: mostly they cannot hear us.
constexpr int64_t kCondemnedPatienceNs = 100 * kMillisecond;
// A device says that a write is done a little before its target can see it.
constexpr int64_t kCalmNs = 2 * kMillisecond;

}  // namespace

void OfiDomain::FencePeer(PeerId id) {
  if (!caps_.removal_fences) return RemovePeer(id);
  if (id >= ids_.size() || ids_[id] == nullptr) return;
  OfiPeer& peer = *std::exchange(ids_[id], nullptr);
  peer.loss_due = false;
  // Then it has posted nothing, or what it posts comes to nobody.
  if (stopped_ || (!peer.greeted && peer.open == 0)) {
    peer.id = kUnknownPeer;
    Lose(peer, Status(StatusCode::kCancelled, "the peer was removed"));
    return;
  }
  // What has landed is polled under its id until then.
  peer.condemned = true;
  fencing_.insert(id);
  BeginRenewal();
}

// They are not greeted by the new endpoint, and do not know where it is. Those
// that are forgotten by now need nothing else.
void OfiDomain::FenceRemoved() {
  if (!caps_.removal_fences || stopped_) return;
  for (auto& [nonce, peer] : peers_) {
    peer->condemned |= peer->id == kUnknownPeer && peer->removed_ns != 0;
  }
  fencing_removed_ = true;
  BeginRenewal();
}

void OfiDomain::BeginRenewal() {
  if (renewing_ || stopped_) return;
  renewing_ = true;
  asked_again_ = false;
  AskToPause();
}

void OfiDomain::AskToPause() {
  renewal_ns_ = calm_ns_ = looked_ns_ = MonotonicNanoseconds();
  for (auto& [nonce, peer] : peers_) {
    peer->has_paused = false;
    if (peer->state == OfiPeer::State::kReady) {
      Tell(*peer, OfiFrameKind::kPause, address_.generation);
    }
  }
  doorbell_->Ring();
}

// Whether nobody posts here any more, as far as that can be had.
bool OfiDomain::IsQuiet(int64_t now_ns) const {
  if (now_ns - renewal_ns_ >= kTurnPatienceNs) return true;
  return std::all_of(peers_.begin(), peers_.end(), [&](const auto& item) {
    const OfiPeer& peer = *item.second;
    if (peer.state == OfiPeer::State::kLost) return true;
    if (peer.state == OfiPeer::State::kGreeting && !peer.greeted &&
        peer.open == 0) {
      return true;
    }
    if (peer.has_paused && peer.open == 0) return true;
    // Nobody counts any more what somebody posts who was merely removed.
    if (peer.condemned && !fencing_.contains(peer.id)) return true;
    const int64_t waited_ns = now_ns - std::max(renewal_ns_, peer.moved_ns);
    if (peer.condemned) return waited_ns >= kCondemnedPatienceNs;
    const bool its_turn = peer.pauses_us && !peer.pause_due;
    return !its_turn &&
           waited_ns >= (peer.posts > 0 ? kOpenPatienceNs : kPatienceNs);
  });
}

void OfiDomain::TendRenewal() {
  const int64_t now_ns = MonotonicNanoseconds();
  // While we were stopped, nobody was silent; and who had paused may be
  // elsewhere by now, and on its way to say so.
  const bool slept = now_ns - std::exchange(looked_ns_, now_ns) >= kPatienceNs;
  if (slept && !std::exchange(asked_again_, true)) AskToPause();
  if (!IsQuiet(now_ns)) return;
  const bool calm = now_ns - calm_ns_ >= kCalmNs;
  if (calm || now_ns - renewal_ns_ >= kTurnPatienceNs + kCalmNs) Renew();
}

void OfiDomain::Renew() {
  CloseEndpoint();
  Status opened = endpoint_->Reopen();
  if (opened.ok()) {
    stopped_ = false;
    ++address_.generation;
    TakeName();
    opened = Listen();
  }
  if (!opened.ok()) {
    broken_ = opened.Annotate("the endpoint could not be opened again");
    for (auto& [nonce, peer] : peers_) Lose(*peer, broken_, /*tell=*/false);
    return;
  }
  WelcomeBack();
}

void OfiDomain::CloseEndpoint() {
  renewing_ = false;
  if (watched_fd_ >= 0) bell_->Remove(std::exchange(watched_fd_, -1));
  endpoint_->Stop();
  stopped_ = true;
  // What came up to that moment counts; what is still open is known to be over.
  OfiEvent event;
  while (endpoint_->Next(&event)) Handle(event);
  for (OfiOperation* operation : operations_->Posted()) {
    operation->peer->failures = 0;  // it is not to blame
    OnFailed(operation,
             "its endpoint was closed to take back what did not end");
  }
  unposted_ = operations_->receives();
  by_source_.clear();
  fencing_.clear();
  fencing_removed_ = false;
  std::erase_if(peers_, [this](const auto& item) {
    const OfiPeer& peer = *item.second;
    const bool gone = peer.condemned || (peer.state == OfiPeer::State::kLost &&
                                         peer.id == kUnknownPeer);
    if (gone) frames_waiting_ -= peer.frames.size();
    return gone;
  });
}

// Nobody who stays knows the new endpoint yet.
void OfiDomain::WelcomeBack() {
  for (auto& [nonce, peer] : peers_) {
    peer->former.clear();
    peer->fi_address = FI_ADDR_NOTAVAIL;
    if (peer->state == OfiPeer::State::kLost) {
      frames_waiting_ -= peer->frames.size();  // a farewell that finds no way
      peer->frames.clear();
      continue;
    }
    if (nonce == address_.nonce) peer->address = address_;
    if (const Status inserted = Insert(*peer); !inserted.ok()) {
      Lose(*peer, inserted, /*tell=*/false);
      continue;
    }
    DropStaleFrames(*peer);
    peer->state = OfiPeer::State::kGreeting;
    peer->greeted = false;
    peer->pause_due = peer->pauses_us;  // from here, it has to hear it anew
    peer->repeat_ns = peer->stuck_ns = 0;
    peer->heard_ns = MonotonicNanoseconds();
  }
  tended_ns_ = 0;  // the next Poll says hello
}

// --- The other side of it ----------------------------------------------------

void OfiDomain::OnPause(OfiPeer& peer, uint64_t generation) {
  if (generation < peer.address.generation) return;  // it is back already
  if (!peer.pauses_us) peer.pauses_us_ns = MonotonicNanoseconds();
  peer.pauses_us = peer.pause_due = true;
  AnswerPause(peer);
}

void OfiDomain::AnswerPause(OfiPeer& peer) {
  if (!peer.pause_due || peer.posts > 0) return;
  const bool we_go_first =
      renewing_ && !peer.condemned && address_.nonce < peer.address.nonce;
  if (we_go_first || peer.state != OfiPeer::State::kReady) return;
  peer.pause_due = false;
  Tell(peer, OfiFrameKind::kPaused, peer.address.generation);
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
