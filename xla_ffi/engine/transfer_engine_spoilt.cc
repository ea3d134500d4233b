// TransferEngine: transfers that end badly when a part of them was counted.
//
// Counters know ids, not transfers: such a part would stand for something that
// somebody sends later under the same id, which would be counted too early. So
//   - where NICs name peers, the parts of a peer that is lost are taken off
//     their counters;
//   - where they do not, a peer says (kUses) under which ids it sends parts;
//     those that are not whole when it is lost are spoilt;
//   - a sender whose transfer ends badly says so (kSpoilt), and takes the id no
//     more for this receiver, over whatever connection.
// Waits under a spoilt id fail with the reason.

#include <algorithm>

#include "engine/transfer_engine.h"

namespace jaxfabric {

void TransferEngine::CountLocked(TransferPeer* peer, Immediate immediate) {
  const uint64_t units = immediate.Units();
  if (peer == nullptr && caps_.immediate_names_peer) {
    ++stats_.counts_dropped;  // its parts were forgotten, and this is one
    return;
  }
  if (peer != nullptr) peer->units_received += units;
  std::vector<std::function<void()>> ready;
  const uint32_t source =
      peer == nullptr ? ImmCounterTable::kAnySource : peer->name;
  if (units == 0 || !counters_.Add(immediate.id, units, &ready, source).ok()) {
    ++stats_.counts_dropped;
    if (peer != nullptr) ++peer->stats.counts_dropped;
    return;
  }
  if (peer != nullptr && units < kTransferUnits) {
    uint64_t& part = peer->parts[immediate.id];
    part = (part + units) % kTransferUnits;
    if (part == 0) peer->parts.erase(immediate.id);
  }
  for (const std::function<void()>& callback : ready) callback();
  if (peer != nullptr && peer->spoilt.Find(immediate.id) != nullptr) {
    HandleSpoiltLocked(*peer, immediate.id);
  }
}

void TransferEngine::AnnounceLocked(TransferPeer& to, uint32_t id,
                                    const PendingWrite& what) {
  if (caps_.immediate_names_peer) return;
  const uint64_t whole = std::min(kSplitBytes, caps_.write_bytes_max);
  const bool is_one_write =
      what.pieces.empty() ||
      (what.pieces.size() == 1 && what.pieces[0].length <= whole);
  if (is_one_write || !to.our_ids.Add(id, {})) return;
  group_->SubmitSend(
      to.name,
      TransferFrame{.type = TransferFrame::Type::kUses, .a = id}.Encode());
}

void TransferEngine::TellSpoiltLocked(const RandomId& receiver, uint32_t name,
                                      uint32_t id) {
  spoilt_.Add(receiver, id,
              "an earlier transfer to " + NameLocked(name) +
                  " ended badly when a part of it was sent");
  const auto peer = peers_.find(name);
  if (peer == peers_.end() || !peer->second->connected) return;
  group_->SubmitSend(
      name,
      TransferFrame{.type = TransferFrame::Type::kSpoilt, .a = id}.Encode());
}

// Where it is known who sends what, no peer spoils the ids of others.
void TransferEngine::HandleSpoiltLocked(TransferPeer& peer, uint32_t id) {
  const bool is_waited_for =
      std::any_of(live_.begin(), live_.end(), [&](const auto& item) {
        const Submission& submission = *item.second;
        const auto& sources = submission.sources;
        return submission.kind == SubmissionKind::kExpect &&
               submission.id == id &&
               std::find(sources.begin(), sources.end(), peer.name) !=
                   sources.end();
      });
  if (caps_.immediate_names_peer && !is_waited_for &&
      !peer.parts.contains(id)) {
    peer.spoilt.Add(id, {});  // a part may still come
    return;
  }
  SpoilLocked(id, NameLocked(peer.name) +
                      " gave up a transfer when a part of it was sent");
}

void TransferEngine::SpoilLocked(uint32_t id, const std::string& why) {
  if (!spoilt_.Add(self_.id, id, why)) return;
  std::vector<SubmissionPtr> waiting;
  for (const auto& [number, submission] : live_) {
    if (submission->kind == SubmissionKind::kExpect && submission->id == id) {
      waiting.push_back(submission);
    }
  }
  for (const SubmissionPtr& submission : waiting) {
    StopLocked(
        submission,
        spoilt_.Check(self_.id, id).Annotate(submission->future->label()));
  }
  counters_.Drop(id, ~uint64_t{0});
  for (auto& [name, peer] : peers_) peer->parts.erase(id);
}

void TransferEngine::ForgetPartsLocked(const TransferPeer& peer) {
  for (const auto& [id, units] : peer.parts) counters_.Drop(id, units);
  counters_.Leave(peer.name);
  for (const auto& [id, nothing] : peer.their_ids.values()) {
    if (!counters_.HasPart(id)) continue;
    SpoilLocked(id, "peer " + std::to_string(peer.name) + " " +
                        peer.address.Describe() +
                        " was lost when a part of a transfer had come");
  }
}

}  // namespace jaxfabric
