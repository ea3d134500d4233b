// put, put_pages, scatter, wait, barrier, exchange.

#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "engine/immediate.h"
#include "handlers/call.h"
#include "handlers/handlers.h"

namespace jaxfabric {

struct PutAttributes : CallAttributes {
  int64_t window;
  int64_t id;
};

struct WaitAttributes : CallAttributes {
  int64_t window;
  int64_t id;
  int64_t count;
};

struct ExchangeAttributes : CallAttributes {
  // source, destination, source, destination, ... as positions on the axis
  xla::ffi::Span<const int64_t> pairs;
};

}  // namespace jaxfabric

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::PutAttributes, JF_CALL_ATTRIBUTES,
    ::xla::ffi::StructMember<int64_t>("window"),
    ::xla::ffi::StructMember<int64_t>("id"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::WaitAttributes, JF_CALL_ATTRIBUTES,
    ::xla::ffi::StructMember<int64_t>("window"),
    ::xla::ffi::StructMember<int64_t>("id"),
    ::xla::ffi::StructMember<int64_t>("count"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::ExchangeAttributes, JF_CALL_ATTRIBUTES,
    ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("pairs"));

namespace jaxfabric {
namespace {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Position = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<ffi::AnyBuffer>;

constexpr uint32_t kUserIdBits = 8;

uint32_t WindowSlot(int64_t window, int64_t id) {
  return static_cast<uint32_t>(window << kUserIdBits | id);
}

StatusOr<Window> FindWindow(const Fabric& fabric, int64_t index) {
  std::lock_guard<std::mutex> lock(fabric.mutex);
  if (index < 0 || index >= static_cast<int64_t>(fabric.windows.size())) {
    return Status(StatusCode::kFailedPrecondition,
                  "the Fabric '" + fabric.name + "' has no window " +
                      std::to_string(index) +
                      "; make it again after the Fabric was opened again");
  }
  return fabric.windows[static_cast<size_t>(index)];
}

// The rank at `position` on the call's axis.
StatusOr<uint32_t> RankAt(const Call& call, int64_t position) {
  if (position >= static_cast<int64_t>(call.group.ranks.size())) {
    return Status(StatusCode::kOutOfRange,
                  "dst=" + std::to_string(position) + " on an axis of size " +
                      std::to_string(call.group.ranks.size()));
  }
  return call.group.ranks[static_cast<size_t>(position)];
}

// Where one contiguous part of `x` goes.
struct Target {
  int64_t position;  // on the axis; negative: nowhere
  int64_t offset;    // in elements of the window
  const std::byte* source;
  uint64_t bytes;
};

Status PutOne(const Call& call, const Window& window, const Target& target,
              uint64_t item_bytes, uint32_t slot) {
  if (target.position < 0) return OkStatus();
  JF_ASSIGN_OR_RETURN(const uint32_t rank, RankAt(call, target.position));
  const uint64_t items = window.bytes / item_bytes;
  const uint64_t count = target.bytes / item_bytes;
  if (target.offset < 0 || count > items ||
      static_cast<uint64_t>(target.offset) > items - count) {
    return Status(StatusCode::kOutOfRange,
                  "offset=" + std::to_string(target.offset) + " and " +
                      std::to_string(count) +
                      " elements do not fit a window "
                      "of " +
                      std::to_string(items) + " elements");
  }
  const uint64_t at =
      window.offset + static_cast<uint64_t>(target.offset) * item_bytes;
  call.endpoint->Put(rank, {{target.source, at, target.bytes}}, slot,
                     call.operation);
  return OkStatus();
}

// Pages of an operand, and the pages of the window that they go to.
struct PageList {
  const std::byte* pages;
  uint64_t page_bytes;
  uint64_t source_pages;
  std::span<const int32_t> source;
  std::span<const int32_t> destination;
};

StatusOr<std::vector<WindowPart>> PartsOf(const PageList& list,
                                          const Window& window) {
  const auto window_pages = static_cast<int64_t>(
      list.page_bytes == 0 ? 0 : window.bytes / list.page_bytes);
  std::vector<WindowPart> parts;
  std::vector<bool> written(static_cast<size_t>(window_pages));
  for (size_t i = 0; i < list.source.size(); ++i) {
    const int64_t from = list.source[i];
    const int64_t to = list.destination[i];
    if (from < 0 || to < 0) continue;  // padding of a static length
    if (from >= static_cast<int64_t>(list.source_pages) || to >= window_pages) {
      return Status(
          StatusCode::kOutOfRange,
          "entry " + std::to_string(i) + ": page " + std::to_string(from) +
              " of " + std::to_string(list.source_pages) + " into page " +
              std::to_string(to) + " of " + std::to_string(window_pages));
    }
    if (written[static_cast<size_t>(to)]) {
      return Status(StatusCode::kInvalidArgument,
                    "dst_idx holds page " + std::to_string(to) +
                        " twice; writes have no order, so that either could "
                        "be the last");
    }
    written[static_cast<size_t>(to)] = true;
    parts.push_back(
        {list.pages + static_cast<uint64_t>(from) * list.page_bytes,
         window.offset + static_cast<uint64_t>(to) * list.page_bytes,
         list.page_bytes});
  }
  return parts;
}

uint64_t ItemBytes(const ffi::AnyBuffer& x) {
  return ffi::ByteWidth(x.element_type());
}

ffi::Future Put(int32_t device, ffi::RunId run_id, PutAttributes attributes,
                Position position, Buffer x, ffi::Buffer<ffi::S32> dst,
                ffi::Buffer<ffi::S32> offset, Buffer token, Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](const Call& call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(const Window window,
                            FindWindow(*call.fabric, attributes.window));
        return PutOne(
            call, window,
            {dst.typed_data()[0], offset.typed_data()[0],
             static_cast<const std::byte*>(x.untyped_data()), x.size_bytes()},
            ItemBytes(x), WindowSlot(attributes.window, attributes.id));
      });
}

ffi::Future Scatter(int32_t device, ffi::RunId run_id, PutAttributes attributes,
                    Position position, Buffer x, ffi::Buffer<ffi::S32> offsets,
                    Buffer token, Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](const Call& call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(const Window window,
                            FindWindow(*call.fabric, attributes.window));
        const size_t peers = call.group.ranks.size();
        const uint64_t slice_bytes = x.size_bytes() / peers;
        const auto* data = static_cast<const std::byte*>(x.untyped_data());
        for (size_t i = 0; i < peers; ++i) {
          const int64_t at = offsets.typed_data()[i];
          const Target target = {at < 0 ? -1 : static_cast<int64_t>(i), at,
                                 data + i * slice_bytes, slice_bytes};
          JF_RETURN_IF_ERROR(
              PutOne(call, window, target, ItemBytes(x),
                     WindowSlot(attributes.window, attributes.id)));
        }
        return OkStatus();
      });
}

ffi::Future PutPages(int32_t device, ffi::RunId run_id,
                     PutAttributes attributes, Position position, Buffer pages,
                     ffi::Buffer<ffi::S32> source,
                     ffi::Buffer<ffi::S32> destination,
                     ffi::Buffer<ffi::S32> dst, Buffer token,
                     Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](const Call& call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(const Window window,
                            FindWindow(*call.fabric, attributes.window));
        const int64_t target = dst.typed_data()[0];
        if (target < 0) return OkStatus();
        JF_ASSIGN_OR_RETURN(const uint32_t rank, RankAt(call, target));
        const auto count = static_cast<uint64_t>(pages.dimensions()[0]);
        const PageList list = {
            static_cast<const std::byte*>(pages.untyped_data()),
            count == 0 ? 0 : pages.size_bytes() / count,
            count,
            {source.typed_data(), source.element_count()},
            {destination.typed_data(), destination.element_count()}};
        JF_ASSIGN_OR_RETURN(std::vector<WindowPart> parts,
                            PartsOf(list, window));
        call.endpoint->Put(rank, std::move(parts),
                           WindowSlot(attributes.window, attributes.id),
                           call.operation);
        return OkStatus();
      });
}

ffi::Future Wait(int32_t device, ffi::RunId run_id, WaitAttributes attributes,
                 Position position, Buffer token, Result out,
                 Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](const Call& call) -> Status {
        PassToken(token, token_out);
        JF_ASSIGN_OR_RETURN(const Window window,
                            FindWindow(*call.fabric, attributes.window));
        if (out->size_bytes() != window.bytes) {
          return Status(StatusCode::kFailedPrecondition,
                        "the program reads a window of " +
                            std::to_string(out->size_bytes()) +
                            " bytes; this Fabric's has " +
                            std::to_string(window.bytes));
        }
        const uint32_t slot = WindowSlot(attributes.window, attributes.id);
        Endpoint* const endpoint = call.endpoint;
        call.operation->SetWaitingFor([endpoint, slot,
                                       count = attributes.count] {
          return std::to_string(count) +
                 " transfers into the window, of which " +
                 std::to_string(endpoint->window_counters().Transfers(slot)) +
                 " have come";
        });
        auto copy_out =
            [source = endpoint->heap() + endpoint->heap_layout().Windows() +
                      window.offset,
             bytes = window.bytes, target = out->untyped_data(), endpoint,
             span = call.span, waiting = call.BeginWaiting()] {
              endpoint->trace().End(waiting);
              const TraceScope tracing(endpoint->trace(), [&] {
                return TraceEvent{
                    .name = "copy out", .parent = span, .bytes = bytes};
              });
              std::memcpy(target, source, bytes);
            };
        endpoint->Progress();
        const auto waiting = endpoint->window_counters().Expect(
            slot, static_cast<uint64_t>(attributes.count),
            [copy_out, operation = call.operation] { copy_out(); });
        if (waiting == 0) copy_out();
        return OkStatus();
      });
}

ffi::Future Barrier(int32_t device, ffi::RunId run_id,
                    CallAttributes attributes, Position position, Buffer token,
                    Result token_out) {
  return RunCall({device, run_id, position}, attributes,
                 [&](Call call) -> Status {
                   PassToken(token, token_out);
                   for (uint32_t peer : call.Others()) {
                     Outgoing message = call.Message(peer);
                     message.pack = [](std::byte*) {};
                     call.endpoint->Send(std::move(message));
                   }
                   std::vector<uint32_t> others = call.Others();
                   std::move(call).Await(
                       std::move(others),
                       [](const std::vector<Arrival>&) { return OkStatus(); });
                   return OkStatus();
                 });
}

Status CopyExchanged(const std::vector<Arrival>& arrivals, std::byte* target,
                     uint64_t bytes) {
  const Arrival& arrival = arrivals[0];
  if (arrival.length != bytes) {
    return Status(StatusCode::kFailedPrecondition,
                  "rank " + std::to_string(arrival.source) + " sent " +
                      std::to_string(arrival.length) + " bytes where " +
                      std::to_string(bytes) +
                      " were expected; the program differs between ranks");
  }
  std::memcpy(target, arrival.data, bytes);
  return OkStatus();
}

ffi::Future Exchange(int32_t device, ffi::RunId run_id,
                     ExchangeAttributes attributes, Position position, Buffer x,
                     Buffer token, Result y, Result token_out) {
  return RunCall(
      {device, run_id, position}, attributes, [&](Call call) -> Status {
        PassToken(token, token_out);
        const auto* source = static_cast<const std::byte*>(x.untyped_data());
        auto* target = static_cast<std::byte*>(y->untyped_data());
        const uint64_t bytes = x.size_bytes();
        const auto pairs = attributes.pairs;
        const int64_t me = call.group.position;
        int64_t from = -1;
        for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
          if (pairs[i + 1] == me) from = pairs[i];
          if (pairs[i] != me || pairs[i + 1] == me) continue;
          Outgoing message =
              call.Message(call.group.ranks[static_cast<size_t>(pairs[i + 1])]);
          message.bytes = bytes;
          message.pack = [source, bytes](std::byte* out) {
            std::memcpy(out, source, bytes);
          };
          call.endpoint->Send(std::move(message));
        }
        if (from == me) {
          std::memcpy(target, source, bytes);
        } else if (from < 0) {
          std::memset(target, 0, bytes);
        } else {
          std::vector<uint32_t> sources = {
              call.group.ranks[static_cast<size_t>(from)]};
          std::move(call).Await(
              std::move(sources),
              [target, bytes](const std::vector<Arrival>& arrivals) {
                return CopyExchanged(arrivals, target, bytes);
              });
        }
        return OkStatus();
      });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricPut, Put,
                              BindCall<PutAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricScatter, Scatter,
                              BindCall<PutAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricPutPages, PutPages,
                              BindCall<PutAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricWait, Wait,
    BindCall<WaitAttributes>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxfabricBarrier, Barrier,
    BindCall<CallAttributes>().Arg<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxfabricExchange, Exchange,
                              BindCall<ExchangeAttributes>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());

}  // namespace jaxfabric
