// Domain: one NIC port opened by one rank, and the whole contract of a
// transport.
//
// Delivery is reliable and unordered. There is no order between two writes, nor
// between the bytes of one write; the only promise is "this immediate arrived,
// so all bytes of that write are here". Both sides make progress by polling.
//
// A Domain is not thread-safe: its owner serialises every call, except
// MapMemory and DirectPointer. No call blocks, except AddPeer, MapMemory, and
// the first use of a memory key that was not mapped.
//
// An implementation is done when tests/cpp/transport_conformance passes on it.

#ifndef JAXFABRIC_TRANSPORT_TRANSPORT_H_
#define JAXFABRIC_TRANSPORT_TRANSPORT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/deadline.h"
#include "base/doorbell.h"
#include "base/status.h"

namespace jaxfabric {

// Names a Domain. Opaque to everything but its transport; travels to peers by
// any means, and is checked when it comes back.
struct NetAddr {
  std::string bytes;
  bool operator==(const NetAddr&) const = default;
};

// A peer as one Domain knows it; small and dense, never reused.
using PeerId = uint32_t;
inline constexpr PeerId kUnknownPeer = ~PeerId{0};

// Memory to be registered. `fd` is the memfd that is mapped at `base` from its
// start, which the shm transport needs; -1 where there is none. Device memory
// comes as `dmabuf_fd`, in which `base` lies at `dmabuf_offset`.
struct MemoryRegion {
  std::byte* base = nullptr;
  uint64_t length = 0;
  int fd = -1;
  int dmabuf_fd = -1;
  uint64_t dmabuf_offset = 0;
};

// Registered memory of this rank, as the source of a write.
struct LocalSpan {
  const std::byte* data = nullptr;
  uint64_t key = 0;
};

// Registered memory of a peer: an offset into the region that `key` names.
// A transport that addresses by virtual address adds `base` itself.
struct RemoteSpan {
  uint64_t key = 0;
  uint64_t base = 0;
  uint64_t offset = 0;
};

enum class AddressMode { kOffset, kVirtualAddress };

// One contiguous part of a write; offsets count from where the spans begin.
struct Piece {
  uint64_t local_offset = 0;
  uint64_t remote_offset = 0;
  uint64_t length = 0;
};

// All of it is read from the device, none is assumed.
struct DomainCaps {
  const char* transport = "";
  uint64_t write_bytes_max = 0;
  // That PostPieces takes: one write of several costs less than several writes.
  uint32_t write_pieces_max = 1;
  uint32_t message_bytes_max = 0;
  // Writes and messages that may be posted and not yet completed.
  uint32_t queue_depth = 0;
  AddressMode address_mode = AddressMode::kOffset;
  // The target must AddPeer the initiator before its first write.
  bool target_must_know_initiator = false;
  // Each immediate consumes a posted receive (EFA).
  bool immediate_consumes_receive = false;
  // A kImmediate names its peer. Where it does not, as on a NIC, what the
  // immediate says must be enough to tell its source.
  bool immediate_names_peer = true;
  // Bytes arrive only while the target polls, too.
  bool target_must_poll = false;
  // The device has no remote writes of its own; software there does them.
  bool emulated_writes = false;
  // A write that has begun goes on landing although its region, or the peer
  // that posted it, is gone here, as where software receives it.
  bool writes_outlive_regions = false;
  // FencePeer keeps its word.
  bool removal_fences = false;
  // DirectPointer works: peers' memory can be stored to by the processor.
  bool direct_store = false;
};

// kAgain is back-pressure: nothing was posted; poll, then try again.
enum class Posted { kPosted, kAgain };

// Each posted cookie comes back exactly once: in kWriteDone, kSendDone or
// kError. `peer` of what arrives is kUnknownPeer where this Domain has not
// added the sender, and in kImmediate where caps().immediate_names_peer is
// false. kPeerLost is the last completion that names its peer.
struct Completion {
  enum class Kind {
    kWriteDone,  // `cookie`: the source bytes may be reused
    kSendDone,   // `cookie`
    kImmediate,  // `immediate` arrived from `peer`, and all bytes of its write
    kMessage,    // `message` arrived from `peer`
    kError,      // the post that `cookie` names failed; see `status`
    kPeerLost,   // nothing will come from or reach `peer` again; see `status`
  };
  Kind kind = Kind::kError;
  PeerId peer = kUnknownPeer;
  uint64_t cookie = 0;
  uint32_t immediate = 0;
  std::string message;
  Status status;
};

class Domain {
 public:
  virtual ~Domain() = default;

  virtual const DomainCaps& caps() const = 0;
  // It may change while peers are added or removed, in its last bytes.
  virtual const NetAddr& address() const = 0;

  // Makes `region` a target of peers' writes; returns its key. The memory must
  // stay until UnregisterMemory has returned.
  virtual StatusOr<uint64_t> RegisterMemory(const MemoryRegion& region) = 0;
  virtual Status UnregisterMemory(uint64_t key) = 0;

  // Connects to the Domain that `address` names; the same address gives the
  // same PeerId. Fails with a sentence on a malformed, stale or foreign
  // address; one that is merely stale may instead be found lost soon after,
  // at the deadline at the latest.
  virtual StatusOr<PeerId> AddPeer(const NetAddr& address,
                                   Deadline deadline) = 0;
  // Forgets a peer. Posts to it that are not complete end, with kError where
  // the transport can still stop them.
  virtual void RemovePeer(PeerId peer) = 0;
  // Forgets a peer, and keeps it out where caps().removal_fences: once IsFenced
  // says so, all posts to it have ended, nothing that it has posted lands here
  // any more, and what it posts fails until both have added each other anew.
  // What landed before is still polled, under its PeerId. Other peers that poll
  // lose nothing; they may have to wait for some milliseconds. To one that does
  // not poll for longer, a transport may lose what is under way.
  virtual void FencePeer(PeerId peer) { RemovePeer(peer); }
  virtual bool IsFenced(PeerId) const { return true; }
  // The same for all peers that were removed and not added again: what they
  // have posted may land until RemovedAreFenced. For
  // caps().writes_outlive_regions.
  virtual void FenceRemoved() {}
  virtual bool RemovedAreFenced() const { return true; }

  // Writes `length` bytes (0 is allowed) from `local` to `remote`; if
  // `immediate` is given, the peer polls it once all bytes are there. Out of
  // range spans are refused here, as far as this side can know. `cookie` comes
  // back in kWriteDone or kError.
  virtual StatusOr<Posted> PostWriteImm(PeerId peer, LocalSpan local,
                                        RemoteSpan remote, uint64_t length,
                                        std::optional<uint32_t> immediate,
                                        uint64_t cookie) = 0;
  // The same for 1 to caps().write_pieces_max pieces, which become one write;
  // each has bytes if there are several. For transports that take several.
  virtual StatusOr<Posted> PostPieces(PeerId, LocalSpan, RemoteSpan,
                                      std::span<const Piece>,
                                      std::optional<uint32_t>, uint64_t) {
    return Status(StatusCode::kUnimplemented, "a write has one piece here");
  }

  // Two-sided, for control. The bytes are copied before the call returns.
  virtual StatusOr<Posted> PostSend(PeerId peer, std::string_view message,
                                    uint64_t cookie) = 0;

  // Moves everything forward and fills `completions`; returns how many. Sets
  // only the fields that the kind has.
  virtual size_t Poll(std::span<Completion> completions) = 0;

  // Messages that were dropped since no Domain of this job and version sends
  // them.
  virtual uint64_t refused_frames() const { return 0; }

  // Asks the peer for the memory behind `key`, so that DirectPointer need not
  // wait for it: its process may be stopped. Any thread, as long as the peer is
  // not removed. kDeadlineExceeded if it has not answered; a deadline that is
  // over asks nobody. Where caps().direct_store is false there is nothing to
  // do.
  virtual Status MapMemory(PeerId, uint64_t /*key*/, Deadline) {
    return OkStatus();
  }

  // Where `length` bytes of the peer's memory are mapped here, or nullptr where
  // caps().direct_store is false or the span is out of range. What is stored
  // there is visible to the peer once an immediate posted later has arrived.
  virtual std::byte* DirectPointer(PeerId peer, RemoteSpan remote,
                                   uint64_t length) = 0;
};

// Opens Domains of one kind for one engine; they must be gone before it goes.
class Transport {
 public:
  virtual ~Transport() = default;

  // On each NIC in turn: nic_count() calls give one rank all of them.
  virtual StatusOr<std::unique_ptr<Domain>> OpenDomain() = 0;
  virtual size_t nic_count() const { return 1; }

  // Rings whenever Poll of one of this transport's Domains may have news.
  virtual Doorbell& doorbell() = 0;
  // Above 0 where the device cannot ring: how long its owner may sleep without
  // polling while something is under way.
  virtual int64_t poll_interval_ns() const { return 0; }
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_TRANSPORT_H_
