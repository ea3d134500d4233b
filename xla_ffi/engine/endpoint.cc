#include "engine/endpoint.h"

#include <cstring>
#include <utility>

#include "base/elastic_pool.h"

namespace jaxfabric {
namespace {

void PostAll(std::vector<std::function<void()>> tasks) {
  for (auto& task : tasks) ElasticPool::Get().Post(std::move(task));
}

}  // namespace

Endpoint::Loss Endpoint::Departed(uint32_t rank) {
  return {rank, /*told=*/false,
          Status(StatusCode::kUnavailable,
                 "it closed its Fabric while this rank still needs it")};
}

// A goodbye may overtake messages that were sent before it.
bool Endpoint::Gone(const Peer& peer) {
  return peer.departed &&
         peer.stats.messages_received >= peer.messages_until_goodbye;
}

Endpoint::Endpoint(EndpointOptions options,
                   std::vector<std::unique_ptr<Domain>> domains, Lost lost)
    : options_(options),
      lost_(std::move(lost)),
      group_(std::move(domains)),
      put_spans_(options.heap.window_bytes) {}

StatusOr<std::unique_ptr<Endpoint>> Endpoint::Open(
    EndpointOptions options, std::vector<std::unique_ptr<Domain>> domains,
    Lost lost) {
  if (options.heap.ranks > kRanksMax) {
    return Status(StatusCode::kInvalidArgument,
                  "a fabric has at most " + std::to_string(kRanksMax) +
                      " ranks, not " + std::to_string(options.heap.ranks));
  }
  std::unique_ptr<Endpoint> endpoint(
      new Endpoint(options, std::move(domains), std::move(lost)));
  JF_RETURN_IF_ERROR(endpoint->OpenHeap());
  return endpoint;
}

StatusOr<std::vector<uint64_t>> Endpoint::Register(const SharedMemory& memory) {
  auto keys =
      group_.RegisterMemory({memory.data(), memory.size(), memory.fd()});
  if (keys.ok()) return keys;
  return keys.status().Annotate(
      "the Fabric's memory, of which NICs keep all in place: window_bytes=" +
      std::to_string(options_.heap.window_bytes) +
      " and mailbox_bytes=" + std::to_string(options_.heap.mailbox_bytes) +
      " for each of " + std::to_string(options_.heap.ranks) +
      " ranks, twice; give jf.Fabric less of them (JAXFABRIC_WINDOW_BYTES, "
      "JAXFABRIC_MAILBOX_BYTES) on all ranks");
}

Status Endpoint::OpenHeap() {
  JF_ASSIGN_OR_RETURN(heap_, SharedMemory::Create("jaxfabric-heap",
                                                  options_.heap.TotalBytes()));
  JF_ASSIGN_OR_RETURN(heap_keys_, Register(heap_));
  if (group_.caps().direct_store && group_.size() == 1) return OkStatus();
  // Staging mirrors the mailboxes: what is sent to rank r lies where it will
  // lie in r's heap, but in r's stride instead of ours. Puts follow.
  JF_ASSIGN_OR_RETURN(
      staging_,
      SharedMemory::Create("jaxfabric-staging", options_.heap.TotalBytes()));
  JF_ASSIGN_OR_RETURN(staging_region_.keys, Register(staging_));
  staging_region_.base = staging_.data();
  staging_region_.length = staging_.size();
  return OkStatus();
}

RankAddress Endpoint::address() const {
  const MrDesc heap = {reinterpret_cast<uintptr_t>(heap_.data()), heap_.size(),
                       heap_keys_};
  std::lock_guard<std::mutex> lock(mutex_);
  return {options_.generation, group_.addresses(), heap};
}

Status Endpoint::Connect(uint32_t name, const RankAddress& address,
                         Deadline deadline) {
  if (name >= options_.heap.ranks || name == options_.rank) {
    return Status(StatusCode::kInvalidArgument,
                  "no other rank " + std::to_string(name));
  }
  if (address.generation != options_.generation) {
    return Status(StatusCode::kFailedPrecondition,
                  "rank " + std::to_string(name) + " is of generation " +
                      std::to_string(address.generation) + ", not " +
                      std::to_string(options_.generation));
  }
  if (address.heap.length != options_.heap.TotalBytes()) {
    return Status(StatusCode::kFailedPrecondition,
                  "rank " + std::to_string(name) + " has a heap of " +
                      std::to_string(address.heap.length) +
                      " bytes where this rank has " +
                      std::to_string(options_.heap.TotalBytes()) +
                      "; give all processes the same jaxfabric settings");
  }
  auto peer = std::make_unique<Peer>(options_.heap.mailbox_bytes);
  peer->address = address;
  std::lock_guard<std::mutex> lock(mutex_);
  JF_RETURN_IF_ERROR(group_.AddPeer(name, address.domains, deadline));
  if (staging_.data() == nullptr) {
    peer->direct =
        group_.DirectPointer(name, address.heap, 0, address.heap.length);
    if (peer->direct == nullptr) {
      return Status(
          StatusCode::kUnavailable,
          "the heap of rank " + std::to_string(name) + " could not be mapped");
    }
  }
  peers_[name] = std::move(peer);
  return OkStatus();
}

uint64_t Endpoint::NextSequence(uint64_t channel) {
  std::lock_guard<std::mutex> lock(mutex_);
  return sequences_[channel]++;
}

bool Endpoint::EnterChannel(uint64_t channel) {
  std::lock_guard<std::mutex> lock(mutex_);
  return channels_under_way_.insert(channel).second;
}

void Endpoint::LeaveChannel(uint64_t channel) {
  std::lock_guard<std::mutex> lock(mutex_);
  channels_under_way_.erase(channel);
}

bool Endpoint::Expect(MatchKey key, std::vector<uint32_t> sources,
                      const OperationPtr& operation, MatchTable::Ready ready,
                      std::vector<Arrival>* arrivals) {
  std::optional<uint32_t> departed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (matches_.Expect(key, std::move(sources), operation, std::move(ready),
                        arrivals)) {
      return true;
    }
    for (uint32_t source : matches_.Missing(key)) {
      if (Gone(*peers_.at(source))) departed = source;
    }
  }
  if (departed) lost_(Departed(*departed));
  return false;
}

std::string Endpoint::DescribeMissing(MatchKey key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (uint32_t source : matches_.Missing(key)) {
    text += (text.empty() ? "rank " : ", rank ") + std::to_string(source);
  }
  for (const auto& [name, peer] : peers_) {
    if (text.empty() && !peer->outbox.waiting().empty()) {
      text = "credit to send";
    }
  }
  const std::string unmatched = matches_.DescribeUnmatched();
  if (text.empty() && unmatched.empty()) return "";
  if (!unmatched.empty()) {
    text += text.empty() ? "" : "; ";
    text += "what came instead matches no call here: " + unmatched;
  }
  return text + " (do all ranks run the same program, on the same shapes?)";
}

void Endpoint::Send(Outgoing outgoing) {
  const OperationPtr operation = outgoing.operation;
  std::optional<Outbox::Place> place;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    Peer& peer = *peers_.at(outgoing.destination);
    if (peer.departed) {
      lock.unlock();
      return lost_(Departed(outgoing.destination));
    }
    if (peer.lost || operation->failed()) return;
    if (outgoing.bytes > options_.heap.mailbox_bytes) {
      const Status too_large(
          StatusCode::kResourceExhausted,
          operation->label() + ": a message of " +
              std::to_string(outgoing.bytes) + " bytes to rank " +
              std::to_string(outgoing.destination) +
              " does not fit a mailbox of " +
              std::to_string(options_.heap.mailbox_bytes) +
              " bytes; raise JAXFABRIC_MAILBOX_BYTES on all ranks");
      lock.unlock();
      operation->Fail(too_large);
      // Its receiver would wait in vain.
      return lost_({std::nullopt, /*told=*/false, too_large});
    }
    std::deque<Outgoing>& waiting = peer.outbox.waiting();
    if (waiting.empty()) place = peer.outbox.Reserve(outgoing.bytes);
    if (!place) {
      if (waiting.empty()) {
        SendControl(outgoing.destination, ControlMessage::Type::kWantCredits, 0,
                    "");
      }
      waiting.push_back(std::move(outgoing));
      return;
    }
  }
  PackAndPost(outgoing, *place);
}

void Endpoint::PackAndPost(const Outgoing& outgoing, Outbox::Place place) {
  const uint32_t name = outgoing.destination;
  const TraceScope tracing(group_.trace(), [&] {
    return TraceEvent{.name = "pack",
                      .label = outgoing.label,
                      .peer = name,
                      .bytes = outgoing.bytes};
  });
  const HeapLayout& heap = options_.heap;
  const uint64_t remote_descriptor = heap.Descriptor(options_.rank, place.slot);
  const uint64_t remote_data = heap.Data(options_.rank) + place.offset;
  std::byte* direct = nullptr;
  uint64_t credits = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Peer& peer = *peers_.at(name);
    direct = peer.direct;
    credits = peer.inbox.TakeCredits();
  }
  const uint64_t local_descriptor = heap.Descriptor(name, place.slot);
  const uint64_t local_data = heap.Data(name) + place.offset;
  std::byte* const descriptor_at = direct != nullptr
                                       ? direct + remote_descriptor
                                       : staging_.data() + local_descriptor;
  std::byte* const data_at =
      direct != nullptr ? direct + remote_data : staging_.data() + local_data;
  MailboxDescriptor descriptor = {};
  descriptor.magic = kDescriptorMagic;
  descriptor.generation = options_.generation;
  descriptor.channel = outgoing.key.channel;
  descriptor.sequence = outgoing.key.sequence;
  descriptor.offset = place.offset;
  descriptor.length = outgoing.bytes;
  descriptor.credits = credits;
  descriptor.run_id = outgoing.run_id;
  outgoing.label.copy(descriptor.label, kLabelBytes);
  std::memcpy(descriptor_at, &descriptor, sizeof descriptor);
  outgoing.pack(data_at);

  // What was stored through the mapping only needs its count.
  std::vector<Piece> pieces;
  if (direct == nullptr) {
    pieces = {{local_descriptor, remote_descriptor, sizeof descriptor},
              {local_data, remote_data, outgoing.bytes}};
  }
  const TransferId id = {options_.rank, IdKind::kMailbox, place.slot};
  std::lock_guard<std::mutex> lock(mutex_);
  Peer& peer = *peers_.at(name);
  if (peer.lost) return;
  ++peer.stats.messages_sent;
  peer.stats.message_bytes_sent += outgoing.bytes;
  const Status posted = Write(name, pieces, id, [&peer, slot = place.slot] {
    peer.outbox.Written(slot);
  });
  if (!posted.ok()) Unposted(outgoing.operation, posted);
}

// Whoever waits for it would wait in vain. Runs under mutex_.
void Endpoint::Unposted(const OperationPtr& operation, const Status& why) {
  const Status failed = why.Annotate(operation->label());
  operation->Fail(failed);
  failed_writes_.push_back({std::nullopt, /*told=*/false, failed});
}

// Runs under mutex_, and so does `done`. What fails after the caller's
// operation has ended can only end the generation: its receiver waits for it.
Status Endpoint::Write(uint32_t name, const std::vector<Piece>& pieces,
                       TransferId id, std::function<void()> done) {
  ++writes_open_;
  const auto posted = group_.SubmitWrite(
      name, staging_region_, peers_.at(name)->address.heap, pieces, id.Encode(),
      [this, name, done = std::move(done)](const Status& status) {
        --writes_open_;
        done();
        if (status.ok()) return;
        const Status failed = status.Annotate("a write to rank " +
                                              std::to_string(name) + " failed");
        // Only a peer that is gone, or cut off, makes its writes unavailable.
        std::optional<uint32_t> lost;
        if (status.code() == StatusCode::kUnavailable) lost = name;
        failed_writes_.push_back({lost, /*told=*/false, failed});
      });
  if (posted.ok()) return OkStatus();
  --writes_open_;
  return posted.status();
}

void Endpoint::SendControl(uint32_t name, ControlMessage::Type type,
                           uint64_t argument, const std::string& text) {
  ++peers_.at(name)->stats.control_messages;
  group_.SubmitSend(
      name, ControlMessage{type, options_.generation, argument, text}.Encode());
}

void Endpoint::FlushCredits(uint32_t name, Peer& peer) {
  SendControl(name, ControlMessage::Type::kCredits, peer.inbox.TakeCredits(),
              "");
}

void Endpoint::TakeCredits(uint32_t name, Peer& peer, uint64_t mask,
                           Tasks* tasks) {
  peer.outbox.Credit(mask);
  SendWaiting(peer, tasks);
  if (!peer.outbox.waiting().empty()) {
    SendControl(name, ControlMessage::Type::kWantCredits, 0, "");
  }
}

void Endpoint::SendWaiting(Peer& peer, Tasks* tasks) {
  std::deque<Outgoing>& waiting = peer.outbox.waiting();
  while (!waiting.empty()) {
    const auto place = peer.outbox.Reserve(waiting.front().bytes);
    if (!place) return;
    tasks->push_back(
        [this, place = *place, outgoing = std::move(waiting.front())] {
          PackAndPost(outgoing, place);
        });
    waiting.pop_front();
  }
}

void Endpoint::Release(const Arrival& arrival) {
  std::lock_guard<std::mutex> lock(mutex_);
  Peer& peer = *peers_.at(arrival.source);
  if (peer.inbox.GiveBack(arrival.slot, arrival.length)) {
    FlushCredits(arrival.source, peer);
  }
}

bool Endpoint::Progress() {
  Tasks tasks;
  std::vector<Loss> losses;
  bool moved = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<DomainGroup::Event> events;
    moved = group_.Poll(&events);
    HandleEvents(events, &tasks, &losses);
    // A write that ends after its credit came makes room, too.
    if (moved) {
      for (auto& [name, peer] : peers_) SendWaiting(*peer, &tasks);
    }
    if (!puts_.empty()) PumpPuts();
    // After the losses of peers, which say more.
    for (Loss& failed : failed_writes_) losses.push_back(std::move(failed));
    failed_writes_.clear();
  }
  PostAll(std::move(tasks));
  for (Loss& loss : losses) lost_(std::move(loss));
  return moved;
}

void Endpoint::CountLocally(uint32_t slot) {
  Tasks tasks;
  const Status counted = window_counters_.Add(slot, kTransferUnits, &tasks);
  PostAll(std::move(tasks));
  if (!counted.ok()) lost_({options_.rank, /*told=*/false, counted});
}

void Endpoint::CopyInto(std::byte* heap,
                        const std::vector<WindowPart>& parts) const {
  for (const WindowPart& part : parts) {
    std::memcpy(heap + options_.heap.Windows() + part.window_offset,
                part.source, part.bytes);
  }
}

void Endpoint::Put(uint32_t name, std::vector<WindowPart> parts, uint32_t slot,
                   OperationPtr operation) {
  uint64_t bytes = 0;
  for (const WindowPart& part : parts) {
    JF_CHECK(part.window_offset + part.bytes <= options_.heap.window_bytes);
    bytes += part.bytes;
  }
  if (name == options_.rank) {
    CopyInto(heap_.data(), parts);
    CountLocally(slot);
    return;
  }
  std::byte* direct = nullptr;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    Peer& peer = *peers_.at(name);
    if (peer.departed) {
      lock.unlock();
      return lost_(Departed(name));
    }
    if (peer.lost) return;
    ++peer.stats.puts;
    peer.stats.put_bytes += bytes;
    direct = peer.direct;
    if (direct == nullptr) {
      puts_.push_back(
          {name, std::move(parts), bytes, slot, std::move(operation)});
      PumpPuts();
      return;
    }
  }
  CopyInto(direct, parts);
  const TransferId id = {options_.rank, IdKind::kWindow, slot};
  std::lock_guard<std::mutex> lock(mutex_);
  const Status posted = Write(name, {}, id, [] {});
  if (!posted.ok()) Unposted(operation, posted);
}

// Puts go in order, as staging memory allows. Runs under mutex_.
void Endpoint::PumpPuts() {
  while (!puts_.empty()) {
    const auto span = put_spans_.Allocate(puts_.front().bytes);
    if (!span) return;
    const PendingPut put = std::move(puts_.front());
    puts_.pop_front();
    std::vector<Piece> pieces;
    uint64_t local = options_.heap.Windows() + *span;
    for (const WindowPart& part : put.parts) {
      std::memcpy(staging_.data() + local, part.source, part.bytes);
      const uint64_t remote = options_.heap.Windows() + part.window_offset;
      Piece* const last = pieces.empty() ? nullptr : &pieces.back();
      // Neighbours in both memories are one write.
      if (last != nullptr && last->remote_offset + last->length == remote) {
        last->length += part.bytes;
      } else {
        pieces.push_back({local, remote, part.bytes});
      }
      local += part.bytes;
    }
    const TransferId id = {options_.rank, IdKind::kWindow, put.slot};
    const Status posted = Write(
        put.peer, pieces, id, [this, span = *span] { put_spans_.Free(span); });
    if (!posted.ok()) {
      put_spans_.Free(*span);
      Unposted(put.operation, posted);
    }
  }
}

void Endpoint::BroadcastAbort(const Status& status,
                              std::optional<uint32_t> lost_rank) {
  const uint64_t argument = AbortArgument(status.code(), lost_rank);
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [name, peer] : peers_) {
    if (peer->lost) continue;
    SendControl(name, ControlMessage::Type::kAbort, argument, status.message());
  }
}

void Endpoint::SayGoodbye() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [name, peer] : peers_) {
    if (peer->lost) continue;
    SendControl(name, ControlMessage::Type::kGoodbye, peer->stats.messages_sent,
                "");
  }
}

void Endpoint::DropWaiting() {
  // Destroyed after the lock is released: they hold operations.
  std::vector<MatchTable::Ready> matches;
  std::vector<std::deque<Outgoing>> sends;
  std::deque<PendingPut> puts;
  const auto counts = window_counters_.TakeExpectations();
  std::lock_guard<std::mutex> lock(mutex_);
  matches = matches_.TakeExpectations();
  for (auto& [name, peer] : peers_) {
    sends.push_back(std::exchange(peer->outbox.waiting(), {}));
  }
  puts = std::exchange(puts_, {});
}

bool Endpoint::Drained() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return writes_open_ == 0 && group_.Idle();
}

std::unordered_map<uint32_t, PeerStats> Endpoint::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::unordered_map<uint32_t, PeerStats> all;
  for (const auto& [name, peer] : peers_) all[name] = peer->stats;
  return all;
}

}  // namespace jaxfabric
