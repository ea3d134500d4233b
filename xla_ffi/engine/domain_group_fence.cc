// DomainGroup: links that fail, what becomes of the writes on them, and how
// they come back.
//
// Both ends of a link go through the same steps, each for the writes that it
// posted:
//   kUp       a post fails, the Domain reports the peer lost, or the other end
//             says that it has fenced: the Domain fences the peer
//   kFencing  once all posts have ended, kFence names the keys of those that
//             may or may not have arrived; kFenced says what did; they count as
//             done, or are posted again over other links
//   kDown     both ends know: nothing of the old epoch is left anywhere. The
//             end with the smaller address tries the link from time to time
//   kProbing  added again; a message each way over the link itself proves it

#include <algorithm>
#include <map>
#include <utility>

#include "engine/domain_group.h"
#include "engine/immediate.h"

namespace jaxfabric {
namespace {

constexpr int64_t kMillisecondNs = 1'000'000;
// Time is looked at this often, and what was not answered said again.
constexpr int64_t kAttendNs = 2 * kMillisecondNs;
constexpr int64_t kRetryNs = 50 * kMillisecondNs;
// Then outcomes stay unknown.
constexpr int64_t kFenceGiveUpNs = 5'000 * kMillisecondNs;
constexpr int64_t kProbeGiveUpNs = 500 * kMillisecondNs;
constexpr int64_t kBackoffMinNs = 100 * kMillisecondNs;
constexpr int64_t kBackoffMaxNs = 5'000 * kMillisecondNs;
// A link that completes nothing for so long, while its peer answers over
// another, has failed.
constexpr int64_t kStallNs = 1'000 * kMillisecondNs;
constexpr uint64_t kOverflowed = 1;

Status OutcomeUnknown(const Link& link, const std::string& why) {
  return Status(
      StatusCode::kUnknown,
      "link " + std::to_string(link.number) + " failed (" +
          link.failure.message() +
          "), and what it had under way may have arrived or not: " + why);
}

}  // namespace

void DomainGroup::FailLink(const GroupPeerPtr& peer, Link& link,
                           const Status& status) {
  using State = Link::State;
  if (peer->over) return;
  if (link.state != State::kUp && link.state != State::kProbing) return;
  ++stats_[link.domain].links_failed;
  trace_.Mark([&] {
    return TraceEvent{.name = "link failed",
                      .label = status.message(),
                      .peer = peer->name,
                      .nic = link.domain,
                      .status = status.code()};
  });
  link.failure = status;
  link.state = peer->fences ? State::kFencing : State::kDead;
  // Without a fence, messages may be lost with the link.
  const bool lost = !peer->fences ||
                    std::none_of(peer->links.begin(), peer->links.end(),
                                 [](const Link& other) { return other.up(); });
  if (peer->fences) {
    domains_[link.domain]->FencePeer(link.id);
    link.resolved = link.answered = false;
    link.retry_ns = 0;
    now_ns_ = clock_ns_();
    link.give_up_ns = now_ns_ + kFenceGiveUpNs;
    link.backoff_ns =
        std::clamp(2 * link.backoff_ns, kBackoffMinNs, kBackoffMaxNs);
  }
  if (lost) LosePeer(*peer, status);
}

void DomainGroup::HandleFrame(const GroupPeerPtr& peer, const Link& from,
                              const LinkFrame& frame) {
  using Type = LinkFrame::Type;
  if (frame.type == Type::kRepair) return HandleRepair(peer, frame);
  if (frame.type == Type::kRepaired) {
    return EndRepair(*peer, static_cast<uint32_t>(frame.number), OkStatus());
  }
  if (frame.link >= peer->links.size()) {
    ++stats_[from.domain].malformed_dropped;
    return;
  }
  Link& link = peer->links[frame.link];
  switch (frame.type) {
    case Type::kFence:
      return HandleFence(peer, link, frame);
    case Type::kFenced:
      if (link.state == Link::State::kFencing && !link.resolved &&
          frame.epoch == link.epoch) {
        Resolve(peer, link, frame);
      }
      return;
    case Type::kPing: {
      LinkFrame pong = frame;
      pong.type = Type::kPong;
      return SendFrame(peer, pong, &link);
    }
    case Type::kPong:
      if (link.up() && !link.idle() &&
          frame.number == static_cast<uint64_t>(link.progress_ns)) {
        FailLink(peer, link,
                 Status(StatusCode::kDeadlineExceeded,
                        "it completed nothing for " +
                            std::to_string(kStallNs / kMillisecondNs) +
                            " ms while the peer answered over another"));
      }
      return;
    default:
      HandleProbing(peer, link, from, frame);
  }
}

// --- What is not known -------------------------------------------------------

void DomainGroup::HandleFence(const GroupPeerPtr& peer, Link& link,
                              const LinkFrame& frame) {
  if (frame.epoch == link.epoch) {
    FailLink(peer, link,
             Status(StatusCode::kUnavailable, "the peer has fenced it"));
    const bool known = std::any_of(
        fence_requests_.begin(), fence_requests_.end(), [&](const auto& item) {
          return item.peer == peer && item.frame.link == frame.link;
        });
    if (!peer->over && !known) fence_requests_.push_back({peer, frame});
  } else if (frame.epoch == link.fenced_epoch && !link.last_fenced.empty()) {
    if (const auto again = LinkFrame::Decode(link.last_fenced)) {
      SendFrame(peer, *again);
    }
  }
}

void DomainGroup::AnswerFences() {
  std::vector<FenceRequest> later;
  // Polling may bring further requests.
  for (size_t i = 0; i < fence_requests_.size(); ++i) {
    const FenceRequest request = fence_requests_[i];
    Link& link = request.peer->links[request.frame.link];
    if (!request.peer->over && !domains_[link.domain]->IsFenced(link.id)) {
      later.push_back(request);
      continue;
    }
    // What has arrived before counts.
    while (PollDomain(link.domain)) {
    }
    if (request.peer->over || link.up() || request.frame.epoch != link.epoch) {
      continue;
    }
    LinkFrame fenced;
    fenced.type = LinkFrame::Type::kFenced;
    fenced.link = link.number;
    fenced.epoch = link.epoch;
    fenced.number = 2 * link.messages_received +
                    (link.received.overflowed() ? kOverflowed : 0);
    for (const LinkCount& asked : request.frame.counts) {
      fenced.counts.push_back({asked.key, link.received.Units(asked.key)});
    }
    link.last_fenced = fenced.Encode();
    link.fenced_epoch = link.epoch;
    link.answered = true;
    SendFrame(request.peer, fenced);
    Settle(link);
  }
  fence_requests_ = std::move(later);
}

void DomainGroup::Resolve(const GroupPeerPtr& peer, Link& link,
                          const LinkFrame& frame) {
  std::map<uint32_t, std::vector<UncertainWrite>> by_key;
  for (UncertainWrite& write : std::exchange(link.uncertain, {})) {
    const Chunk& chunk = write.transfer->chunks[write.chunk];
    if (chunk.immediate) {
      by_key[KeyOfImmediate(*chunk.immediate).key].push_back(std::move(write));
    } else {
      PostAgain(*peer, link, write);  // nothing counts it
    }
  }
  for (auto& [key, writes] : by_key) {
    std::optional<uint32_t> held;
    for (const LinkCount& count : frame.counts) {
      if (count.key == key) held = count.units;
    }
    if ((frame.number & kOverflowed) != 0 || link.sent.overflowed()) {
      held = std::nullopt;
    }
    ResolveKey(peer, link, key, held, writes);
    if (peer->over) return;
  }
  if (!SendAgain(*peer, link, frame.number / 2)) return;
  link.resolved = true;
  Settle(link);
}

void DomainGroup::ResolveKey(const GroupPeerPtr& peer, Link& link, uint32_t key,
                             std::optional<uint32_t> held,
                             const std::vector<UncertainWrite>& writes) {
  uint32_t total = 0;
  bool all_live = true;
  for (const UncertainWrite& write : writes) {
    const Transfer& transfer = *write.transfer;
    total += KeyOfImmediate(*transfer.chunks[write.chunk].immediate).units;
    all_live &= transfer.status.ok();
  }
  const uint32_t missing = held ? link.sent.Units(key) - *held : 0;
  if (held && missing > total) {
    // The peer lacks what its NIC had said was there.
    for (const UncertainWrite& write : writes) {
      CloseWrite(*peer, write, link.failure);
    }
    for (const Link& other : peer->links) {
      if (other.up()) domains_[other.domain]->RemovePeer(other.id);
    }
    LosePeer(*peer, Status(StatusCode::kDataLoss,
                           "a link failed, and with it writes that had been "
                           "reported done: " +
                               link.failure.message()));
    return;
  }
  if (held && missing > 0 && missing < total && all_live) {
    StartRepair(peer, {key, missing}, writes);
  }
  for (const UncertainWrite& write : writes) {
    const bool live = write.transfer->status.ok();
    if (!held) {
      CloseWrite(*peer, write,
                 OutcomeUnknown(link, "the peer can no longer tell"));
    } else if (missing == 0 || !live) {
      CloseWrite(*peer, write, write.transfer->status);
    } else if (missing == total || all_live) {
      PostAgain(*peer, link, write);
    } else {
      // Some arrived, and perhaps only those of transfers that have failed.
      CloseWrite(*peer, write,
                 OutcomeUnknown(link, "a transfer that failed has its id"));
    }
  }
}

// Messages that the peer's NIC had, and the peer perhaps not: it drops those
// that it has seen. False if there may be one that it can no longer tell.
bool DomainGroup::SendAgain(GroupPeer& peer, Link& link, uint64_t received) {
  auto delivered = std::exchange(link.delivered, {});
  const uint64_t tells = peer.next_message > ReplayWindow::kNumbers
                             ? peer.next_message - ReplayWindow::kNumbers
                             : 0;
  for (; !delivered.empty(); delivered.pop_back()) {
    if (delivered.back().number > tells) {
      peer.open_messages.insert(delivered.back().number);
      peer.messages.push_front(std::move(delivered.back()));
    } else if (received < link.messages_sent) {
      LosePeer(peer, Status(StatusCode::kDataLoss,
                            "a link failed, and with it messages that had been "
                            "reported delivered: " +
                                link.failure.message()));
      return false;
    }
  }
  return true;
}

void DomainGroup::PostAgain(GroupPeer& peer, const Link& link,
                            const UncertainWrite& write) {
  if (!write.transfer->status.ok()) {
    CloseWrite(peer, write, write.transfer->status);
    return;
  }
  ++stats_[link.domain].writes_again;
  peer.waiting_bytes += write.transfer->chunks[write.chunk].bytes;
  peer.again.push_back(write);
}

// --- Back again --------------------------------------------------------------

void DomainGroup::Settle(Link& link) {
  if (link.state != Link::State::kFencing) return;
  if (!link.resolved || !link.answered) return;
  link.state = Link::State::kDown;
  ++link.epoch;
  link.sent.Clear();
  link.received.Clear();
  link.messages_sent = link.messages_received = 0;
  link.retry_ns = now_ns_ + link.backoff_ns;
}

// The peer did not say in time what it holds.
void DomainGroup::GiveUp(const GroupPeerPtr& peer, Link& link) {
  link.state = Link::State::kDead;
  if (!SendAgain(*peer, link, link.messages_sent)) return;
  for (const UncertainWrite& write : std::exchange(link.uncertain, {})) {
    CloseWrite(*peer, write,
               OutcomeUnknown(link, "the peer did not say in time"));
  }
}

// One end does. What of an address may change is less than what tells two
// Domains apart.
bool DomainGroup::Revives(const Link& link) const {
  return domains_[link.domain]->address().bytes < link.address.bytes;
}

bool DomainGroup::StartProbing(const GroupPeerPtr& peer, Link& link) {
  auto& names = names_[link.domain];
  const auto id = domains_[link.domain]->AddPeer(
      link.address, Deadline::AfterNanoseconds(kProbeGiveUpNs));
  // A peer may say where it is, but not be somebody else.
  if (!id.ok() || (names.contains(*id) && *id != link.id)) return false;
  names.erase(link.id);
  link.id = *id;
  names[*id] = {peer, link.number};
  link.state = Link::State::kProbing;
  link.retry_ns = now_ns_ + kRetryNs;
  link.give_up_ns = now_ns_ + kProbeGiveUpNs;
  link.open_bytes = 0;
  link.rate = RateMeter();
  return true;
}

void DomainGroup::HandleProbing(const GroupPeerPtr& peer, Link& link,
                                const Link& from, const LinkFrame& frame) {
  using State = Link::State;
  using Type = LinkFrame::Type;
  if (frame.epoch != link.epoch) return;
  LinkFrame answer;
  answer.link = link.number;
  answer.epoch = link.epoch;
  if (link.state == State::kDown && !frame.address.empty()) {
    link.address.bytes = frame.address;
  }
  if (frame.type == Type::kRevive) {
    const bool ready = link.state == State::kProbing ||
                       (link.state == State::kDown && StartProbing(peer, link));
    answer.type = Type::kRevived;
    answer.address = domains_[link.domain]->address().bytes;
    if (ready) SendFrame(peer, answer, &link);
  } else if (frame.type == Type::kRevived) {
    if (link.state != State::kDown || !StartProbing(peer, link)) return;
    answer.type = Type::kProbe;
    PostFrame(peer, link, answer);
  } else if (&from == &link && (link.state == State::kProbing || link.up())) {
    if (link.state == State::kProbing) ++stats_[link.domain].links_revived;
    link.state = State::kUp;
    answer.type = Type::kProbed;
    if (frame.type == Type::kProbe) PostFrame(peer, link, answer);
  }
}

void DomainGroup::Attend() {
  AnswerFences();
  now_ns_ = clock_ns_();
  if (now_ns_ < attend_ns_) return;
  attend_ns_ = now_ns_ + kAttendNs;
  for (size_t i = 0; i < turn_.size(); ++i) {
    const GroupPeerPtr peer = turn_[i];
    if (!peer->fences || peer->over) continue;
    for (Link& link : peer->links) {
      if (!peer->over) AttendLink(peer, link);
    }
    std::vector<uint32_t> late;
    for (auto& [number, repair] : peer->repairs) {
      if (now_ns_ >= repair.give_up_ns) late.push_back(number);
      if (now_ns_ < repair.retry_ns) continue;
      repair.retry_ns = now_ns_ + kRetryNs;
      SendFrame(peer, repair.frame);
    }
    for (const uint32_t number : late) {
      EndRepair(*peer, number,
                Status(StatusCode::kUnknown,
                       "a link failed, and the peer did not say in time that "
                       "it has what was sent again"));
    }
  }
}

void DomainGroup::AttendLink(const GroupPeerPtr& peer, Link& link) {
  using State = Link::State;
  LinkFrame frame;
  frame.link = link.number;
  frame.epoch = link.epoch;
  if (link.up()) {
    if (link.idle() || now_ns_ - link.progress_ns < kStallNs ||
        now_ns_ - link.pinged_ns < kRetryNs) {
      return;
    }
    link.pinged_ns = now_ns_;
    frame.type = LinkFrame::Type::kPing;
    frame.number = static_cast<uint64_t>(link.progress_ns);
    SendFrame(peer, frame, &link);
  } else if (link.state == State::kProbing) {
    if (now_ns_ < link.give_up_ns) {
      // The Domain may not have been ready for the first.
      if (now_ns_ < link.retry_ns || !Revives(link)) return;
      link.retry_ns = now_ns_ + kRetryNs;
      frame.type = LinkFrame::Type::kProbe;
      return PostFrame(peer, link, frame);
    }
    FailLink(peer, link,
             Status(StatusCode::kDeadlineExceeded, "its probe got lost"));
  } else if (link.state == State::kFencing) {
    if (now_ns_ >= link.give_up_ns) return GiveUp(peer, link);
    if (link.resolved || now_ns_ < link.retry_ns || link.open_writes > 0 ||
        link.open_messages > 0) {
      return;
    }
    link.retry_ns = now_ns_ + kRetryNs;
    frame.type = LinkFrame::Type::kFence;
    for (const UncertainWrite& write : link.uncertain) {
      const auto& immediate = write.transfer->chunks[write.chunk].immediate;
      if (!immediate) continue;
      const LinkCount asked = {KeyOfImmediate(*immediate).key, 0};
      if (std::find(frame.counts.begin(), frame.counts.end(), asked) ==
          frame.counts.end()) {
        frame.counts.push_back(asked);
      }
    }
    SendFrame(peer, frame, &link);
  } else if (link.state == State::kDown && now_ns_ >= link.retry_ns &&
             Revives(link)) {
    link.backoff_ns =
        std::clamp(2 * link.backoff_ns, kBackoffMinNs, kBackoffMaxNs);
    link.retry_ns = now_ns_ + link.backoff_ns;
    frame.type = LinkFrame::Type::kRevive;
    frame.address = domains_[link.domain]->address().bytes;
    SendFrame(peer, frame, &link);
  }
}

}  // namespace jaxfabric
