#include "transport/verbs_connection.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <arpa/inet.h>

#include <algorithm>
#include <atomic>

#include "base/check.h"
#include "transport/shm_address.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kInlineBytes = 128;
constexpr uint32_t kTwentyFourBits = (1u << 24) - 1;
// With credits no receiver is ever unready; should one be, its sender tries
// again after 0.01 ms, without end.
constexpr uint8_t kMinRnrTimer = 1;
constexpr uint8_t kRnrRetryForEver = 7;

}  // namespace

StatusOr<std::unique_ptr<VerbsConnection>> VerbsConnection::Open(
    VerbsPort& port, VerbsReceives& receives, VerbsBuffers& buffers,
    uint64_t attempt) {
  std::unique_ptr<VerbsConnection> connection(
      new VerbsConnection(port, receives, buffers, attempt));
  JF_RETURN_IF_ERROR(connection->Start());
  return connection;
}

Status VerbsConnection::Start() {
  words_ = buffers_.TakeWords();
  if (!words_.has_value()) {
    return Status(StatusCode::kResourceExhausted,
                  "a verbs Domain has at most " +
                      std::to_string(VerbsBuffers::kConnectionsMax) +
                      " connections");
  }
  JF_ASSIGN_OR_RETURN(const uint32_t quota, receives_.Reserve());
  receive_credits_ = ReceiveCredits(quota);
  inline_bytes_ = kInlineBytes;
  JF_ASSIGN_OR_RETURN(
      pair_, port_.CreateQueuePair(IBV_QPT_RC, receives_.shared(),
                                   static_cast<uint32_t>(operations_.size()),
                                   /*receives=*/0, &inline_bytes_));
  sequence_ = static_cast<uint32_t>(RandomU64()) & kTwentyFourBits;
  auto attributes = VerbsZeroed<ibv_qp_attr>();
  attributes.qp_state = IBV_QPS_INIT;
  attributes.pkey_index = port_.settings().pkey_index;
  attributes.port_num = port_.number();
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
  const int error = port_.library().modify_qp(
      pair_.get(), &attributes,
      IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  return error == 0 ? OkStatus() : port_.Failed("ibv_modify_qp(INIT)", error);
}

VerbsConnection::~VerbsConnection() {
  Destroy();
  if (words_.has_value()) buffers_.GiveWords(*words_);
  receives_.Release(receive_credits_.quota());
}

void VerbsConnection::Introduce(VerbsGreeting* greeting) const {
  greeting->attempt = attempt_;
  greeting->queue_pair = number();
  greeting->sequence = sequence_;
  greeting->word_address =
      reinterpret_cast<uintptr_t>(&buffers_.words(*words_).limit);
  greeting->word_key = buffers_.words_remote_key();
  greeting->quota = receive_credits_.quota();
  greeting->mtu = static_cast<uint32_t>(port_.mtu());
}

Status VerbsConnection::Join(const VerbsGreeting& greeting) {
  send_credits_ = SendCredits(greeting.quota);
  buffers_.words(*words_) = {.limit = greeting.quota, .told = 0};
  remote_word_ = greeting.word_address;
  remote_word_key_ = greeting.word_key;

  auto attributes = VerbsZeroed<ibv_qp_attr>();
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu =
      std::min(port_.mtu(), static_cast<ibv_mtu>(greeting.mtu));
  attributes.dest_qp_num = greeting.queue_pair;
  attributes.rq_psn = greeting.sequence;
  attributes.max_dest_rd_atomic = 1;
  attributes.min_rnr_timer = kMinRnrTimer;
  attributes.ah_attr =
      port_.WayTo(greeting.sender, number() ^ greeting.queue_pair);
  int error = port_.library().modify_qp(
      pair_.get(), &attributes,
      IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
          IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  if (error != 0) return port_.Failed("ibv_modify_qp(RTR)", error);

  attributes = VerbsZeroed<ibv_qp_attr>();
  attributes.qp_state = IBV_QPS_RTS;
  attributes.sq_psn = sequence_;
  attributes.timeout = port_.settings().timeout;
  attributes.retry_cnt = port_.settings().retry_count;
  attributes.rnr_retry = kRnrRetryForEver;
  attributes.max_rd_atomic = 1;
  error = port_.library().modify_qp(
      pair_.get(), &attributes,
      IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
          IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC);
  if (error != 0) return port_.Failed("ibv_modify_qp(RTS)", error);
  remote_attempt_ = greeting.attempt;
  return OkStatus();
}

void VerbsConnection::Stop() {
  auto attributes = VerbsZeroed<ibv_qp_attr>();
  attributes.qp_state = IBV_QPS_ERR;
  // If the device refuses, Destroy still ends it.
  (void)port_.library().modify_qp(pair_.get(), &attributes, IBV_QP_STATE);
}

bool VerbsConnection::HasCredit() {
  // The device writes the word behind the compiler's back.
  std::atomic_ref<uint32_t> word(buffers_.words(*words_).limit);
  send_credits_.Update(word.load(std::memory_order_acquire));
  return send_credits_.available();
}

VerbsConnection::Link& VerbsConnection::Append(
    const VerbsOperation& operation) {
  JF_CHECK(open() < operations_.size() && chained_ < kChainMax);
  operations_[tail_ % operations_.size()] = operation;
  Link& link = chain_[chained_++];
  link.work = VerbsZeroed<ibv_send_wr>();
  link.work.wr_id = tail_++;
  link.work.sg_list = &link.piece;
  link.work.num_sge = 1;
  return link;
}

Status VerbsConnection::Appended() {
  // What is under way brings a completion, and with it the next Flush.
  const bool idle = open() == chained_;
  return idle || chained_ == kChainMax ? Flush() : OkStatus();
}

Status VerbsConnection::PostWrite(const VerbsOperation& operation,
                                  const Write& write) {
  Link& link = Append(operation);
  link.piece.addr = reinterpret_cast<uintptr_t>(write.data);
  link.piece.length = write.length;
  link.piece.lkey = write.local_key;
  if (write.length == 0) link.work.num_sge = 0;
  link.work.opcode = IBV_WR_RDMA_WRITE;
  if (write.immediate.has_value()) {
    link.work.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    link.work.imm_data = htonl(*write.immediate);
    send_credits_.Use();
  }
  link.work.wr.rdma.remote_addr = write.remote_address;
  link.work.wr.rdma.rkey = write.remote_key;
  // The processor copies inline bytes, and cannot read device memory.
  if (write.in_host_memory && write.length <= inline_bytes_) {
    link.work.send_flags = IBV_SEND_INLINE;
  }
  return Appended();
}

Status VerbsConnection::PostFrame(const VerbsOperation& operation,
                                  uint32_t bytes) {
  Link& link = Append(operation);
  link.piece.addr =
      reinterpret_cast<uintptr_t>(buffers_.frame(operation.buffer));
  link.piece.length = bytes;
  link.piece.lkey = buffers_.frame_key();
  link.work.opcode = IBV_WR_SEND;
  if (bytes <= inline_bytes_) link.work.send_flags = IBV_SEND_INLINE;
  send_credits_.Use();
  return Appended();
}

Status VerbsConnection::PostWord() {
  if (word_open_ || open() == operations_.size()) return OkStatus();
  word_open_ = true;
  VerbsWords& words = buffers_.words(*words_);
  words.told = receive_credits_.Tell();
  Link& link = Append({.kind = VerbsOperation::Kind::kWord});
  link.piece.addr = reinterpret_cast<uintptr_t>(&words.told);
  link.piece.length = sizeof(words.told);
  link.piece.lkey = buffers_.words_local_key();
  link.work.opcode = IBV_WR_RDMA_WRITE;
  link.work.wr.rdma.remote_addr = remote_word_;
  link.work.wr.rdma.rkey = remote_word_key_;
  if (sizeof(words.told) <= inline_bytes_) {
    link.work.send_flags = IBV_SEND_INLINE;
  }
  return Flush();
}

Status VerbsConnection::Flush() {
  if (chained_ == 0) return OkStatus();
  for (uint32_t i = 0; i + 1 < chained_; ++i) {
    chain_[i].work.next = &chain_[i + 1].work;
  }
  chain_[chained_ - 1].work.send_flags |= IBV_SEND_SIGNALED;
  chained_ = 0;
  ibv_send_wr* bad = nullptr;
  const int error = ibv_post_send(pair_.get(), &chain_[0].work, &bad);
  return error == 0 ? OkStatus() : port_.Failed("ibv_post_send", error);
}

void VerbsConnection::Abandon(
    const std::function<void(const VerbsOperation&)>& done) {
  chained_ = 0;
  for (; head_ < tail_; ++head_) done(operations_[head_ % operations_.size()]);
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
