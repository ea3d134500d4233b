// The messages of dispatch and combine: one per peer and phase.
//
// A message is a 64-byte header, metadata, and rows that start at the next
// multiple of 64 bytes from the message's begin:
//
//   kind    direction                metadata                          rows
//   route   token's -> expert's rank tokens i32[rows]                  of x
//                                    slot_counts i32[rows]
//                                    slots SendSlot[slots]
//                                    weights f32[slots]
//   replay  token's -> expert's rank none: the plan is known           of x
//   reduce  expert's -> token's rank scalars f32[rows * S], or none    partials
//
// Packing writes each byte of `out` once and in ascending order (padding
// between metadata and rows is left alone) and reads none back: `out` may be
// memory of a peer. Parsing trusts nothing: metadata is copied before it is
// checked, since the peer may still change it, and rows are only ever copied or
// added. A message that was made for another Layout is FailedPrecondition with
// both values; one that contradicts itself is DataLoss. Processor byte order:
// little-endian hosts only, as everywhere in xla_ffi.

#ifndef JAXFABRIC_MOE_MESSAGE_H_
#define JAXFABRIC_MOE_MESSAGE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/status.h"
#include "moe/layout.h"
#include "moe/send_lists.h"

namespace jaxfabric::moe {

// Unique rows in order: packed, as in a message, or gathered from x by token.
// No alignment is assumed.
struct RowSource {
  const std::byte* data = nullptr;
  const int32_t* tokens = nullptr;  // row m is row tokens[m] of data; or null
  int64_t row_bytes = 0;

  const std::byte* Row(int64_t m) const {
    return data + (tokens == nullptr ? m : tokens[m]) * row_bytes;
  }
};

// The routes of one source's rows to one rank, checked against the Layout.
struct RouteView {
  std::span<const int32_t> tokens;
  std::span<const int32_t> slot_counts;  // of each row
  std::span<const SendSlot> slots;
  std::span<const float> weights;  // of each slot
  RowSource rows;
  // Private memory behind the spans, as far as they need some.
  std::unique_ptr<std::byte[]> storage;

  int32_t row_count() const { return static_cast<int32_t>(tokens.size()); }
};

struct ReduceView {
  RowSource rows;  // the partials
  // f32[rows * S] in the message, of any alignment; null if there are none.
  const std::byte* scalars = nullptr;
};

// Route messages. `x` is T rows of layout.row_bytes, `weights` is f32[T, K].
size_t RouteMessageBytes(const Layout& layout, const SendLists& lists,
                         int32_t destination);
size_t RouteMessageBytesMax(const Layout& layout);
void PackRouteMessage(const Layout& layout, const SendLists& lists,
                      int32_t destination, std::span<const float> weights,
                      const std::byte* x, std::byte* out);
StatusOr<RouteView> ParseRouteMessage(const Layout& layout,
                                      std::span<const std::byte> message);

// The same without a message, for ranks of one process (a rank's rows for
// itself first of all): rows are gathered straight from x. Refers to `lists`
// and `x`.
RouteView DirectRouteView(const Layout& layout, const SendLists& lists,
                          int32_t destination, std::span<const float> weights,
                          const std::byte* x);

// Replay messages: the rows of another x along the same plan.
size_t ReplayMessageBytes(const Layout& layout, int32_t row_count);
void PackReplayMessage(const Layout& layout, const SendLists& lists,
                       int32_t destination, const std::byte* x, std::byte* out);
StatusOr<RowSource> ParseReplayMessage(const Layout& layout,
                                       int32_t row_count_expected,
                                       std::span<const std::byte> message);
RowSource DirectRows(const Layout& layout, const SendLists& lists,
                     int32_t destination, const std::byte* x);

// Reduce messages. PackReduceMessage is in reduce.h.
size_t ReduceMessageBytes(const Layout& layout, int32_t row_count,
                          bool with_scalars);
// Where the parts of a reduce message of `row_count` rows go.
struct ReduceParts {
  std::byte* scalars = nullptr;  // null without scalars
  std::byte* rows = nullptr;
};
ReduceParts StartReduceMessage(const Layout& layout, int32_t row_count,
                               bool with_scalars, std::byte* out);
StatusOr<ReduceView> ParseReduceMessage(const Layout& layout,
                                        int32_t row_count_expected,
                                        bool with_scalars,
                                        std::span<const std::byte> message);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_MESSAGE_H_
