#include "driver_api.h"

namespace jaxfabric::cuda {

namespace {

// The first CUDA whose driver has all of these functions.
constexpr unsigned kDriverVersion = 12000;

template <typename Function>
Status Find(const char* name, Function* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      name, &found, kDriverVersion, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();  // it is reported here, not by the next call
    return Status(StatusCode::kUnavailable,
                  std::string("the CUDA driver has no ") + name + " (" +
                      (error == cudaSuccess ? "it is older than CUDA 12"
                                            : cudaGetErrorString(error)) +
                      "); install NVIDIA driver 525 or newer");
  }
  *function = reinterpret_cast<Function>(found);
  return OkStatus();
}

Status FindAll(DriverApi& api) {
  JF_RETURN_IF_ERROR(Find("cuMemCreate", &api.mem_create));
  JF_RETURN_IF_ERROR(Find("cuMemRelease", &api.mem_release));
  JF_RETURN_IF_ERROR(Find("cuMemAddressReserve", &api.address_reserve));
  JF_RETURN_IF_ERROR(Find("cuMemAddressFree", &api.address_free));
  JF_RETURN_IF_ERROR(Find("cuMemMap", &api.mem_map));
  JF_RETURN_IF_ERROR(Find("cuMemUnmap", &api.mem_unmap));
  JF_RETURN_IF_ERROR(Find("cuMemSetAccess", &api.set_access));
  JF_RETURN_IF_ERROR(Find("cuMemGetAllocationGranularity", &api.granularity));
  JF_RETURN_IF_ERROR(Find("cuMemExportToShareableHandle", &api.export_handle));
  JF_RETURN_IF_ERROR(
      Find("cuMemImportFromShareableHandle", &api.import_handle));
  return Find("cuGetErrorString", &api.error_string);
}

}  // namespace

StatusOr<const DriverApi*> DriverApi::Get() {
  static DriverApi api;
  static const Status found = FindAll(api);
  if (!found.ok()) return found;
  return static_cast<const DriverApi*>(&api);
}

Status DriverApi::ToStatus(CUresult result, const std::string& call) const {
  if (result == CUDA_SUCCESS) return OkStatus();
  const char* text = nullptr;
  error_string(result, &text);
  const auto code = result == CUDA_ERROR_OUT_OF_MEMORY
                        ? StatusCode::kResourceExhausted
                        : StatusCode::kInternal;
  return Status(code, call + ": " + (text == nullptr ? "unknown" : text) +
                          " (CUDA driver error " + std::to_string(result) +
                          ")");
}

Status ToStatus(cudaError_t error, const std::string& call) {
  if (error == cudaSuccess) return OkStatus();
  cudaGetLastError();  // it is reported here, not by the next call
  const auto code = error == cudaErrorMemoryAllocation
                        ? StatusCode::kResourceExhausted
                        : StatusCode::kInternal;
  return Status(code, call + ": " + cudaGetErrorString(error));
}

ScopedDevice::ScopedDevice(int device) {
  cudaGetDevice(&before_);
  if (before_ == device) {
    before_ = -1;
  } else {
    cudaSetDevice(device);
  }
}

ScopedDevice::~ScopedDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace jaxfabric::cuda
