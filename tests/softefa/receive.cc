// Packets that have come: each becomes a completion.

#include <algorithm>
#include <cstring>

#include "tests/softefa/progress.h"

namespace jaxfabric::softefa {
namespace {

constexpr int kPacketsPerCall = 64;

// Returns whether the payload fits.
bool Scatter(const Packet& packet, const std::vector<ibv_sge>& spans) {
  uint64_t done = 0;
  for (const ibv_sge& span : spans) {
    const uint64_t bytes = std::min<uint64_t>(span.length, packet.bytes - done);
    std::memcpy(reinterpret_cast<void*>(span.addr), &packet.payload[done],
                bytes);
    done += bytes;
  }
  return done == packet.bytes;
}

void Accept(QueuePair& pair, const Packet& packet) {
  Completion completion;
  completion.queue_pair = pair.qp_base.qp_num;
  completion.source_queue_pair = packet.source_queue_pair;
  completion.source = packet.source;
  completion.bytes = packet.bytes;
  if (packet.has_immediate != 0) {
    completion.flags = IBV_WC_WITH_IMM;
    completion.immediate = packet.immediate;
  }
  const bool send = packet.kind == Packet::Kind::kSend;
  completion.opcode = send ? IBV_WC_RECV : IBV_WC_RECV_RDMA_WITH_IMM;
  completion.unsolicited = packet.unsolicited != 0;
  if (!completion.unsolicited) {
    // There is one: the sender has claimed it.
    const PostedReceive& receive = pair.receive_queue.front();
    completion.request_id = receive.id;
    if (send && !Scatter(packet, receive.spans)) {
      completion.code = CompletionCode::kLocalBadLength;
    }
    pair.receive_queue.pop_front();
  }
  pair.receive_completions->Push(completion);
}

}  // namespace

void Receive(QueuePair& pair) {
  for (int count = 0; count < kPacketsPerCall; ++count) {
    const Packet* packet = pair.file->Front();
    // Without room for its completion it stays on the wire.
    if (packet == nullptr || pair.receive_completions->full()) return;
    Accept(pair, *packet);
    pair.file->Pop();
  }
}

}  // namespace jaxfabric::softefa
