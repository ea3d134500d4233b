#include "shared_allocation.h"

#include <string>

#include "driver_api.h"

namespace jaxfabric::cuda {

namespace {

constexpr auto kHandleType = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

CUmemAllocationProp PropertiesOn(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  properties.requestedHandleTypes = kHandleType;
  return properties;
}

StatusOr<size_t> Rounded(const DriverApi& driver, int device, size_t bytes) {
  const CUmemAllocationProp properties = PropertiesOn(device);
  size_t granularity = 0;
  JF_RETURN_IF_ERROR(
      driver.ToStatus(driver.granularity(&granularity, &properties,
                                         CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                      "cuMemGetAllocationGranularity"));
  return (bytes + granularity - 1) / granularity * granularity;
}

}  // namespace

StatusOr<std::unique_ptr<AddressRange>> AddressRange::Reserve(size_t bytes) {
  JF_ASSIGN_OR_RETURN(const DriverApi* driver, DriverApi::Get());
  CUdeviceptr address = 0;
  JF_RETURN_IF_ERROR(
      driver->ToStatus(driver->address_reserve(&address, bytes, 0, 0, 0),
                       "cuMemAddressReserve"));
  return std::unique_ptr<AddressRange>(new AddressRange(address, bytes));
}

AddressRange::~AddressRange() {
  auto driver = DriverApi::Get();
  if (driver.ok()) (*driver)->address_free(address_, bytes_);
}

StatusOr<std::unique_ptr<SharedAllocation>> SharedAllocation::Create(
    int device, size_t bytes) {
  JF_ASSIGN_OR_RETURN(const DriverApi* driver, DriverApi::Get());
  const ScopedDevice current(device);
  // Opens the device's primary context if nobody has.
  JF_RETURN_IF_ERROR(ToStatus(cudaFree(nullptr), "opening the device"));
  JF_ASSIGN_OR_RETURN(const size_t rounded, Rounded(*driver, device, bytes));
  const CUmemAllocationProp properties = PropertiesOn(device);
  CUmemGenericAllocationHandle handle = 0;
  JF_RETURN_IF_ERROR(driver->ToStatus(
      driver->mem_create(&handle, rounded, &properties, 0),
      "the heap of a Fabric, " + std::to_string(rounded >> 20) +
          " MiB on device " + std::to_string(device) +
          " (window_bytes, and four times mailbox_bytes for each peer; lower "
          "them, or leave it memory: XLA_PYTHON_CLIENT_MEM_FRACTION): "
          "cuMemCreate"));
  return std::unique_ptr<SharedAllocation>(
      new SharedAllocation(handle, rounded));
}

StatusOr<std::unique_ptr<SharedAllocation>> SharedAllocation::Import(
    int fd, size_t bytes, int device) {
  JF_ASSIGN_OR_RETURN(const DriverApi* driver, DriverApi::Get());
  const ScopedDevice current(device);
  JF_RETURN_IF_ERROR(ToStatus(cudaFree(nullptr), "opening the device"));
  JF_ASSIGN_OR_RETURN(const size_t rounded, Rounded(*driver, device, bytes));
  CUmemGenericAllocationHandle handle = 0;
  void* const os_handle = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  JF_RETURN_IF_ERROR(
      driver->ToStatus(driver->import_handle(&handle, os_handle, kHandleType),
                       "cuMemImportFromShareableHandle"));
  return std::unique_ptr<SharedAllocation>(
      new SharedAllocation(handle, rounded));
}

SharedAllocation::~SharedAllocation() {
  auto driver = DriverApi::Get();
  if (!driver.ok()) return;
  if (address_ != 0) (*driver)->mem_unmap(address_, bytes_);
  (*driver)->mem_release(handle_);
}

StatusOr<int> SharedAllocation::Export() const {
  JF_ASSIGN_OR_RETURN(const DriverApi* driver, DriverApi::Get());
  int fd = -1;
  JF_RETURN_IF_ERROR(
      driver->ToStatus(driver->export_handle(&fd, handle_, kHandleType, 0),
                       "cuMemExportToShareableHandle"));
  return fd;
}

Status SharedAllocation::Map(const std::vector<int>& devices,
                             const AddressRange& range) {
  JF_ASSIGN_OR_RETURN(const DriverApi* driver, DriverApi::Get());
  JF_RETURN_IF_ERROR(driver->ToStatus(
      driver->mem_map(range.address(), bytes_, 0, handle_, 0), "cuMemMap"));
  address_ = range.address();
  std::vector<CUmemAccessDesc> access;
  for (const int device : devices) {
    CUmemAccessDesc one = {};
    one.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    one.location.id = device;
    one.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    access.push_back(one);
  }
  return driver
      ->ToStatus(
          driver->set_access(address_, bytes_, access.data(), access.size()),
          "cuMemSetAccess")
      .Annotate(
          "mapping a peer's memory, which needs NVLink or PCIe peer "
          "access between the devices");
}

}  // namespace jaxfabric::cuda
