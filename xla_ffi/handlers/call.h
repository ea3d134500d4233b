// Call: one execution of one of our calls, from XLA's frame to the engine's
// words. Everything that the handlers have in common.

#ifndef JAXFABRIC_HANDLERS_CALL_H_
#define JAXFABRIC_HANDLERS_CALL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "engine/endpoint.h"
#include "engine/engine.h"
#include "engine/mesh_group.h"
#include "engine/operation.h"
#include "handlers/fabric_registry.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfabric {

// The attributes that each call carries.
struct CallAttributes {
  int64_t fabric;
  int64_t channel;
  std::string_view label;  // "dispatch (jit_step, call 3)"
  double timeout_s;        // <= 0: the Fabric's
  xla::ffi::Span<const int64_t> axes;
  // This rank's index on the axes, as the program sees it.
  xla::ffi::Buffer<xla::ffi::S32> position;
  // When the first half of the call began (monotonic), or 0: the time limit
  // counts from there.
  int64_t begun_ns = 0;
};

// Begins the binding of a handler: context, attributes, first operand.
inline auto BindCall() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::DeviceOrdinal>()
      .Ctx<xla::ffi::RunId>()
      .Attr<int64_t>("fabric")
      .Attr<int64_t>("channel")
      .Attr<std::string_view>("label")
      .Attr<double>("timeout_s")
      .Attr<xla::ffi::Span<const int64_t>>("axes")
      .Arg<xla::ffi::Buffer<xla::ffi::S32>>();
}

xla::ffi::Error ToError(const Status& status);
xla::ffi::Future FailedFuture(const Status& status);

struct Call {
  std::shared_ptr<Fabric> fabric;
  Endpoint* endpoint = nullptr;
  MeshGroup group;
  MatchKey key;
  int64_t run_id = 0;
  OperationPtr operation;

  // Ranks of the group without this one, in order.
  std::vector<uint32_t> Others() const;
  // Continues the call that began under `started`, in its first half.
  void AdoptKey(MatchKey started);
  // The message for `destination`, without bytes and pack.
  Outgoing Message(uint32_t destination) const;
  // Waits for a message from each of `sources`, then runs `finish` with them
  // (here and now if they have come) and gives them back. A failed `finish`
  // fails the operation.
  void Await(std::vector<uint32_t> sources,
             std::function<Status(const std::vector<Arrival>&)> finish) &&;
};

// Runs `start` with a Call of this rank; what is returned completes when the
// last reference to the Call's operation is gone.
xla::ffi::Future RunCall(int32_t device, xla::ffi::RunId run_id,
                         const CallAttributes& attributes,
                         const std::function<Status(Call)>& start);

}  // namespace jaxfabric

#endif  // JAXFABRIC_HANDLERS_CALL_H_
