// TransferEngine: regions that end. Peers hold descriptions of them, and may be
// writing just now.
//
//   owner  kWithdraw: region R goes      to each peer, if R was ever described
//   peer   refuses new writes into R; once those under way have ended, answers
//   owner  kWithdrawn from all: no NIC writes into R, which is unregistered
//
// A peer that does not answer in time is named, and R stays. One that is lost
// need not answer: the group has removed it. Where its writes may land all the
// same (caps().writes_outlive_regions), it is cut off first; and where that
// cannot be done, R stays. Only regions that were described to it have to wait
// for this, and only when they end: others should not have to pause for a peer
// that dies. Who goes on using such a region asks for a fence himself.

#include <algorithm>
#include <utility>

#include "base/elastic_pool.h"
#include "engine/transfer_engine.h"

namespace jaxfabric {

using Type = TransferFrame::Type;

TransferEngine::Submitted TransferEngine::UnregisterMemory(
    RegionId id, MaybeDeadline deadline) {
  std::lock_guard<std::mutex> lock(mutex_);
  JF_ASSIGN_OR_RETURN(MemoryRegistry::Region* const region, registry_.Find(id));
  JF_ASSIGN_OR_RETURN(
      const SubmissionPtr submission,
      BeginLocked(SubmissionKind::kUnregister, "unregister_memory", deadline));
  registry_.BeginRemoval(id);
  submission->region = id;
  ending_.regions[id] = submission;
  const TransferFrame frame = {
      .type = Type::kWithdraw, .a = submission->future->number(), .b = id};
  submission->told = region->target && region->described;
  for (const auto& [name, peer] : peers_) {
    if (!submission->told || !peer->connected) continue;
    submission->unanswered.push_back(name);
    group_->SubmitSend(name, frame.Encode());
  }
  ending_.unused.push_back(id);
  RemoveUnusedLocked();
  return submission->future;
}

Status TransferEngine::HandleWithdrawLocked(TransferPeer& peer,
                                            const TransferFrame& frame) {
  const uint64_t region = frame.b;
  if (peer.withdrawals.size() >= TransferPeer::kRecentMax &&
      !peer.withdrawals.contains(region)) {
    return Status(StatusCode::kDataLoss,
                  "it withdraws more than 2^16 regions at a time");
  }
  peer.withdrawn.Add(region, {});
  const auto [found, is_new] = peer.withdrawals.try_emplace(region);
  found->second.number = frame.a;
  if (is_new) {
    // From here on none is added. Those of an earlier connection count, too.
    for (const auto& [number, submission] : live_) {
      if (submission->kind != SubmissionKind::kWrites) continue;
      for (const Submission::Part& part : submission->parts) {
        found->second.open += part.open && part.receiver == peer.address.id &&
                              part.target == region;
      }
    }
  }
  AnswerWithdrawalLocked(peer, region);
  return OkStatus();
}

void TransferEngine::WriteEndedLocked(const Submission::Part& part) {
  const auto owner = peer_by_engine_.find(part.receiver);
  if (owner == peer_by_engine_.end()) return;
  TransferPeer& peer = *peers_.at(owner->second);
  const auto found = peer.withdrawals.find(part.target);
  if (found == peer.withdrawals.end() || found->second.open == 0) return;
  --found->second.open;
  AnswerWithdrawalLocked(peer, part.target);
}

// It is kept until its answer has gone, so that answers, too, are bounded.
void TransferEngine::AnswerWithdrawalLocked(TransferPeer& peer,
                                            uint64_t region) {
  TransferPeer::Withdrawal& withdrawal = peer.withdrawals.at(region);
  if (withdrawal.open > 0 || withdrawal.answering) return;
  withdrawal.answering = true;
  const uint64_t number = withdrawal.number;
  const auto sent = [this, name = peer.name, region, number](const Status&) {
    const auto found = peers_.find(name);
    if (found == peers_.end()) return;
    auto& withdrawals = found->second->withdrawals;
    if (withdrawals.at(region).number == number) {
      withdrawals.erase(region);
    } else {  // it asked again meanwhile
      withdrawals.at(region).answering = false;
      AnswerWithdrawalLocked(*found->second, region);
    }
  };
  group_->SubmitSend(
      peer.name, TransferFrame{.type = Type::kWithdrawn, .a = number}.Encode(),
      sent);
}

// Also for a peer that is lost, and whatever it was asked: `number` 0.
void TransferEngine::HandleWithdrawnLocked(uint32_t peer, uint64_t number) {
  for (const auto& [region, submission] : ending_.regions) {
    if (number != 0 && submission->future->number() != number) continue;
    if (std::erase(submission->unanswered, peer) == 0) continue;
    if (submission->unanswered.empty()) ending_.unused.push_back(region);
  }
}

TransferEngine::Submitted TransferEngine::SubmitFence(MaybeDeadline deadline) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!caps_.removal_fences && !closing_) {
    return Status(StatusCode::kUnimplemented,
                  "fence: over " + std::string(caps_.transport) +
                      " nothing can stop what a lost peer has under way (over "
                      "ofi/tcp, that of libfabric 2 can)");
  }
  JF_ASSIGN_OR_RETURN(const SubmissionPtr submission,
                      BeginLocked(SubmissionKind::kFence, "fence", deadline));
  submission->losses = ending_.lost.losses;
  ending_.lost.waiting.push_back(submission);
  RemoveUnusedLocked();
  return submission->future;
}

// One fence covers those that were lost before it began.
void TransferEngine::FenceLostLocked() {
  LostPeers& lost = ending_.lost;
  if (lost.fence && group_->RemovedAreFenced()) {
    lost.fenced = lost.fence->losses;
    registry_.ClearStrays(lost.fence->strays);
    lost.fence.reset();
    // One may have come meanwhile.
    const auto exposed = std::exchange(ending_.exposed, {});
    ending_.unused.insert(ending_.unused.end(), exposed.begin(), exposed.end());
  }
  std::erase_if(lost.waiting, [&](const SubmissionPtr& submission) {
    if (submission->losses <= lost.fenced) FinishLocked(submission, OkStatus());
    return submission->over;
  });
  if ((lost.waiting.empty() && ending_.exposed.empty()) || lost.fence) return;
  lost.fence = {.losses = lost.losses, .strays = registry_.strays()};
  group_->FenceRemoved();
}

void TransferEngine::RemoveUnusedLocked() {
  FenceLostLocked();
  for (const RegionId region : std::exchange(ending_.unused, {})) {
    const auto waits = ending_.regions.find(region);
    if (waits == ending_.regions.end()) continue;  // it gave up meanwhile
    const SubmissionPtr submission = waits->second;
    if (!submission->unanswered.empty() || registry_.Users(region) > 0) {
      continue;
    }
    if (caps_.removal_fences && registry_.HasStray(region)) {
      ending_.exposed.push_back(region);
      continue;
    }
    ending_.regions.erase(waits);
    auto removed = registry_.Remove(*group_, region);
    FinishLocked(submission,
                 removed.status().Annotate(submission->future->label()));
    if (!removed.ok()) {
      registry_.AbandonRemoval(region);
    } else if (*removed != nullptr) {
      // Its destructor may want locks that somebody holds who waits for ours.
      ElasticPool::Get().Post([owner = *std::move(removed)] {});
    }
  }
  FenceLostLocked();  // of what was found exposed
}

}  // namespace jaxfabric
