// Queue pairs of EFA's kind (SRD): reliable, unordered, and connected to
// nobody, so that each work request names its target.

#ifndef JAXFABRIC_TESTS_SOFTEFA_QUEUE_PAIR_H_
#define JAXFABRIC_TESTS_SOFTEFA_QUEUE_PAIR_H_

#include <infiniband/verbs.h>

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/softefa/completion_queue.h"
#include "tests/softefa/host.h"
#include "tests/softefa/wire.h"
#include "tests/softefa/work_request.h"

namespace jaxfabric::softefa {

// The value of rnr_retry that means for ever.
inline constexpr uint8_t kRetryForEver = 7;

struct PostedReceive {
  uint64_t id;
  std::vector<ibv_sge> spans;
};

struct QueuePair : ibv_qp_ex {
  Nic* nic;
  CompletionQueue* send_completions;
  CompletionQueue* receive_completions;
  std::string name;  // of `file`
  QueuePairFile* file;
  uint8_t rnr_retry = kRetryForEver;

  uint32_t send_depth;
  uint32_t send_slots_used = 0;  // until the completion is read
  std::vector<WorkRequest> building;
  std::deque<WorkRequest> send_queue;
  std::deque<WorkRequest> late;  // failed at the sender, still to be delivered

  uint32_t receive_depth;
  std::deque<PostedReceive> receive_queue;

  std::map<std::pair<Gid, uint32_t>, QueuePairFile*> targets;
  std::map<int32_t, ProcessFile*> processes;

  // The queue pair that a request is for, or nullptr if there is none now.
  QueuePairFile* FindTarget(const WorkRequest& request);
  ProcessFile* FindProcess(int32_t pid);
};

int PostReceives(ibv_qp* pair, ibv_recv_wr* receive, ibv_recv_wr** refused);

inline QueuePair* AsQueuePair(ibv_qp* pair) {
  return static_cast<QueuePair*>(reinterpret_cast<ibv_qp_ex*>(pair));
}

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_QUEUE_PAIR_H_
