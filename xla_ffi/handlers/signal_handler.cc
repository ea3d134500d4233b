// signal: a program bumps a Watcher, and the engine that watches it starts to
// work on memory of its own.

#include <string>

#include "base/registry.h"
#include "engine/watcher.h"
#include "handlers/call.h"
#include "handlers/handlers.h"

namespace jaxfabric {
namespace {

namespace ffi = xla::ffi;

ffi::Error Signal(int64_t watcher, int64_t by, ffi::AnyBuffer token,
                  ffi::Result<ffi::AnyBuffer> token_out) {
  PassToken(token, token_out);
  const auto found = Registry<Watcher>::Get().Find(watcher);
  if (found == nullptr) {
    return ToError(Status(StatusCode::kNotFound,
                          "signal: there is no watcher " +
                              std::to_string(watcher) +
                              " (any more); it ends with its TransferEngine"));
  }
  found->Bump(static_cast<uint64_t>(by));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricSignal, Signal,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("watcher")
                                  .Attr<int64_t>("by")
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace jaxfabric
