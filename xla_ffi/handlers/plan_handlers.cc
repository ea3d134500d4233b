// Along a known plan: replay (rows of another x) and reduce (combine), the
// latter whole and in two halves. Every operand comes from the program, so the
// plan is checked before it is used.

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "handlers/call.h"
#include "handlers/handlers.h"
#include "handlers/moe_layout.h"
#include "handlers/pending.h"
#include "moe/message.h"
#include "moe/receive_plan.h"
#include "moe/reduce.h"
#include "moe/send_lists.h"
#include "moe/unpack.h"

namespace jaxfabric {
namespace {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Position = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<ffi::AnyBuffer>;

// Both ends of one exchange along a plan, and the operands.
struct Along {
  moe::Layout layout;
  moe::SendLists lists;   // as the tokens' rank
  moe::ReceivePlan plan;  // as the experts' rank
  const std::byte* rows;  // x or expert rows
  moe::RowType type;
  moe::ReduceInput input;  // reduce only
};

StatusOr<std::shared_ptr<Along>> MakeAlong(
    const Call& call, const MoeAttributes& attributes, const Buffer& rows,
    const Buffer& ids, const Buffer& recv_count, const Buffer& slot_row) {
  auto along = std::make_shared<Along>();
  JF_ASSIGN_OR_RETURN(along->layout,
                      LayoutOf(attributes, call.group.ranks.size(), rows, ids));
  JF_ASSIGN_OR_RETURN(
      along->lists,
      moe::BuildSendLists(along->layout, SpanOf<const int32_t>(ids)));
  JF_ASSIGN_OR_RETURN(
      along->plan,
      moe::CheckPlan(along->layout, SpanOf<const int32_t>(recv_count),
                     SpanOf<const int32_t>(slot_row)));
  along->rows = static_cast<const std::byte*>(rows.untyped_data());
  JF_ASSIGN_OR_RETURN(along->type, RowTypeOf(rows));
  return along;
}

// Posts one message to each other rank: `bytes` and `pack` by axis position.
void SendToAll(const Call& call, const std::function<uint64_t(int32_t)>& bytes,
               const std::function<void(int32_t, std::byte*)>& pack) {
  const size_t ranks = call.group.ranks.size();
  for (size_t i = 1; i < ranks; ++i) {
    const size_t position = (call.group.position + i) % ranks;
    const auto destination = static_cast<int32_t>(position);
    Outgoing message = call.Message(call.group.ranks[position]);
    message.bytes = bytes(destination);
    message.pack = [pack, destination](std::byte* out) {
      pack(destination, out);
    };
    call.endpoint->Send(std::move(message));
  }
}

Status FromRank(const Status& status, const Arrival& arrival) {
  return status.Annotate("from rank " + std::to_string(arrival.source));
}

// --- replay ---

Status UnpackReplay(const Along& along, uint32_t position, std::byte* out,
                    const std::vector<Arrival>& arrivals) {
  size_t next = 0;
  for (int32_t source = 0; source < along.layout.num_ranks; ++source) {
    const int32_t rows = along.plan.RowCount(source);
    moe::RowSource from;
    if (static_cast<uint32_t>(source) == position) {
      if (rows != along.lists.RowCount(source)) {
        return Status(StatusCode::kInvalidArgument,
                      "the plan's ids and counts are of different dispatches");
      }
      from = moe::DirectRows(along.layout, along.lists, source, along.rows);
    } else {
      const Arrival& arrival = arrivals[next++];
      auto parsed = moe::ParseReplayMessage(along.layout, rows,
                                            {arrival.data, arrival.length});
      if (!parsed.ok()) return FromRank(parsed.status(), arrival);
      from = *parsed;
    }
    moe::UnpackRows(along.layout, along.plan, source, from, {0, rows}, out);
  }
  moe::ZeroUnwrittenRows(along.layout, along.plan, out);
  return OkStatus();
}

ffi::Future Replay(int32_t device, ffi::RunId run_id, MoeAttributes attributes,
                   Position position, Buffer x, Buffer ids, Buffer recv_count,
                   Buffer slot_row, Buffer token, Result rows,
                   Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](Call call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(
            std::shared_ptr<Along> along,
            MakeAlong(call, attributes, x, ids, recv_count, slot_row));
        SendToAll(
            call,
            [&](int32_t destination) {
              return moe::ReplayMessageBytes(
                  along->layout, along->lists.RowCount(destination));
            },
            [along](int32_t destination, std::byte* out) {
              moe::PackReplayMessage(along->layout, along->lists, destination,
                                     along->rows, out);
            });
        auto* out = static_cast<std::byte*>(rows->untyped_data());
        const uint32_t position = call.group.position;
        std::vector<uint32_t> others = call.Others();
        std::move(call).Await(
            std::move(others),
            [along, position, out](const std::vector<Arrival>& arrivals) {
              return UnpackReplay(*along, position, out, arrivals);
            });
        return OkStatus();
      });
}

// --- reduce ---

struct ReduceResults {
  std::byte* y;
  std::span<float> slot_scalars;  // empty: none
};

Status AccumulateArrivals(const Along& along, uint32_t position,
                          ReduceResults results,
                          const std::vector<Arrival>& arrivals) {
  const moe::ScopedFloatEnvironment environment;
  const bool with_scalars = along.input.with_scalars;
  const auto me = static_cast<int32_t>(position);
  if (along.plan.RowCount(me) != along.lists.RowCount(me)) {
    return Status(StatusCode::kInvalidArgument,
                  "the plan's ids and counts are of different dispatches");
  }
  // This rank's own partials take the same way, without the journey.
  std::vector<std::byte> own(moe::ReduceMessageBytes(
      along.layout, along.plan.RowCount(me), with_scalars));
  moe::PackReduceMessage(along.layout, along.plan, me, along.input, own.data());
  std::vector<moe::RowSource> partials;
  std::vector<const std::byte*> scalars;
  size_t next = 0;
  for (int32_t source = 0; source < along.layout.num_ranks; ++source) {
    const bool is_own = source == me;
    const std::span<const std::byte> message =
        is_own ? std::span<const std::byte>(own)
               : std::span<const std::byte>(arrivals[next].data,
                                            arrivals[next].length);
    auto view = moe::ParseReduceMessage(
        along.layout, along.lists.RowCount(source), with_scalars, message);
    if (!view.ok()) {
      return is_own ? view.status() : FromRank(view.status(), arrivals[next]);
    }
    if (!is_own) ++next;
    partials.push_back(view->rows);
    scalars.push_back(view->scalars);
  }
  moe::Accumulate(along.layout, along.type, along.lists, partials,
                  {0, along.layout.tokens}, results.y);
  if (with_scalars) {
    moe::ScatterScalars(along.layout, along.lists, scalars,
                        results.slot_scalars);
  }
  return OkStatus();
}

StatusOr<std::shared_ptr<Along>> PlanReduce(
    const Call& call, const MoeAttributes& attributes, const Buffer& rows,
    const Buffer& row_weights, const Buffer& scalars, const Buffer& ids,
    const Buffer& recv_count, const Buffer& slot_row) {
  JF_ASSIGN_OR_RETURN(
      std::shared_ptr<Along> along,
      MakeAlong(call, attributes, rows, ids, recv_count, slot_row));
  JF_RETURN_IF_ERROR(moe::CheckRowType(along->layout, along->type));
  const auto weights = SpanOf<const float>(row_weights);
  const auto scalar_values = SpanOf<const float>(scalars);
  along->input = {
      .type = along->type,
      .rows = along->rows,
      .per_slot = attributes.expand,
      .weights = weights.empty() ? nullptr : weights.data(),
      .with_scalars = !scalar_values.empty(),
      .scalars = scalar_values.empty() ? nullptr : scalar_values.data()};
  return along;
}

void SendPartials(const Call& call, const std::shared_ptr<Along>& along) {
  SendToAll(
      call,
      [&](int32_t destination) {
        return moe::ReduceMessageBytes(along->layout,
                                       along->plan.RowCount(destination),
                                       along->input.with_scalars);
      },
      [along](int32_t destination, std::byte* out) {
        const moe::ScopedFloatEnvironment environment;
        moe::PackReduceMessage(along->layout, along->plan, destination,
                               along->input, out);
      });
}

void ReceivePartials(Call call, std::shared_ptr<Along> along,
                     ReduceResults results) {
  const uint32_t position = call.group.position;
  std::vector<uint32_t> others = call.Others();
  std::move(call).Await(
      std::move(others), [along = std::move(along), position,
                          results](const std::vector<Arrival>& arrivals) {
        return AccumulateArrivals(*along, position, results, arrivals);
      });
}

ffi::Future ReduceWhole(int32_t device, ffi::RunId run_id,
                        MoeAttributes attributes, Position position,
                        Buffer rows, Buffer row_weights, Buffer scalars,
                        Buffer ids, Buffer recv_count, Buffer slot_row,
                        Buffer token, Result y, Result slot_scalars,
                        Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](Call call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(std::shared_ptr<Along> along,
                            PlanReduce(call, attributes, rows, row_weights,
                                       scalars, ids, recv_count, slot_row));
        SendPartials(call, along);
        ReceivePartials(std::move(call), std::move(along),
                        {static_cast<std::byte*>(y->untyped_data()),
                         SpanOf<float>(*slot_scalars)});
        return OkStatus();
      });
}

ffi::Future ReduceStart(int32_t device, ffi::RunId run_id,
                        MoeAttributes attributes, Position position,
                        Buffer rows, Buffer row_weights, Buffer scalars,
                        Buffer ids, Buffer recv_count, Buffer slot_row,
                        Buffer token, Result pending, Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](const Call& call) -> Status {
        PassToken(token, token_out);
        StorePending({call.key, MonotonicNanoseconds()},
                     pending->untyped_data());
        JF_ASSIGN_OR_RETURN(std::shared_ptr<Along> along,
                            PlanReduce(call, attributes, rows, row_weights,
                                       scalars, ids, recv_count, slot_row));
        SendPartials(call, along);
        return OkStatus();
      });
}

ffi::Future ReduceDone(int32_t device, ffi::RunId run_id,
                       MoeAttributes attributes, Position position,
                       Buffer pending, Buffer rows, Buffer row_weights,
                       Buffer scalars, Buffer ids, Buffer recv_count,
                       Buffer slot_row, Buffer token, Result y,
                       Result slot_scalars, Result token_out) {
  const Pending started = LoadPending(pending.untyped_data());
  return RunCall(
      {device, run_id, position}, attributes,
      [&](Call call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(std::shared_ptr<Along> along,
                            PlanReduce(call, attributes, rows, row_weights,
                                       scalars, ids, recv_count, slot_row));
        call.AdoptKey(started.key);
        ReceivePartials(std::move(call), std::move(along),
                        {static_cast<std::byte*>(y->untyped_data()),
                         SpanOf<float>(*slot_scalars)});
        return OkStatus();
      },
      started.begun_ns);
}

// rows, row_weights, scalars, ids, recv_count, slot_row, token
template <typename Binding>
auto BindReduceOperands(Binding binding) {
  return std::move(binding)
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricReplay, Replay,
                              BindCall<MoeAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricReduce, ReduceWhole,
                              BindReduceOperands(BindCall<MoeAttributes>())
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricReduceStart, ReduceStart,
    BindReduceOperands(BindCall<MoeAttributes>()).Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricReduceDone, ReduceDone,
    BindReduceOperands(BindCall<MoeAttributes>().Arg<Buffer>())
        .Ret<Buffer>()
        .Ret<Buffer>()
        .Ret<Buffer>());

}  // namespace jaxfabric
