// DriverApi: the functions of libcuda that we use, found at run time, so that
// this library loads on a machine without a driver.

#ifndef JAXFABRIC_CUDA_DRIVER_API_H_
#define JAXFABRIC_CUDA_DRIVER_API_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "base/status.h"

namespace jaxfabric::cuda {

struct DriverApi {
  decltype(&::cuMemCreate) mem_create = nullptr;
  decltype(&::cuMemRelease) mem_release = nullptr;
  decltype(&::cuMemAddressReserve) address_reserve = nullptr;
  decltype(&::cuMemAddressFree) address_free = nullptr;
  decltype(&::cuMemMap) mem_map = nullptr;
  decltype(&::cuMemUnmap) mem_unmap = nullptr;
  decltype(&::cuMemSetAccess) set_access = nullptr;
  decltype(&::cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&::cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&::cuMemImportFromShareableHandle) import_handle = nullptr;
  decltype(&::cuGetErrorString) error_string = nullptr;

  // Unavailable where there is no driver, or one without these functions.
  static StatusOr<const DriverApi*> Get();

  // A Status that names the call.
  Status ToStatus(CUresult result, const std::string& call) const;
};

Status ToStatus(cudaError_t error, const std::string& call);

// Makes a device current for as long as it lives.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device);
  ~ScopedDevice();
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;

 private:
  int before_ = -1;
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_DRIVER_API_H_
