// DomainGroup: writes of which some, but not all, are known to have arrived.
//
// Their bytes are written again under the number of a repair; the peer counts
// what was missing once all of them are there.

#include <utility>

#include "engine/domain_group.h"
#include "engine/immediate.h"

namespace jaxfabric {
namespace {

// Then outcomes stay unknown.
constexpr int64_t kRepairGiveUpNs = 5'000'000'000;
// Repairs that a peer may have under way.
constexpr size_t kCreditsMax = 4096;

// The immediates that count `units` under `id`.
std::vector<uint32_t> ImmediatesOf(LinkCount count) {
  std::vector<uint32_t> words;
  uint64_t rest = count.units;
  for (uint32_t share = 0; share <= kUnitBits; ++share) {
    const uint64_t units = kTransferUnits >> share;
    for (; rest >= units; rest -= units) {
      words.push_back(Immediate{count.key, share}.Encode());
    }
  }
  return words;
}

}  // namespace

void DomainGroup::StartRepair(const GroupPeerPtr& peer, LinkCount stands_for,
                              const std::vector<UncertainWrite>& writes) {
  const uint32_t number = peer->next_repair++;
  LinkFrame frame;
  frame.type = LinkFrame::Type::kRepair;
  frame.number = number;
  frame.epoch = static_cast<uint32_t>(writes.size());
  frame.counts = {stands_for};
  GroupPeer::Repair& repair = peer->repairs[number];
  repair.frame = frame;
  repair.give_up_ns = now_ns_ + kRepairGiveUpNs;
  for (const UncertainWrite& write : writes) {
    write.transfer->chunks[write.chunk].immediate = RepairImmediate(number);
    ++write.transfer->repairs;
    repair.transfers.push_back(write.transfer);
  }
}

void DomainGroup::EndRepair(GroupPeer& peer, uint32_t number,
                            const Status& status) {
  auto node = peer.repairs.extract(number);
  if (!node) return;
  for (const auto& transfer : node.mapped().transfers) {
    --transfer->repairs;
    if (status.ok()) {
      Retire(transfer);
    } else {
      FailTransfer(&peer, transfer, status);
    }
  }
}

void DomainGroup::HandleRepair(const GroupPeerPtr& peer,
                               const LinkFrame& frame) {
  const auto number = static_cast<uint32_t>(frame.number);
  const bool sane =
      frame.counts.size() == 1 && frame.epoch > 0 &&
      frame.epoch <= LinkFrame::kCountsMax &&
      frame.counts[0].units <= LinkFrame::kCountsMax * kTransferUnits &&
      peer->credits.size() < kCreditsMax;
  if (!sane) return;
  if (peer->finished_repairs.contains(number)) {
    LinkFrame repaired;
    repaired.type = LinkFrame::Type::kRepaired;
    repaired.number = number;
    SendFrame(peer, repaired);
    return;
  }
  GroupPeer::Credit& credit = peer->credits[number];
  credit.writes = frame.epoch;
  credit.stands_for = frame.counts[0];
  CountRepairWrites(peer, number, 0);
}

void DomainGroup::CountRepairWrites(const GroupPeerPtr& peer, uint32_t number,
                                    uint64_t writes) {
  if (!peer->credits.contains(number) && peer->credits.size() >= kCreditsMax) {
    return;
  }
  GroupPeer::Credit& credit = peer->credits[number];
  credit.arrived += writes;
  if (credit.writes == 0 || credit.arrived < credit.writes) return;
  const LinkCount stands_for = credit.stands_for;
  peer->credits.erase(number);
  peer->finished_repairs.insert(number);
  if (peer->finished_repairs.size() > kCreditsMax) {
    peer->finished_repairs.erase(peer->finished_repairs.begin());
  }
  LinkFrame repaired;
  repaired.type = LinkFrame::Type::kRepaired;
  repaired.number = number;
  SendFrame(peer, repaired);
  if ((stands_for.key & kRepairKey) != 0) {
    CountRepairWrites(peer, stands_for.key & ~kRepairKey, stands_for.units);
    return;
  }
  for (const uint32_t word : ImmediatesOf(stands_for)) {
    news_.push_back(
        {Event::Kind::kImmediate, peer->name, word, "", OkStatus()});
  }
}

}  // namespace jaxfabric
