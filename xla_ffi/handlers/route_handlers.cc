// Dispatch with routes: whole, and in two halves.

#include <memory>
#include <utility>
#include <vector>

#include "base/huge_pages.h"
#include "handlers/call.h"
#include "handlers/handlers.h"
#include "handlers/moe_layout.h"
#include "handlers/pending.h"
#include "moe/message.h"
#include "moe/place.h"
#include "moe/send_lists.h"
#include "moe/unpack.h"

namespace jaxfabric {
namespace {

namespace ffi = xla::ffi;

// This rank's part of a dispatch; shared by what is still to be done of it.
struct Route {
  moe::Layout layout;
  moe::SendLists lists;
  std::span<const float> weights;
  const std::byte* x;
};

// The program's result buffers.
struct RouteResults {
  std::byte* tokens;
  moe::PlaceOutputs place;
  std::span<int32_t> sent;
  int32_t* dropped;
};

StatusOr<std::shared_ptr<const Route>> PlanRoute(
    const Call& call, const MoeAttributes& attributes, const ffi::AnyBuffer& x,
    const ffi::AnyBuffer& ids, const ffi::AnyBuffer& weights) {
  auto route = std::make_shared<Route>();
  JF_ASSIGN_OR_RETURN(route->layout,
                      LayoutOf(attributes, call.group.ranks.size(), x, ids));
  JF_ASSIGN_OR_RETURN(
      route->lists,
      moe::BuildSendLists(route->layout, SpanOf<const int32_t>(ids)));
  route->weights = SpanOf<const float>(weights);
  route->x = static_cast<const std::byte*>(x.untyped_data());
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

Status Unpack(const Route& route, uint32_t position, RouteResults results,
              const std::vector<Arrival>& arrivals) {
  const moe::Layout& layout = route.layout;
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
  AdviseHugePages(results.tokens,
                  static_cast<size_t>(layout.output_rows() * layout.row_bytes));
  const moe::Placement placement = moe::Place(layout, views, results.place);
  *results.dropped = placement.dropped;
  for (int32_t source = 0; source < layout.num_ranks; ++source) {
    const moe::RouteView& view = views[static_cast<size_t>(source)];
    moe::UnpackRows(layout, placement.plan, source, view.rows,
                    {0, view.row_count()}, results.tokens);
  }
  moe::ZeroUnwrittenRows(layout, placement.plan, results.tokens);
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

RouteResults ResultsOf(Result& tokens, Result& group_sizes, Result& row_weights,
                       Result& row_index, Result& recv_count, Result& slot_row,
                       Result& sent, Result& dropped) {
  return {.tokens = static_cast<std::byte*>(tokens->untyped_data()),
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
                       Result dropped, Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](Call call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(auto route,
                            PlanRoute(call, attributes, x, ids, weights));
        SendRoutes(call, route);
        ReceiveRoutes(std::move(call), std::move(route),
                      ResultsOf(tokens, group_sizes, row_weights, row_index,
                                recv_count, slot_row, sent, dropped));
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
                      Result token_out) {
  const Pending started = LoadPending(pending.untyped_data());
  return RunCall(
      {device, run_id, position}, attributes,
      [&](Call call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(auto route,
                            PlanRoute(call, attributes, x, ids, weights));
        call.AdoptKey(started.key);
        ReceiveRoutes(std::move(call), std::move(route),
                      ResultsOf(tokens, group_sizes, row_weights, row_index,
                                recv_count, slot_row, sent, dropped));
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
// token
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
      .template Ret<Buffer>();
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
