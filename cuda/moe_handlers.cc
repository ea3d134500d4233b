// The XLA FFI handlers of dispatch and combine, whole and in halves, and of
// replay.

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

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
  bool e4m3;  // rows travel scaled; dispatch only
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
                    "on GPUs rows that are summed or scaled are float32, "
                    "bfloat16 or float16; cast them");
  }
}

// `rows` is any buffer of rows of this call, `ids` is int32[T, K]. Rows that
// travel as e4m3 are those of x, and `keep` says that they are returned so.
StatusOr<MoeShape> ShapeOf(const MoeAttributes& attributes, int ranks,
                           const Buffer& rows, const Buffer& ids,
                           bool with_scalars, bool keep = false) {
  MoeShape shape = {};
  shape.ranks = ranks;
  shape.tokens = static_cast<int32_t>(ids.dimensions()[0]);
  shape.k = static_cast<int32_t>(ids.dimensions()[1]);
  shape.experts = static_cast<int32_t>(attributes.num_experts / ranks);
  shape.slots = std::min(shape.k, shape.experts);
  shape.alignment = static_cast<int32_t>(attributes.expert_alignment);
  shape.row_bytes = rows.dimensions()[1] *
                    static_cast<int64_t>(ffi::ByteWidth(rows.element_type()));
  if (attributes.e4m3) {
    JF_ASSIGN_OR_RETURN(shape.type, RowTypeOf(rows));
    shape.scaled = true;
    shape.keep = keep;
    shape.hidden = static_cast<int32_t>(rows.dimensions()[1]);
    if (keep) shape.row_bytes = shape.hidden;
  }
  const int64_t all = int64_t{ranks} * shape.tokens * shape.slots;
  const bool limited = attributes.capacity >= 0 && attributes.capacity < all;
  const int64_t kept = limited ? attributes.capacity : all;
  const int64_t pad = int64_t{shape.experts} * (shape.alignment - 1);
  shape.rows = (kept + pad) / shape.alignment * shape.alignment;
  shape.kept_max = limited ? kept : INT32_MAX;
  shape.expand = attributes.expand;
  shape.zero_tail = attributes.zero_tail;
  if (shape.rows > INT32_MAX / 2) {
    return Status(StatusCode::kUnimplemented,
                  "on GPUs a rank has at most " +
                      std::to_string(INT32_MAX / 2) + " rows, and might get " +
                      std::to_string(shape.rows) +
                      "; give a capacity, or fewer tokens");
  }
  if (shape.k > kExpertsPerTokenMax || shape.experts > kExpertsPerRankMax) {
    return Status(
        StatusCode::kUnimplemented,
        "on GPUs a token has at most " + std::to_string(kExpertsPerTokenMax) +
            " experts, and a rank " + std::to_string(kExpertsPerRankMax));
  }
  Complete(shape, with_scalars);
  return shape;
}

Status CheckMessage(const MoeShape& shape, const Peers& peers) {
  return CheckMessageBytes(static_cast<uint64_t>(MessageBytes(shape)), peers);
}

Status RunDispatch(const Target& target, const MoeAttributes& attributes,
                   const Buffer& x, const Buffer& ids,
                   DispatchBuffers buffers) {
  JF_ASSIGN_OR_RETURN(const MoeShape shape,
                      ShapeOf(attributes, target.peers.ranks, x, ids, false,
                              buffers.scales != nullptr));
  JF_RETURN_IF_ERROR(CheckMessage(shape, target.peers));
  const int rank = target.rank;
  const Grid grid = DispatchGrid(shape, target.group->BlocksMax(rank));
  if (PlanBytes(shape, grid) > Group::kWorkspaceBytes) {
    return Status(StatusCode::kResourceExhausted,
                  "the plan of a dispatch of " + std::to_string(shape.tokens) +
                      " tokens does not fit its workspace; dispatch fewer "
                      "tokens at a time");
  }
  if (shape.expand) buffers.row_index = nullptr;
  return ToStatus(LaunchDispatch(target.peers, shape, grid, buffers,
                                 target.group->Workspace(rank), target.stream),
                  "launch");
}

// What both forms of dispatch return, in order. Scales are there where rows
// travel as e4m3, and empty unless they are kept so.
struct DispatchResults {
  Result tokens, group_sizes, row_weights, row_index, recv_count, slot_row,
      sent, dropped;
  ffi::RemainingRets scales;
};

float* ScalesOf(const ffi::RemainingRets& rest) {
  auto scales = rest.get<ffi::AnyBuffer>(0);
  if (!scales.has_value() || (*scales)->element_count() == 0) return nullptr;
  return static_cast<float*>((*scales)->untyped_data());
}

DispatchBuffers BuffersOf(const Buffer& x, const Buffer& ids,
                          const Buffer& weights, DispatchResults& results) {
  return {DataOf<char>(x),
          DataOf<int32_t>(ids),
          DataOf<float>(weights),
          DataOf<char>(results.tokens),
          ScalesOf(results.scales),
          DataOf<int32_t>(results.group_sizes),
          DataOf<float>(results.row_weights),
          DataOf<int32_t>(results.row_index),
          DataOf<int32_t>(results.recv_count),
          DataOf<int32_t>(results.slot_row),
          DataOf<int32_t>(results.sent),
          DataOf<int32_t>(results.dropped)};
}

ffi::Error Dispatch(CallContext context, MoeAttributes attributes,
                    Position position, Buffer x, Buffer ids, Buffer weights,
                    Buffer token, Result tokens, Result group_sizes,
                    Result row_weights, Result row_index, Result recv_count,
                    Result slot_row, Result sent, Result dropped,
                    Result token_out, ffi::RemainingRets scales) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target target,
        FindTarget(context, attributes, position, token, token_out));
    DispatchResults results = {tokens,    group_sizes, row_weights,
                               row_index, recv_count,  slot_row,
                               sent,      dropped,     scales};
    return RunDispatch(target, attributes, x, ids,
                       BuffersOf(x, ids, weights, results));
  };
  return ToError(run(), attributes.label);
}

ffi::Error DispatchStart(CallContext context, MoeAttributes attributes,
                         Position position, Buffer x, Buffer ids,
                         Buffer weights, Buffer token,
                         ffi::Result<Pending> pending, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(Target target,
                        FindTarget(context, attributes, position, token,
                                   token_out, Phase::kStart));
    target.peers.pending = pending->typed_data();
    DispatchBuffers buffers = {};
    buffers.x = DataOf<char>(x);
    buffers.ids = DataOf<int32_t>(ids);
    buffers.weights = DataOf<float>(weights);
    return RunDispatch(target, attributes, x, ids, buffers);
  };
  return ToError(run(), attributes.label);
}

ffi::Error DispatchDone(CallContext context, MoeAttributes attributes,
                        Position position, Pending pending, Buffer x,
                        Buffer ids, Buffer weights, Buffer token, Result tokens,
                        Result group_sizes, Result row_weights,
                        Result row_index, Result recv_count, Result slot_row,
                        Result sent, Result dropped, Result token_out,
                        ffi::RemainingRets scales) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(Target target,
                        FindTarget(context, attributes, position, token,
                                   token_out, Phase::kDone));
    target.peers.pending = pending.typed_data();
    DispatchResults results = {tokens,    group_sizes, row_weights,
                               row_index, recv_count,  slot_row,
                               sent,      dropped,     scales};
    return RunDispatch(target, attributes, x, ids,
                       BuffersOf(x, ids, weights, results));
  };
  return ToError(run(), attributes.label);
}

// What all forms of combine are given, in order.
struct CombineOperands {
  Buffer rows, row_weights, scalars, ids, recv_count, slot_row;
};

// `y` and `slot_scalars` are null in the first half.
Status RunCombine(const Target& target, const MoeAttributes& attributes,
                  const CombineOperands& o, char* y, float* slot_scalars) {
  const bool with_scalars = o.scalars.element_count() != 0;
  JF_ASSIGN_OR_RETURN(MoeShape shape, ShapeOf(attributes, target.peers.ranks,
                                              o.rows, o.ids, with_scalars));
  JF_ASSIGN_OR_RETURN(shape.type, RowTypeOf(o.rows));
  JF_RETURN_IF_ERROR(CheckMessage(shape, target.peers));
  const CombineBuffers buffers = {DataOf<char>(o.rows),
                                  DataOrNull<float>(o.row_weights),
                                  DataOrNull<float>(o.scalars),
                                  DataOf<int32_t>(o.ids),
                                  DataOf<int32_t>(o.recv_count),
                                  DataOf<int32_t>(o.slot_row),
                                  y,
                                  with_scalars ? slot_scalars : nullptr};
  const int blocks = target.group->BlocksMax(target.rank);
  return ToStatus(LaunchCombine(target.peers, shape, CombineGrid(shape, blocks),
                                buffers, target.stream),
                  "launch");
}

ffi::Error Combine(CallContext context, MoeAttributes attributes,
                   Position position, Buffer rows, Buffer row_weights,
                   Buffer scalars, Buffer ids, Buffer recv_count,
                   Buffer slot_row, Buffer token, Result y, Result slot_scalars,
                   Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target target,
        FindTarget(context, attributes, position, token, token_out));
    return RunCombine(target, attributes,
                      {rows, row_weights, scalars, ids, recv_count, slot_row},
                      DataOf<char>(y), DataOf<float>(slot_scalars));
  };
  return ToError(run(), attributes.label);
}

ffi::Error CombineStart(CallContext context, MoeAttributes attributes,
                        Position position, Buffer rows, Buffer row_weights,
                        Buffer scalars, Buffer ids, Buffer recv_count,
                        Buffer slot_row, Buffer token,
                        ffi::Result<Pending> pending, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(Target target,
                        FindTarget(context, attributes, position, token,
                                   token_out, Phase::kStart));
    target.peers.pending = pending->typed_data();
    return RunCombine(target, attributes,
                      {rows, row_weights, scalars, ids, recv_count, slot_row},
                      nullptr, nullptr);
  };
  return ToError(run(), attributes.label);
}

ffi::Error CombineDone(CallContext context, MoeAttributes attributes,
                       Position position, Pending pending, Buffer rows,
                       Buffer row_weights, Buffer scalars, Buffer ids,
                       Buffer recv_count, Buffer slot_row, Buffer token,
                       Result y, Result slot_scalars, Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(Target target,
                        FindTarget(context, attributes, position, token,
                                   token_out, Phase::kDone));
    target.peers.pending = pending.typed_data();
    return RunCombine(target, attributes,
                      {rows, row_weights, scalars, ids, recv_count, slot_row},
                      DataOf<char>(y), DataOf<float>(slot_scalars));
  };
  return ToError(run(), attributes.label);
}

ffi::Error Replay(CallContext context, MoeAttributes attributes,
                  Position position, Buffer x, Buffer ids, Buffer recv_count,
                  Buffer slot_row, Buffer token, Result rows,
                  Result token_out) {
  const auto run = [&]() -> Status {
    JF_ASSIGN_OR_RETURN(
        const Target target,
        FindTarget(context, attributes, position, token, token_out));
    JF_ASSIGN_OR_RETURN(const MoeShape shape,
                        ShapeOf(attributes, target.peers.ranks, x, ids, false));
    JF_RETURN_IF_ERROR(CheckMessage(shape, target.peers));
    const ReplayBuffers buffers = {
        DataOf<char>(x), DataOf<int32_t>(ids), DataOf<int32_t>(recv_count),
        DataOf<int32_t>(slot_row), DataOf<char>(rows)};
    return ToStatus(
        LaunchReplay(target.peers, shape, target.group->BlocksMax(target.rank),
                     buffers, target.stream),
        "launch");
  };
  return ToError(run(), attributes.label);
}

// rows, row_weights, scalars, ids, recv_count, slot_row, token
template <typename Binding>
auto BindCombineOperands(Binding binding) {
  return std::move(binding)
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>();
}

// x, ids, weights, token; then the nine results of a dispatch, and scales
template <typename Binding>
auto BindDispatchOperands(Binding binding) {
  return std::move(binding)
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>();
}

template <typename Binding>
auto BindDispatchResults(Binding binding) {
  return std::move(binding)
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .RemainingRets();
}

}  // namespace
}  // namespace jaxfabric::cuda

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::cuda::MoeAttributes, JF_CUDA_CALL_ATTRIBUTES,
    ::xla::ffi::StructMember<int64_t>("num_experts"),
    ::xla::ffi::StructMember<int64_t>("capacity"),
    ::xla::ffi::StructMember<int64_t>("expert_alignment"),
    ::xla::ffi::StructMember<bool>("expand"),
    ::xla::ffi::StructMember<bool>("zero_tail"),
    ::xla::ffi::StructMember<bool>("e4m3"));

namespace jaxfabric::cuda {

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricCudaRoute, Dispatch,
    BindDispatchResults(BindDispatchOperands(BindCall<MoeAttributes>())),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaRouteStart, DispatchStart,
                              BindDispatchOperands(BindCall<MoeAttributes>())
                                  .Ret<Pending>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaRouteDone, DispatchDone,
                              BindDispatchResults(BindDispatchOperands(
                                  BindCall<MoeAttributes>().Arg<Pending>())),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaReduce, Combine,
                              BindCombineOperands(BindCall<MoeAttributes>())
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricCudaReduceStart, CombineStart,
    BindCombineOperands(BindCall<MoeAttributes>()).Ret<Pending>().Ret<Buffer>(),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricCudaReduceDone, CombineDone,
    BindCombineOperands(BindCall<MoeAttributes>().Arg<Pending>())
        .Ret<Buffer>()
        .Ret<Buffer>()
        .Ret<Buffer>(),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricCudaReplay, Replay,
                              BindCall<MoeAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
#pragma GCC visibility pop

}  // namespace jaxfabric::cuda
