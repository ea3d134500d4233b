#include "transport/ofi_domain.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <utility>

#include "transport/shm_address.h"

namespace jaxfabric {
namespace {

// Room in the device's queue for frames, which writes may not take.
constexpr size_t kFrameReserve = 32;
constexpr size_t kQueueDepthMax = 512;
constexpr size_t kMessagesMax = 64;
constexpr size_t kReceives = 64;
// Where immediates use receives up as well.
constexpr size_t kReceivesForData = 512;

// What tcp says of a connection that is not there (yet); whether it can come is
// found out by TcpProbe.
bool IsNoConnection(int64_t error) {
  switch (-error) {
    case FI_ENOTCONN:
    case FI_ECONNREFUSED:
    case FI_ECONNRESET:
    case FI_ECONNABORTED:
    case FI_EHOSTUNREACH:
    case FI_ENETUNREACH:
    case FI_ETIMEDOUT:
    case FI_ESHUTDOWN:
      return true;
    default:
      return false;
  }
}

// libfabric's shm maps an endpoint once for its whole process: where two
// endpoints of one process talk to each other, the one that stays crashes when
// the other is closed, and at times before (2.5.1, in fi_send and fi_cq_read).
// Between processes it does not.
std::atomic<bool> shm_is_open{false};

}  // namespace

StatusOr<std::unique_ptr<OfiDomain>> OfiDomain::Open(
    const OfiLibrary& library, OfiProvider provider, const fi_info& info,
    const JobKey& key, OfiBell* bell, Doorbell* doorbell) {
  std::unique_ptr<OfiDomain> domain(new OfiDomain(key, bell, doorbell));
  JF_RETURN_IF_ERROR(domain->Start(library, provider, info));
  return domain;
}

Status OfiDomain::Start(const OfiLibrary& library, OfiProvider provider,
                        const fi_info& info) {
  if (provider == OfiProvider::kShm) {
    if (shm_is_open.exchange(true, std::memory_order_acq_rel)) {
      return Status(StatusCode::kUnimplemented,
                    "ofi/shm joins processes, and crashes inside libfabric "
                    "where one process has two Domains: open one, or use the "
                    "transport shm");
    }
    holds_shm_ = true;
  }
  JF_ASSIGN_OR_RETURN(endpoint_, OfiEndpoint::Open(library, provider, info));
  FillCaps();
  const size_t receives =
      std::min(endpoint_->receive_depth(),
               caps_.immediate_consumes_receive ? kReceivesForData : kReceives);
  JF_ASSIGN_OR_RETURN(
      operations_,
      OfiOperations::Open(
          *endpoint_, caps_.queue_depth,
          std::min<size_t>(caps_.queue_depth, kMessagesMax) + kFrameReserve,
          receives));
  for (OfiOperation* operation : operations_->receives()) {
    PostReceive(operation);
  }
  address_.provider = provider;
  address_.nonce = RandomU64();
  address_.job = key_.JobId();
  TakeName();
  return Listen();
}

void OfiDomain::TakeName() {
  const std::span<const std::byte> name = endpoint_->name();
  address_.endpoint_bytes = static_cast<uint32_t>(name.size());
  address_.endpoint = {};
  std::copy(name.begin(), name.end(), address_.endpoint.begin());
  net_addr_ = ToNetAddr(address_);
}

Status OfiDomain::Listen() {
  if (bell_ == nullptr || endpoint_->wait_fd() < 0) return OkStatus();
  JF_RETURN_IF_ERROR(bell_->Add(endpoint_->wait_fd()));
  watched_fd_ = endpoint_->wait_fd();
  return OkStatus();
}

void OfiDomain::FillCaps() {
  switch (endpoint_->provider()) {
    case OfiProvider::kTcp:
      caps_.transport = "ofi/tcp";
      break;
    case OfiProvider::kEfa:
      caps_.transport = "ofi/efa";
      break;
    case OfiProvider::kEfaDirect:
      caps_.transport = "ofi/efa-direct";
      break;
    case OfiProvider::kShm:
      caps_.transport = "ofi/shm";
      break;
  }
  caps_.write_bytes_max = endpoint_->write_bytes_max();
  caps_.write_pieces_max = static_cast<uint32_t>(endpoint_->write_pieces_max());
  caps_.message_bytes_max = kOfiMessageBytesMax;
  const size_t depth = std::min(endpoint_->send_depth(), kQueueDepthMax);
  caps_.queue_depth = static_cast<uint32_t>(
      depth > 2 * kFrameReserve ? depth - kFrameReserve : depth / 2 + 1);
  // Addresses are added here, from what the peer tells of its memory.
  caps_.address_mode = AddressMode::kOffset;
  caps_.immediate_consumes_receive = endpoint_->immediate_consumes_receive();
  caps_.immediate_names_peer = endpoint_->names_source();
  caps_.removal_fences = endpoint_->can_reopen();
  caps_.target_must_poll = true;
  caps_.emulated_writes = endpoint_->emulated_writes();
  caps_.writes_outlive_regions = endpoint_->writes_in_software();
}

OfiDomain::~OfiDomain() {
  if (operations_ != nullptr && !stopped_) SayBye();
  if (watched_fd_ >= 0) bell_->Remove(watched_fd_);
  if (endpoint_ != nullptr) endpoint_->Stop();
  if (holds_shm_) {
    operations_.reset();
    memory_.clear();
    endpoint_.reset();
    shm_is_open.store(false, std::memory_order_release);
  }
}

void OfiDomain::PostReceive(OfiOperation* operation) {
  if (stopped_ ||
      endpoint_->Receive(operation->buffer, operations_->descriptor(),
                         kOfiFrameBytesMax, operation) != 0) {
    unposted_.push_back(operation);
  }
}

StatusOr<uint64_t> OfiDomain::RegisterMemory(const MemoryRegion& region) {
  if (region.base == nullptr || region.length == 0) {
    return Status(StatusCode::kInvalidArgument,
                  "memory to be registered has an address and a length");
  }
  const uint64_t key = RandomU64();
  JF_ASSIGN_OR_RETURN(memory_[key],
                      endpoint_->Register(region.base, region.length,
                                          /*remote=*/true, key));
  regions_.Add(key, region);
  return key;
}

Status OfiDomain::UnregisterMemory(uint64_t key) {
  if (!regions_.Remove(key)) {
    return Status(StatusCode::kNotFound,
                  "the key to unregister is not registered with this Domain");
  }
  memory_.erase(key);
  for (auto& [nonce, peer] : peers_) {
    if (peer->told.erase(key) > 0) Tell(*peer, OfiFrameKind::kGone, key);
  }
  return OkStatus();
}

StatusOr<OfiPeer*> OfiDomain::FindPeer(PeerId id) {
  if (id >= ids_.size() || ids_[id] == nullptr) {
    return Status(
        StatusCode::kInvalidArgument,
        "no peer " + std::to_string(id) + " (removed, or never added)");
  }
  JF_RETURN_IF_ERROR(ids_[id]->lost);
  return ids_[id];
}

StatusOr<std::optional<OfiRegion>> OfiDomain::RegionOf(OfiPeer& peer,
                                                       const RemoteSpan& remote,
                                                       uint64_t length) {
  const auto [found, is_new] = peer.regions.try_emplace(remote.key);
  if (is_new) Tell(peer, OfiFrameKind::kAsk, remote.key);
  if (!found->second.has_value()) return std::optional<OfiRegion>();
  const OfiRegion region = *found->second;
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
  return std::optional<OfiRegion>(region);
}

// No peer has more open than is free for the others: n peers that take nothing
// hold n/(n+1) of the queue.
bool OfiDomain::HasRoom(const OfiPeer& peer) const {
  return posted_ < caps_.queue_depth && peer.open < caps_.queue_depth - posted_;
}

StatusOr<Posted> OfiDomain::Refused(OfiPeer& peer, OfiOperation* operation,
                                    int64_t error) {
  operations_->GiveBack(operation);
  const bool connecting =
      address_.provider == OfiProvider::kTcp && IsNoConnection(error);
  if (error == -FI_EAGAIN || connecting) {
    NoteRefusal(peer);
    return Posted::kAgain;
  }
  return Status(StatusCode::kUnavailable,
                std::string(caps_.transport) + " refused to post to " +
                    DescribeEndpoint(peer.address) + ": libfabric error " +
                    std::to_string(-error));
}

StatusOr<Posted> OfiDomain::PostWriteImm(PeerId id, LocalSpan local,
                                         RemoteSpan remote, uint64_t length,
                                         std::optional<uint32_t> immediate,
                                         uint64_t cookie) {
  const Piece all = {0, 0, length};
  return PostPieces(id, local, remote, {&all, 1}, immediate, cookie);
}

StatusOr<Posted> OfiDomain::PostPieces(PeerId id, LocalSpan local,
                                       RemoteSpan remote,
                                       std::span<const Piece> pieces,
                                       std::optional<uint32_t> immediate,
                                       uint64_t cookie) {
  JF_ASSIGN_OR_RETURN(OfiPeer* const peer, FindPeer(id));
  JF_CHECK(pieces.size() <= caps_.write_pieces_max);
  std::array<iovec, OfiEndpoint::kWritePiecesMax> from;
  std::array<fi_rma_iov, OfiEndpoint::kWritePiecesMax> target;
  void* descriptor = operations_->descriptor();
  uint64_t length = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    const std::byte* data = operations_->anything();
    if (piece.length > 0) {
      data = local.data + piece.local_offset;
      JF_RETURN_IF_ERROR(regions_.CheckSource({data, local.key}, piece.length));
      descriptor = memory_.at(local.key).descriptor();
    }
    from[i] = {const_cast<std::byte*>(data), piece.length};
    length += piece.length;
  }
  if (length > caps_.write_bytes_max) {
    return Status(StatusCode::kInvalidArgument,
                  "a write of " + std::to_string(length) + " bytes exceeds " +
                      caps_.transport + "'s " +
                      std::to_string(caps_.write_bytes_max));
  }
  if (!peer->MayPost() || renewing_) return Posted::kAgain;
  for (size_t i = 0; i < pieces.size(); ++i) {
    RemoteSpan to = remote;
    to.offset += pieces[i].remote_offset;
    JF_ASSIGN_OR_RETURN(const std::optional<OfiRegion> region,
                        RegionOf(*peer, to, pieces[i].length));
    if (!region.has_value()) return Posted::kAgain;
    target[i] = {region->base + to.offset, pieces[i].length,
                 region->provider_key};
  }
  if (!HasRoom(*peer)) return Posted::kAgain;
  OfiOperation* const operation = operations_->TakeWrite();
  if (operation == nullptr) return Posted::kAgain;
  operation->kind = OfiOperation::Kind::kWrite;
  operation->peer = peer;
  operation->cookie = cookie;
  const int64_t error = endpoint_->Write(
      peer->fi_address, {from.data(), pieces.size()}, descriptor,
      {target.data(), pieces.size()}, immediate, operation);
  if (error != 0) return Refused(*peer, operation, error);
  ++posted_;
  ++peer->open;
  ++peer->posts;
  peer->stuck_ns = 0;
  return Posted::kPosted;
}

StatusOr<Posted> OfiDomain::PostSend(PeerId id, std::string_view message,
                                     uint64_t cookie) {
  JF_ASSIGN_OR_RETURN(OfiPeer* const peer, FindPeer(id));
  if (message.size() > kOfiMessageBytesMax) {
    return Status(StatusCode::kInvalidArgument,
                  "a message of " + std::to_string(message.size()) +
                      " bytes exceeds " + caps_.transport + "'s " +
                      std::to_string(kOfiMessageBytesMax));
  }
  if (!peer->MayPost() || renewing_ || !HasRoom(*peer)) return Posted::kAgain;
  OfiOperation* const operation = operations_->TakeSend(kFrameReserve);
  if (operation == nullptr) return Posted::kAgain;
  operation->kind = OfiOperation::Kind::kMessage;
  operation->peer = peer;
  operation->cookie = cookie;
  const size_t bytes = EncodeOfiFrame(
      {OfiFrameKind::kMessage, address_.nonce, peer->address.nonce, 0, message},
      key_, operation->buffer);
  const int64_t error =
      endpoint_->Send(peer->fi_address, operation->buffer,
                      operations_->descriptor(), bytes, operation);
  if (error != 0) return Refused(*peer, operation, error);
  ++posted_;
  ++peer->open;
  ++peer->posts;
  peer->stuck_ns = 0;
  peer->spoke_ns = MonotonicNanoseconds();
  return Posted::kPosted;
}

size_t OfiDomain::Poll(std::span<Completion> completions) {
  for (OfiOperation* operation : std::exchange(unposted_, {})) {
    PostReceive(operation);
  }
  bool empty = stopped_;
  bool heard = false;
  OfiEvent event;
  while (ready_.size() < completions.size() && !empty) {
    empty = !endpoint_->Next(&event);
    heard |= !empty;
    if (!empty) Handle(event);
  }
  // A loss may be told only after what came before it.
  if (empty && !stopped_) TendPeers();
  if (renewing_) {
    if (heard) calm_ns_ = MonotonicNanoseconds();
    if (empty) TendRenewal();
  }
  if (frames_waiting_ > 0) {
    for (auto& [nonce, peer] : peers_) {
      while (PumpFrame(*peer)) continue;
    }
  }
  const size_t count = std::min(ready_.size(), completions.size());
  for (size_t i = 0; i < count; ++i) {
    completions[i] = std::move(ready_.front());
    ready_.pop_front();
  }
  Rest(empty && ready_.empty());
  return count;
}

// The owner may sleep now; the descriptor wakes it only for what comes from
// here on.
void OfiDomain::Rest(bool empty) {
  if (watched_fd_ < 0) return;
  // A renewal is over within milliseconds, and is waited for by all peers.
  if (!empty || renewing_ || !endpoint_->MaySleep()) doorbell_->Ring();
}

void OfiDomain::Handle(const OfiEvent& event) {
  OfiOperation* const operation = OfiOperations::FromContext(event.context);
  switch (event.kind) {
    case OfiEvent::Kind::kDone:
      OnDone(operation);
      break;
    case OfiEvent::Kind::kFailed:
      // One without a context is about a write of a peer, which is told.
      if (operation != nullptr) OnFailed(operation, event.error);
      break;
    case OfiEvent::Kind::kImmediate: {
      Completion completion;
      completion.kind = Completion::Kind::kImmediate;
      completion.immediate = event.immediate;
      if (caps_.immediate_names_peer) {
        const auto source = by_source_.find(event.source);
        if (source != by_source_.end()) completion.peer = source->second->id;
      }
      ready_.push_back(std::move(completion));
      if (caps_.immediate_consumes_receive && operation != nullptr) {
        PostReceive(operation);
      }
      break;
    }
    case OfiEvent::Kind::kReceived: {
      if (operation == nullptr) break;
      const auto frame = DecodeOfiFrame(
          {operation->buffer, std::min(event.bytes, kOfiFrameBytesMax)}, key_,
          address_.nonce);
      // What is not of this job is dropped, whoever sent it.
      if (frame.has_value()) {
        OnFrame(*frame);
      } else {
        ++refused_frames_;
      }
      PostReceive(operation);
      break;
    }
    case OfiEvent::Kind::kOther:
      break;
  }
}

void OfiDomain::OnDone(OfiOperation* operation) {
  OfiPeer& peer = *operation->peer;
  --peer.open;
  peer.failures = 0;
  peer.greeted |= operation->kind == OfiOperation::Kind::kFrame &&
                  operation->frame == OfiFrameKind::kHello;
  if (operation->kind == OfiOperation::Kind::kWrite) {
    peer.heard_ns = MonotonicNanoseconds();  // its end has said so
  }
  if (operation->kind != OfiOperation::Kind::kFrame) {
    --posted_;
    --peer.posts;
    Completion completion;
    completion.kind = operation->kind == OfiOperation::Kind::kWrite
                          ? Completion::Kind::kWriteDone
                          : Completion::Kind::kSendDone;
    completion.peer = peer.id;
    completion.cookie = operation->cookie;
    ready_.push_back(std::move(completion));
  }
  operations_->GiveBack(operation);
  AnswerPause(peer);
}

void OfiDomain::OnFailed(OfiOperation* operation, const std::string& error) {
  if (operation->kind == OfiOperation::Kind::kReceive) {
    unposted_.push_back(operation);  // too long for a frame: not of ours
    return;
  }
  OfiPeer& peer = *operation->peer;
  const OfiOperation::Kind kind = operation->kind;
  --peer.open;
  const Status status(StatusCode::kUnavailable,
                      std::string(caps_.transport) + " to " +
                          DescribeEndpoint(peer.address) + ": " + error);
  if (kind != OfiOperation::Kind::kFrame) {
    --posted_;
    --peer.posts;
    Completion completion;
    completion.kind = Completion::Kind::kError;
    completion.peer = peer.id;
    completion.cookie = operation->cookie;
    completion.status = status;
    ready_.push_back(std::move(completion));
  }
  operations_->GiveBack(operation);
  AnswerPause(peer);
  peer.spoke_ns = 0;  // a ping now shows whether the peer lives
  if (kind == OfiOperation::Kind::kWrite) return;
  peer.repeat_ns = 0;
  ++peer.failures;
  // A message that may be lost breaks the promise that none is. Frames are said
  // again; tcp's fail with their connection, which may come back.
  const bool again =
      kind == OfiOperation::Kind::kFrame &&
      (address_.provider == OfiProvider::kTcp || peer.failures < 2);
  if (!again) Lose(peer, status);
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
