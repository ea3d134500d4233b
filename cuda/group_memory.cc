#include "group_memory.h"

#include <cuda_runtime.h>

#include <mutex>
#include <string>
#include <utility>

#include "driver_api.h"

namespace jaxfabric::cuda {

namespace {

// Never destroyed: XLA may keep programs until the process ends.
struct Left {
  std::mutex mutex;
  std::map<int64_t, std::unique_ptr<GroupMemory>> by_key;  // guarded by mutex
};

Left& TheLeft() {
  static Left* const left = new Left;
  return *left;
}

int64_t NextId() {
  static std::atomic<int64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

Status Zeroed(void* data, size_t bytes) {
  return ToStatus(cudaMemset(data, 0, bytes), "cudaMemset");
}

}  // namespace

GroupMemory::GroupMemory(int64_t key, const GroupLayout& layout)
    : id_(NextId()), key_(key), layout_(layout) {}

std::unique_ptr<GroupMemory> GroupMemory::Take(int64_t key,
                                               const GroupLayout& layout) {
  Left& left = TheLeft();
  const std::lock_guard<std::mutex> lock(left.mutex);
  std::unique_ptr<GroupMemory> memory;
  const auto found = left.by_key.find(key);
  if (found != left.by_key.end()) {
    memory = std::move(found->second);
    left.by_key.erase(found);
  }
  if (memory != nullptr && memory->layout_ == layout) return memory;
  return std::unique_ptr<GroupMemory>(new GroupMemory(key, layout));
}

void GroupMemory::Leave(std::unique_ptr<GroupMemory> memory) {
  if (!memory->captured()) return;
  Left& left = TheLeft();
  const std::lock_guard<std::mutex> lock(left.mutex);
  left.by_key[memory->key_] = std::move(memory);
}

GroupMemory::~GroupMemory() {
  for (const auto& [rank, local] : local_) {
    const ScopedDevice current(local.device);
    cudaFree(local.state);
    cudaFree(local.workspace);
    cudaFree(local.stamps);
    cudaFreeHost(local.error);
  }
}

StatusOr<GroupMemory::Local> GroupMemory::ForRank(int rank, int device) {
  constexpr size_t kStampBytes = kPagesMax * sizeof(uint32_t);
  Local& local = local_[rank];
  if (local.device != -1 && local.device != device) {
    return Status(StatusCode::kFailedPrecondition,
                  "rank " + std::to_string(rank) + " was on device " +
                      std::to_string(local.device) +
                      " under the last Fabric of this mesh and name; open it "
                      "under another name=");
  }
  local.device = device;
  const ScopedDevice current(device);
  if (local.state == nullptr) {
    JF_RETURN_IF_ERROR(
        ToStatus(cudaMalloc(&local.state, sizeof(RankState)), "cudaMalloc"));
  }
  if (local.workspace == nullptr) {
    JF_RETURN_IF_ERROR(
        ToStatus(cudaMalloc(&local.workspace, kWorkspaceBytes), "cudaMalloc"));
  }
  if (local.stamps == nullptr) {
    JF_RETURN_IF_ERROR(
        ToStatus(cudaMalloc(&local.stamps, kStampBytes), "cudaMalloc"));
  }
  if (local.error == nullptr) {
    JF_RETURN_IF_ERROR(
        ToStatus(cudaHostAlloc(&local.error, sizeof(ErrorWord),
                               cudaHostAllocMapped | cudaHostAllocPortable),
                 "cudaHostAlloc"));
  }
  *local.error = ErrorWord{};
  JF_RETURN_IF_ERROR(Zeroed(local.state, sizeof(RankState)));
  JF_RETURN_IF_ERROR(Zeroed(local.stamps, kStampBytes));
  return local;
}

StatusOr<const AddressRange*> GroupMemory::ForHeap(int rank, size_t bytes) {
  std::unique_ptr<AddressRange>& range = heaps_[rank];
  if (range == nullptr) {
    JF_ASSIGN_OR_RETURN(range, AddressRange::Reserve(bytes));
  }
  if (range->bytes() != bytes) {
    return Status(StatusCode::kInternal,
                  "the heap of rank " + std::to_string(rank) + " has " +
                      std::to_string(bytes) + " bytes, and had " +
                      std::to_string(range->bytes()));
  }
  return range.get();
}

}  // namespace jaxfabric::cuda
