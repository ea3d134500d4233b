// VerbsGreeter: the datagram queue pair of one Domain, by which greetings come
// and go (verbs_greeting.h).

#ifndef JAXFABRIC_TRANSPORT_VERBS_GREETER_H_
#define JAXFABRIC_TRANSPORT_VERBS_GREETER_H_

#include "transport/verbs_port.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "transport/verbs_greeting.h"

namespace jaxfabric {

// How to reach a peer's greeter.
using VerbsWay = VerbsOwned<ibv_ah>;

class VerbsGreeter {
 public:
  // Work is posted under wr_id = one of the tags | its index.
  static StatusOr<std::unique_ptr<VerbsGreeter>> Open(VerbsPort& port,
                                                      uint64_t send_tag,
                                                      uint64_t receive_tag);

  uint32_t number() const { return pair_->qp_num; }
  uint32_t queue_key() const { return queue_key_; }

  // Fails where no route leads there.
  StatusOr<VerbsWay> FindWay(const VerbsAddress& address);

  // Greetings may be lost; there is no word of it.
  void Send(const VerbsWay& way, const VerbsAddress& to,
            const VerbsGreeting& greeting);
  void SendDone(uint64_t index);
  bool HasRoom() const { return !free_.empty(); }
  bool idle() const { return free_.size() == kSends; }

  // What came, `bytes` long with its header, in receive `index`.
  std::span<const std::byte> Received(uint64_t index, uint32_t bytes) const;
  void Repost(uint64_t index);

 private:
  static constexpr uint64_t kSends = 64;

  explicit VerbsGreeter(VerbsPort& port) : port_(port) {}
  Status Start();
  std::byte* BufferOf(uint64_t index) const;

  VerbsPort& port_;
  uint64_t send_tag_ = 0;
  uint64_t receive_tag_ = 0;
  uint32_t queue_key_ = 0;
  uint32_t inline_bytes_ = 0;
  std::unique_ptr<std::byte[]> bytes_;
  VerbsMemory memory_{nullptr, nullptr};
  VerbsOwned<ibv_qp> pair_{nullptr, nullptr};
  std::vector<uint64_t> free_;  // sends
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
#endif  // JAXFABRIC_TRANSPORT_VERBS_GREETER_H_
