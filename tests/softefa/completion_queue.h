// Completion queues, read by the provider through the function pointers of
// ibv_cq_ex and efadv_cq.

#ifndef JAXFABRIC_TESTS_SOFTEFA_COMPLETION_QUEUE_H_
#define JAXFABRIC_TESTS_SOFTEFA_COMPLETION_QUEUE_H_

#include <infiniband/verbs.h>

#include <cstdint>
#include <deque>

#include "tests/softefa/efa_abi.h"
#include "tests/softefa/wire.h"

namespace jaxfabric::softefa {

struct QueuePair;

struct Completion {
  uint64_t request_id = 0;
  CompletionCode code = CompletionCode::kOk;
  ibv_wc_opcode opcode = IBV_WC_SEND;
  uint32_t queue_pair = 0;
  uint32_t bytes = 0;
  // Whose send queue gets a free slot when this is read; null for a receive.
  QueuePair* sender = nullptr;
  // Of receives only:
  unsigned int flags = 0;  // IBV_WC_*
  uint32_t immediate = 0;  // network byte order
  uint32_t source_queue_pair = 0;
  Gid source{};
  bool unsolicited = false;  // consumed no posted receive
};

struct CompletionQueue : ibv_cq_ex {
  struct EfaView : EfadvCq {
    CompletionQueue* queue;
  };

  int nic;
  size_t capacity;
  std::deque<Completion> ready;
  Completion current;
  EfaView efa;

  // The device does not guard its completion queues: one that is too small for
  // the sends of its queue pairs is the provider's or the program's fault, and
  // ends the process.
  void Push(const Completion& completion);
  bool full() const { return ready.size() >= capacity; }
};

ibv_cq_ex* CreateCompletionQueue(ibv_context* context,
                                 ibv_cq_init_attr_ex* attributes);

inline CompletionQueue* AsCompletionQueue(ibv_cq* queue) {
  return static_cast<CompletionQueue*>(reinterpret_cast<ibv_cq_ex*>(queue));
}

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_COMPLETION_QUEUE_H_
