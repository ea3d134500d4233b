// One entry of a send queue, as the provider builds it with the wr_* calls of
// ibv_qp_ex, and how far it has come.

#ifndef JAXFABRIC_TESTS_SOFTEFA_WORK_REQUEST_H_
#define JAXFABRIC_TESTS_SOFTEFA_WORK_REQUEST_H_

#include <infiniband/verbs.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "tests/softefa/efa_abi.h"
#include "tests/softefa/wire.h"

namespace jaxfabric::softefa {

struct WorkRequest {
  enum class Kind { kSend, kWrite, kRead };
  // What its NIC's health makes of it; decided when it starts.
  enum class Fate { kNormal, kUnacked, kLate, kLost };

  Kind kind;
  uint64_t id;
  std::optional<uint32_t> immediate;  // network byte order
  uint32_t remote_key = 0;
  uint64_t remote_address = 0;
  Gid destination{};
  uint32_t destination_queue_pair = 0;
  uint32_t destination_queue_key = 0;
  // The payload: one or the other.
  std::vector<ibv_sge> spans;
  std::vector<std::byte> inline_data;
  uint64_t bytes = 0;

  int64_t posted_ns = 0;
  bool started = false;
  bool silent = false;  // its completion was already given
  Fate fate = Fate::kNormal;
  CompletionCode error = CompletionCode::kOk;
  int64_t not_before_ns = 0;
  std::vector<uint32_t> segments;  // not moved yet; the last one is next
  std::optional<int64_t> not_ready_since_ns;  // the target has no receive
};

// Fills in the calls with which the provider builds work requests.
void SetWorkRequestCalls(ibv_qp_ex& pair);

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_WORK_REQUEST_H_
