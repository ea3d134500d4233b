// Dispatch with routes: whole, and in two halves.

#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/huge_pages.h"
#include "handlers/call.h"
#include "handlers/handlers.h"
#include "handlers/moe_layout.h"
#include "handlers/pending.h"
#include "moe/block_scaled.h"
#include "moe/message.h"
#include "moe/place.h"
#include "moe/send_lists.h"
#include "moe/sum_rows.h"
#include "moe/unpack.h"

namespace jaxfabric {
namespace {

namespace ffi = xla::ffi;

// This rank's part of a dispatch; shared by what is still to be done of it.
struct Route {
  moe::Layout layout;
  moe::SendLists lists;
  std::span<const float> weights;
  const std::byte* x;  // rows as they travel
  // If layout.scaled:
  moe::ScaledRows scaled;
  std::unique_ptr<std::byte[]> scaled_x;
};

// The program's result buffers.
struct RouteResults {
  std::byte* tokens;
  size_t tokens_bytes;
  std::byte* scales;  // null: tokens are not scaled
  moe::PlaceOutputs place;
  std::span<int32_t> sent;
  int32_t* dropped;
};

// From here on rows of x are scaled ones, those of `tokens` at least.
Status Scale(const ffi::AnyBuffer& x, std::span<const int32_t> tokens,
             Route& route) {
  JF_ASSIGN_OR_RETURN(route.scaled.type, RowTypeOf(x));
  if (route.scaled.type == moe::RowType::kF64) {
    return Status(StatusCode::kInvalidArgument,
                  "float64 rows do not travel as e4m3");
  }
  moe::Layout& layout = route.layout;
  route.scaled.hidden = x.dimensions()[1];
  layout.row_bytes = route.scaled.row_bytes();
  layout.scaled = true;
  JF_RETURN_IF_ERROR(moe::CheckLayout(layout));
  route.scaled_x = std::make_unique_for_overwrite<std::byte[]>(
      static_cast<size_t>(layout.tokens * layout.row_bytes));
  const moe::ScopedFloatEnvironment environment;
  moe::ScaleRows(route.scaled, tokens, layout.tokens, route.x,
                 route.scaled_x.get());
  route.x = route.scaled_x.get();
  return OkStatus();
}

// `own_only`: no other rows than those for this rank itself are needed.
StatusOr<std::shared_ptr<const Route>> PlanRoute(
    const Call& call, const MoeAttributes& attributes, const ffi::AnyBuffer& x,
    const ffi::AnyBuffer& ids, const ffi::AnyBuffer& weights,
    bool own_only = false) {
  auto route = std::make_shared<Route>();
  JF_ASSIGN_OR_RETURN(route->layout,
                      LayoutOf(attributes, call.group.ranks.size(), x, ids));
  JF_ASSIGN_OR_RETURN(
      route->lists,
      moe::BuildSendLists(route->layout, SpanOf<const int32_t>(ids)));
  route->weights = SpanOf<const float>(weights);
  route->x = static_cast<const std::byte*>(x.untyped_data());
  if (attributes.e4m3) {
    const auto position = static_cast<int32_t>(call.group.position);
    JF_RETURN_IF_ERROR(
        Scale(x, own_only ? route->lists.Tokens(position) : route->lists.tokens,
              *route));
  }
  return std::shared_ptr<const Route>(std::move(route));
}

void SendRoutes(const Call& call, const std::shared_ptr<const Route>& route) {
  const size_t ranks = call.group.ranks.size();
  for (size_t i = 1; i < ranks; ++i) {
    // Each rank begins with its successor, so that not all write to one.
    const size_t position = (call.group.position + i) % ranks;
    const auto destination = static_cast<int32_t>(position);
    Outgoing message = call.Message(call.group.ranks[position]);
    message.bytes =
        moe::RouteMessageBytes(route->layout, route->lists, destination);
    message.pack = [route, destination](std::byte* out) {
      moe::PackRouteMessage(route->layout, route->lists, destination,
                            route->weights, route->x, out);
    };
    call.endpoint->Send(std::move(message));
  }
}

// The types of the results tell whether rows are kept as they came.
Status CheckScaledResults(const Route& route, const RouteResults& results) {
  const moe::ScaledRows& rows = route.scaled;
  const int64_t element =
      results.scales != nullptr ? 1 : moe::ElementBytes(rows.type);
  if (static_cast<int64_t>(results.tokens_bytes) ==
      route.layout.output_rows() * rows.hidden * element) {
    return OkStatus();
  }
  return Status(StatusCode::kInvalidArgument,
                "the results do not fit rows that travel as e4m3");
}

// The rows of all sources into the program's results.
void WriteRows(const Route& route, std::span<const moe::RouteView> views,
               const moe::ReceivePlan& plan, const RouteResults& results) {
  const moe::Layout& layout = route.layout;
  const moe::UnscaledOutput unscaled = {results.tokens, results.scales};
  AdviseHugePages(results.tokens, results.tokens_bytes);
  const moe::ScopedFloatEnvironment environment;
  for (int32_t source = 0; source < layout.num_ranks; ++source) {
    const moe::RouteView& view = views[static_cast<size_t>(source)];
    const moe::RowRange all = {0, view.row_count()};
    if (layout.scaled) {
      moe::UnpackScaledRows(layout, plan, source, route.scaled, view.rows, all,
                            unscaled);
    } else {
      moe::UnpackRows(layout, plan, source, view.rows, all, results.tokens);
    }
  }
  if (layout.scaled) {
    moe::ZeroUnwrittenScaledRows(layout, plan, route.scaled, unscaled);
  } else {
    moe::ZeroUnwrittenRows(layout, plan, results.tokens);
  }
}

Status Unpack(const Route& route, uint32_t position, RouteResults results,
              const std::vector<Arrival>& arrivals) {
  const moe::Layout& layout = route.layout;
  if (layout.scaled) JF_RETURN_IF_ERROR(CheckScaledResults(route, results));
  std::vector<moe::RouteView> views;
  size_t next = 0;
  for (int32_t source = 0; source < layout.num_ranks; ++source) {
    results.sent[static_cast<size_t>(source)] = route.lists.RowCount(source);
    if (static_cast<uint32_t>(source) == position) {
      views.push_back(moe::DirectRouteView(layout, route.lists, source,
                                           route.weights, route.x));
      continue;
    }
    const Arrival& arrival = arrivals[next++];
    auto view = moe::ParseRouteMessage(layout, {arrival.data, arrival.length});
    if (!view.ok()) {
      return view.status().Annotate("from rank " +
                                    std::to_string(arrival.source));
    }
    views.push_back(*std::move(view));
  }
  const moe::Placement placement = moe::Place(layout, views, results.place);
  *results.dropped = placement.dropped;
  WriteRows(route, views, placement.plan, results);
  return OkStatus();
}

void ReceiveRoutes(Call call, std::shared_ptr<const Route> route,
                   RouteResults results) {
  const uint32_t position = call.group.position;
  std::vector<uint32_t> others = call.Others();
  std::move(call).Await(std::move(others),
                        [route = std::move(route), position,
                         results](const std::vector<Arrival>& arrivals) {
                          return Unpack(*route, position, results, arrivals);
                        });
}

using Buffer = ffi::AnyBuffer;
using Position = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<ffi::AnyBuffer>;
using OptionalResult = std::optional<Result>;

RouteResults ResultsOf(Result& tokens, Result& group_sizes, Result& row_weights,
                       Result& row_index, Result& recv_count, Result& slot_row,
                       Result& sent, Result& dropped, OptionalResult& scales) {
  return {
      .tokens = static_cast<std::byte*>(tokens->untyped_data()),
      .tokens_bytes = tokens->size_bytes(),
      .scales = tokens->element_type() == ffi::F8E4M3FN && scales.has_value()
                    ? static_cast<std::byte*>((*scales)->untyped_data())
                    : nullptr,
      .place = {.group_sizes = SpanOf<int32_t>(*group_sizes),
                .slot_row = SpanOf<int32_t>(*slot_row),
                .recv_count = SpanOf<int32_t>(*recv_count),
                .weights = SpanOf<float>(*row_weights),
                .row_index = SpanOf<int32_t>(*row_index)},
      .sent = SpanOf<int32_t>(*sent),
      .dropped = static_cast<int32_t*>(dropped->untyped_data())};
}

ffi::Future RouteWhole(int32_t device, ffi::RunId run_id,
                       MoeAttributes attributes, Position position, Buffer x,
                       Buffer ids, Buffer weights, Buffer token, Result tokens,
                       Result group_sizes, Result row_weights, Result row_index,
                       Result recv_count, Result slot_row, Result sent,
                       Result dropped, Result token_out,
                       OptionalResult scales) {
  return RunCall(
      {device, run_id, position}, attributes, [&](Call call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(auto route,
                            PlanRoute(call, attributes, x, ids, weights));
        SendRoutes(call, route);
        ReceiveRoutes(std::move(call), std::move(route),
                      ResultsOf(tokens, group_sizes, row_weights, row_index,
                                recv_count, slot_row, sent, dropped, scales));
        return OkStatus();
      });
}

ffi::Future RouteStart(int32_t device, ffi::RunId run_id,
                       MoeAttributes attributes, Position position, Buffer x,
                       Buffer ids, Buffer weights, Buffer token, Result pending,
                       Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](const Call& call) -> Status {
        PassToken(token, token_out);
        StorePending({call.key, MonotonicNanoseconds()},
                     pending->untyped_data());
        JF_ASSIGN_OR_RETURN(auto route,
                            PlanRoute(call, attributes, x, ids, weights));
        SendRoutes(call, route);
        return OkStatus();
      });
}

ffi::Future RouteDone(int32_t device, ffi::RunId run_id,
                      MoeAttributes attributes, Position position,
                      Buffer pending, Buffer x, Buffer ids, Buffer weights,
                      Buffer token, Result tokens, Result group_sizes,
                      Result row_weights, Result row_index, Result recv_count,
                      Result slot_row, Result sent, Result dropped,
                      Result token_out, OptionalResult scales) {
  const Pending started = LoadPending(pending.untyped_data());
  return RunCall(
      {device, run_id, position}, attributes,
      [&](Call call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(auto route,
                            PlanRoute(call, attributes, x, ids, weights,
                                      /*own_only=*/true));
        call.AdoptKey(started.key);
        ReceiveRoutes(std::move(call), std::move(route),
                      ResultsOf(tokens, group_sizes, row_weights, row_index,
                                recv_count, slot_row, sent, dropped, scales));
        return OkStatus();
      },
      started.begun_ns);
}

// x, ids, weights, token
template <typename Binding>
auto BindOperands(Binding binding) {
  return std::move(binding)
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>();
}

// tokens, group_sizes, weights, row_index, recv_count, slot_row, sent, dropped,
// token, and scales if rows travel scaled
template <typename Binding>
auto BindResults(Binding binding) {
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
      .template OptionalRet<Buffer>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricRoute, RouteWhole,
    BindResults(BindOperands(BindCall<MoeAttributes>())));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricRouteStart, RouteStart,
    BindOperands(BindCall<MoeAttributes>()).Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricRouteDone, RouteDone,
    BindResults(BindOperands(BindCall<MoeAttributes>().Arg<Buffer>())));

}  // namespace jaxfabric
