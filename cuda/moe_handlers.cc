// The XLA FFI handlers of dispatch and combine.

#include <algorithm>
#include <cstdint>
#include <string>

#include "moe_kernels.h"
#include "moe_shape.h"
#include "program_call.h"

namespace jaxfabric::cuda {

struct MoeAttributes : CallAttributes {
  int64_t num_experts;
  int64_t capacity;  // -1: dropless
  int64_t expert_alignment;
  bool expand;
  bool zero_tail;
};

namespace {

StatusOr<RowType> RowTypeOf(const Buffer& rows) {
  switch (rows.element_type()) {
    case ffi::F32:
      return RowType::kF32;
    case ffi::BF16:
      return RowType::kBf16;
    case ffi::F16:
      return RowType::kF16;
    default:
      return Status(StatusCode::kUnimplemented,
                    "on GPUs rows are float32, bfloat16 or float16; cast them");
  }
}

// `rows` is any buffer of rows of this call, `ids` is int32[T, K].
StatusOr<MoeShape> ShapeOf(const MoeAttributes& attributes, int ranks,
                           const Buffer& rows, const Buffer& ids,
                           bool with_scalars) {
  MoeShape shape = {};
  JF_ASSIGN_OR_RETURN(shape.type, RowTypeOf(rows));
  shape.ranks = ranks;
  shape.tokens = static_cast<int32_t>(ids.dimensions()[0]);
  shape.k = static_cast<int32_t>(ids.dimensions()[1]);
  shape.experts = static_cast<int32_t>(attributes.num_experts / ranks);
  shape.slots = std::min(shape.k, shape.experts);
  shape.alignment = static_cast<int32_t>(attributes.expert_alignment);
  shape.row_bytes = rows.dimensions()[1] *
                    static_cast<int64_t>(ffi::ByteWidth(rows.element_type()));
  const int64_t all = int64_t{ranks} * shape.tokens * shape.slots;
  const bool limited = attributes.capacity >= 0 && attributes.capacity < all;
  const int64_t kept = limited ? attributes.capacity : all;
  const int64_t pad = int64_t{shape.experts} * (shape.alignment - 1);
  shape.rows = (kept + pad) / shape.alignment * shape.alignment;
  shape.kept_max = limited ? kept : INT32_MAX;
  shape.expand = attributes.expand;
  shape.zero_tail = attributes.zero_tail;
  if (shape.k > kExpertsPerTokenMax || shape.experts > kExpertsPerRankMax ||
      shape.rows > INT32_MAX / 2) {
    return Status(
        StatusCode::kUnimplemented,
        "on GPUs a token has at most " + std::to_string(kExpertsPerTokenMax) +
            " experts, and a rank " + std::to_string(kExpertsPerRankMax));
  }
  Complete(shape, with_scalars);
  return shape;
}

Status CheckMessage(const MoeShape& shape, const Peers& peers) {
  const auto bytes = static_cast<uint64_t>(MessageBytes(shape));
  if (bytes <= peers.mailbox_bytes) return OkStatus();
  return Status(
      StatusCode::kResourceExhausted,
      "a message of " + std::to_string(bytes) +
          " bytes does not fit a mailbox of " +
          std::to_string(peers.mailbox_bytes) +
          "; open the Fabric with mailbox_bytes=" + std::to_string(bytes));
}

ffi::Error Dispatch(cudaStream_t stream, int32_t device,
                    MoeAttributes attributes, Position position, Buffer x,
                    Buffer ids, Buffer weights, Buffer token, Result tokens,
                    Result group_sizes, Result row_weights, Result row_index,
                    Result recv_count, Result slot_row, Result sent,
                    Result dropped, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target target,
        FindTarget(device, attributes, position, token, token_out));
    JF_ASSIGN_OR_RETURN(const MoeShape shape,
                        ShapeOf(attributes, target.peers.ranks, x, ids, false));
    JF_RETURN_IF_ERROR(CheckMessage(shape, target.peers));
    const int rank = target.peers.rank;
    const Grid grid = DispatchGrid(shape, target.group->BlocksMax(rank));
    if (PlanBytes(shape, grid) > Group::kWorkspaceBytes) {
      return Status(StatusCode::kResourceExhausted,
                    "the plan of a dispatch of " +
                        std::to_string(shape.tokens) +
                        " tokens does not fit its workspace; dispatch fewer "
                        "tokens at a time");
    }
    const DispatchBuffers buffers = {
        DataOf<char>(x),
        DataOf<int32_t>(ids),
        DataOf<float>(weights),
        DataOf<char>(tokens),
        DataOf<int32_t>(group_sizes),
        DataOf<float>(row_weights),
        shape.expand ? nullptr : DataOf<int32_t>(row_index),
        DataOf<int32_t>(recv_count),
        DataOf<int32_t>(slot_row),
        DataOf<int32_t>(sent),
        DataOf<int32_t>(dropped)};
    return ToStatus(LaunchDispatch(target.peers, shape, grid, buffers,
                                   target.group->Workspace(rank), stream),
                    "launch");
  };
  return ToError(run(), attributes.label);
}

ffi::Error Combine(cudaStream_t stream, int32_t device,
                   MoeAttributes attributes, Position position, Buffer rows,
                   Buffer row_weights, Buffer scalars, Buffer ids,
                   Buffer recv_count, Buffer slot_row, Buffer token, Result y,
                   Result slot_scalars, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target target,
        FindTarget(device, attributes, position, token, token_out));
    const bool with_scalars = scalars.element_count() != 0;
    JF_ASSIGN_OR_RETURN(
        const MoeShape shape,
        ShapeOf(attributes, target.peers.ranks, rows, ids, with_scalars));
    JF_RETURN_IF_ERROR(CheckMessage(shape, target.peers));
    const int rank = target.peers.rank;
    const CombineBuffers buffers = {
        DataOf<char>(rows),
        DataOrNull<float>(row_weights),
        DataOrNull<float>(scalars),
        DataOf<int32_t>(ids),
        DataOf<int32_t>(recv_count),
        DataOf<int32_t>(slot_row),
        DataOf<char>(y),
        with_scalars ? DataOf<float>(slot_scalars) : nullptr};
    return ToStatus(
        LaunchCombine(target.peers, shape,
                      CombineGrid(shape, target.group->BlocksMax(rank)),
                      buffers, stream),
        "launch");
  };
  return ToError(run(), attributes.label);
}

}  // namespace
}  // namespace jaxfabric::cuda

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::cuda::MoeAttributes, JF_CUDA_CALL_ATTRIBUTES,
    ::xla::ffi::StructMember<int64_t>("num_experts"),
    ::xla::ffi::StructMember<int64_t>("capacity"),
    ::xla::ffi::StructMember<int64_t>("expert_alignment"),
    ::xla::ffi::StructMember<bool>("expand"),
    ::xla::ffi::StructMember<bool>("zero_tail"));

namespace jaxfabric::cuda {

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaRoute, Dispatch,
                              BindCall<MoeAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaReduce, Combine,
                              BindCall<MoeAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
#pragma GCC visibility pop

}  // namespace jaxfabric::cuda
