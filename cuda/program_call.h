// From XLA's frame of a call to what a kernel is told.

#ifndef JAXFABRIC_CUDA_PROGRAM_CALL_H_
#define JAXFABRIC_CUDA_PROGRAM_CALL_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"
#include "call_state.h"
#include "driver_api.h"
#include "group.h"
#include "group_registry.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfabric::cuda {

namespace ffi = xla::ffi;

// The attributes that each call carries; as on the host (handlers/call.h).
struct CallAttributes {
  int64_t fabric;
  int64_t channel;  // a stream's order is the match; this only checks it
  std::string_view label;
  double timeout_s;  // <= 0: the Fabric's
  ffi::Span<const int64_t> axes;
};

#define JF_CUDA_CALL_ATTRIBUTES                            \
  ::xla::ffi::StructMember<int64_t>("fabric"),             \
      ::xla::ffi::StructMember<int64_t>("channel"),        \
      ::xla::ffi::StructMember<std::string_view>("label"), \
      ::xla::ffi::StructMember<double>("timeout_s"),       \
      ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("axes")

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using Position = ffi::Buffer<ffi::S32>;

template <typename T>
T* DataOf(const Buffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

template <typename T>
T* DataOf(Result& result) {
  return static_cast<T*>(result->untyped_data());
}

// Null for the empty arrays that stand for absent operands.
template <typename T>
T* DataOrNull(const Buffer& buffer) {
  return buffer.element_count() == 0 ? nullptr : DataOf<T>(buffer);
}

inline ffi::Error ToError(const Status& status, std::string_view label) {
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error(
      static_cast<ffi::ErrorCode>(status.code()),
      "jaxfabric: " + std::string(label) + ": " + status.message());
}

// The array that the first half of a call gives to its second.
using Pending = ffi::BufferR1<ffi::U32>;

// Where a call runs, and what is kept of it with its program.
struct CallContext {
  cudaStream_t stream;
  int32_t device;
  CallState* state;
};

// What the launch of a kernel needs; the group is kept by the registry, and
// closing it waits for the device.
struct Target {
  std::shared_ptr<Group> group;
  int rank;  // in the mesh; peers.rank counts along the call's axes
  Peers peers;
  cudaStream_t stream;
  CallState* captured;  // into a graph; null if it is launched
};

inline StatusOr<Target> FindTarget(const CallContext& context,
                                   const CallAttributes& attributes,
                                   const Position& position,
                                   const Buffer& token, Result& token_out,
                                   Phase phase = Phase::kWhole) {
  JF_ASSIGN_OR_RETURN(const Published published,
                      GroupRegistry::Get().Find(attributes.fabric));
  JF_RETURN_IF_ERROR(published.group->Failure());
  const int rank = published.group->RankOn(context.device);
  if (rank < 0) {
    return Status(StatusCode::kFailedPrecondition,
                  "device " + std::to_string(context.device) +
                      " is not in the mesh of the Fabric");
  }
  const double timeout_s =
      attributes.timeout_s > 0 ? attributes.timeout_s : published.timeout_s;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  JF_RETURN_IF_ERROR(ToStatus(cudaStreamIsCapturing(context.stream, &capture),
                              "cudaStreamIsCapturing"));
  const bool captured = capture != cudaStreamCaptureStatusNone;
  if (captured) {
    published.group->NoteCapture();
    context.state->NoteMemory(published.group->memory_id());
  }
  published.group->CountCall();
  JF_ASSIGN_OR_RETURN(
      const Peers peers,
      published.group->PeersOf(rank,
                               {attributes.axes.begin(), attributes.axes.end()},
                               timeout_s, phase));
  Target target = {published.group, rank, peers, context.stream,
                   captured ? context.state : nullptr};
  // Enough of the hash.
  const auto channel = static_cast<uint64_t>(attributes.channel);
  target.peers.tag = static_cast<uint32_t>((channel ^ channel >> 32) &
                                           ((1u << (64 - kEpochBits)) - 1));
  target.peers.call = {position.typed_data(), DataOf<float>(token),
                       DataOf<float>(token_out)};
  return target;
}

// Whether the largest message of a call fits.
inline Status CheckMessageBytes(uint64_t bytes, const Peers& peers) {
  if (bytes <= peers.mailbox_bytes) return OkStatus();
  return Status(
      StatusCode::kResourceExhausted,
      "a message of " + std::to_string(bytes) +
          " bytes does not fit a mailbox of " +
          std::to_string(peers.mailbox_bytes) +
          "; open the Fabric with mailbox_bytes=" + std::to_string(bytes));
}

// Binds (context, attributes, position, ...).
template <typename Attributes>
auto BindCall() {
  return ffi::Ffi::Bind()
      .Ctx<CallContext>()
      .Attrs<Attributes>()
      .template Arg<Position>();
}

}  // namespace jaxfabric::cuda

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jaxfabric::cuda::CallAttributes,
                                      JF_CUDA_CALL_ATTRIBUTES);

template <>
struct xla::ffi::CtxDecoding<::jaxfabric::cuda::CallContext> {
  using Type = ::jaxfabric::cuda::CallContext;

  static std::optional<Type> Decode(const XLA_FFI_Api* api,
                                    XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto stream = CtxDecoding<PlatformStream<cudaStream_t>>::Decode(
        api, context, diagnostic);
    const auto device =
        CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    const auto state = CtxDecoding<State<::jaxfabric::cuda::CallState>>::Decode(
        api, context, diagnostic);
    if (!stream || !device || !state) return std::nullopt;
    return Type{*stream, *device, *state};
  }
};

#endif  // JAXFABRIC_CUDA_PROGRAM_CALL_H_
