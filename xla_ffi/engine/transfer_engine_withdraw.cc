// TransferEngine: regions that end. Peers hold descriptions of them, and may be
// writing just now.
//
//   owner  kWithdraw: region R goes      to each peer, if R was ever described
//   peer   refuses new writes into R; once those under way have ended, answers
//   owner  kWithdrawn from all: no NIC writes into R, which is unregistered
//
// A peer that does not answer in time is named, and R stays. One that is lost
// need not answer: the group has removed it.

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
  unregistering_[id] = submission;
  const TransferFrame frame = {
      .type = Type::kWithdraw, .a = submission->future->number(), .b = id};
  for (const auto& [name, peer] : peers_) {
    if (!region->target || !region->described || !peer->connected) continue;
    submission->unanswered.push_back(name);
    group_->SubmitSend(name, frame.Encode());
  }
  unused_.push_back(id);
  RemoveUnusedLocked();
  return submission->future;
}

Status TransferEngine::HandleWithdrawLocked(TransferPeer& peer,
                                            const TransferFrame& frame) {
  if (peer.withdrawals.size() >= TransferPeer::kRecentMax) {
    return Status(StatusCode::kDataLoss,
                  "it withdraws more than 2^16 regions at a time");
  }
  peer.withdrawn.Add(frame.b, {});
  peer.withdrawals.push_back({frame.a, frame.b});
  AnswerWithdrawalsLocked(peer);
  return OkStatus();
}

void TransferEngine::AnswerWithdrawalsLocked(TransferPeer& peer) {
  const auto in_use = [&](uint64_t region) {
    return std::any_of(live_.begin(), live_.end(), [&](const auto& item) {
      const Submission& submission = *item.second;
      return submission.kind == SubmissionKind::kWrites &&
             std::any_of(submission.parts.begin(), submission.parts.end(),
                         [&](const Submission::Part& part) {
                           return part.open && part.peer == peer.name &&
                                  part.target == region;
                         });
    });
  };
  std::vector<uint64_t> answered;
  std::erase_if(peer.withdrawals, [&](const auto& withdrawal) {
    if (in_use(withdrawal.region)) return false;
    answered.push_back(withdrawal.number);
    return true;
  });
  for (const uint64_t number : answered) {
    group_->SubmitSend(
        peer.name,
        TransferFrame{.type = Type::kWithdrawn, .a = number}.Encode());
  }
}

// Also for a peer that is lost, and whatever it was asked: `number` 0.
void TransferEngine::HandleWithdrawnLocked(uint32_t peer, uint64_t number) {
  for (const auto& [region, submission] : unregistering_) {
    if (number != 0 && submission->future->number() != number) continue;
    if (std::erase(submission->unanswered, peer) == 0) continue;
    if (submission->unanswered.empty()) unused_.push_back(region);
  }
}

void TransferEngine::RemoveUnusedLocked() {
  for (const RegionId region : std::exchange(unused_, {})) {
    const auto waits = unregistering_.find(region);
    if (waits == unregistering_.end()) continue;  // it gave up meanwhile
    const SubmissionPtr submission = waits->second;
    if (!submission->unanswered.empty() || registry_.Users(region) > 0)
      continue;
    unregistering_.erase(waits);
    auto removed = registry_.Remove(*group_, region);
    FinishLocked(submission, removed.status());
    if (!removed.ok()) {
      registry_.AbandonRemoval(region);
    } else if (*removed != nullptr) {
      // Its destructor may want locks that somebody holds who waits for ours.
      ElasticPool::Get().Post([owner = *std::move(removed)] {});
    }
  }
}

}  // namespace jaxfabric
