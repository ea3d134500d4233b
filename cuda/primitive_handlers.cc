// The XLA FFI handlers of the primitives, and what runs before every call.

#include "primitive_kernels.h"
#include "program_call.h"

namespace jaxfabric::cuda {
namespace {

ffi::Error Barrier(cudaStream_t stream, int32_t device,
                   CallAttributes attributes, Position position, Buffer token,
                   Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target target,
        FindTarget(device, attributes, position, token, token_out));
    return ToStatus(LaunchBarrier(target.peers, stream), "launch");
  };
  return ToError(run(), attributes.label);
}

// XLA runs it for each execution, also where the call itself is replayed from a
// command buffer: so a failure on the device is an error of the next execution.
ffi::Error BeforeCall(ffi::Dictionary attributes) {
  const auto key = attributes.get<int64_t>("fabric");
  const auto label = attributes.get<std::string_view>("label");
  if (!key || !label) return ffi::Error::Success();
  const auto published = GroupRegistry::Get().Find(*key);
  if (!published.ok()) return ToError(published.status(), *label);
  return ToError((*published).group->Failure(), *label);
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricCudaBarrier, Barrier,
    BindCall<CallAttributes>().Arg<Buffer>().Ret<Buffer>(),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaBeforeCall, BeforeCall,
                              ffi::Ffi::BindInitialize().Attrs());
#pragma GCC visibility pop

}  // namespace jaxfabric::cuda
