// GroupMemory: what captured calls hold the addresses of, which outlives a
// Group.
//
// XLA replays a captured call with the arguments that it had, also after its
// Fabric was closed and opened again, when a program must run under the new
// one. So the successor of a Group that calls were captured under has its
// memory at the same addresses, unless it has other sizes: then the program is
// refused (CallState). Between the two only addresses of heaps are kept, no
// memory behind them; of the rest, which is small, both.

#ifndef JAXFABRIC_CUDA_GROUP_MEMORY_H_
#define JAXFABRIC_CUDA_GROUP_MEMORY_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "base/status.h"
#include "group_state.h"
#include "shared_allocation.h"

namespace jaxfabric::cuda {

// What addresses within a group's memory follow from.
struct GroupLayout {
  std::vector<int64_t> mesh_shape;
  uint64_t window_bytes;
  uint64_t mailbox_bytes;

  bool operator==(const GroupLayout& other) const {
    return mesh_shape == other.mesh_shape &&
           window_bytes == other.window_bytes &&
           mailbox_bytes == other.mailbox_bytes;
  }
};

class GroupMemory {
 public:
  // Of one rank, on its device.
  struct Local {
    int device = -1;
    RankState* state = nullptr;
    char* workspace = nullptr;
    uint32_t* stamps = nullptr;
    ErrorWord* error = nullptr;  // pinned, mapped
  };
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;
  static constexpr int kPagesMax = 1 << 20;

  // What the last Group of this key left behind, if its layout was the same;
  // nothing yet otherwise, and that of before is freed.
  static std::unique_ptr<GroupMemory> Take(int64_t key,
                                           const GroupLayout& layout);
  // For the next Take of its key, if calls were captured; freed otherwise. No
  // kernel uses it, and no heap is mapped.
  static void Leave(std::unique_ptr<GroupMemory> memory);
  ~GroupMemory();
  GroupMemory(const GroupMemory&) = delete;
  GroupMemory& operator=(const GroupMemory&) = delete;

  // All of it zero.
  StatusOr<Local> ForRank(int rank, int device);
  // Where the heap of a rank, of `bytes`, is mapped.
  StatusOr<const AddressRange*> ForHeap(int rank, size_t bytes);
  // Positive, and never that of another in this process.
  int64_t id() const { return id_; }
  void NoteCapture() { captured_.store(true, std::memory_order_relaxed); }

 private:
  GroupMemory(int64_t key, const GroupLayout& layout);
  bool captured() const { return captured_.load(std::memory_order_relaxed); }

  const int64_t id_;
  const int64_t key_;
  const GroupLayout layout_;
  std::map<int, Local> local_;
  std::map<int, std::unique_ptr<AddressRange>> heaps_;
  std::atomic<bool> captured_{false};
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_GROUP_MEMORY_H_
