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
#include "handlers/fabric.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfabric {

// The attributes that each call carries. Calls with more of them derive from
// it.
struct CallAttributes {
  int64_t fabric;
  int64_t channel;
  std::string_view label;  // "dispatch (jit_step, call 3)"
  double timeout_s;        // <= 0: the Fabric's
  xla::ffi::Span<const int64_t> axes;
};

// How XLA finds the attributes of CallAttributes, for
// XLA_FFI_REGISTER_STRUCT_ATTR_DECODING of it and what derives from it.
#define JF_CALL_ATTRIBUTES                                 \
  ::xla::ffi::StructMember<int64_t>("fabric"),             \
      ::xla::ffi::StructMember<int64_t>("channel"),        \
      ::xla::ffi::StructMember<std::string_view>("label"), \
      ::xla::ffi::StructMember<double>("timeout_s"),       \
      ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("axes")

// What each handler is told by XLA, besides its attributes.
struct Frame {
  int32_t device;
  xla::ffi::RunId run_id;
  // This rank's index on the axes, as the program sees it.
  xla::ffi::Buffer<xla::ffi::S32> position;
};

// Begins the binding of a handler (device, run_id, attributes, position, ...).
template <typename Attributes>
auto BindCall() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::DeviceOrdinal>()
      .Ctx<xla::ffi::RunId>()
      .Attrs<Attributes>()
      .template Arg<xla::ffi::Buffer<xla::ffi::S32>>();
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
  uint64_t span = 0;     // in the trace of `endpoint`
  uint64_t posting = 0;  // its first part: until it waits, or is back in XLA

  // Ranks of the group without this one, in order.
  std::vector<uint32_t> Others() const;
  // Continues the call that began under `started`, in its first half.
  void AdoptKey(MatchKey started);
  // The message for `destination`, without bytes and pack.
  Outgoing Message(uint32_t destination) const;
  // For the trace: all is posted, and from here on the call waits. Returns the
  // span of that.
  uint64_t BeginWaiting() const;
  // Waits for a message from each of `sources`, then runs `finish` with them
  // (here and now if they have come) and gives them back. A failed `finish`
  // fails the operation.
  void Await(std::vector<uint32_t> sources,
             std::function<Status(const std::vector<Arrival>&)> finish) &&;
};

// Copies the token, which is data to XLA and nothing to us.
void PassToken(const xla::ffi::AnyBuffer& token,
               xla::ffi::Result<xla::ffi::AnyBuffer> token_out);

// Runs `start` with a Call of this rank; what is returned completes when the
// last reference to the Call's operation is gone. `begun_ns` is when the first
// half of the call began (monotonic), or 0: the time limit counts from there.
xla::ffi::Future RunCall(const Frame& frame, const CallAttributes& attributes,
                         const std::function<Status(Call)>& start,
                         int64_t begun_ns = 0);

}  // namespace jaxfabric

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jaxfabric::CallAttributes,
                                      JF_CALL_ATTRIBUTES);

#endif  // JAXFABRIC_HANDLERS_CALL_H_
