#include "tests/softefa/work_request.h"

#include <errno.h>

#include <utility>

#include "tests/softefa/address_handle.h"
#include "tests/softefa/host.h"
#include "tests/softefa/progress.h"
#include "tests/softefa/queue_pair.h"

namespace jaxfabric::softefa {
namespace {

using Kind = WorkRequest::Kind;

QueuePair* Of(ibv_qp_ex* pair) { return static_cast<QueuePair*>(pair); }

WorkRequest& Last(ibv_qp_ex* pair) { return Of(pair)->building.back(); }

WorkRequest& Begin(ibv_qp_ex* pair, Kind kind) {
  WorkRequest request{kind, pair->wr_id};
  return Of(pair)->building.emplace_back(std::move(request));
}

// From wr_start to wr_complete or wr_abort the provider holds the device.
void Start(ibv_qp_ex* pair) {
  TheHost().mutex.lock();
  Of(pair)->building.clear();
}

void Abort(ibv_qp_ex* pair) {
  Of(pair)->building.clear();
  TheHost().mutex.unlock();
}

// All of them or none. The provider reports a full queue as FI_EAGAIN.
int Complete(ibv_qp_ex* verbs) {
  QueuePair* pair = Of(verbs);
  const bool room =
      pair->send_slots_used + pair->building.size() <= pair->send_depth;
  if (room) {
    pair->send_slots_used += pair->building.size();
    for (WorkRequest& request : pair->building) {
      for (const ibv_sge& span : request.spans) request.bytes += span.length;
      request.bytes += request.inline_data.size();
      request.posted_ns = NowNs();
      pair->send_queue.push_back(std::move(request));
    }
    Progress();
    WakeEngine();
  }
  pair->building.clear();
  TheHost().mutex.unlock();
  return room ? 0 : ENOMEM;
}

void Write(ibv_qp_ex* pair, uint32_t key, uint64_t address) {
  WorkRequest& request = Begin(pair, Kind::kWrite);
  request.remote_key = key;
  request.remote_address = address;
}

void WriteImmediate(ibv_qp_ex* pair, uint32_t key, uint64_t address,
                    __be32 immediate) {
  Write(pair, key, address);
  Last(pair).immediate = immediate;
}

void Read(ibv_qp_ex* pair, uint32_t key, uint64_t address) {
  WorkRequest& request = Begin(pair, Kind::kRead);
  request.remote_key = key;
  request.remote_address = address;
}

void Send(ibv_qp_ex* pair) { Begin(pair, Kind::kSend); }

void SendImmediate(ibv_qp_ex* pair, __be32 immediate) {
  Begin(pair, Kind::kSend).immediate = immediate;
}

void SetAddress(ibv_qp_ex* pair, ibv_ah* handle, uint32_t queue_pair,
                uint32_t queue_key) {
  WorkRequest& request = Last(pair);
  request.destination = GidOf(handle);
  request.destination_queue_pair = queue_pair;
  request.destination_queue_key = queue_key;
}

void SetSpan(ibv_qp_ex* pair, uint32_t key, uint64_t address, uint32_t bytes) {
  Last(pair).spans = {ibv_sge{address, bytes, key}};
}

void SetSpans(ibv_qp_ex* pair, size_t count, const ibv_sge* spans) {
  Last(pair).spans.assign(spans, spans + count);
}

void SetInlineList(ibv_qp_ex* pair, size_t count, const ibv_data_buf* parts) {
  std::vector<std::byte>& data = Last(pair).inline_data;
  for (size_t i = 0; i < count; ++i) {
    const auto* part = static_cast<const std::byte*>(parts[i].addr);
    data.insert(data.end(), part, part + parts[i].length);
  }
}

void SetInline(ibv_qp_ex* pair, void* address, size_t bytes) {
  const ibv_data_buf part{address, bytes};
  SetInlineList(pair, 1, &part);
}

}  // namespace

void SetWorkRequestCalls(ibv_qp_ex& pair) {
  pair.wr_start = Start;
  pair.wr_abort = Abort;
  pair.wr_complete = Complete;
  pair.wr_rdma_write = Write;
  pair.wr_rdma_write_imm = WriteImmediate;
  pair.wr_rdma_read = Read;
  pair.wr_send = Send;
  pair.wr_send_imm = SendImmediate;
  pair.wr_set_ud_addr = SetAddress;
  pair.wr_set_sge = SetSpan;
  pair.wr_set_sge_list = SetSpans;
  pair.wr_set_inline_data = SetInline;
  pair.wr_set_inline_data_list = SetInlineList;
}

}  // namespace jaxfabric::softefa
