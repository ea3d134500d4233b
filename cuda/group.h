// Group: the ranks of one NVLink domain that exchange messages, seen from one
// process, which has one or more of them.
//
// Opened in three steps, with a rendezvous of the processes after each of the
// first two: AddLocal for each own rank; Import of the others' heaps; Open.

#ifndef JAXFABRIC_CUDA_GROUP_H_
#define JAXFABRIC_CUDA_GROUP_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/status.h"
#include "group_memory.h"
#include "group_state.h"
#include "shared_allocation.h"

namespace jaxfabric::cuda {

class Group {
 public:
  // Equal on all ranks, which count through the mesh in row-major order.
  // `mailbox_bytes` bounds what one rank sends another in one call. `key` is
  // that of its Fabric: see GroupMemory.
  static StatusOr<std::unique_ptr<Group>> Create(
      int64_t key, const std::vector<int64_t>& mesh_shape,
      uint64_t window_bytes, uint64_t mailbox_bytes);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  Status AddLocal(int rank, int device);
  // The heap of a local rank, for Import in another process.
  StatusOr<int> Export(int rank) const;
  Status Import(int rank, int fd);
  // Maps all heaps and loads the kernels.
  Status Open();

  // A region of every rank's heap, the next one; returns its index. All ranks
  // allocate the same in the same order.
  StatusOr<int> AllocateWindow(uint64_t bytes);
  struct Window {
    uint64_t begin;  // in the heap
    uint64_t bytes;

    bool operator==(const Window& other) const {
      return begin == other.begin && bytes == other.bytes;
    }
  };
  StatusOr<Window> FindWindow(int64_t index) const;

  int ranks() const { return ranks_; }
  // The rank on `device`, or -1.
  int RankOn(int device) const;
  // What a kernel of a local rank is told, for a call over these axes of the
  // mesh.
  StatusOr<Peers> PeersOf(int rank, const std::vector<int64_t>& axes,
                          double timeout_s, Phase phase) const;
  char* Workspace(int rank) const;
  static constexpr size_t kWorkspaceBytes = GroupMemory::kWorkspaceBytes;
  // One word for each page of a window: see PutPagesArguments.
  uint32_t* PageStamps(int rank) const;
  static constexpr int kPagesMax = GroupMemory::kPagesMax;
  // Most blocks that a kernel takes; leaves SMs for the model.
  int BlocksMax(int rank) const;

  // The first failure of a local rank's kernels, or OK. Never blocks.
  Status Failure() const;
  // Waits for the kernels under way; the failure that nobody has asked for yet.
  Status Finish();

  // Calls that were launched or captured; a replayed one is not counted.
  void CountCall() { calls_.fetch_add(1, std::memory_order_relaxed); }
  int64_t calls() const { return calls_.load(std::memory_order_relaxed); }
  // Before a call of this group is captured.
  void NoteCapture() { memory_->NoteCapture(); }
  int64_t memory_id() const { return memory_->id(); }

 private:
  struct Local {
    int blocks_max = 0;
    GroupMemory::Local memory;
  };

  Group(const std::vector<int64_t>& mesh_shape, int ranks,
        uint64_t window_bytes, uint64_t mailbox_bytes);
  // Which of the sets that have flags and messages of their own.
  int AxisSetOf(const std::vector<int64_t>& axes) const;

  const std::vector<int64_t> mesh_shape_;
  const int ranks_;
  const uint64_t window_bytes_;
  const uint64_t mailbox_bytes_;
  std::vector<uint64_t> message_begin_;  // of each set of axes
  uint64_t heap_bytes_ = 0;
  std::unique_ptr<GroupMemory> memory_;
  std::vector<std::unique_ptr<SharedAllocation>> heaps_;
  std::map<int, Local> local_;
  mutable std::mutex mutex_;
  std::vector<Window> windows_;  // guarded by mutex_
  uint64_t windows_used_ = 0;    // guarded by mutex_
  mutable std::atomic<bool> failure_known_{false};
  std::atomic<int64_t> calls_{0};
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_GROUP_H_
