// CallState: what a call of a compiled program was captured with.
//
// XLA makes one with the program and keeps it as long. A captured call is
// replayed with the arguments that it had, without asking its handler, also
// after its Fabric was closed and another one of the same mesh and name was
// opened. What runs before each execution compares the two.

#ifndef JAXFABRIC_CUDA_CALL_STATE_H_
#define JAXFABRIC_CUDA_CALL_STATE_H_

#include <cstdint>
#include <mutex>

#include "base/status.h"
#include "group.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfabric::cuda {

class CallState {
 public:
  static xla::ffi::TypeId id;
  static xla::ffi::TypeInfo info;

  // By the handler of a call that is being captured, for each device.
  void NoteMemory(int64_t memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    memory_ = memory;
  }
  void NoteWindow(int64_t index, const Group::Window& window) {
    const std::lock_guard<std::mutex> lock(mutex_);
    window_index_ = index;
    window_ = window;
  }
  // An error if the graph has addresses that are not those of `group`.
  Status Check(const Group& group) const;

 private:
  mutable std::mutex mutex_;
  int64_t memory_ = 0;         // GroupMemory::id(); 0: never captured
  int64_t window_index_ = -1;  // -1: none
  Group::Window window_ = {};
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_CALL_STATE_H_
