// VerbsConnection: one reliable queue pair, joined with one of a peer's.
//
// Posts are gathered while something is under way, and handed to the device
// several at a time; only the last of such a chain asks for a completion, which
// stands for all before it.

#ifndef JAXFABRIC_TRANSPORT_VERBS_CONNECTION_H_
#define JAXFABRIC_TRANSPORT_VERBS_CONNECTION_H_

#include "transport/verbs_port.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/status.h"
#include "transport/verbs_buffers.h"
#include "transport/verbs_credits.h"
#include "transport/verbs_greeting.h"
#include "transport/verbs_receives.h"

namespace jaxfabric {

struct VerbsOperation {
  enum class Kind { kWrite, kMessage, kFrame, kWord };
  Kind kind = Kind::kWrite;
  uint64_t cookie = 0;  // of kWrite and kMessage
  uint32_t buffer = 0;  // of kMessage and kFrame: of VerbsBuffers
};

class VerbsConnection {
 public:
  struct Write {
    const void* data = nullptr;
    uint32_t local_key = 0;
    bool in_host_memory = true;
    uint32_t length = 0;
    uint64_t remote_address = 0;
    uint32_t remote_key = 0;
    std::optional<uint32_t> immediate;
  };

  // `attempt` tells this queue pair from all others of the Domain.
  static StatusOr<std::unique_ptr<VerbsConnection>> Open(
      VerbsPort& port, VerbsReceives& receives, VerbsBuffers& buffers,
      uint64_t attempt);
  ~VerbsConnection();

  uint32_t number() const { return pair_->qp_num; }
  uint64_t attempt() const { return attempt_; }
  // What a peer must know to join its queue pair with this one.
  void Introduce(VerbsGreeting* greeting) const;
  // With the queue pair that `greeting` introduces.
  Status Join(const VerbsGreeting& greeting);
  // Of the peer's queue pair; 0: not joined.
  uint64_t remote_attempt() const { return remote_attempt_; }
  // The peer's end has joined too: until then nothing may be posted.
  bool confirmed() const { return confirmed_; }
  void Confirm() { confirmed_ = true; }

  // From now on nothing of the peer lands here.
  void Stop();
  // And nothing of this queue pair enters the completion queue.
  void Destroy() { pair_.reset(); }

  // Posts that are not complete, chained ones included.
  uint32_t open() const { return static_cast<uint32_t>(tail_ - head_); }
  bool HasRoom() const { return open() < depth_; }
  // Whether the peer has a receive for one more.
  bool HasCredit();
  ReceiveCredits& receive_credits() { return receive_credits_; }

  // The device refuses nothing while there is room; if it does, the connection
  // is broken.
  Status PostWrite(const VerbsOperation& operation, const Write& write);
  Status PostFrame(const VerbsOperation& operation, uint32_t bytes);
  // Tells the peer what it may send; nothing while the last is on its way.
  Status PostWord();
  // Hands what is chained to the device.
  Status Flush();

  // `sequence` is the wr_id of a completion. Gives all operations up to it to
  // `done`, and that one as the last. False if there is no such operation.
  template <typename Done>
  bool Finish(uint64_t sequence, const Done& done) {
    if (sequence < head_ || sequence >= tail_ - chained_) return false;
    while (head_ <= sequence) {
      const VerbsOperation operation = operations_[head_ % operations_.size()];
      if (operation.kind == VerbsOperation::Kind::kWord) word_open_ = false;
      done(operation, /*last=*/head_ == sequence);
      ++head_;
    }
    return true;
  }
  // All that are left, after Destroy.
  void Abandon(const std::function<void(const VerbsOperation&)>& done);

 private:
  static constexpr uint32_t kChainMax = 16;
  // Beyond the depth, for words and frames.
  static constexpr uint32_t kReserve = 16;
  struct Link {
    ibv_send_wr work = VerbsZeroed<ibv_send_wr>();
    ibv_sge piece = {};
  };

  VerbsConnection(VerbsPort& port, VerbsReceives& receives,
                  VerbsBuffers& buffers, uint64_t attempt)
      : port_(port),
        receives_(receives),
        buffers_(buffers),
        attempt_(attempt),
        depth_(port.queue_depth()),
        operations_(depth_ + kReserve) {}
  Status Start();
  Link& Append(const VerbsOperation& operation);
  Status Appended();

  VerbsPort& port_;
  VerbsReceives& receives_;
  VerbsBuffers& buffers_;
  const uint64_t attempt_;
  const uint32_t depth_;

  VerbsOwned<ibv_qp> pair_{nullptr, nullptr};
  uint32_t inline_bytes_ = 0;
  uint32_t sequence_ = 0;  // of the first packet
  std::optional<uint32_t> words_;
  uint64_t remote_attempt_ = 0;
  uint64_t remote_word_ = 0;
  uint32_t remote_word_key_ = 0;
  bool confirmed_ = false;
  bool word_open_ = false;
  SendCredits send_credits_;
  ReceiveCredits receive_credits_;

  // Operation n is in slot n mod size, from head_, the oldest, to tail_.
  std::vector<VerbsOperation> operations_;
  uint64_t head_ = 0;
  uint64_t tail_ = 0;
  std::array<Link, kChainMax> chain_;
  uint32_t chained_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
#endif  // JAXFABRIC_TRANSPORT_VERBS_CONNECTION_H_
