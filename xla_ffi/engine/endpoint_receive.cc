// Endpoint: what peers send, and the checks that it has to pass.

#include <cstring>
#include <utility>

#include "engine/endpoint.h"

namespace jaxfabric {
namespace {

Status Nonsense(uint32_t peer, const std::string& what) {
  return Status(StatusCode::kDataLoss,
                "rank " + std::to_string(peer) + " sent " + what);
}

std::string LabelOf(const MailboxDescriptor& descriptor) {
  return std::string(descriptor.label, strnlen(descriptor.label, kLabelBytes));
}

}  // namespace

Status Endpoint::OnImmediate(uint32_t name, Peer& peer, uint32_t word,
                             Tasks* tasks) {
  const Immediate immediate = Immediate::Decode(word);
  const TransferId id = TransferId::Decode(immediate.id);
  if (immediate.Units() == 0 || id.source != name) {
    return Nonsense(name, "an immediate that is not its own");
  }
  if (id.kind == IdKind::kWindow) {
    return window_counters_.Add(id.slot, immediate.Units(), tasks);
  }
  if (id.kind != IdKind::kMailbox) {
    return Nonsense(name, "an immediate of an unknown kind");
  }
  const auto complete = peer.inbox.Count(id.slot, immediate.Units());
  if (!complete.ok()) return Nonsense(name, complete.status().message());
  return *complete ? OnMailbox(name, peer, id.slot, tasks) : OkStatus();
}

Status Endpoint::OnMailbox(uint32_t name, Peer& peer, uint32_t slot,
                           Tasks* tasks) {
  MailboxDescriptor descriptor;
  std::memcpy(&descriptor, heap_.data() + options_.heap.Descriptor(name, slot),
              sizeof descriptor);
  if (descriptor.magic != kDescriptorMagic ||
      descriptor.length > options_.heap.mailbox_bytes ||
      descriptor.offset > options_.heap.mailbox_bytes - descriptor.length) {
    return Nonsense(name, "a descriptor that is out of bounds");
  }
  if (descriptor.generation != options_.generation) {
    ++peer.stats.stale_dropped;
    peer.inbox.GiveBack(slot, descriptor.length);
    return OkStatus();
  }
  TakeCredits(name, peer, descriptor.credits, tasks);
  ++peer.stats.messages_received;
  peer.stats.message_bytes_received += descriptor.length;
  peer.inbox.Hold(slot);
  const Arrival arrival = {
      .source = name,
      .slot = slot,
      .key = {descriptor.channel, descriptor.sequence},
      .data = heap_.data() + options_.heap.Data(name) + descriptor.offset,
      .length = descriptor.length};
  if (auto ready = matches_.Add(arrival, LabelOf(descriptor))) {
    tasks->push_back(std::move(ready));
  }
  return OkStatus();
}

Endpoint::Loss Endpoint::OnAbort(uint32_t name,
                                 const ControlMessage& message) const {
  Loss loss;
  loss.told = true;
  const auto rank = static_cast<uint32_t>(message.argument);
  if (rank != 0 && rank <= options_.heap.ranks && rank - 1 != options_.rank) {
    loss.rank = rank - 1;
  }
  auto code = static_cast<StatusCode>(message.argument >> 32);
  if (code == StatusCode::kOk) code = StatusCode::kAborted;
  loss.status = Status(
      code, "rank " + std::to_string(name) + " gave up: " + message.text);
  return loss;
}

Status Endpoint::OnControl(uint32_t name, Peer& peer, const std::string& bytes,
                           Tasks* tasks, std::vector<Loss>* losses) {
  JF_ASSIGN_OR_RETURN(const ControlMessage message,
                      ControlMessage::Decode(bytes));
  if (message.generation != options_.generation) {
    ++peer.stats.stale_dropped;
    return OkStatus();
  }
  switch (message.type) {
    case ControlMessage::Type::kCredits:
      TakeCredits(name, peer, message.argument, tasks);
      return OkStatus();
    case ControlMessage::Type::kWantCredits:
      if (peer.inbox.Want()) FlushCredits(name, peer);
      return OkStatus();
    case ControlMessage::Type::kAbort:
      losses->push_back(OnAbort(name, message));
      return OkStatus();
    case ControlMessage::Type::kGoodbye:
      peer.departed = true;
      peer.messages_until_goodbye = message.argument;
      return OkStatus();
  }
  return OkStatus();
}

void Endpoint::HandleEvents(std::vector<DomainGroup::Event>& events,
                            Tasks* tasks, std::vector<Loss>* losses) {
  using Kind = DomainGroup::Event::Kind;
  for (DomainGroup::Event& event : events) {
    if (event.kind == Kind::kStranger) continue;
    if (event.kind == Kind::kImmediate && event.peer == kUnknownPeer) {
      // Where the NIC does not say whose it is, the id does.
      const Immediate immediate = Immediate::Decode(event.immediate);
      event.peer = TransferId::Decode(immediate.id).source;
    }
    const auto found = peers_.find(event.peer);
    if (found == peers_.end()) continue;
    Peer& peer = *found->second;
    Status status = OkStatus();
    if (event.kind == Kind::kPeerLost) {
      peer.lost = true;
      if (!peer.departed) status = event.status;
    } else if (event.kind == Kind::kImmediate) {
      status = OnImmediate(event.peer, peer, event.immediate, tasks);
    } else {
      status = OnControl(event.peer, peer, event.message, tasks, losses);
    }
    if (!status.ok()) {
      losses->push_back({event.peer, /*told=*/false, std::move(status)});
    } else if (Gone(peer) && (!peer.outbox.waiting().empty() ||
                              matches_.Awaits(event.peer))) {
      losses->push_back(Departed(event.peer));
    }
  }
}

}  // namespace jaxfabric
