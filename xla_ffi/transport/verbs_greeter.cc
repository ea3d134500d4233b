#include "transport/verbs_greeter.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <cstring>
#include <utility>

#include "transport/shm_address.h"

namespace jaxfabric {
namespace {

constexpr uint64_t kReceives = 256;
// Each datagram comes with a global route header, or the room for one.
constexpr uint32_t kHeaderBytes = 40;
constexpr uint32_t kBufferBytes = 256;
static_assert(kHeaderBytes + sizeof(VerbsGreeting) <= kBufferBytes);
constexpr uint32_t kQueueKeyMax = 0x7fff'ffff;

}  // namespace

StatusOr<std::unique_ptr<VerbsGreeter>> VerbsGreeter::Open(
    VerbsPort& port, uint64_t send_tag, uint64_t receive_tag) {
  std::unique_ptr<VerbsGreeter> greeter(new VerbsGreeter(port));
  greeter->send_tag_ = send_tag;
  greeter->receive_tag_ = receive_tag;
  JF_RETURN_IF_ERROR(greeter->Start());
  return greeter;
}

Status VerbsGreeter::Start() {
  const uint64_t bytes = (kSends + kReceives) * kBufferBytes;
  bytes_ = std::make_unique<std::byte[]>(bytes);
  JF_ASSIGN_OR_RETURN(
      memory_, port_.Register(bytes_.get(), bytes, IBV_ACCESS_LOCAL_WRITE));
  JF_ASSIGN_OR_RETURN(pair_, port_.CreateQueuePair(IBV_QPT_UD, nullptr, kSends,
                                                   kReceives, &inline_bytes_));
  queue_key_ = static_cast<uint32_t>(RandomU64()) & kQueueKeyMax;
  if (queue_key_ == 0) queue_key_ = 1;
  auto attributes = VerbsZeroed<ibv_qp_attr>();
  attributes.pkey_index = port_.settings().pkey_index;
  attributes.port_num = port_.number();
  attributes.qkey = queue_key_;
  const std::pair<ibv_qp_state, int> steps[] = {
      {IBV_QPS_INIT,
       IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY},
      {IBV_QPS_RTR, IBV_QP_STATE},
      {IBV_QPS_RTS, IBV_QP_STATE | IBV_QP_SQ_PSN}};
  for (const auto& [state, mask] : steps) {
    attributes.qp_state = state;
    const int error = port_.library().modify_qp(pair_.get(), &attributes, mask);
    if (error != 0) return port_.Failed("ibv_modify_qp(UD)", error);
  }
  for (uint64_t i = 0; i < kSends; ++i) free_.push_back(i);
  for (uint64_t i = 0; i < kReceives; ++i) Repost(i);
  return OkStatus();
}

std::byte* VerbsGreeter::BufferOf(uint64_t index) const {
  return bytes_.get() + index * kBufferBytes;
}

StatusOr<VerbsWay> VerbsGreeter::FindWay(const VerbsAddress& address) {
  ibv_ah_attr attributes = port_.WayTo(address, address.queue_pair);
  VerbsWay way(port_.library().create_ah(port_.pd(), &attributes),
               port_.library().destroy_ah);
  if (way == nullptr) {
    return port_.Failed("ibv_create_ah", 0)
        .Annotate(Describe(address) +
                  " cannot be reached; choose ports of one network with "
                  "JAXFABRIC_NICS");
  }
  return way;
}

void VerbsGreeter::Send(const VerbsWay& way, const VerbsAddress& to,
                        const VerbsGreeting& greeting) {
  if (free_.empty()) return;
  const uint64_t index = free_.back();
  std::memcpy(BufferOf(index), &greeting, sizeof(greeting));
  ibv_sge piece = {};
  piece.addr = reinterpret_cast<uintptr_t>(BufferOf(index));
  piece.length = sizeof(greeting);
  piece.lkey = memory_->lkey;
  auto work = VerbsZeroed<ibv_send_wr>();
  work.wr_id = send_tag_ | index;
  work.sg_list = &piece;
  work.num_sge = 1;
  work.opcode = IBV_WR_SEND;
  work.send_flags = IBV_SEND_SIGNALED;
  work.wr.ud.ah = way.get();
  work.wr.ud.remote_qpn = to.queue_pair;
  work.wr.ud.remote_qkey = to.queue_key;
  ibv_send_wr* bad = nullptr;
  if (ibv_post_send(pair_.get(), &work, &bad) == 0) free_.pop_back();
}

void VerbsGreeter::SendDone(uint64_t index) {
  if (index < kSends && free_.size() < kSends) free_.push_back(index);
}

std::span<const std::byte> VerbsGreeter::Received(uint64_t index,
                                                  uint32_t bytes) const {
  if (index >= kReceives || bytes < kHeaderBytes || bytes > kBufferBytes) {
    return {};
  }
  return {BufferOf(kSends + index) + kHeaderBytes, bytes - kHeaderBytes};
}

void VerbsGreeter::Repost(uint64_t index) {
  if (index >= kReceives) return;
  ibv_sge piece = {};
  piece.addr = reinterpret_cast<uintptr_t>(BufferOf(kSends + index));
  piece.length = kBufferBytes;
  piece.lkey = memory_->lkey;
  ibv_recv_wr work = {};
  work.wr_id = receive_tag_ | index;
  work.sg_list = &piece;
  work.num_sge = 1;
  ibv_recv_wr* bad = nullptr;
  (void)ibv_post_recv(pair_.get(), &work, &bad);
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
