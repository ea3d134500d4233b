// DomainGroup: which chunk goes next, over which link; and how transfers end.

#include <algorithm>
#include <limits>
#include <utility>

#include "engine/domain_group.h"

namespace jaxfabric {
namespace {

// Of a Domain's queue, this share (and at least one place, where there are
// two) is kept free of writes, so that messages never wait behind them.
constexpr uint32_t kControlShare = 8;
// A link has to be so much better to be taken before the one whose turn it is:
// rates are not known more exactly.
constexpr double kNotablyBetter = 0.8;
// What a write costs beside its bytes, when links are compared.
constexpr uint64_t kWriteCostBytes = 4096;

uint32_t WritesMax(uint32_t queue_depth) {
  const uint32_t control =
      std::clamp<uint32_t>(queue_depth / kControlShare, 1, 32);
  return queue_depth > control ? queue_depth - control : queue_depth;
}

uint64_t LoadOf(const Link& link) {
  return link.open_bytes + link.open_writes * kWriteCostBytes;
}

}  // namespace

bool DomainGroup::HasRoom(const Link& link, uint64_t bytes) const {
  if (!link.up() || link.refused_in == round_) return false;
  const Queue& queue = queues_[link.domain];
  const uint32_t most = WritesMax(domains_[link.domain]->caps().queue_depth);
  if (queue.posts >= most) return false;
  if (link.open_writes >= queue.own &&
      queue.links * queue.own + queue.borrowed >= most) {
    return false;
  }
  if (link.open_writes < kWindowWritesMin) return true;
  const auto window_bytes =
      static_cast<uint64_t>(link.rate.bytes_per_ns() * kWindowNs);
  return link.open_writes < kWindowWritesMax &&
         link.open_bytes + bytes <=
             std::clamp(window_bytes, kWindowBytesMin, kWindowBytesMax);
}

void DomainGroup::CountBorrowed(Link& link) {
  Queue& queue = queues_[link.domain];
  queue.borrowed -= link.borrowed;
  link.borrowed =
      link.open_writes > queue.own ? link.open_writes - queue.own : 0;
  queue.borrowed += link.borrowed;
}

// `peer`, which is not over, comes or goes.
void DomainGroup::Share(GroupPeer& peer, bool joins) {
  for (Link& link : peer.links) {
    Queue& queue = queues_[link.domain];
    queue.links += joins ? 1 : -1;
    queue.borrowed -= std::exchange(link.borrowed, 0);
  }
  for (size_t i = 0; i < domains_.size(); ++i) {
    const uint32_t most = WritesMax(domains_[i]->caps().queue_depth);
    const uint32_t links = std::max<uint32_t>(1, queues_[i].links);
    queues_[i].own = std::max<uint32_t>(1, most / (2 * links));
  }
  for (const GroupPeerPtr& other : turn_) {
    if (other->over || other.get() == &peer) continue;
    for (Link& link : other->links) CountBorrowed(link);
  }
}

// The link that would be done with `bytes` first, of those that have room;
// null if it is better to wait.
Link* DomainGroup::ChooseLink(GroupPeer& peer, uint64_t bytes) {
  if (peer.links.size() == 1) {
    return HasRoom(peer.links[0], bytes) ? peer.links.data() : nullptr;
  }
  // A link that nobody has measured is taken for a good one.
  double best_rate = 0;
  for (const Link& link : peer.links) {
    best_rate = std::max(best_rate, link.rate.bytes_per_ns());
  }
  if (best_rate == 0) best_rate = 1;
  const auto rate = [best_rate](const Link& link) {
    const double known = link.rate.bytes_per_ns();
    return known > 0 ? known : best_rate;
  };
  const uint64_t cost = bytes + kWriteCostBytes;
  Link* best = nullptr;
  double best_ns = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < peer.links.size(); ++i) {
    Link& link = peer.links[(peer.first_link + i) % peer.links.size()];
    if (!HasRoom(link, bytes)) continue;
    const double ns = static_cast<double>(LoadOf(link) + cost) / rate(link);
    if (ns < kNotablyBetter * best_ns) {
      best = &link;
      best_ns = ns;
    }
  }
  if (best == nullptr) return nullptr;
  // When the others would have done everything, this chunk too.
  uint64_t others_load = peer.waiting_bytes + kWriteCostBytes;
  double others_rate = 0;
  bool others_work = false;
  for (const Link& link : peer.links) {
    if (&link == best || !link.up()) continue;
    others_load += LoadOf(link);
    others_rate += rate(link);
    others_work |= link.open_writes > 0;
  }
  if (others_work && best_ns > static_cast<double>(others_load) / others_rate) {
    return nullptr;
  }
  peer.first_link = best->number + size_t{1};
  return best;
}

DomainGroup::Outcome DomainGroup::PostChunk(const GroupPeerPtr& peer,
                                            Link& link,
                                            const UncertainWrite& write) {
  Transfer& transfer = *write.transfer;
  const Chunk& chunk = transfer.chunks[write.chunk];
  const Piece& piece = transfer.pieces[chunk.first];
  LocalSpan source;
  if (chunk.bytes > 0) {
    source = {transfer.local.base, transfer.local.keys[link.domain]};
  }
  RemoteSpan target = {transfer.remote.keys[link.remote_domain],
                       transfer.remote.base, 0};
  Domain& domain = *domains_[link.domain];
  StatusOr<Posted> posted = Posted::kAgain;
  if (chunk.count == 1) {
    if (chunk.bytes > 0) source.data += piece.local_offset;
    target.offset = piece.remote_offset;
    posted = domain.PostWriteImm(link.id, source, target, chunk.bytes,
                                 chunk.immediate, next_cookie_);
  } else {
    posted = domain.PostPieces(link.id, source, target, {&piece, chunk.count},
                               chunk.immediate, next_cookie_);
  }
  if (!posted.ok()) {
    if (peer->fences && !IsOfThePost(posted.status())) {
      FailLink(peer, link, posted.status());
    } else {
      FailTransfer(peer.get(), write.transfer, posted.status());
    }
    return Outcome::kFailed;
  }
  if (*posted == Posted::kAgain) {
    link.refused_in = round_;
    return Outcome::kRefused;
  }
  open_[next_cookie_++] = {.kind = OpenPost::Kind::kWrite,
                           .peer = peer,
                           .link = link.number,
                           .write = write,
                           .span = trace_.Begin([&] {
                             return TraceEvent{.name = "write",
                                               .parent = transfer.span,
                                               .peer = transfer.peer,
                                               .nic = link.domain,
                                               .bytes = chunk.bytes};
                           })};
  if (peer->links.size() > 1) {
    if (link.open_writes == 0) {
      now_ns_ = clock_ns_();
      link.rate.Begin(now_ns_);
      link.progress_ns = now_ns_;
    }
    if (peer->fences && chunk.immediate) {
      link.sent.Add(KeyOfImmediate(*chunk.immediate));
    }
  }
  ++link.open_writes;
  CountBorrowed(link);
  link.open_bytes += chunk.bytes;
  ++queues_[link.domain].posts;
  ++stats_[link.domain].open_writes;
  peer->waiting_bytes -= chunk.bytes;
  return Outcome::kPosted;
}

// Posts one chunk of `peer`; false if it has none, or there is no room.
bool DomainGroup::PostNext(const GroupPeerPtr& peer) {
  if (peer->over) return false;
  UncertainWrite write;
  std::deque<std::shared_ptr<Transfer>>* queue = nullptr;
  if (!peer->again.empty()) {
    write = peer->again.front();
  } else {
    queue = peer->large_is_next ? &peer->large : &peer->small;
    if (queue->empty()) {
      queue = peer->large_is_next ? &peer->small : &peer->large;
    }
    if (queue->empty()) return false;
    write = {queue->front(), queue->front()->next};
  }
  const uint64_t bytes = write.transfer->chunks[write.chunk].bytes;
  Outcome outcome = Outcome::kRefused;
  while (outcome == Outcome::kRefused) {
    Link* const link = ChooseLink(*peer, bytes);
    if (link == nullptr) return false;
    outcome = PostChunk(peer, *link, write);
  }
  if (outcome == Outcome::kFailed) return true;
  if (queue == nullptr) {
    peer->again.pop_front();
    return true;
  }
  peer->large_is_next = queue == &peer->small;
  ++write.transfer->open;
  if (++write.transfer->next == write.transfer->chunks.size()) {
    queue->pop_front();
  }
  return true;
}

bool DomainGroup::Pump() {
  ++round_;
  bool moved = false;
  size_t refusals = 0;  // peers in a row that had nothing or no room
  while (refusals < turn_.size()) {
    if (turn_next_ >= turn_.size()) turn_next_ = 0;
    const GroupPeerPtr peer = turn_[turn_next_++];
    if (PostNext(peer)) {
      refusals = 0;
      moved = true;
    } else {
      ++refusals;
    }
  }
  return moved;
}

Link* DomainGroup::ChooseLinkForMessage(GroupPeer& peer, const Link* avoid) {
  Link* best = nullptr;
  for (Link& link : peer.links) {
    if (!link.up() || &link == avoid) continue;
    if (best == nullptr || LoadOf(link) < LoadOf(*best)) best = &link;
  }
  return best;
}

bool DomainGroup::PumpMessages(const GroupPeerPtr& peer) {
  bool moved = false;
  while (!peer->messages.empty() && !peer->over) {
    GroupMessage& first = peer->messages.front();
    // The peer could not tell whether it has seen what is older.
    const auto& open = peer->open_messages;
    if (peer->fences && first.number == 0 && !open.empty() &&
        peer->next_message - *open.begin() >= ReplayWindow::kNumbers) {
      break;
    }
    Link* const link = ChooseLinkForMessage(*peer, nullptr);
    if (link == nullptr) break;
    if (first.number == 0) {
      first.number = peer->next_message++;
      peer->open_messages.insert(first.number);
    }
    LinkFrame header;
    header.number = first.number;
    const auto posted = domains_[link->domain]->PostSend(
        link->id, header.Encode() + first.bytes, next_cookie_);
    if (posted.ok() && *posted == Posted::kAgain) break;
    moved = true;
    if (!posted.ok() && peer->fences && !IsOfThePost(posted.status())) {
      FailLink(peer, *link, posted.status());
      continue;
    }
    GroupMessage message = std::move(first);
    peer->messages.pop_front();
    if (!posted.ok()) {
      peer->open_messages.erase(message.number);
      ended_.emplace_back(std::move(message.done), posted.status());
      continue;
    }
    if (!peer->fences) message.bytes.clear();  // is not sent again
    open_[next_cookie_++] = {
        .kind = OpenPost::Kind::kMessage,
        .peer = peer,
        .link = link->number,
        .message = std::make_unique<GroupMessage>(std::move(message))};
    ++open_messages_;
    NoteMessage(*link);
  }
  return moved;
}

void DomainGroup::PostFrame(const GroupPeerPtr& peer, Link& link,
                            const LinkFrame& frame) {
  const auto posted =
      domains_[link.domain]->PostSend(link.id, frame.Encode(), next_cookie_);
  if (!posted.ok()) {
    if (!IsOfThePost(posted.status())) FailLink(peer, link, posted.status());
    return;
  }
  if (*posted == Posted::kAgain) return;
  open_[next_cookie_++] = {
      .kind = OpenPost::Kind::kFrame, .peer = peer, .link = link.number};
  NoteMessage(link);
}

// A message was posted on it.
void DomainGroup::NoteMessage(Link& link) {
  if (link.open_writes + link.open_messages == 0) {
    link.progress_ns = clock_ns_();
  }
  ++queues_[link.domain].posts;
  ++link.open_messages;
}

void DomainGroup::SendFrame(const GroupPeerPtr& peer, const LinkFrame& frame,
                            const Link* avoid) {
  Link* const link = ChooseLinkForMessage(*peer, avoid);
  if (link != nullptr) PostFrame(peer, *link, frame);
}

void DomainGroup::Retire(const std::shared_ptr<Transfer>& transfer) {
  // The source may be reused only once the last open write is over, also when
  // the first has failed.
  if (!transfer->over() || transfers_.erase(transfer->handle) == 0) return;
  trace_.End(transfer->span, transfer->status.code());
  ended_.emplace_back(std::move(transfer->done), transfer->status);
}

void DomainGroup::FailTransfer(GroupPeer* peer,
                               const std::shared_ptr<Transfer>& transfer,
                               const Status& status) {
  if (transfer->status.ok()) transfer->status = status;
  if (on_spoilt_ && transfer->id && transfer->next > 0) {
    on_spoilt_(transfer->peer, *transfer->id);
  }
  if (peer != nullptr) {
    for (size_t i = transfer->next; i < transfer->chunks.size(); ++i) {
      peer->waiting_bytes -= transfer->chunks[i].bytes;
    }
    if (transfer->next < transfer->chunks.size()) {
      std::erase(peer->QueueOf(*transfer), transfer);
    }
    std::erase_if(peer->again, [&](const UncertainWrite& write) {
      if (write.transfer != transfer) return false;
      peer->waiting_bytes -= transfer->chunks[write.chunk].bytes;
      --transfer->open;
      return true;
    });
    if (transfer->id && transfer->next > 0) {
      peer->quarantined.insert(*transfer->id);
    }
  }
  transfer->next = static_cast<uint32_t>(transfer->chunks.size());
  Retire(transfer);
}

void DomainGroup::CloseWrite(GroupPeer& peer, const UncertainWrite& write,
                             const Status& status) {
  --write.transfer->open;
  if (status.ok()) {
    Retire(write.transfer);
  } else {
    FailTransfer(&peer, write.transfer, status);
  }
}

void DomainGroup::EndPeer(GroupPeer& peer, const Status& status) {
  if (!peer.over) Share(peer, /*joins=*/false);
  peer.over = true;
  peer.end = status;
  for (Link& link : peer.links) {
    link.state = Link::State::kDead;
    for (const UncertainWrite& write : std::exchange(link.uncertain, {})) {
      CloseWrite(peer, write, status);
    }
  }
  for (auto& [number, repair] : std::exchange(peer.repairs, {})) {
    for (const auto& transfer : repair.transfers) {
      --transfer->repairs;
      FailTransfer(&peer, transfer, status);
    }
  }
  while (!peer.again.empty()) {
    FailTransfer(&peer, std::shared_ptr(peer.again.front().transfer), status);
  }
  for (auto* queue : {&peer.small, &peer.large}) {
    while (!queue->empty()) {
      FailTransfer(&peer, std::shared_ptr(queue->front()), status);
    }
  }
  for (GroupMessage& message : std::exchange(peer.messages, {})) {
    ended_.emplace_back(std::move(message.done), status);
  }
}

void DomainGroup::LosePeer(GroupPeer& peer, const Status& status) {
  if (peer.over) return;
  trace_.Mark([&] {
    return TraceEvent{.name = "peer lost",
                      .label = status.message(),
                      .peer = peer.name,
                      .status = status.code()};
  });
  EndPeer(peer, status);
  news_.push_back({Event::Kind::kPeerLost, peer.name, 0, "", status});
}

}  // namespace jaxfabric
