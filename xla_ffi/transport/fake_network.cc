#include "transport/fake_network.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <utility>

namespace jaxfabric {
namespace {

constexpr uint64_t kFakeMagic = 0x314b'4146'4652'584a;  // "JXRFFAK1"

struct Registry {
  std::mutex mutex;
  std::map<std::string, std::weak_ptr<FakeNetwork>> networks;
  uint64_t next_id = 1;
};

Registry& TheRegistry() {
  static Registry* registry = new Registry();
  return *registry;
}

}  // namespace

std::shared_ptr<FakeNetwork> FakeNetwork::Join(const FakeOptions& options) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  std::weak_ptr<FakeNetwork>& entry = registry.networks[options.network];
  std::shared_ptr<FakeNetwork> network = entry.lock();
  if (network == nullptr) {
    network = std::make_shared<FakeNetwork>(registry.next_id++, options);
    entry = network;
  }
  return network;
}

std::shared_ptr<FakeNetwork> FakeNetwork::Find(const std::string& name) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.networks.find(name);
  return found == registry.networks.end() ? nullptr : found->second.lock();
}

FakeNetwork::FakeNetwork(uint64_t id, const FakeOptions& options)
    : id_(id), clock_ns_(options.clock_ns), random_(options.seed) {
  // Whoever has another clock polls by it.
  if (clock_ns_ == MonotonicNanoseconds) {
    timer_ = std::thread([this] { RunTimer(); });
  }
}

FakeNetwork::~FakeNetwork() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  timer_wakes_.notify_all();
  if (timer_.joinable()) timer_.join();
}

void FakeNetwork::Enter(FakePort* port) {
  std::lock_guard<std::mutex> lock(mutex_);
  port->id = next_port_++;
  ports_[port->id] = port;
}

void FakeNetwork::Leave(FakePort* port) {
  std::lock_guard<std::mutex> lock(mutex_);
  ports_.erase(port->id);
  LosePortLocked(port->id, Status(StatusCode::kUnavailable,
                                  "the peer closed its Domain; nothing more "
                                  "comes from it"));
  port->inbox.clear();
}

bool FakeNetwork::Kill(const NetAddr& address) {
  std::lock_guard<std::mutex> lock(mutex_);
  const StatusOr<FakeAddress> parsed = ParseLocked(address);
  FakePort* const port = parsed.ok() ? FindLocked(parsed->port) : nullptr;
  if (port == nullptr) return false;
  port->dead = true;
  LosePortLocked(port->id, Status(StatusCode::kUnavailable,
                                  "the peer was killed (KillFakeDomain)"));
  return true;
}

NetAddr FakeNetwork::AddressOf(const FakePort& port) const {
  const FakeAddress address = {kFakeMagic, id_, port.id};
  NetAddr net_addr;
  net_addr.bytes.resize(sizeof(address));
  std::memcpy(net_addr.bytes.data(), &address, sizeof(address));
  return net_addr;
}

StatusOr<FakeAddress> FakeNetwork::ParseLocked(const NetAddr& net_addr) const {
  const std::string& bytes = net_addr.bytes;
  if (bytes.size() < sizeof(kFakeMagic) ||
      std::memcmp(bytes.data(), &kFakeMagic, sizeof(kFakeMagic)) != 0) {
    return Status(StatusCode::kInvalidArgument,
                  "not an address of the fake transport");
  }
  FakeAddress address;
  if (bytes.size() != sizeof(address)) {
    return Status(StatusCode::kInvalidArgument,
                  "malformed fake address: it has " +
                      std::to_string(bytes.size()) + " bytes where " +
                      std::to_string(sizeof(address)) + " are due");
  }
  std::memcpy(&address, bytes.data(), sizeof(address));
  if (address.network != id_) {
    return Status(StatusCode::kFailedPrecondition,
                  "the address belongs to another fake network");
  }
  return address;
}

FakePort* FakeNetwork::FindLocked(uint64_t port) {
  const auto found = ports_.find(port);
  if (found == ports_.end() || found->second->dead) return nullptr;
  return found->second;
}

StatusOr<uint64_t> FakeNetwork::AddRegion(FakePort& port,
                                          const MemoryRegion& region) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t key = random_() << 32 | next_key_++;
  port.regions.Add(key, region);
  return key;
}

Status FakeNetwork::RemoveRegion(FakePort& port, uint64_t key) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (port.regions.Remove(key)) return OkStatus();
  return Status(StatusCode::kNotFound,
                "the key to unregister is not registered with this Domain");
}

StatusOr<PeerId> FakeNetwork::AddPeer(FakePort& port, const NetAddr& net_addr) {
  std::lock_guard<std::mutex> lock(mutex_);
  JF_ASSIGN_OR_RETURN(const FakeAddress address, ParseLocked(net_addr));
  for (PeerId id = 0; id < port.peers.size(); ++id) {
    const FakePort::Peer& peer = port.peers[id];
    if (peer.port != address.port || peer.removed) continue;
    JF_RETURN_IF_ERROR(peer.lost);
    return id;
  }
  if (LinkLocked(port.id, address.port) == LinkState::kCut) {
    return Status(StatusCode::kUnavailable, "the link is cut (CutFakeLink)");
  }
  const FakePort* const target = FindLocked(address.port);
  if (target == nullptr) {
    return Status(StatusCode::kNotFound,
                  "stale fake address: its Domain was closed or killed");
  }
  if (target->options->job_secret != port.options->job_secret) {
    return Status(StatusCode::kUnauthenticated,
                  "the peer belongs to another job: the job secrets differ");
  }
  port.peers.emplace_back();
  port.peers.back().port = address.port;
  return static_cast<PeerId>(port.peers.size() - 1);
}

void FakeNetwork::RemovePeer(FakePort& port, PeerId id) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (id >= port.peers.size() || port.peers[id].removed) return;
  if (port.options->removal_fences) FenceLocked(port, port.peers[id].port);
  port.peers[id].removed = true;
  for (auto& [due_ns, event] : events_) {
    // What is answered has arrived, as far as this Domain was told.
    if (event.post->from == port.id && event.post->peer == id &&
        !event.post->answered) {
      FailLocked(*event.post,
                 Status(StatusCode::kCancelled, "the peer was removed"));
    }
  }
  std::erase_if(events_,
                [](const auto& entry) { return entry.second.post->failed; });
  std::erase_if(port.inbox, [id](const FakePort::Arrival& arrival) {
    return arrival.completion.kind == Completion::Kind::kPeerLost &&
           arrival.completion.peer == id;
  });
}

StatusOr<Posted> FakeNetwork::Post(FakePort& port,
                                   std::shared_ptr<FakePost> draft) {
  std::lock_guard<std::mutex> lock(mutex_);
  // Let go of before the lock: the last owner of a post changes its count.
  const std::shared_ptr<FakePost> post = std::move(draft);
  if (port.dead) {
    return Status(StatusCode::kUnavailable, "this Domain was killed");
  }
  if (post->peer >= port.peers.size() || port.peers[post->peer].removed) {
    return Status(
        StatusCode::kInvalidArgument,
        "no peer " + std::to_string(post->peer) + " (removed, or never added)");
  }
  const FakePort::Peer& peer = port.peers[post->peer];
  JF_RETURN_IF_ERROR(peer.lost);
  if (post->length > 0) {
    JF_RETURN_IF_ERROR(port.regions.CheckSource(post->local, post->length));
  }
  const double dice = static_cast<double>(random_() >> 11) * 0x1p-53;
  if (*peer.open >= port.options->queue_depth ||
      dice < port.options->again_share) {
    return Posted::kAgain;
  }
  post->from = port.id;
  post->to = peer.port;
  post->open = peer.open;
  ++*post->open;
  if (LinkLocked(post->from, post->to) == LinkState::kCut) {
    FailLocked(*post, Status(StatusCode::kUnavailable,
                             "the link is cut (CutFakeLink)"));
  } else {
    CutLocked(post, port.options->pieces_max);
  }
  return Posted::kPosted;
}

// Schedules the pieces of a write; what has none is finished already.
void FakeNetwork::CutLocked(const std::shared_ptr<FakePost>& post,
                            uint32_t pieces_max) {
  if (post->length == 0) {
    FinishLocked(post);
    return;
  }
  std::vector<uint64_t> cuts = {0, post->length};
  const uint64_t pieces = 1 + random_() % std::max<uint32_t>(1, pieces_max);
  while (cuts.size() <= pieces) cuts.push_back(random_() % post->length);
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  post->pieces_left = static_cast<uint32_t>(cuts.size() - 1);
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    ScheduleLocked({Event::Kind::kPiece, post, cuts[i], cuts[i + 1] - cuts[i]});
  }
}

void FakeNetwork::FinishLocked(const std::shared_ptr<FakePost>& post) {
  ScheduleLocked({Event::Kind::kAnswer, post, 0, 0});
  if (post->immediate.has_value() || post->message.has_value()) {
    ScheduleLocked({Event::Kind::kNotice, post, 0, 0});
  }
}

void FakeNetwork::ScheduleLocked(Event event) {
  FakePort* const from = FindLocked(event.post->from);
  const int64_t delay_max_ns =
      from == nullptr ? 0 : std::max<int64_t>(0, from->options->delay_max_ns);
  const auto delay_ns = static_cast<int64_t>(
      random_() % (static_cast<uint64_t>(delay_max_ns) + 1));
  int64_t leaves_ns = NowNs();
  if (from != nullptr && from->bytes_per_s > 0 &&
      event.kind == Event::Kind::kPiece) {
    const double takes_s =
        static_cast<double>(event.length) / from->bytes_per_s;
    from->free_ns = std::max(from->free_ns, leaves_ns) +
                    static_cast<int64_t>(takes_s * 1e9);
    leaves_ns = from->free_ns;
  }
  const int64_t due_ns = leaves_ns + delay_ns;
  if (LinkLocked(event.post->from, event.post->to) == LinkState::kStalled) {
    events_.emplace(std::numeric_limits<int64_t>::max(), std::move(event));
    return;
  }
  const bool now = due_ns <= NowNs();
  events_.emplace(due_ns, std::move(event));
  if (now) {
    RingLocked();
  } else {
    timer_wakes_.notify_one();
  }
}

size_t FakeNetwork::Poll(FakePort& port, std::span<Completion> completions) {
  std::lock_guard<std::mutex> lock(mutex_);
  DeliverDueLocked();
  size_t count = 0;
  for (; count < completions.size() && !port.inbox.empty(); ++count) {
    completions[count] = std::move(port.inbox.front().completion);
    port.inbox.pop_front();
  }
  return count;
}

std::optional<int64_t> FakeNetwork::NextEventNs() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (events_.empty()) return std::nullopt;
  const int64_t due_ns = events_.begin()->first;
  if (due_ns == std::numeric_limits<int64_t>::max()) return std::nullopt;
  return due_ns;
}

void FakeNetwork::DeliverDueLocked() {
  for (;;) {
    const auto end = events_.upper_bound(NowNs());
    if (end == events_.begin()) return;
    std::vector<Event> due;
    for (auto entry = events_.begin(); entry != end; ++entry) {
      due.push_back(std::move(entry->second));
    }
    events_.erase(events_.begin(), end);
    std::shuffle(due.begin(), due.end(), random_);
    for (const Event& event : due) DeliverLocked(event);
  }
}

void FakeNetwork::DeliverLocked(const Event& event) {
  FakePost& post = *event.post;
  if (post.failed) return;
  FakePort* const from = FindLocked(post.from);
  FakePort* const to = FindLocked(post.to);
  // Both live: whoever goes takes its events along (LosePortLocked).
  JF_CHECK(from != nullptr && to != nullptr);
  Completion answer;
  switch (event.kind) {
    case Event::Kind::kPiece:
      DeliverPieceLocked(event);
      return;
    case Event::Kind::kAnswer:
      if (std::exchange(post.answered, true)) return;
      answer.kind = post.message.has_value() ? Completion::Kind::kSendDone
                                             : Completion::Kind::kWriteDone;
      answer.peer = post.peer;
      answer.cookie = post.cookie;
      PushLocked(*from, std::move(answer), nullptr);
      return;
    case Event::Kind::kNotice:
      DeliverNoticeLocked(event.post);
      return;
  }
}

void FakeNetwork::DeliverNoticeLocked(const std::shared_ptr<FakePost>& post) {
  FakePort* const to = FindLocked(post->to);
  post->noticed = true;
  Completion notice;
  for (PeerId id = 0; id < to->peers.size(); ++id) {
    if (to->peers[id].port == post->from && !to->peers[id].removed) {
      notice.peer = id;
    }
  }
  if (post->message.has_value()) {
    notice.kind = Completion::Kind::kMessage;
    notice.message = *post->message;
  } else {
    notice.kind = Completion::Kind::kImmediate;
    notice.immediate = *post->immediate;
    if (!to->options->immediate_names_peer) notice.peer = kUnknownPeer;
  }
  PushLocked(*to, std::move(notice), post);
}

void FakeNetwork::DeliverPieceLocked(const Event& event) {
  FakePost& post = *event.post;
  const RegionTable& sources = FindLocked(post.from)->regions;
  if (const Status source = sources.CheckSource(post.local, post.length);
      !post.late && !source.ok()) {
    FailLocked(post, source.Annotate("unregistered while in use"));
    return;
  }
  const MemoryRegion* const region =
      FindLocked(post.to)->regions.Find(post.remote.key);
  if (region == nullptr) {
    FailLocked(post, Status(StatusCode::kNotFound,
                            "the peer's Domain has no memory registered under "
                            "this key (any more)"));
    return;
  }
  if (!InRange(post.remote.offset, post.length, region->length)) {
    FailLocked(
        post,
        Status(StatusCode::kOutOfRange,
               "the target of a write of " + std::to_string(post.length) +
                   " bytes at offset " + std::to_string(post.remote.offset) +
                   " lies outside the peer's region of " +
                   std::to_string(region->length) + " bytes"));
    return;
  }
  StorePieceLocked(event);
  if (--post.pieces_left == 0) FinishLocked(event.post);
}

void FakeNetwork::StorePieceLocked(const Event& event) {
  const FakePost& post = *event.post;
  const MemoryRegion* const region =
      FindLocked(post.to)->regions.Find(post.remote.key);
  if (region == nullptr) return;
  std::memcpy(region->base + post.remote.offset + event.offset,
              post.local.data + event.offset, event.length);
}

void FakeNetwork::PushLocked(FakePort& port, Completion completion,
                             std::shared_ptr<FakePost> notice_of) {
  port.inbox.push_back({std::move(completion), std::move(notice_of)});
  port.doorbell->Ring();
}

// Ends `post` where it is, with kError if its cookie has not come back.
void FakeNetwork::FailLocked(FakePost& post, const Status& why) {
  if (post.failed) return;
  post.failed = true;
  AnswerLocked(post, why);
}

// Gives the cookie of `post` back with kError, if it has not come back.
void FakeNetwork::AnswerLocked(FakePost& post, const Status& why) {
  const auto from = ports_.find(post.from);
  if (post.answered || from == ports_.end()) return;
  post.answered = true;
  Completion completion;
  completion.kind = Completion::Kind::kError;
  completion.peer = post.peer;
  completion.cookie = post.cookie;
  completion.status = why;
  PushLocked(*from->second, std::move(completion), nullptr);
}

void FakeNetwork::LosePortLocked(uint64_t port, const Status& why) {
  for (auto& [due_ns, event] : events_) {
    FakePost& post = *event.post;
    if (post.from != port && post.to != port) continue;
    // Its poster was told that it has arrived.
    if (post.answered && !post.failed && !post.late && !post.noticed &&
        FindLocked(post.to) != nullptr) {
      DeliverNoticeLocked(event.post);
    }
    FailLocked(post, why);
  }
  std::erase_if(events_,
                [](const auto& entry) { return entry.second.post->failed; });
  for (auto& [id, other] : ports_) {
    if (id != port) ReportLostLocked(id, port, why.message());
  }
}

void FakeNetwork::RingLocked() {
  for (const auto& [id, port] : ports_) port->doorbell->Ring();
}

// Wakes the Domains' owners when something falls due: delivery itself happens
// in Poll, but an owner that sleeps does not poll.
void FakeNetwork::RunTimer() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    const auto next = events_.upper_bound(rung_until_ns_);
    if (next == events_.end()) {
      timer_wakes_.wait(lock);
      continue;
    }
    const int64_t now_ns = NowNs();
    if (next->first == std::numeric_limits<int64_t>::max()) {
      timer_wakes_.wait(lock);
      continue;
    }
    if (next->first > now_ns) {
      timer_wakes_.wait_until(lock, std::chrono::steady_clock::time_point(
                                        std::chrono::nanoseconds(next->first)));
      continue;
    }
    rung_until_ns_ = now_ns;
    RingLocked();
  }
}

}  // namespace jaxfabric
