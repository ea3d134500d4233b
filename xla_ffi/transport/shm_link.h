// ShmLink: the connection of one shm Transport to another one's control thread,
// shared by all Domains of the initiating side.

#ifndef JAXFABRIC_TRANSPORT_SHM_LINK_H_
#define JAXFABRIC_TRANSPORT_SHM_LINK_H_

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "base/deadline.h"
#include "base/shared_memory.h"
#include "base/status.h"
#include "base/unique_fd.h"
#include "transport/shm_control.h"

namespace jaxfabric {

// A peer's registered region, mapped here. It stays mapped while anybody holds
// it, also when its owner has unregistered it.
struct ShmMapping {
  SharedMemory memory;
  uint32_t domain = 0;  // the Domain that registered it
  std::atomic<bool> gone = false;
};

class ShmLink {
 public:
  ShmLink(UniqueFd socket, const std::array<uint64_t, 2>& process)
      : socket_(std::move(socket)), process_(process) {}

  int fd() const { return socket_.get(); }
  const std::array<uint64_t, 2>& process() const { return process_; }

  // Sends `request` and waits for its reply. Any thread.
  StatusOr<ShmReceived> Request(ShmControlMessage request, Deadline deadline);

  // The region that `key` names, mapped once for all Domains. Any thread.
  StatusOr<std::shared_ptr<ShmMapping>> Map(const ShmAddress& target,
                                            uint64_t key, Deadline deadline);

  // Sends what needs no reply, if there is room.
  void Notify(const ShmControlMessage& message);

  // The rest is for the control thread, which alone reads the socket.
  void Deliver(ShmReceived reply);
  void Forget(uint64_t key);
  // Ends all requests, now and later. The first reason stays.
  void Fail(Status why);
  // Makes the peer see the end of the connection.
  void Shutdown();

 private:
  struct Pending {
    uint64_t key = 0;  // of the region that was asked for
    bool done = false;
    ShmReceived reply;
    std::shared_ptr<ShmMapping> mapping;
    Status status;
  };

  StatusOr<Pending> Exchange(ShmControlMessage request, Deadline deadline);
  // Maps and remembers what a kMapRegion reply brings.
  Status Adopt(uint64_t key, ShmReceived& reply,
               std::shared_ptr<ShmMapping>& mapping);

  const UniqueFd socket_;
  const std::array<uint64_t, 2> process_;

  std::mutex mutex_;
  std::condition_variable replied_;
  uint64_t next_serial_ = 1;                        // guarded by mutex_
  std::unordered_map<uint64_t, Pending*> pending_;  // guarded by mutex_
  std::unordered_map<uint64_t, std::weak_ptr<ShmMapping>>
      mappings_;   // guarded by mutex_
  Status failed_;  // guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_SHM_LINK_H_
