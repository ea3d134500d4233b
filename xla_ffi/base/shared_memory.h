// SharedMemory: a memfd and its mapping.
//
// A memfd has no name in any file system: nothing is left in /dev/shm when a
// process is killed, and there is no stale file to meet. Its pages cost nothing
// until they are touched, so regions may be generous.

#ifndef JAXFABRIC_BASE_SHARED_MEMORY_H_
#define JAXFABRIC_BASE_SHARED_MEMORY_H_

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "base/unique_fd.h"

namespace jaxfabric {

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  ~SharedMemory();

  // Zero-filled memory of this process. `name` shows up in /proc/PID/maps.
  // The size is sealed, so that no peer can shrink it under a reader.
  static StatusOr<SharedMemory> Create(const char* name, uint64_t bytes);

  // Maps a peer's memory. Refuses a descriptor that is smaller than `bytes` or
  // whose size is not sealed: reading it could then kill this process. The
  // descriptor is closed, since the mapping alone keeps the memory.
  static StatusOr<SharedMemory> Attach(UniqueFd fd, uint64_t bytes);

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  // -1 for attached memory, and after CloseFd.
  int fd() const { return fd_.get(); }
  // For memory that is not handed to further processes.
  void CloseFd() { fd_ = UniqueFd(); }

 private:
  UniqueFd fd_;
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_BASE_SHARED_MEMORY_H_
