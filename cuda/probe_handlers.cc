// The XLA FFI handler of the bare kernels: (x, token) -> token.

#include <cstdint>

#include "probe_kernels.h"
#include "program_call.h"

namespace jaxfabric::cuda {

struct ProbeAttributes {
  int64_t fabric;
  int64_t window;
  int64_t probe;
  ffi::Span<const int64_t> axes;
};

namespace {

ffi::Error RunProbe(cudaStream_t stream, int32_t device,
                    ProbeAttributes attributes, Buffer x, Buffer /*token*/,
                    Result /*token_out*/) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(const Published published,
                        GroupRegistry::Get().Find(attributes.fabric));
    const int rank = published.group->RankOn(device);
    if (rank < 0) {
      return Status(StatusCode::kFailedPrecondition,
                    "this device is not in the mesh of the Fabric");
    }
    JF_ASSIGN_OR_RETURN(const Group::Window window,
                        published.group->FindWindow(attributes.window));
    const auto bytes = static_cast<int64_t>(x.size_bytes()) / 16 * 16;
    if (kProbeData + bytes > static_cast<int64_t>(window.bytes)) {
      return Status(StatusCode::kOutOfRange, "x does not fit the window");
    }
    const ProbeArguments probe = {
        static_cast<Probe>(attributes.probe),
        {window.begin, window.bytes,
         static_cast<int32_t>(attributes.window + 1) * kIdsMax - 1},
        DataOf<char>(x),
        bytes};
    JF_ASSIGN_OR_RETURN(
        const Peers peers,
        published.group->PeersOf(
            rank, {attributes.axes.begin(), attributes.axes.end()},
            published.timeout_s, Phase::kWhole));
    return ToStatus(
        LaunchProbe(peers, probe, published.group->BlocksMax(rank), stream),
        "launch");
  };
  return ToError(run(), "probe");
}

}  // namespace
}  // namespace jaxfabric::cuda

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::cuda::ProbeAttributes,
    ::xla::ffi::StructMember<int64_t>("fabric"),
    ::xla::ffi::StructMember<int64_t>("window"),
    ::xla::ffi::StructMember<int64_t>("probe"),
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("axes"));

namespace jaxfabric::cuda {

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaProbe, RunProbe,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<ProbeAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
#pragma GCC visibility pop

}  // namespace jaxfabric::cuda
