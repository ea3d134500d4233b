#include "tests/softefa/queue_pair.h"

#include <errno.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "tests/softefa/efa_abi.h"
#include "tests/softefa/host.h"
#include "tests/softefa/settings.h"

namespace jaxfabric::softefa {
namespace {

// Only providers that know the flag pass attributes long enough to hold it.
bool WantsUnsolicited(const efadv_qp_init_attr* attributes, uint32_t bytes) {
  uint16_t flags = 0;
  if (bytes >= kQpFlagsOffset + sizeof(flags)) {
    std::memcpy(&flags,
                reinterpret_cast<const std::byte*>(attributes) + kQpFlagsOffset,
                sizeof(flags));
  }
  return TheSettings().unsolicited && (flags & kQpUnsolicitedWriteRecv) != 0;
}

// The provider looks a completion's queue pair up, and finds nothing any more.
void DropCompletions(CompletionQueue& queue, uint32_t pair) {
  std::erase_if(queue.ready, [&](const Completion& completion) {
    return completion.queue_pair == pair;
  });
}

}  // namespace

QueuePairFile* QueuePair::FindTarget(const WorkRequest& request) {
  const std::pair target{request.destination, request.destination_queue_pair};
  const auto known = targets.find(target);
  if (known != targets.end()) {
    if (known->second->ready.load(std::memory_order_acquire) != 0) {
      return known->second;
    }
    UnmapQueuePair(known->second);
    targets.erase(known);
  }
  QueuePairFile* found =
      MapQueuePair(QueuePairName(target.first, target.second), false);
  if (found == nullptr) return nullptr;
  if (found->ready.load(std::memory_order_acquire) == 0) {
    UnmapQueuePair(found);
    return nullptr;
  }
  targets.emplace(target, found);
  return found;
}

ProcessFile* QueuePair::FindProcess(int32_t pid) {
  ProcessFile*& process = processes[pid];
  if (process == nullptr) process = MapProcess(pid, /*create=*/false);
  return process;
}

int PostReceives(ibv_qp* verbs, ibv_recv_wr* receive, ibv_recv_wr** refused) {
  const std::lock_guard lock(TheHost().mutex);
  QueuePair* pair = AsQueuePair(verbs);
  for (; receive != nullptr; receive = receive->next) {
    if (pair->receive_queue.size() >= pair->receive_depth) {
      if (refused != nullptr) *refused = receive;
      return ENOMEM;
    }
    pair->receive_queue.push_back(
        {receive->wr_id,
         {receive->sg_list, receive->sg_list + receive->num_sge}});
    pair->file->receives.fetch_add(1, std::memory_order_release);
  }
  return 0;
}

}  // namespace jaxfabric::softefa

using namespace jaxfabric::softefa;  // NOLINT: the functions below are C

extern "C" {

ibv_qp* efadv_create_qp_ex(ibv_context* context,
                           ibv_qp_init_attr_ex* attributes,
                           efadv_qp_init_attr* efa_attributes, uint32_t bytes) {
  Host& host = TheHost();
  const std::lock_guard lock(host.mutex);
  auto* pair = new QueuePair{};
  pair->nic = &NicOf(context);
  pair->send_completions = AsCompletionQueue(attributes->send_cq);
  pair->receive_completions = AsCompletionQueue(attributes->recv_cq);
  pair->send_depth = attributes->cap.max_send_wr;
  pair->receive_depth = std::min(attributes->cap.max_recv_wr, kReceivesMax);

  const uint32_t number = NextQueuePairNumber();
  pair->name = QueuePairName(pair->nic->gid, number);
  pair->file = MapQueuePair(pair->name, /*create=*/true);
  pair->file->Init(pair->nic->index, WantsUnsolicited(efa_attributes, bytes));

  pair->qp_base.context = context;
  pair->qp_base.qp_context = attributes->qp_context;
  pair->qp_base.pd = attributes->pd;
  pair->qp_base.send_cq = attributes->send_cq;
  pair->qp_base.recv_cq = attributes->recv_cq;
  pair->qp_base.qp_num = number;
  pair->qp_base.qp_type = IBV_QPT_DRIVER;
  SetWorkRequestCalls(*pair);
  host.queue_pairs.push_back(pair);
  return &pair->qp_base;
}

int ibv_modify_qp(ibv_qp* verbs, ibv_qp_attr* attributes, int mask) {
  const std::lock_guard lock(TheHost().mutex);
  QueuePair* pair = AsQueuePair(verbs);
  if ((mask & IBV_QP_QKEY) != 0) {
    pair->file->queue_key.store(attributes->qkey, std::memory_order_relaxed);
  }
  if ((mask & IBV_QP_RNR_RETRY) != 0) pair->rnr_retry = attributes->rnr_retry;
  if ((mask & IBV_QP_STATE) != 0) {
    verbs->state = attributes->qp_state;
    const bool ready = attributes->qp_state == IBV_QPS_RTR ||
                       attributes->qp_state == IBV_QPS_RTS;
    pair->file->ready.store(ready, std::memory_order_release);
  }
  return 0;
}

// The order of bytes within a write: none, whatever the provider asks about.
int ibv_query_qp_data_in_order(ibv_qp*, ibv_wr_opcode, uint32_t) { return 0; }

ibv_qp_ex* ibv_qp_to_qp_ex(ibv_qp* pair) { return AsQueuePair(pair); }

// Work and completions go with the queue pair; when this returns, nobody
// writes to memory by way of it any more.
int ibv_destroy_qp(ibv_qp* verbs) {
  Host& host = TheHost();
  const std::lock_guard lock(host.mutex);
  QueuePair* pair = AsQueuePair(verbs);
  pair->file->ready.store(0, std::memory_order_seq_cst);
  pair->file->users.Drain();
  RemoveFile(pair->name);
  UnmapQueuePair(pair->file);
  for (const auto& [target, file] : pair->targets) UnmapQueuePair(file);
  DropCompletions(*pair->send_completions, verbs->qp_num);
  DropCompletions(*pair->receive_completions, verbs->qp_num);
  std::erase(host.queue_pairs, pair);
  delete pair;
  return 0;
}

}  // extern "C"
