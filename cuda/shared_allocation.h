// SharedAllocation: device memory that other devices and processes can map, and
// AddressRange: where.

#ifndef JAXFABRIC_CUDA_SHARED_ALLOCATION_H_
#define JAXFABRIC_CUDA_SHARED_ALLOCATION_H_

#include <cuda.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "base/status.h"

namespace jaxfabric::cuda {

// Addresses that nothing else is given, with memory or not.
class AddressRange {
 public:
  static StatusOr<std::unique_ptr<AddressRange>> Reserve(size_t bytes);
  ~AddressRange();
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;

  CUdeviceptr address() const { return address_; }
  size_t bytes() const { return bytes_; }

 private:
  AddressRange(CUdeviceptr address, size_t bytes)
      : address_(address), bytes_(bytes) {}

  const CUdeviceptr address_;
  const size_t bytes_;
};

class SharedAllocation {
 public:
  // At least `bytes` on `device`, not mapped yet.
  static StatusOr<std::unique_ptr<SharedAllocation>> Create(int device,
                                                            size_t bytes);
  // Another process's, from the file descriptor that its Export gave, which
  // may be closed afterwards. `bytes` as given to Create there.
  static StatusOr<std::unique_ptr<SharedAllocation>> Import(int fd,
                                                            size_t bytes,
                                                            int device);
  ~SharedAllocation();
  SharedAllocation(const SharedAllocation&) = delete;
  SharedAllocation& operator=(const SharedAllocation&) = delete;

  // A file descriptor for Import, to be closed by the caller.
  StatusOr<int> Export() const;
  // Maps it once, readable and writable by all of `devices`. `range` is as long
  // and outlives it.
  Status Map(const std::vector<int>& devices, const AddressRange& range);

  char* data() const { return reinterpret_cast<char*>(address_); }
  size_t bytes() const { return bytes_; }

 private:
  SharedAllocation(CUmemGenericAllocationHandle handle, size_t bytes)
      : handle_(handle), bytes_(bytes) {}

  CUmemGenericAllocationHandle handle_;
  size_t bytes_;             // rounded up to the granularity
  CUdeviceptr address_ = 0;  // 0 until mapped
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_SHARED_ALLOCATION_H_
