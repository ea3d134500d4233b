// What the processes of one software network share: files in SOFTEFA_DIR that
// each of them maps.
//
//   process-PID       its registered memory and the peers it has handles for
//   qp-GID-NUMBER     a queue pair's receive side: a ring of packets
//   numbers           the next queue pair number
//
// Payload of writes does not go through files: the initiator stores it into the
// target's memory with process_vm_writev, as a NIC does without the target's
// help.

#ifndef JAXFABRIC_TESTS_SOFTEFA_WIRE_H_
#define JAXFABRIC_TESTS_SOFTEFA_WIRE_H_

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "tests/softefa/settings.h"

namespace jaxfabric::softefa {

inline constexpr uint32_t kRegionsMax = 65536;
inline constexpr uint32_t kAddressHandlesMax = 1024;  // of one NIC
inline constexpr uint32_t kRingPackets = kReceivesMax;

// fe80:: with the host in bytes 8 to 11 and the NIC's number + 1 in the last.
using Gid = std::array<uint8_t, 16>;
Gid MakeGid(uint32_t host, int nic);
uint32_t GidHost(const Gid& gid);
int GidNic(const Gid& gid);

// Counts whoever is about to touch something of another process; taking it away
// waits for them. A process that is killed in between leaves its count, so that
// Drain gives up after a while.
class Users {
 public:
  void Enter() { count_.fetch_add(1, std::memory_order_seq_cst); }
  void Leave() { count_.fetch_sub(1, std::memory_order_release); }
  void Drain() const;

 private:
  std::atomic<int32_t> count_;
};

class UseGuard {
 public:
  explicit UseGuard(Users& users) : users_(users) { users_.Enter(); }
  ~UseGuard() { users_.Leave(); }
  UseGuard(const UseGuard&) = delete;
  UseGuard& operator=(const UseGuard&) = delete;

 private:
  Users& users_;
};

// All of it starts as the zero bytes of a new file.
struct RegionEntry {
  std::atomic<uint32_t> key;  // 0: free
  uint32_t access;            // IBV_ACCESS_*
  uint64_t base;
  uint64_t length;
  int32_t nic;
  Users users;

  bool Covers(uint32_t wanted, int on_nic, uint64_t address,
              uint64_t bytes) const {
    return key.load(std::memory_order_seq_cst) == wanted && nic == on_nic &&
           address >= base && bytes <= length &&
           address - base <= length - bytes;
  }
};

struct AddressHandleEntry {
  std::atomic<uint32_t> references;
  Gid gid;  // written once, before the first reference
};

struct ProcessFile {
  std::array<std::array<AddressHandleEntry, kAddressHandlesMax>, kNicsMax>
      address_handles;
  std::array<RegionEntry, kRegionsMax> regions;

  RegionEntry& Region(uint32_t key) { return regions[key % kRegionsMax]; }
  bool Knows(int nic, const Gid& gid) const;
};

struct Packet {
  enum class Kind : uint32_t { kSend, kWrite };
  Kind kind;
  uint32_t bytes;  // of a send's payload, or of the write that went before
  uint32_t has_immediate;
  uint32_t immediate;  // network byte order, as verbs have it
  uint32_t source_queue_pair;
  uint32_t unsolicited;  // consumes no posted receive
  Gid source;
  std::array<std::byte, kPacketBytesMax> payload;
};

struct QueuePairFile {
  std::atomic<uint32_t> ready;
  // Posted, and not yet claimed by a packet on its way.
  std::atomic<uint32_t> receives;
  Users users;
  int32_t pid;
  uint64_t owner_address;  // of this file in its owner
  int32_t nic;
  uint32_t unsolicited;
  std::atomic<uint32_t> queue_key;
  // Robust, since a sender may be killed while it holds it.
  pthread_mutex_t mutex;
  std::atomic<uint64_t> head;
  std::atomic<uint64_t> tail;
  std::array<Packet, kRingPackets> ring;

  void Init(int32_t owner_nic, bool wants_unsolicited);
  // Takes one posted receive; false if there is none.
  bool ClaimReceive();
  // Lets `fill` write the next slot; false if the ring is full.
  bool Push(const std::function<void(Packet&)>& fill);
  // The oldest packet, or nullptr; it stays until Pop.
  Packet* Front();
  void Pop();
};

std::string QueuePairName(const Gid& gid, uint32_t number);
std::string ProcessName(int32_t pid);

// Maps a file of SOFTEFA_DIR for good, or returns nullptr if there is none.
ProcessFile* MapProcess(int32_t pid, bool create);
QueuePairFile* MapQueuePair(const std::string& name, bool create);
void UnmapQueuePair(QueuePairFile* file);
void RemoveFile(const std::string& name);
uint32_t NextQueuePairNumber();

int64_t NowNs();

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_WIRE_H_
