// TransferEngine: who it talks to. The handshake, heartbeats, farewells,
// losses.

#include <algorithm>
#include <utility>

#include "engine/immediate.h"
#include "engine/transfer_engine.h"

namespace jaxfabric {
namespace {

using Type = TransferFrame::Type;

// AddPeer may let us wait, and everything here waits with it; it is tried again
// where there was not enough time.
constexpr int64_t kJoinLimitMinNs = 200'000'000;
constexpr int64_t kJoinLimitMaxNs = 1'000'000'000;
// So long, one that said hello and could not be added may say it again.
constexpr int64_t kHelloPatienceNs = 5'000'000'000;
constexpr int64_t kHelloPauseMinNs = 200'000'000;
constexpr int64_t kHelloPauseMaxNs = 2'000'000'000;
// So long, a peer may take to accept a farewell.
constexpr double kFarewellS = 0.5;
// What a peer sent before it took leave may come so much later.
constexpr int64_t kFarewellNs = 2'000'000'000;
// Peers that are lost and still remembered, for error texts.
constexpr size_t kLostMax = 256;

int64_t Nanoseconds(double seconds) {
  return static_cast<int64_t>(seconds * 1e9);
}

std::string Bytes(const TransferFrame& frame) { return frame.Encode(); }

}  // namespace

std::string TransferEngine::NameLocked(uint32_t peer) const {
  const auto found = peers_.find(peer);
  if (found != peers_.end()) return *found->second->title;
  std::string text = "peer " + std::to_string(peer);
  const auto lost = lost_.find(peer);
  return lost == lost_.end() ? text : text + " " + lost->second;
}

StatusOr<TransferPeer*> TransferEngine::FindPeerLocked(uint32_t name) {
  const auto found = peers_.find(name);
  if (found != peers_.end() && found->second->connected) {
    return found->second.get();
  }
  if (found != peers_.end()) {
    return Status(StatusCode::kFailedPrecondition,
                  NameLocked(name) + " has not answered yet; wait for connect");
  }
  if (lost_.contains(name)) {
    return Status(StatusCode::kUnavailable,
                  NameLocked(name) +
                      "; connect to its address again, if it has a new one");
  }
  return Status(StatusCode::kNotFound,
                "there is no peer " + std::to_string(name) +
                    "; it comes from connect() or with a message");
}

StatusOr<TransferPeer*> TransferEngine::FindOwnerLocked(
    const RegionAddress& region) {
  if (region.owner == self_.id) {
    return Status(StatusCode::kInvalidArgument,
                  "the target region is this engine's own; copy instead");
  }
  const auto found = peer_by_engine_.find(region.owner);
  if (found == peer_by_engine_.end()) {
    return Status(StatusCode::kUnavailable,
                  "the target region belongs to engine " +
                      region.owner.Short() +
                      ", which is no peer (any more): connect to its address "
                      "first, and take a new description if it was restarted");
  }
  return FindPeerLocked(found->second);
}

// --- The handshake, see handshake.h ---

TransferEngine::Submitted TransferEngine::Connect(std::string_view bytes,
                                                  MaybeDeadline deadline) {
  const auto refuse = [](StatusCode code, std::string why) {
    return Status(code, "connect: " + std::move(why));
  };
  auto decoded = EngineAddress::Decode(bytes);
  if (!decoded.ok()) return decoded.status().Annotate("connect");
  const EngineAddress address = *std::move(decoded);
  if (address.id == self_.id) {
    return refuse(StatusCode::kInvalidArgument,
                  "this is the engine's own address");
  }
  if (address.job != self_.job) {
    return refuse(StatusCode::kPermissionDenied,
                  address.Describe() + " is of job '" + address.job +
                      "', this engine of job '" + self_.job + "'");
  }
  if (!address.IsSealedWith(options_.token)) {
    return refuse(StatusCode::kUnauthenticated,
                  "the address of " + address.Describe() +
                      " was made with another token, or altered since; give "
                      "both engines the same token=");
  }
  std::unique_lock<std::mutex> lock(mutex_);
  JF_ASSIGN_OR_RETURN(
      const SubmissionPtr submission,
      BeginLocked(SubmissionKind::kConnect, "connect to " + address.Describe(),
                  deadline));
  const auto known = peer_by_engine_.find(address.id);
  if (known != peer_by_engine_.end()) {
    submission->peer = known->second;
    if (peers_.at(known->second)->connected) {
      FinishLocked(submission, OkStatus(), known->second);
    }
    return submission->future;
  }
  const auto added = AddPeerLocked(address);
  if (!added.ok()) {
    const Status failed = added.status().Annotate(submission->future->label());
    FinishLocked(submission, failed);
    return failed;
  }
  submission->peer = *added;
  SendHelloLocked(*peers_.at(*added), MonotonicNanoseconds());
  return submission->future;
}

StatusOr<uint32_t> TransferEngine::AddPeerLocked(const EngineAddress& address) {
  auto peer = std::make_unique<TransferPeer>();
  const uint32_t name = next_peer_++;
  peer->name = name;
  peer->address = address;
  peer->title = std::make_shared<const std::string>(
      "peer " + std::to_string(name) + " " + address.Describe());
  peer->last_heard_ns = MonotonicNanoseconds();
  JF_RETURN_IF_ERROR(JoinLocked(*peer));
  peers_[name] = std::move(peer);
  peer_by_engine_[address.id] = name;
  return name;
}

// Adds it to the group. What may go better the next time is no error.
Status TransferEngine::JoinLocked(TransferPeer& peer) {
  if (peer.added) return OkStatus();
  peer.join_limit_ns =
      std::clamp(2 * peer.join_limit_ns, kJoinLimitMinNs, kJoinLimitMaxNs);
  const Status added =
      group_->AddPeer(peer.name, peer.address.domains,
                      Deadline::AfterNanoseconds(peer.join_limit_ns));
  peer.added = added.ok();
  return added.code() == StatusCode::kDeadlineExceeded ? OkStatus() : added;
}

void TransferEngine::SendHelloLocked(TransferPeer& peer, int64_t now_ns) {
  peer.hello_pause_ns =
      std::clamp(2 * peer.hello_pause_ns, kHelloPauseMinNs, kHelloPauseMaxNs);
  peer.next_hello_ns = now_ns + peer.hello_pause_ns;
  if (!peer.added) return;
  self_.domains = group_->addresses();
  const Hello hello = {peer.address.id, peer.nonce, self_};
  group_->SubmitSend(peer.name, Bytes({.type = Type::kHello,
                                       .body = hello.Encode(options_.token)}));
}

void TransferEngine::RefuseLocked(const Status& why) {
  if (why.code() == StatusCode::kUnauthenticated) {
    ++stats_.refused_seal;
  } else if (why.code() == StatusCode::kFailedPrecondition) {
    ++stats_.refused_version;
  } else if (why.code() == StatusCode::kAlreadyExists) {
    ++stats_.refused_replay;
  } else {
    ++stats_.refused_other;
  }
  stats_.last_refusal = why.message();
}

// Only a Hello may come from somebody that nobody has added.
void TransferEngine::HandleStrangerLocked(std::string_view bytes) {
  const auto frame = TransferFrame::Decode(bytes);
  if (!frame.ok()) return RefuseLocked(frame.status());
  if (frame->type != Type::kHello) {
    ++stats_.strangers_dropped;
    return;
  }
  const Status handled = HandleHelloLocked(frame->body);
  if (!handled.ok()) RefuseLocked(handled);
}

Status TransferEngine::HandleHelloLocked(std::string_view body) {
  JF_ASSIGN_OR_RETURN(const Hello hello,
                      Hello::Verify(body, options_.token, self_));
  if (closing_) return OkStatus();
  auto known = peer_by_engine_.find(hello.sender.id);
  if (known != peer_by_engine_.end()) {
    const TransferPeer& peer = *peers_.at(known->second);
    const bool again = peer.their_nonce == hello.nonce;
    if (!again && !nonces_.Add(hello.nonce, {})) {
      return Status(
          StatusCode::kAlreadyExists,
          "a hello of an earlier connection of " + peer.address.Describe());
    }
    if (!again && peer.connected && peer.their_nonce) {
      peers_.at(known->second)->came_back = true;
      LosePeerLocked(known->second, Status(StatusCode::kUnavailable,
                                           "it gave up this connection and "
                                           "connected again"));
      known = peer_by_engine_.end();
    }
  } else if (!nonces_.Add(hello.nonce, {})) {
    return Status(StatusCode::kAlreadyExists, "a hello of a connection of " +
                                                  hello.sender.Describe() +
                                                  " that is over");
  }
  uint32_t name = 0;
  Status joined;
  if (known == peer_by_engine_.end()) {
    const auto added = AddPeerLocked(hello.sender);
    joined = added.status();
    if (added.ok()) name = *added;
  } else {
    name = known->second;
    joined = JoinLocked(*peers_.at(name));
  }
  if (!joined.ok() || !peers_.at(name)->added) {
    nonces_.Forget(hello.nonce);  // nothing came of it: it may come again
    return joined;
  }
  TransferPeer& peer = *peers_.at(name);
  peer.their_nonce = hello.nonce;
  ConnectedLocked(peer);
  if (std::exchange(peer.welcome_waits, true)) return OkStatus();
  const Welcome welcome = {hello.sender.id, self_.id, hello.nonce, peer.nonce};
  group_->SubmitSend(
      name,
      Bytes({.type = Type::kWelcome, .body = welcome.Encode(options_.token)}),
      [this, name](const Status&) {
        const auto found = peers_.find(name);
        if (found == peers_.end()) return;
        found->second->welcome_waits = false;
      });
  return OkStatus();
}

Status TransferEngine::HandleWelcomeLocked(TransferPeer& peer,
                                           std::string_view body) {
  JF_ASSIGN_OR_RETURN(const Welcome welcome,
                      Welcome::Verify(body, options_.token));
  if (welcome.target != self_.id || welcome.sender != peer.address.id ||
      welcome.echo != peer.nonce) {
    return Status(StatusCode::kAlreadyExists,
                  "a welcome that answers no hello of this connection");
  }
  // Should its own Hello still be on the way, it is no new connection.
  peer.their_nonce = welcome.nonce;
  nonces_.Add(welcome.nonce, {});
  ConnectedLocked(peer);
  return OkStatus();
}

void TransferEngine::ConnectedLocked(TransferPeer& peer) {
  if (peer.connected) return;
  peer.connected = true;
  ++stats_.handshakes;
  std::vector<SubmissionPtr> waiting;
  for (const auto& [number, submission] : live_) {
    if (submission->kind == SubmissionKind::kConnect &&
        submission->peer == peer.name) {
      waiting.push_back(submission);
    }
  }
  for (const SubmissionPtr& submission : waiting) {
    FinishLocked(submission, OkStatus(), peer.name);
  }
  // It may have been told of these regions before it connected.
  for (const auto& [region, submission] : ending_.regions) {
    if (!submission->told) continue;
    submission->unanswered.push_back(peer.name);
    group_->SubmitSend(peer.name, Bytes({.type = Type::kWithdraw,
                                         .a = submission->future->number(),
                                         .b = region}));
  }
}

// --- What peers send ---

void TransferEngine::HandleFrameLocked(uint32_t name, std::string_view bytes) {
  auto frame = TransferFrame::Decode(bytes);
  if (!frame.ok()) return RefuseLocked(frame.status());
  if (frame->type == Type::kHello) {
    const Status handled = HandleHelloLocked(frame->body);
    if (!handled.ok()) RefuseLocked(handled);
    return;
  }
  TransferPeer& peer = *peers_.at(name);
  if (frame->type == Type::kWelcome) {
    const Status handled = HandleWelcomeLocked(peer, frame->body);
    if (!handled.ok()) RefuseLocked(handled);
    return;
  }
  const Status handled = HandlePeerFrameLocked(peer, *std::move(frame));
  if (!handled.ok()) LosePeerLocked(name, handled);
}

Status TransferEngine::HandlePeerFrameLocked(TransferPeer& peer,
                                             TransferFrame frame) {
  if (frame.type == Type::kPart) {
    std::vector<std::string> complete;
    JF_RETURN_IF_ERROR(peer.assembler.Add(std::move(frame), &complete));
    for (std::string& message : complete) {
      ++peer.stats.messages_received;
      if (!inbox_->Push({peer.name, std::move(message)})) {
        ++stats_.messages_dropped;
      }
    }
  } else if (frame.type == Type::kBarrier) {
    const uint32_t id = static_cast<uint32_t>(frame.a);
    if (peer.barriers.size() >= TransferPeer::kBarriersMax &&
        !peer.barriers.contains(id)) {
      return Status(StatusCode::kDataLoss,
                    "it came to more than 2^16 barriers");
    }
    uint64_t& theirs = peer.barriers[id].theirs;
    theirs = std::max(theirs, frame.b);
    CheckBarriersLocked();
  } else if (frame.type == Type::kPing) {
    if (std::exchange(peer.pong_waits, true)) return OkStatus();
    group_->SubmitSend(peer.name, Bytes({.type = Type::kPong}),
                       [this, name = peer.name](const Status&) {
                         const auto found = peers_.find(name);
                         if (found == peers_.end()) return;
                         found->second->pong_waits = false;
                       });
  } else if (frame.type == Type::kSpoilt) {
    HandleSpoiltLocked(peer, static_cast<uint32_t>(frame.a));
  } else if (frame.type == Type::kUses) {
    peer.their_ids.Add(static_cast<uint32_t>(frame.a), {});
  } else if (frame.type == Type::kWithdraw) {
    return HandleWithdrawLocked(peer, frame);
  } else if (frame.type == Type::kWithdrawn) {
    HandleWithdrawnLocked(peer.name, frame.a);
  } else if (frame.type == Type::kGoodbye) {
    peer.farewell = {.messages = frame.a,
                     .transfers = frame.b,
                     .heard_ns = MonotonicNanoseconds()};
  }
  return OkStatus();
}

// --- Life and death ---

void TransferEngine::WatchPeersLocked(int64_t now_ns) {
  std::vector<std::pair<uint32_t, Status>> losses;
  const auto lose = [&](const TransferPeer& peer, const char* why) {
    losses.emplace_back(peer.name, Status(StatusCode::kUnavailable, why));
  };
  for (auto& [name, peer] : peers_) {
    const int64_t silent_ns = now_ns - peer->last_heard_ns;
    if (peer->farewell) {
      const TransferPeer::Farewell& farewell = *peer->farewell;
      const bool all_here =
          peer->assembler.next() >= farewell.messages &&
          (!caps_.immediate_names_peer ||
           peer->units_received / kTransferUnits >= farewell.transfers);
      if (all_here || now_ns - farewell.heard_ns > kFarewellNs) {
        lose(*peer, "it closed its TransferEngine, or disconnected");
      }
    } else if (!peer->connected) {
      const bool wanted = std::any_of(
          live_.begin(), live_.end(), [&peer = *peer](const auto& item) {
            return item.second->kind == SubmissionKind::kConnect &&
                   item.second->peer == peer.name;
          });
      if (!wanted && !peer->added && silent_ns < kHelloPatienceNs) continue;
      if (!wanted) {
        lose(*peer, "it did not answer in time");
      } else if (now_ns >= peer->next_hello_ns) {
        const Status joined = JoinLocked(*peer);
        if (!joined.ok()) losses.emplace_back(name, joined);
        SendHelloLocked(*peer, now_ns);
      }
    } else if (silent_ns > Nanoseconds(options_.peer_timeout_s)) {
      lose(*peer, "it was silent for longer than peer_timeout_s");
    } else if (silent_ns > Nanoseconds(options_.heartbeat_s) &&
               now_ns - peer->last_ping_ns >
                   Nanoseconds(options_.heartbeat_s)) {
      peer->last_ping_ns = now_ns;
      group_->SubmitSend(name, Bytes({.type = Type::kPing}));
    }
  }
  for (const auto& [name, why] : losses) LosePeerLocked(name, why);
}

void TransferEngine::LosePeerLocked(uint32_t name, const Status& why) {
  const auto found = peers_.find(name);
  if (found == peers_.end()) return;
  const std::string text =
      found->second->address.Describe() + ", which is lost: " + why.message();
  if (found->second->connected) ++stats_.peers_lost;
  const std::unique_ptr<TransferPeer> gone = std::move(found->second);
  peer_by_engine_.erase(gone->address.id);
  peers_.erase(found);
  lost_[name] = text;
  if (lost_.size() > kLostMax) lost_.erase(lost_.begin());

  const auto involves = [name](const Submission& submission) {
    const auto is = [name](const auto& item) { return item.peer == name; };
    const auto& sources = submission.sources;
    return (submission.kind == SubmissionKind::kConnect && is(submission)) ||
           std::any_of(submission.arrivals.begin(), submission.arrivals.end(),
                       is) ||
           std::find(sources.begin(), sources.end(), name) != sources.end();
  };
  for (const auto& [number, submission] : std::map(live_)) {
    const Status failed =
        Status(StatusCode::kUnavailable,
               submission->future->label() + ": " + NameLocked(name));
    if (involves(*submission)) {
      submission->lost = name;
      StopLocked(submission, failed);
      continue;
    }
    // Writes and messages end in the group; this is their reason.
    for (size_t i = 0; i < submission->parts.size(); ++i) {
      Submission::Part& part = submission->parts[i];
      if (!part.open || part.peer != name) continue;
      if (submission->failure.ok()) {
        submission->failure = failed;
        submission->lost = name;
      }
      if (std::exchange(part.unmapped, false)) {
        EndPartLocked(submission, i, failed);
      }
    }
  }
  if (mapped_.copies.contains(name)) {
    mapped_.to_remove.insert(name);
  } else {
    group_->RemovePeer(name);
  }
  // Its goodbye may have overtaken writes, where a network keeps no order.
  if (gone->connected) ++ending_.lost.losses;
  // What it had under way here ends first where it said goodbye; or where it
  // has come back: then it says so itself.
  if (caps_.writes_outlive_regions && gone->connected && !gone->farewell &&
      !gone->came_back) {
    registry_.MarkStray(NameLocked(name));
  }
  ForgetPartsLocked(*gone);
  HandleWithdrawnLocked(name, 0);
}

void TransferEngine::EndCopyLocked(uint32_t peer) {
  const auto copies = mapped_.copies.find(peer);
  if (--copies->second > 0) return;
  mapped_.copies.erase(copies);
  if (mapped_.to_remove.erase(peer) > 0) group_->RemovePeer(peer);
}

void TransferEngine::SayGoodbyeLocked(TransferPeer& peer,
                                      DomainGroup::Done done) {
  group_->SubmitSend(peer.name,
                     Bytes({.type = Type::kGoodbye,
                            .a = peer.next_message,
                            .b = peer.counted_transfers_sent}),
                     std::move(done));
}

Status TransferEngine::Disconnect(uint32_t name) {
  // Not before the farewell has gone: the way to send it goes with the peer.
  const auto sent = std::make_shared<std::atomic<bool>>(false);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = peers_.find(name);
    if (found == peers_.end()) {
      return FindPeerLocked(name).status().Annotate("disconnect");
    }
    SayGoodbyeLocked(*found->second, [sent](const Status&) {
      sent->store(true, std::memory_order_release);
    });
  }
  const Deadline deadline = Deadline::AfterSeconds(kFarewellS);
  Doorbell& doorbell = transport_->doorbell();
  for (;;) {
    Progress();
    if (sent->load(std::memory_order_acquire) || deadline.Expired()) break;
    doorbell.Wait(doorbell.Sequence(), Deadline::AfterNanoseconds(1'000'000));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  LosePeerLocked(name, Status(StatusCode::kUnavailable,
                              "this engine disconnected from it"));
  return OkStatus();
}

}  // namespace jaxfabric
