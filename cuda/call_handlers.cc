// What XLA runs beside the call itself: once with the program, and before each
// execution.

#include <memory>
#include <string>
#include <string_view>

#include "call_state.h"
#include "program_call.h"

namespace jaxfabric::cuda {

ffi::TypeId CallState::id = {};
ffi::TypeInfo CallState::info = ffi::MakeTypeInfo<CallState>();

Status CallState::Check(const Group& group) const {
  const auto stale = [](const std::string& what) {
    return Status(StatusCode::kFailedPrecondition,
                  what +
                      " under an earlier Fabric of this mesh and name, whose "
                      "addresses are in the CUDA graph that XLA replays this "
                      "call from; compile the program anew (jax.clear_caches() "
                      "forgets it), or give the two Fabrics names of their own "
                      "(name=)");
  };
  const std::lock_guard<std::mutex> lock(mutex_);
  if (memory_ == 0) return OkStatus();
  if (memory_ != group.memory_id()) {
    return stale("window_bytes or mailbox_bytes was another");
  }
  if (window_index_ < 0) return OkStatus();
  const auto now = group.FindWindow(window_index_);
  if (now.ok() && *now == window_) return OkStatus();
  return stale("window " + std::to_string(window_index_) +
               " had another size or place");
}

namespace {

ffi::ErrorOr<std::unique_ptr<CallState>> NewCall(ffi::Dictionary /*all*/) {
  return std::make_unique<CallState>();
}

// XLA runs it for each execution, also where the call itself is replayed from a
// command buffer: so a failure on the device is an error of the next execution.
ffi::Error BeforeCall(CallState* state, ffi::Dictionary attributes) {
  const auto key = attributes.get<int64_t>("fabric");
  const auto label = attributes.get<std::string_view>("label");
  if (!key || !label) return ffi::Error::Success();
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(const Published published,
                        GroupRegistry::Get().Find(*key));
    JF_RETURN_IF_ERROR(state->Check(*published.group));
    return published.group->Failure();
  };
  return ToError(run(), *label);
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaNewCall, NewCall,
                              ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricCudaBeforeCall, BeforeCall,
    ffi::Ffi::BindInitialize().Ctx<ffi::State<CallState>>().Attrs());
extern "C" ffi::TypeId* JaxfabricCudaCallTypeId() { return &CallState::id; }
extern "C" ffi::TypeInfo* JaxfabricCudaCallTypeInfo() {
  return &CallState::info;
}
#pragma GCC visibility pop

}  // namespace jaxfabric::cuda
