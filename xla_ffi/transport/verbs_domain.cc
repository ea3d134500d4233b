#include "transport/verbs_domain.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "transport/shm_address.h"

namespace jaxfabric {
namespace {

// The highest bits of a wr_id say what ended: on errors the device tells no
// more than wr_id, status, queue pair and the vendor's word.
constexpr int kTagShift = 60;
constexpr uint64_t kSentTag = 0;  // and then the sequence of VerbsConnection
constexpr uint64_t kReceivedTag = uint64_t{1} << kTagShift;
constexpr uint64_t kGreetingSentTag = uint64_t{2} << kTagShift;
constexpr uint64_t kGreetingTag = uint64_t{3} << kTagShift;
constexpr uint64_t kTagMask = uint64_t{15} << kTagShift;

constexpr uint32_t kEmptyPolls = 16;

// Buffers for frames, of which messages of the owner leave some.
constexpr uint32_t kFrames = 96;
constexpr size_t kFrameReserve = 32;
// Answers that wait for a peer's credits; one that asks on and on and gives
// none must not fill our memory.
constexpr size_t kAnswersMax = 1024;

}  // namespace

StatusOr<std::unique_ptr<VerbsDomain>> VerbsDomain::Open(
    const VerbsLibrary& library, const VerbsPortName& name,
    const VerbsSettings& settings, const JobKey& key, OfiBell* bell) {
  std::unique_ptr<VerbsDomain> domain(new VerbsDomain(key, bell));
  JF_RETURN_IF_ERROR(domain->Start(library, name, settings));
  return domain;
}

Status VerbsDomain::Start(const VerbsLibrary& library,
                          const VerbsPortName& name,
                          const VerbsSettings& settings) {
  JF_ASSIGN_OR_RETURN(port_, VerbsPort::Open(library, name, settings));
  JF_ASSIGN_OR_RETURN(buffers_, VerbsBuffers::Open(*port_, kFrames));
  JF_ASSIGN_OR_RETURN(receives_, VerbsReceives::Open(*port_, kReceivedTag));
  JF_ASSIGN_OR_RETURN(
      greeter_, VerbsGreeter::Open(*port_, kGreetingSentTag, kGreetingTag));
  FillCaps();
  address_.queue_pair = greeter_->number();
  address_.nonce = RandomU64();
  address_.job = key_.JobId();
  address_.gid = port_->gid();
  address_.queue_key = greeter_->queue_key();
  address_.lid = port_->lid();
  address_.link_layer = port_->link_layer();
  net_addr_ = ToNetAddr(address_);
  JF_RETURN_IF_ERROR(bell_->Add(port_->notice_fd()));
  watched_ = true;
  return OkStatus();
}

void VerbsDomain::FillCaps() {
  caps_.transport = "verbs";
  caps_.write_bytes_max = port_->write_bytes_max();
  caps_.message_bytes_max = kVerbsMessageBytesMax;
  caps_.queue_depth = port_->queue_depth();
  // Addresses are added here, from what the peer tells of its memory.
  caps_.address_mode = AddressMode::kOffset;
  caps_.immediate_consumes_receive = true;
  caps_.immediate_names_peer = true;
  // The device needs nobody's poll, but greetings and credits do.
  caps_.target_must_poll = true;
  caps_.removal_fences = true;
}

VerbsDomain::~VerbsDomain() {
  if (greeter_ != nullptr) SayBye();
  if (watched_) bell_->Remove(port_->notice_fd());
}

StatusOr<uint64_t> VerbsDomain::RegisterMemory(const MemoryRegion& region) {
  if (region.base == nullptr || region.length == 0) {
    return Status(StatusCode::kInvalidArgument,
                  "memory to be registered has an address and a length");
  }
  JF_ASSIGN_OR_RETURN(VerbsMemory registration,
                      port_->RegisterForPeers(region));
  const uint64_t key = RandomU64();
  memory_.emplace(key, Memory{std::move(registration), region.dmabuf_fd < 0});
  regions_.Add(key, region);
  return key;
}

Status VerbsDomain::UnregisterMemory(uint64_t key) {
  if (!regions_.Remove(key)) {
    return Status(StatusCode::kNotFound,
                  "the key to unregister is not registered with this Domain");
  }
  memory_.erase(key);
  for (auto& [nonce, peer] : peers_) {
    if (peer->told.erase(key) > 0) Tell(*peer, VerbsFrameKind::kGone, key);
  }
  return OkStatus();
}

StatusOr<VerbsPeer*> VerbsDomain::FindPeer(PeerId id) {
  if (id >= ids_.size() || ids_[id] == nullptr) {
    return Status(
        StatusCode::kInvalidArgument,
        "no peer " + std::to_string(id) + " (removed, or never added)");
  }
  JF_RETURN_IF_ERROR(ids_[id]->lost);
  return ids_[id];
}

StatusOr<std::optional<VerbsRegion>> VerbsDomain::RegionOf(
    VerbsPeer& peer, const RemoteSpan& remote, uint64_t length) {
  const auto [found, is_new] = peer.regions.try_emplace(remote.key);
  if (is_new) Tell(peer, VerbsFrameKind::kAsk, remote.key);
  if (!found->second.has_value()) return std::optional<VerbsRegion>();
  const VerbsRegion region = *found->second;
  if (region.length == 0) {
    peer.regions.erase(found);  // it may be registered by the next time
    return Status(StatusCode::kNotFound,
                  "the peer has no memory registered under the key of the "
                  "write's target");
  }
  if (!InRange(remote.offset, length, region.length)) {
    return Status(StatusCode::kOutOfRange,
                  "the target of a write of " + std::to_string(length) +
                      " bytes at offset " + std::to_string(remote.offset) +
                      " lies outside the peer's region of " +
                      std::to_string(region.length) + " bytes");
  }
  return std::optional<VerbsRegion>(region);
}

// No peer has more open than is free for the others: n peers that take nothing
// hold n/(n+1) of the queue.
bool VerbsDomain::HasRoom(const VerbsPeer& peer) const {
  return posted_ < caps_.queue_depth &&
         peer.open < caps_.queue_depth - posted_ && peer.connection->HasRoom();
}

Posted VerbsDomain::Opened(VerbsPeer& peer, const Status& posted) {
  ++posted_;
  ++peer.open;
  MarkBusy(peer);
  if (!posted.ok()) Break(peer, posted);
  return Posted::kPosted;
}

StatusOr<Posted> VerbsDomain::PostWriteImm(PeerId id, LocalSpan local,
                                           RemoteSpan remote, uint64_t length,
                                           std::optional<uint32_t> immediate,
                                           uint64_t cookie) {
  JF_ASSIGN_OR_RETURN(VerbsPeer* const peer, FindPeer(id));
  if (length > caps_.write_bytes_max) {
    return Status(StatusCode::kInvalidArgument,
                  "a write of " + std::to_string(length) +
                      " bytes exceeds the port's " +
                      std::to_string(caps_.write_bytes_max));
  }
  VerbsConnection::Write write;
  if (length > 0) {
    JF_RETURN_IF_ERROR(regions_.CheckSource(local, length));
    const Memory& source = memory_.at(local.key);
    write.data = local.data;
    write.local_key = source.registration->lkey;
    write.in_host_memory = source.in_host_memory;
  }
  if (!peer->ready()) return Posted::kAgain;
  JF_ASSIGN_OR_RETURN(const std::optional<VerbsRegion> region,
                      RegionOf(*peer, remote, length));
  if (!region.has_value() || !HasRoom(*peer)) return Posted::kAgain;
  if (immediate.has_value() && !peer->connection->HasCredit()) {
    return Posted::kAgain;
  }
  write.length = static_cast<uint32_t>(length);
  write.remote_address = region->base + remote.offset;
  write.remote_key = region->remote_key;
  write.immediate = immediate;
  return Opened(*peer, peer->connection->PostWrite(
                           {VerbsOperation::Kind::kWrite, cookie, 0}, write));
}

StatusOr<Posted> VerbsDomain::PostSend(PeerId id, std::string_view message,
                                       uint64_t cookie) {
  JF_ASSIGN_OR_RETURN(VerbsPeer* const peer, FindPeer(id));
  if (message.size() > kVerbsMessageBytesMax) {
    return Status(StatusCode::kInvalidArgument,
                  "a message of " + std::to_string(message.size()) +
                      " bytes exceeds the limit of " +
                      std::to_string(kVerbsMessageBytesMax));
  }
  if (!peer->ready() || !HasRoom(*peer) || !peer->connection->HasCredit()) {
    return Posted::kAgain;
  }
  const std::optional<uint32_t> buffer = buffers_->TakeFrame(kFrameReserve);
  if (!buffer.has_value()) return Posted::kAgain;
  const uint32_t bytes = EncodeVerbsFrame(
      {VerbsFrameKind::kMessage, 0, message}, buffers_->frame(*buffer));
  return Opened(*peer,
                peer->connection->PostFrame(
                    {VerbsOperation::Kind::kMessage, cookie, *buffer}, bytes));
}

size_t VerbsDomain::Poll(std::span<Completion> completions) {
  bool empty = false;
  while (ready_.size() < completions.size() && !empty) empty = !PollQueue();
  HandleGreetings();
  Mend();
  if (empty) TendPeers();
  Pump();
  const size_t count = std::min(ready_.size(), completions.size());
  for (size_t i = 0; i < count; ++i) {
    completions[i] = std::move(ready_.front());
    ready_.pop_front();
  }
  Rest(empty && ready_.empty());
  return count;
}

// The owner may sleep now. If nothing is left for it, the device is to give
// notice of what comes.
void VerbsDomain::Rest(bool empty) {
  if (!empty || !broken_.empty()) return bell_->Ring();
  // Who polls now needs none, and somebody polls after it.
  if (bell_->muted()) return;
  // A notice may come after what it tells of has been polled; then it wakes the
  // owner for nothing, but not for ever. Looking costs a system call.
  if (asked_ && ++empty_polls_ % kEmptyPolls != 0) return;
  if (port_->TakeNotices()) asked_ = false;
  if (asked_) return;
  asked_ = true;
  port_->RequestNotice();
  // What came before the request is not told of.
  if (PollQueue()) bell_->Ring();
}

bool VerbsDomain::PollQueue() {
  std::array<ibv_wc, 32> works;
  const int count =
      ibv_poll_cq(port_->queue(), static_cast<int>(works.size()), works.data());
  for (int i = 0; i < count; ++i) Handle(works[static_cast<size_t>(i)]);
  if (count > 0) asked_ = false;
  return count > 0;
}

void VerbsDomain::Handle(const ibv_wc& work) {
  const uint64_t index = work.wr_id & ~kTagMask;
  switch (work.wr_id & kTagMask) {
    case kSentTag:
      return OnSent(work);
    case kReceivedTag:
      return OnReceived(work);
    case kGreetingSentTag:
      return greeter_->SendDone(index);
    case kGreetingTag: {
      if (work.status == IBV_WC_SUCCESS) {
        const auto greeting =
            OpenGreeting(greeter_->Received(index, work.byte_len), key_,
                         address_.nonce, address_.link_layer);
        // What is not of this job is dropped, whoever sent it.
        if (greeting.has_value()) greetings_.push_back(*greeting);
      }
      return greeter_->Repost(index);
    }
    default:
      return;
  }
}

void VerbsDomain::OnSent(const ibv_wc& work) {
  const auto found = numbers_.find(work.qp_num);
  if (found == numbers_.end()) return;
  VerbsPeer& peer = *found->second;
  Status status;
  if (work.status != IBV_WC_SUCCESS) {
    status = peer.broken;
    if (status.ok()) {
      status = Status(
          StatusCode::kUnavailable,
          "verbs on " + port_->name() + " to " + Describe(peer.address) + ": " +
              port_->library().wc_status_str(work.status) + " (vendor's code " +
              std::to_string(work.vendor_err) + ")" + port_->Fault());
    }
  }
  peer.connection->Finish(
      work.wr_id, [&](const VerbsOperation& operation, bool last) {
        EndOperation(peer, operation, last ? status : OkStatus());
      });
  if (!status.ok()) {
    Break(peer, status, /*silent=*/work.status == IBV_WC_RETRY_EXC_ERR);
  }
}

void VerbsDomain::EndOperation(VerbsPeer& peer, const VerbsOperation& operation,
                               const Status& status) {
  using Kind = VerbsOperation::Kind;
  if (operation.kind == Kind::kMessage || operation.kind == Kind::kFrame) {
    buffers_->GiveFrame(operation.buffer);
  }
  if (operation.kind == Kind::kWord || operation.kind == Kind::kFrame) return;
  --posted_;
  --peer.open;
  Completion completion;
  completion.kind = operation.kind == Kind::kWrite
                        ? Completion::Kind::kWriteDone
                        : Completion::Kind::kSendDone;
  completion.peer = peer.id;
  completion.cookie = operation.cookie;
  if (!status.ok()) {
    completion.kind = Completion::Kind::kError;
    completion.status = status;
  }
  ready_.push_back(std::move(completion));
}

void VerbsDomain::OnReceived(const ibv_wc& work) {
  const auto index = static_cast<uint32_t>(work.wr_id & ~kTagMask);
  if (!receives_->IsIndex(index)) return;
  const auto found = numbers_.find(work.qp_num);
  if (found != numbers_.end() && work.status == IBV_WC_SUCCESS) {
    VerbsPeer& peer = *found->second;
    peer.connection->Confirm();  // nobody else could have sent this
    if (!peer.connection->receive_credits().Consume()) {
      Break(peer, Status(StatusCode::kDataLoss,
                         "verbs: " + Describe(peer.address) +
                             " sends more than it was given receives for"));
    }
    if (peer.connection->receive_credits().due()) MarkBusy(peer);
    if (work.opcode == IBV_WC_RECV_RDMA_WITH_IMM) {
      Completion completion;
      completion.kind = Completion::Kind::kImmediate;
      completion.peer = peer.wanted() ? peer.id : kUnknownPeer;
      completion.immediate = ntohl(work.imm_data);
      ready_.push_back(std::move(completion));
    } else {
      const auto frame = DecodeVerbsFrame(
          {receives_->data(index),
           std::min<uint32_t>(work.byte_len, kVerbsFrameBytesMax)});
      if (frame.has_value()) OnFrame(peer, *frame);
    }
  }
  const Status reposted = receives_->Repost(index);
  if (!reposted.ok() && failed_.ok()) failed_ = reposted;
}

void VerbsDomain::OnFrame(VerbsPeer& peer, const VerbsFrame& frame) {
  switch (frame.kind) {
    case VerbsFrameKind::kMessage: {
      Completion completion;
      completion.kind = Completion::Kind::kMessage;
      completion.peer = peer.wanted() ? peer.id : kUnknownPeer;
      completion.message = std::string(frame.payload);
      ready_.push_back(std::move(completion));
      break;
    }
    case VerbsFrameKind::kAsk:
      OnAsk(peer, frame.argument);
      break;
    case VerbsFrameKind::kAnswer: {
      const auto asked = peer.regions.find(frame.argument);
      if (asked == peer.regions.end() ||
          frame.payload.size() != sizeof(VerbsRegion)) {
        break;
      }
      VerbsRegion region;
      std::memcpy(&region, frame.payload.data(), sizeof(region));
      asked->second = region;
      break;
    }
    case VerbsFrameKind::kGone:
      peer.regions.erase(frame.argument);
      break;
    case VerbsFrameKind::kJoined:
      break;
  }
}

void VerbsDomain::OnAsk(VerbsPeer& peer, uint64_t key) {
  if (peer.frames.size() >= kAnswersMax) {
    return Break(
        peer, Status(StatusCode::kDataLoss,
                     "verbs: " + Describe(peer.address) +
                         " asks for more than " + std::to_string(kAnswersMax) +
                         " memory keys and takes no answers"));
  }
  VerbsRegion region;
  if (const MemoryRegion* ours = regions_.Find(key)) {
    region.base = reinterpret_cast<uintptr_t>(ours->base);
    region.length = ours->length;
    region.remote_key = memory_.at(key).registration->rkey;
    peer.told.insert(key);
  }
  Tell(peer, VerbsFrameKind::kAnswer, key,
       std::string(reinterpret_cast<const char*>(&region), sizeof(region)));
}

void VerbsDomain::Tell(VerbsPeer& peer, VerbsFrameKind kind, uint64_t argument,
                       std::string payload) {
  if (peer.connection == nullptr) return;
  peer.frames.push_back({kind, argument, std::move(payload)});
  MarkBusy(peer);
}

void VerbsDomain::MarkBusy(VerbsPeer& peer) {
  if (std::exchange(peer.busy, true)) return;
  busy_.push_back(&peer);
}

void VerbsDomain::PumpFrames(VerbsPeer& peer) {
  VerbsConnection& connection = *peer.connection;
  while (!peer.frames.empty() && connection.HasRoom() &&
         connection.HasCredit()) {
    const std::optional<uint32_t> buffer = buffers_->TakeFrame(0);
    if (!buffer.has_value()) return;
    const VerbsPeer::Outgoing& frame = peer.frames.front();
    const uint32_t bytes = EncodeVerbsFrame(
        {frame.kind, frame.argument, frame.payload}, buffers_->frame(*buffer));
    const Status posted =
        connection.PostFrame({VerbsOperation::Kind::kFrame, 0, *buffer}, bytes);
    peer.frames.pop_front();
    if (!posted.ok()) return Break(peer, posted);
  }
}

// Words first, so that the peer goes on; then frames; then what is chained.
void VerbsDomain::Pump() {
  pumped_.swap(busy_);  // neither gives its memory back
  for (VerbsPeer* const peer : pumped_) {
    peer->busy = false;
    if (!peer->ready()) continue;
    VerbsConnection& connection = *peer->connection;
    Status status;
    if (connection.receive_credits().due()) status = connection.PostWord();
    if (status.ok()) PumpFrames(*peer);
    if (status.ok()) status = connection.Flush();
    if (!status.ok()) Break(*peer, status);
    if (!peer->frames.empty() || connection.receive_credits().due()) {
      MarkBusy(*peer);
    }
  }
  pumped_.clear();
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
