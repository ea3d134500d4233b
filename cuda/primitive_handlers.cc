// The XLA FFI handlers of the primitives.

#include "primitive_kernels.h"
#include "program_call.h"

namespace jaxfabric::cuda {

struct PutAttributes : CallAttributes {
  int64_t window;
  int64_t id;
};

struct WaitAttributes : PutAttributes {
  int64_t count;
};

struct ExchangeAttributes : CallAttributes {
  // source, destination, source, destination, ... as positions on the axis
  ffi::Span<const int64_t> pairs;
};

}  // namespace jaxfabric::cuda

#define JF_CUDA_PUT_ATTRIBUTES                                          \
  JF_CUDA_CALL_ATTRIBUTES, ::xla::ffi::StructMember<int64_t>("window"), \
      ::xla::ffi::StructMember<int64_t>("id")

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jaxfabric::cuda::PutAttributes,
                                      JF_CUDA_PUT_ATTRIBUTES);
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::cuda::WaitAttributes, JF_CUDA_PUT_ATTRIBUTES,
    ::xla::ffi::StructMember<int64_t>("count"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::cuda::ExchangeAttributes, JF_CUDA_CALL_ATTRIBUTES,
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("pairs"));

namespace jaxfabric::cuda {
namespace {

// The kernels of puts and waits leave most of the device to the model: 16
// blocks come within a tenth of the link.
constexpr int kCopyBlocks = 32;
// Half of them send; packets take more instructions than copies.
constexpr int kExchangeBlocks = 64;

StatusOr<WindowPlace> PlaceOf(const Target& target,
                              const PutAttributes& attributes) {
  JF_ASSIGN_OR_RETURN(const Group::Window window,
                      target.group->FindWindow(attributes.window));
  if (target.captured != nullptr) {
    target.captured->NoteWindow(attributes.window, window);
  }
  if (attributes.id < 0 || attributes.id >= kIdsMax) {
    return Status(StatusCode::kInvalidArgument,
                  "id " + std::to_string(attributes.id) + " is out of range");
  }
  return WindowPlace{
      window.begin, window.bytes,
      static_cast<int32_t>(attributes.window * kIdsMax + attributes.id)};
}

// Puts of equal parts of `x`; `target` is null for one to each rank.
Status PutSlices(const Target& call, const PutAttributes& attributes,
                 const Buffer& x, int slices, const int32_t* target,
                 const int32_t* offset) {
  JF_ASSIGN_OR_RETURN(const WindowPlace window, PlaceOf(call, attributes));
  const PutArguments put = {
      DataOf<char>(x), static_cast<int64_t>(x.size_bytes()) / slices,
      slices,          target,
      offset,          static_cast<int64_t>(ffi::ByteWidth(x.element_type())),
      window};
  return ToStatus(LaunchPut(call.peers, put, kCopyBlocks, call.stream),
                  "launch");
}

ffi::Error Put(CallContext context, PutAttributes attributes, Position position,
               Buffer x, ffi::Buffer<ffi::S32> target,
               ffi::Buffer<ffi::S32> offset, Buffer token, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target call,
        FindTarget(context, attributes, position, token, token_out));
    return PutSlices(call, attributes, x, 1, target.typed_data(),
                     offset.typed_data());
  };
  return ToError(run(), attributes.label);
}

ffi::Error Scatter(CallContext context, PutAttributes attributes,
                   Position position, Buffer x, ffi::Buffer<ffi::S32> offsets,
                   Buffer token, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target call,
        FindTarget(context, attributes, position, token, token_out));
    return PutSlices(call, attributes, x, call.peers.ranks, nullptr,
                     offsets.typed_data());
  };
  return ToError(run(), attributes.label);
}

ffi::Error PutPages(CallContext context, PutAttributes attributes,
                    Position position, Buffer pages,
                    ffi::Buffer<ffi::S32> source, ffi::Buffer<ffi::S32> to,
                    ffi::Buffer<ffi::S32> target, Buffer token,
                    Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target call,
        FindTarget(context, attributes, position, token, token_out));
    JF_ASSIGN_OR_RETURN(const WindowPlace window, PlaceOf(call, attributes));
    const int64_t count = pages.dimensions()[0];
    const int64_t bytes =
        count == 0 ? 0 : static_cast<int64_t>(pages.size_bytes()) / count;
    const int64_t places =
        bytes == 0 ? 0 : static_cast<int64_t>(window.bytes) / bytes;
    if (places > Group::kPagesMax) {
      return Status(StatusCode::kUnimplemented,
                    "on GPUs a window has at most " +
                        std::to_string(Group::kPagesMax) +
                        " pages; make them larger");
    }
    const PutPagesArguments put = {DataOf<char>(pages),
                                   bytes,
                                   static_cast<int32_t>(count),
                                   static_cast<int32_t>(places),
                                   source.typed_data(),
                                   to.typed_data(),
                                   static_cast<int32_t>(source.element_count()),
                                   target.typed_data(),
                                   call.group->PageStamps(call.rank),
                                   window};
    return ToStatus(LaunchPutPages(call.peers, put, kCopyBlocks, call.stream),
                    "launch");
  };
  return ToError(run(), attributes.label);
}

ffi::Error Wait(CallContext context, WaitAttributes attributes,
                Position position, Buffer token, Result out, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target call,
        FindTarget(context, attributes, position, token, token_out));
    JF_ASSIGN_OR_RETURN(const WindowPlace window, PlaceOf(call, attributes));
    if (out->size_bytes() != window.bytes) {
      return Status(
          StatusCode::kFailedPrecondition,
          "the program reads a window of " + std::to_string(out->size_bytes()) +
              " bytes; this Fabric's has " + std::to_string(window.bytes));
    }
    const WaitArguments wait = {DataOf<char>(out), window,
                                static_cast<uint64_t>(attributes.count)};
    return ToStatus(LaunchWait(call.peers, wait, kCopyBlocks, call.stream),
                    "launch");
  };
  return ToError(run(), attributes.label);
}

// The bytes of a message and their bound; int32 counts what they come to.
Status CheckExchange(int64_t bytes, const Peers& peers) {
  const auto message = static_cast<uint64_t>(ExchangeMessageBytes(bytes));
  if (message > INT32_MAX) {
    return Status(StatusCode::kUnimplemented,
                  "on GPUs an array of " + std::to_string(bytes) +
                      " bytes is too large for one exchange; cut it");
  }
  return CheckMessageBytes(message, peers);
}

ffi::Error Exchange(CallContext context, ExchangeAttributes attributes,
                    Position position, Buffer x, Buffer token, Result y,
                    Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target call,
        FindTarget(context, attributes, position, token, token_out));
    const auto bytes = static_cast<int64_t>(x.size_bytes());
    JF_RETURN_IF_ERROR(CheckExchange(bytes, call.peers));
    ExchangeArguments exchange = {DataOf<char>(x), DataOf<char>(y), bytes, -1,
                                  -1};
    const auto pairs = attributes.pairs;
    for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
      const auto source = static_cast<int32_t>(pairs[i]);
      const auto target = static_cast<int32_t>(pairs[i + 1]);
      if (source == call.peers.rank) exchange.to = target;
      if (target == call.peers.rank) exchange.from = source;
    }
    return ToStatus(
        LaunchExchange(call.peers, exchange, kExchangeBlocks, call.stream),
        "launch");
  };
  return ToError(run(), attributes.label);
}

ffi::Error Barrier(CallContext context, CallAttributes attributes,
                   Position position, Buffer token, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target target,
        FindTarget(context, attributes, position, token, token_out));
    return ToStatus(LaunchBarrier(target.peers, target.stream), "launch");
  };
  return ToError(run(), attributes.label);
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricCudaBarrier, Barrier,
    BindCall<CallAttributes>().Arg<Buffer>().Ret<Buffer>(),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaPut, Put,
                              BindCall<PutAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaScatter, Scatter,
                              BindCall<PutAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaPutPages, PutPages,
                              BindCall<PutAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricCudaWait, Wait,
    BindCall<WaitAttributes>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>(),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaExchange, Exchange,
                              BindCall<ExchangeAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
#pragma GCC visibility pop

}  // namespace jaxfabric::cuda
