#include "tests/softefa/completion_queue.h"

#include <errno.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "tests/softefa/address_handle.h"
#include "tests/softefa/host.h"
#include "tests/softefa/progress.h"
#include "tests/softefa/queue_pair.h"

namespace jaxfabric::softefa {
namespace {

constexpr size_t kShuffleDepth = 8;
// What read_slid gives for a sender without handle; the provider then asks for
// its address instead.
constexpr uint32_t kNoHandle = 0xffff;

CompletionQueue* Of(ibv_cq_ex* queue) {
  return static_cast<CompletionQueue*>(queue);
}

const Completion& Current(ibv_cq_ex* queue) { return Of(queue)->current; }

ibv_wc_status StatusOf(CompletionCode code) {
  switch (code) {
    case CompletionCode::kOk:
      return IBV_WC_SUCCESS;
    case CompletionCode::kFlushed:
      return IBV_WC_WR_FLUSH_ERR;
    case CompletionCode::kLocalBadLength:
      return IBV_WC_LOC_LEN_ERR;
    case CompletionCode::kRemoteNotReady:
      return IBV_WC_RNR_RETRY_EXC_ERR;
    default:
      return IBV_WC_REM_ABORT_ERR;
  }
}

int NextPoll(ibv_cq_ex* verbs) {
  const std::lock_guard lock(TheHost().mutex);
  CompletionQueue* queue = Of(verbs);
  if (queue->ready.empty()) return ENOENT;
  queue->current = queue->ready.front();
  queue->ready.pop_front();
  const Completion& current = queue->current;
  if (current.sender != nullptr) --current.sender->send_slots_used;
  verbs->wr_id = current.request_id;
  verbs->status = StatusOf(current.code);
  return 0;
}

// Each poll also moves the hardware forward.
int StartPoll(ibv_cq_ex* verbs, ibv_poll_cq_attr*) {
  const std::lock_guard lock(TheHost().mutex);
  Progress();
  return NextPoll(verbs);
}

void EndPoll(ibv_cq_ex*) {}

ibv_wc_opcode ReadOpcode(ibv_cq_ex* queue) { return Current(queue).opcode; }

uint32_t ReadVendorError(ibv_cq_ex* queue) {
  return static_cast<uint32_t>(Current(queue).code);
}

uint32_t ReadBytes(ibv_cq_ex* queue) { return Current(queue).bytes; }

__be32 ReadImmediate(ibv_cq_ex* queue) { return Current(queue).immediate; }

uint32_t ReadQueuePair(ibv_cq_ex* queue) { return Current(queue).queue_pair; }

uint32_t ReadSource(ibv_cq_ex* queue) {
  return Current(queue).source_queue_pair;
}

unsigned int ReadFlags(ibv_cq_ex* queue) { return Current(queue).flags; }

uint32_t ReadHandle(ibv_cq_ex* queue) {
  return HandleNumber(Of(queue)->nic, Current(queue).source)
      .value_or(kNoHandle);
}

uint8_t ReadZero(ibv_cq_ex*) { return 0; }

CompletionQueue* Of(efadv_cq* view) {
  return static_cast<CompletionQueue::EfaView*>(
             reinterpret_cast<EfadvCq*>(view))
      ->queue;
}

int ReadSourceGid(efadv_cq* view, ibv_gid* gid) {
  CompletionQueue* queue = Of(view);
  if (HandleNumber(queue->nic, queue->current.source).has_value()) {
    return ENOENT;  // known by its handle
  }
  std::memcpy(gid->raw, queue->current.source.data(), sizeof(gid->raw));
  return 0;
}

bool IsUnsolicited(efadv_cq* view) { return Of(view)->current.unsolicited; }

}  // namespace

void CompletionQueue::Push(const Completion& completion) {
  if (full()) {
    std::fprintf(stderr, "softefa: completion queue overrun (%zu entries)\n",
                 capacity);
    std::abort();
  }
  Chaos& chaos = TheHost().chaos;
  size_t back = 0;
  if (chaos.on()) {
    back = chaos.Below(std::min(ready.size(), kShuffleDepth) + 1);
  }
  ready.insert(ready.end() - back, completion);
}

ibv_cq_ex* CreateCompletionQueue(ibv_context* context,
                                 ibv_cq_init_attr_ex* attributes) {
  auto* queue = new CompletionQueue{};
  queue->nic = NicOf(context).index;
  queue->capacity = attributes->cqe;
  queue->context = context;
  queue->channel = attributes->channel;
  queue->cq_context = attributes->cq_context;
  queue->cqe = attributes->cqe;
  queue->start_poll = StartPoll;
  queue->next_poll = NextPoll;
  queue->end_poll = EndPoll;
  queue->read_opcode = ReadOpcode;
  queue->read_vendor_err = ReadVendorError;
  queue->read_byte_len = ReadBytes;
  queue->read_imm_data = ReadImmediate;
  queue->read_qp_num = ReadQueuePair;
  queue->read_src_qp = ReadSource;
  queue->read_wc_flags = ReadFlags;
  queue->read_slid = ReadHandle;
  queue->read_sl = ReadZero;
  queue->read_dlid_path_bits = ReadZero;
  queue->efa.wc_read_sgid = ReadSourceGid;
  queue->efa.wc_is_unsolicited = IsUnsolicited;
  queue->efa.queue = queue;
  return queue;
}

}  // namespace jaxfabric::softefa

using namespace jaxfabric::softefa;  // NOLINT: the functions below are C

extern "C" {

ibv_cq_ex* efadv_create_cq(ibv_context* context,
                           ibv_cq_init_attr_ex* attributes, efadv_cq_init_attr*,
                           uint32_t) {
  return CreateCompletionQueue(context, attributes);
}

efadv_cq* efadv_cq_from_ibv_cq_ex(ibv_cq_ex* queue) {
  EfadvCq* view = &static_cast<CompletionQueue*>(queue)->efa;
  return reinterpret_cast<efadv_cq*>(view);
}

int ibv_destroy_cq(ibv_cq* queue) {
  delete AsCompletionQueue(queue);
  return 0;
}

}  // extern "C"
