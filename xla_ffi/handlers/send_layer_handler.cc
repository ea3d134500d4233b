// send_layer: copies a layer's KV pages to registered memory, and has them sent
// while the program goes on.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/registry.h"
#include "engine/page_pool.h"
#include "handlers/call.h"
#include "handlers/handlers.h"

namespace jaxfabric {
namespace {

namespace ffi = xla::ffi;

ffi::Error SendLayer(int64_t pool, int64_t layer, ffi::AnyBuffer rows,
                     ffi::Buffer<ffi::S32> from, ffi::Buffer<ffi::S32> to,
                     ffi::Buffer<ffi::U32> request, ffi::AnyBuffer token,
                     ffi::Result<ffi::AnyBuffer> token_out) {
  PassToken(token, token_out);
  if (request.element_count() != 2) {
    return ffi::Error::InvalidArgument("send_layer: request is not uint32[2]");
  }
  const auto found = Registry<PagePool>::Get().Find(pool);
  if (found == nullptr) {
    return ToError(Status(StatusCode::kNotFound,
                          "send_layer: there is no pool " +
                              std::to_string(pool) +
                              " (any more); it ends with its PageSender"));
  }
  const uint32_t* const words = request.typed_data();
  const PagePool::Note note = {.request = uint64_t{words[1]} << 32 | words[0],
                               .layer = layer};
  const Status put = found->Put(
      note,
      {static_cast<const std::byte*>(rows.untyped_data()), rows.size_bytes()},
      {from.typed_data(), from.element_count()},
      {to.typed_data(), to.element_count()});
  if (!put.ok()) return ToError(put.Annotate("send_layer"));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricSendLayer, SendLayer,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("pool")
                                  .Attr<int64_t>("layer")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace jaxfabric
