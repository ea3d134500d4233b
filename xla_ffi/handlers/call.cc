#include "handlers/call.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/registry.h"

namespace jaxfabric {

namespace ffi = xla::ffi;

ffi::Error ToError(const Status& status) {
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error(static_cast<ffi::ErrorCode>(status.code()),
                    "jaxfabric: " + status.message());
}

ffi::Future FailedFuture(const Status& status) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(ToError(status));
  return future;
}

namespace {

// An operation that fails on one rank never ends on the others: they are told.
void GiveUp(Engine& engine, Operation& operation, const Status& status) {
  const Status annotated = status.Annotate(operation.label());
  operation.Fail(annotated);
  engine.Fail(annotated, /*tell_peers=*/true);
}

}  // namespace

std::vector<uint32_t> Call::Others() const {
  std::vector<uint32_t> others;
  for (uint32_t rank : group.ranks) {
    if (rank != endpoint->rank()) others.push_back(rank);
  }
  return others;
}

void Call::AdoptKey(MatchKey started) {
  key = started;
  operation->SetWaitingFor([endpoint = endpoint, started] {
    return endpoint->DescribeMissing(started);
  });
}

Outgoing Call::Message(uint32_t destination) const {
  Outgoing outgoing;
  outgoing.destination = destination;
  outgoing.key = key;
  outgoing.run_id = run_id;
  outgoing.label = operation->label();
  outgoing.operation = operation;
  return outgoing;
}

uint64_t Call::BeginWaiting() const {
  endpoint->trace().End(posting);
  return endpoint->trace().Begin(
      [&] { return TraceEvent{.name = "waiting", .parent = span}; });
}

void Call::Await(std::vector<uint32_t> sources,
                 std::function<Status(const std::vector<Arrival>&)> finish) && {
  // The operation keeps the Fabric, and so the engine.
  auto ready = [operation = operation, endpoint = endpoint, span = span,
                waiting = BeginWaiting(), engine = fabric->engine.get(),
                finish =
                    std::move(finish)](const std::vector<Arrival>& arrivals) {
    endpoint->trace().End(waiting);
    const TraceScope tracing(endpoint->trace(), [span] {
      return TraceEvent{.name = "copy out", .parent = span};
    });
    const Status finished = finish(arrivals);
    for (const Arrival& arrival : arrivals) endpoint->Release(arrival);
    if (!finished.ok()) GiveUp(*engine, *operation, finished);
  };
  // What has come already saves the way through the worker and the pool.
  endpoint->Progress();
  std::vector<Arrival> arrivals;
  const bool all_here = endpoint->Expect(
      key, std::move(sources), operation,
      [ready](const std::vector<Arrival>& late) { ready(late); }, &arrivals);
  if (all_here) ready(arrivals);
}

namespace {

// The same for a call that does not begin.
ffi::Future Refuse(Engine& engine, const Status& status) {
  engine.Fail(status, /*tell_peers=*/true);
  return FailedFuture(status);
}

StatusOr<Call> Resolve(std::shared_ptr<Fabric> fabric, const Frame& frame,
                       const CallAttributes& attributes) {
  const int32_t device = frame.device;
  Call call;
  call.fabric = std::move(fabric);
  const auto rank = call.fabric->rank_by_device.find(device);
  if (rank == call.fabric->rank_by_device.end()) {
    return Status(StatusCode::kFailedPrecondition,
                  "device " + std::to_string(device) +
                      " is not in the mesh of the Fabric '" +
                      call.fabric->name + "'");
  }
  call.endpoint = call.fabric->engine->endpoint(rank->second);
  JF_ASSIGN_OR_RETURN(
      call.group,
      GroupOf(call.fabric->mesh_shape,
              {attributes.axes.begin(), attributes.axes.end()}, rank->second));
  const int32_t position = frame.position.typed_data()[0];
  if (static_cast<int64_t>(call.group.position) != position) {
    return Status(StatusCode::kFailedPrecondition,
                  "device " + std::to_string(device) + " has index " +
                      std::to_string(position) +
                      " on the axis in this program's mesh, but " +
                      std::to_string(call.group.position) +
                      " in the mesh of the Fabric '" + call.fabric->name +
                      "': the two order their devices differently; open the "
                      "Fabric over the program's mesh");
  }
  call.run_id = frame.run_id.run_id;
  return call;
}

double TimeLeft(const Engine& engine, const CallAttributes& attributes,
                int64_t begun_ns) {
  const double whole_s = attributes.timeout_s > 0 ? attributes.timeout_s
                                                  : engine.options().timeout_s;
  if (begun_ns == 0) return whole_s;
  constexpr double kLeastS = 1e-3;  // what has come already is still taken
  const auto elapsed_ns = MonotonicNanoseconds() - begun_ns;
  return std::max(kLeastS, whole_s - static_cast<double>(elapsed_ns) * 1e-9);
}

}  // namespace

void PassToken(const ffi::AnyBuffer& token,
               ffi::Result<ffi::AnyBuffer> token_out) {
  std::memcpy(token_out->untyped_data(), token.untyped_data(),
              token.size_bytes());
}

ffi::Future RunCall(const Frame& frame, const CallAttributes& attributes,
                    const std::function<Status(Call)>& start,
                    int64_t begun_ns) {
  const std::string label(attributes.label);
  const auto fabric = Registry<Fabric>::Get().Find(attributes.fabric);
  if (fabric == nullptr) {
    return FailedFuture(Status(
        StatusCode::kFailedPrecondition,
        label + ": the Fabric that this program was traced under is closed; "
                "run it inside `with jaxfabric.Fabric(mesh):`"));
  }
  Engine* const engine = fabric->engine.get();
  auto resolved = Resolve(fabric, frame, attributes);
  if (!resolved.ok()) {
    return Refuse(*engine, resolved.status().Annotate(label));
  }
  Call call = *std::move(resolved);
  const auto channel = static_cast<uint64_t>(attributes.channel);
  if (!call.endpoint->EnterChannel(channel)) {
    return Refuse(
        *engine,
        Status(StatusCode::kFailedPrecondition,
               label + ": two executions of this call are under way on one "
                       "device and nothing orders them, so that peers cannot "
                       "tell them apart; thread a token through them (token=), "
                       "or give them different key="));
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  call.span = call.endpoint->trace().Begin([&] {
    return TraceEvent{.name = label.substr(0, label.find(' ')), .label = label};
  });
  // The Fabric is kept until the end: closing it waits for operations.
  auto begun =
      engine->Begin(label, TimeLeft(*engine, attributes, begun_ns),
                    [promise, fabric = call.fabric, endpoint = call.endpoint,
                     channel, span = call.span](const Status& status) mutable {
                      endpoint->trace().End(span, status.code());
                      endpoint->LeaveChannel(channel);
                      fabric.reset();
                      if (status.ok()) {
                        promise.SetAvailable();
                      } else {
                        promise.SetError(ToError(status));
                      }
                    });
  if (!begun.ok()) {
    call.endpoint->trace().End(call.span, begun.status().code());
    call.endpoint->LeaveChannel(channel);
    return FailedFuture(begun.status());
  }
  call.operation = *std::move(begun);
  call.key = {channel, call.endpoint->NextSequence(channel)};
  call.AdoptKey(call.key);
  OperationPtr operation = call.operation;
  Trace& trace = call.endpoint->trace();
  const uint64_t posting = call.posting = trace.Begin(
      [&] { return TraceEvent{.name = "post", .parent = call.span}; });
  const Status started = start(std::move(call));
  trace.End(posting);
  if (!started.ok()) GiveUp(*engine, *operation, started);
  const Operation::CompleteHere here;
  operation.reset();
  return future;
}

}  // namespace jaxfabric
