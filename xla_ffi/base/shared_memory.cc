#include "base/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

namespace jaxfabric {
namespace {

constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

Status SystemError(const char* call, uint64_t bytes) {
  return Status(StatusCode::kResourceExhausted,
                std::string(call) + " of " + std::to_string(bytes) +
                    " bytes failed: " + std::strerror(errno));
}

StatusOr<std::byte*> Map(int fd, uint64_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (address == MAP_FAILED) return SystemError("mmap", bytes);
  return static_cast<std::byte*>(address);
}

}  // namespace

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

StatusOr<SharedMemory> SharedMemory::Create(const char* name, uint64_t bytes) {
  SharedMemory memory;
  memory.fd_ = UniqueFd(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.fd_.valid()) return SystemError("memfd_create", bytes);
  if (ftruncate(memory.fd(), static_cast<off_t>(bytes)) != 0) {
    return SystemError("ftruncate", bytes);
  }
  if (fcntl(memory.fd(), F_ADD_SEALS, kSizeSeals) != 0) {
    return SystemError("sealing", bytes);
  }
  JF_ASSIGN_OR_RETURN(memory.data_, Map(memory.fd(), bytes));
  memory.size_ = bytes;
  return memory;
}

StatusOr<SharedMemory> SharedMemory::Attach(UniqueFd fd, uint64_t bytes) {
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return SystemError("fstat", bytes);
  if (static_cast<uint64_t>(info.st_size) < bytes) {
    return Status(StatusCode::kInvalidArgument,
                  "a peer offered " + std::to_string(info.st_size) +
                      " bytes of shared memory where " + std::to_string(bytes) +
                      " were announced");
  }
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return Status(StatusCode::kPermissionDenied,
                  "a peer offered shared memory that it could shrink");
  }
  SharedMemory memory;
  JF_ASSIGN_OR_RETURN(memory.data_, Map(fd.get(), bytes));
  memory.size_ = bytes;
  return memory;
}

}  // namespace jaxfabric
