#include "transport/fake_link.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "transport/fake_network.h"

namespace jaxfabric {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr uint64_t kLateMaxNs = 1'000'000;

}  // namespace

bool PaceFakeDomain(const std::string& network, const NetAddr& domain,
                    double bytes_per_s) {
  const auto found = FakeNetwork::Find(network);
  return found != nullptr && found->Pace(domain, bytes_per_s);
}

bool StallFakeLink(const std::string& network, const NetAddr& a,
                   const NetAddr& b) {
  const auto found = FakeNetwork::Find(network);
  return found != nullptr && found->Stall(a, b);
}

bool CutFakeLink(const std::string& network, const NetAddr& a, const NetAddr& b,
                 const FakeCut& cut) {
  const auto found = FakeNetwork::Find(network);
  return found != nullptr && found->Cut(a, b, cut);
}

bool HealFakeLink(const std::string& network, const NetAddr& a,
                  const NetAddr& b) {
  const auto found = FakeNetwork::Find(network);
  return found != nullptr && found->Heal(a, b);
}

std::optional<int64_t> NextFakeEventNs(const std::string& network) {
  const auto found = FakeNetwork::Find(network);
  return found == nullptr ? std::nullopt : found->NextEventNs();
}

FakePort* FakeNetwork::FindLocked(const NetAddr& address) {
  const StatusOr<FakeAddress> parsed = ParseLocked(address);
  return parsed.ok() ? FindLocked(parsed->port) : nullptr;
}

FakeNetwork::PortPair FakeNetwork::PairOf(uint64_t a, uint64_t b) {
  return {std::min(a, b), std::max(a, b)};
}

FakeNetwork::LinkState FakeNetwork::LinkLocked(uint64_t a, uint64_t b) const {
  const auto found = links_.find(PairOf(a, b));
  return found == links_.end() ? LinkState::kUp : found->second;
}

bool FakeNetwork::Pace(const NetAddr& domain, double bytes_per_s) {
  std::lock_guard<std::mutex> lock(mutex_);
  FakePort* const port = FindLocked(domain);
  if (port == nullptr) return false;
  port->bytes_per_s = bytes_per_s;
  return true;
}

bool FakeNetwork::Stall(const NetAddr& a, const NetAddr& b) {
  std::lock_guard<std::mutex> lock(mutex_);
  const FakePort* const one = FindLocked(a);
  const FakePort* const other = FindLocked(b);
  if (one == nullptr || other == nullptr) return false;
  const PortPair pair = PairOf(one->id, other->id);
  links_[pair] = LinkState::kStalled;
  RescheduleLocked(pair, kNever);
  return true;
}

bool FakeNetwork::Heal(const NetAddr& a, const NetAddr& b) {
  std::lock_guard<std::mutex> lock(mutex_);
  const FakePort* const one = FindLocked(a);
  const FakePort* const other = FindLocked(b);
  if (one == nullptr || other == nullptr) return false;
  const PortPair pair = PairOf(one->id, other->id);
  if (links_[pair] == LinkState::kStalled) RescheduleLocked(pair, NowNs());
  links_.erase(pair);
  RingLocked();
  return true;
}

// All events of a link fall due at `due_ns`.
void FakeNetwork::RescheduleLocked(PortPair pair, int64_t due_ns) {
  std::vector<Event> moved;
  std::erase_if(events_, [&](auto& entry) {
    if (PairOf(entry.second.post->from, entry.second.post->to) != pair) {
      return false;
    }
    moved.push_back(std::move(entry.second));
    return true;
  });
  for (Event& event : moved) events_.emplace(due_ns, std::move(event));
}

bool FakeNetwork::Cut(const NetAddr& a, const NetAddr& b, const FakeCut& cut) {
  std::lock_guard<std::mutex> lock(mutex_);
  const FakePort* const one = FindLocked(a);
  const FakePort* const other = FindLocked(b);
  if (one == nullptr || other == nullptr) return false;
  const PortPair pair = PairOf(one->id, other->id);
  links_[pair] = LinkState::kCut;
  std::vector<std::shared_ptr<FakePost>> posts;
  for (const auto& [due_ns, event] : events_) {
    const auto& post = event.post;
    const bool known =
        std::find(posts.begin(), posts.end(), post) != posts.end();
    if (PairOf(post->from, post->to) == pair && !known) posts.push_back(post);
  }
  for (const auto& post : posts) CutPostLocked(post, cut);
  std::erase_if(events_,
                [](const auto& entry) { return entry.second.post->failed; });
  if (cut.report_lost) {
    ReportLostLocked(pair.first, pair.second, "the link was cut");
    ReportLostLocked(pair.second, pair.first, "the link was cut");
  }
  RingLocked();
  return true;
}

void FakeNetwork::CutPostLocked(const std::shared_ptr<FakePost>& post,
                                const FakeCut& cut) {
  enum class Fate { kLost, kLanded, kLandedPartly, kLandsLate };
  std::vector<Fate> fates = {Fate::kLost};
  if (cut.may_land) fates.push_back(Fate::kLanded);
  if (cut.may_land_partly) fates.push_back(Fate::kLandedPartly);
  if (cut.may_land_late) fates.push_back(Fate::kLandsLate);
  // What its initiator was told to have arrived has arrived.
  const Fate fate =
      post->answered ? Fate::kLanded : fates[random_() % fates.size()];
  const Status why(StatusCode::kUnavailable, "the link was cut (CutFakeLink)");
  if (fate == Fate::kLandsLate) {
    // Its bytes are in the network: the source may change from now on.
    post->late_bytes.assign(post->local.data, post->local.data + post->length);
    post->local.data = post->late_bytes.data();
    AnswerLocked(*post, why);
    post->late = true;
    const int64_t due_ns =
        NowNs() + static_cast<int64_t>(random_() % kLateMaxNs);
    std::vector<Event> moved;
    std::erase_if(events_, [&](auto& entry) {
      if (entry.second.post != post) return false;
      moved.push_back(std::move(entry.second));
      return true;
    });
    for (Event& event : moved) events_.emplace(due_ns, std::move(event));
    return;
  }
  if (fate != Fate::kLost) {
    LandLocked(post, /*all=*/fate == Fate::kLanded);
  }
  FailLocked(*post, why);
}

// Stores what is on its way of a write, or at random some of it, and gives
// notice if that was all.
void FakeNetwork::LandLocked(const std::shared_ptr<FakePost>& post, bool all) {
  std::vector<Event> pieces;
  for (const auto& [due_ns, event] : events_) {
    if (event.post == post && event.kind == Event::Kind::kPiece) {
      pieces.push_back(event);
    }
  }
  const bool given = post->noticed;
  for (const Event& piece : pieces) {
    if (all || random_() % 2 == 0) StorePieceLocked(piece);
  }
  if (all && !given && (post->immediate || post->message)) {
    DeliverNoticeLocked(post);
  }
}

void FakeNetwork::FenceLocked(FakePort& port, uint64_t other) {
  const Status gone(StatusCode::kUnavailable,
                    "the peer has removed this Domain");
  for (auto& [due_ns, event] : events_) {
    FakePost& post = *event.post;
    if (post.from != other || post.to != port.id || post.failed) continue;
    // What its poster was told to have arrived has arrived.
    if (post.answered && !post.late && !post.noticed) {
      DeliverNoticeLocked(event.post);
    }
    FailLocked(post, gone);
  }
  std::erase_if(events_,
                [](const auto& entry) { return entry.second.post->failed; });
  const auto poster = ports_.find(other);
  if (poster == ports_.end()) return;
  for (FakePort::Peer& known : poster->second->peers) {
    if (known.port == port.id && known.lost.ok()) known.lost = gone;
  }
}

void FakeNetwork::ReportLostLocked(uint64_t port, uint64_t other,
                                   const std::string& why) {
  const auto found = ports_.find(port);
  if (found == ports_.end()) return;
  FakePort& told = *found->second;
  for (PeerId id = 0; id < told.peers.size(); ++id) {
    FakePort::Peer& known = told.peers[id];
    if (known.port != other || known.removed || known.told_lost) continue;
    known.told_lost = true;
    known.lost = Status(StatusCode::kUnavailable, why);
    Completion completion;
    completion.kind = Completion::Kind::kPeerLost;
    completion.peer = id;
    completion.status = known.lost;
    PushLocked(told, std::move(completion), nullptr);
  }
}

}  // namespace jaxfabric
