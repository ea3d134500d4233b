#include "tests/softefa/wire.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

#include "base/check.h"
#include "base/unique_fd.h"

namespace jaxfabric::softefa {
namespace {

constexpr int64_t kDrainNs = 200'000'000;

struct NumbersFile {
  std::atomic<uint32_t> last_queue_pair;
};

std::string PathOf(const std::string& name) {
  return TheSettings().directory + "/" + name;
}

template <typename File>
File* Map(const std::string& name, bool create) {
  const int flags = O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0);
  const UniqueFd fd(open(PathOf(name).c_str(), flags, 0600));
  if (!fd.valid()) {
    JF_CHECK(!create);  // SOFTEFA_DIR is gone or full
    return nullptr;
  }
  struct stat found;
  if (create) {
    JF_CHECK(ftruncate(fd.get(), sizeof(File)) == 0);
  } else if (fstat(fd.get(), &found) != 0 ||
             found.st_size < off_t{sizeof(File)}) {
    return nullptr;  // its owner is about to give it its size
  }
  void* address = mmap(nullptr, sizeof(File), PROT_READ | PROT_WRITE,
                       MAP_SHARED, fd.get(), 0);
  JF_CHECK(address != MAP_FAILED);
  return static_cast<File*>(address);
}

}  // namespace

Gid MakeGid(uint32_t host, int nic) {
  Gid gid{0xfe, 0x80};
  std::memcpy(&gid[8], &host, sizeof(host));
  gid[15] = nic + 1;
  return gid;
}

uint32_t GidHost(const Gid& gid) {
  uint32_t host;
  std::memcpy(&host, &gid[8], sizeof(host));
  return host;
}

int GidNic(const Gid& gid) { return gid[15] - 1; }

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void Users::Drain() const {
  const int64_t until = NowNs() + kDrainNs;
  while (count_.load(std::memory_order_seq_cst) != 0 && NowNs() < until) {
    std::this_thread::yield();
  }
}

bool ProcessFile::Knows(int nic, const Gid& gid) const {
  for (const AddressHandleEntry& entry : address_handles[nic]) {
    if (entry.gid == gid) {
      return entry.references.load(std::memory_order_acquire) != 0;
    }
    if (entry.gid == Gid{}) return false;  // entries are taken in order
  }
  return false;
}

void QueuePairFile::Init(int32_t owner_nic, bool wants_unsolicited) {
  pid = getpid();
  owner_address = reinterpret_cast<uint64_t>(this);
  nic = owner_nic;
  unsolicited = wants_unsolicited;
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  JF_CHECK(pthread_mutex_init(&mutex, &attributes) == 0);
  pthread_mutexattr_destroy(&attributes);
}

bool QueuePairFile::ClaimReceive() {
  uint32_t posted = receives.load(std::memory_order_relaxed);
  while (posted != 0) {
    if (receives.compare_exchange_weak(posted, posted - 1,
                                       std::memory_order_acq_rel)) {
      return true;
    }
  }
  return false;
}

bool QueuePairFile::Push(const std::function<void(Packet&)>& fill) {
  // `tail` moves last, so that what a killed sender left half done is unseen.
  if (pthread_mutex_lock(&mutex) == EOWNERDEAD) {
    pthread_mutex_consistent(&mutex);
  }
  const uint64_t end = tail.load(std::memory_order_relaxed);
  const bool room = end - head.load(std::memory_order_acquire) < kRingPackets;
  if (room) {
    fill(ring[end % kRingPackets]);
    tail.store(end + 1, std::memory_order_release);
  }
  pthread_mutex_unlock(&mutex);
  return room;
}

Packet* QueuePairFile::Front() {
  const uint64_t begin = head.load(std::memory_order_relaxed);
  if (begin == tail.load(std::memory_order_acquire)) return nullptr;
  return &ring[begin % kRingPackets];
}

void QueuePairFile::Pop() { head.fetch_add(1, std::memory_order_release); }

std::string QueuePairName(const Gid& gid, uint32_t number) {
  std::string name = "qp-";
  for (const uint8_t byte : gid) {
    char hex[3];
    std::snprintf(hex, sizeof(hex), "%02x", byte);
    name += hex;
  }
  return name + "-" + std::to_string(number);
}

std::string ProcessName(int32_t pid) {
  return "process-" + std::to_string(pid);
}

ProcessFile* MapProcess(int32_t pid, bool create) {
  return Map<ProcessFile>(ProcessName(pid), create);
}

QueuePairFile* MapQueuePair(const std::string& name, bool create) {
  return Map<QueuePairFile>(name, create);
}

void UnmapQueuePair(QueuePairFile* file) {
  munmap(file, sizeof(QueuePairFile));
}

void RemoveFile(const std::string& name) { unlink(PathOf(name).c_str()); }

uint32_t NextQueuePairNumber() {
  static NumbersFile* numbers = Map<NumbersFile>("numbers", true);
  return numbers->last_queue_pair.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace jaxfabric::softefa
