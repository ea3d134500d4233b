#include "moe/message.h"

#include <bit>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "base/cache_line.h"
#include "base/check.h"

namespace jaxfabric::moe {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr uint32_t kMagic = 0x4f4d464a;  // "JFMO"
constexpr uint16_t kVersion = 1;

enum class Kind : uint16_t { kRoute = 1, kReplay = 2, kReduce = 3 };

constexpr uint32_t kExpandFlag = 1;
constexpr uint32_t kZeroTailFlag = 2;
constexpr uint32_t kScalarsFlag = 4;
constexpr uint32_t kScaledFlag = 8;

// offset  field
//  0  magic             8  num_ranks     24  capacity          40  row_bytes
//  4  version          12  tokens        28  expert_alignment  44  row_count
//  6  kind             16  k             32  flags             48  slot_count
//                      20  num_experts   36  element_type      52  scalar_count
//                                                              56  rows_offset
struct Header {
  uint32_t magic;
  uint16_t version;
  uint16_t kind;
  int32_t num_ranks;
  int32_t tokens;
  int32_t k;
  int32_t num_experts;
  int32_t capacity;
  int32_t expert_alignment;
  uint32_t flags;
  int32_t element_type;
  uint32_t row_bytes;
  uint32_t row_count;
  uint32_t slot_count;
  uint32_t scalar_count;
  uint64_t rows_offset;
};
static_assert(sizeof(Header) == 64);
static_assert(offsetof(Header, num_ranks) == 8);
static_assert(offsetof(Header, flags) == 32);
static_assert(offsetof(Header, row_bytes) == 40);
static_assert(offsetof(Header, rows_offset) == 56);
static_assert(std::is_trivially_copyable_v<Header>);

constexpr size_t kRouteRowBytes = 2 * sizeof(int32_t);
constexpr size_t kRouteSlotBytes = sizeof(SendSlot) + sizeof(float);

size_t RowsOffset(size_t metadata_bytes) {
  return AlignUp(sizeof(Header) + metadata_bytes, kCacheLineBytes);
}

size_t MessageBytes(const Layout& layout, size_t metadata_bytes,
                    size_t row_count) {
  return RowsOffset(metadata_bytes) + row_count * layout.row_bytes;
}

size_t RouteMetadataBytes(size_t row_count, size_t slot_count) {
  return row_count * kRouteRowBytes + slot_count * kRouteSlotBytes;
}

size_t ScalarCount(const Layout& layout, size_t row_count, bool with_scalars) {
  return with_scalars ? row_count * layout.slots() : 0;
}

Header MakeHeader(const Layout& layout, Kind kind) {
  Header header = {};
  header.magic = kMagic;
  header.version = kVersion;
  header.kind = static_cast<uint16_t>(kind);
  header.num_ranks = layout.num_ranks;
  header.tokens = layout.tokens;
  header.k = layout.k;
  header.num_experts = layout.num_experts;
  header.capacity = layout.capacity;
  header.expert_alignment = layout.expert_alignment;
  header.flags = (layout.expand ? kExpandFlag : 0) |
                 (layout.zero_tail ? kZeroTailFlag : 0) |
                 (layout.scaled ? kScaledFlag : 0);
  header.element_type = layout.element_type;
  header.row_bytes = static_cast<uint32_t>(layout.row_bytes);
  header.rows_offset = RowsOffset(0);
  return header;
}

// Appends to a message, in ascending order and without reading it.
class Writer {
 public:
  explicit Writer(std::byte* out) : begin_(out), next_(out) {}

  void Append(const void* data, size_t bytes) {
    if (bytes == 0) return;
    std::memcpy(next_, data, bytes);
    next_ += bytes;
  }
  void AppendGathered(const Layout& layout, std::span<const int32_t> tokens,
                      const std::byte* x) {
    for (int32_t token : tokens) {
      Append(x + token * layout.row_bytes, layout.row_bytes);
    }
  }
  void SkipTo(size_t offset) { next_ = begin_ + offset; }

 private:
  std::byte* begin_;
  std::byte* next_;
};

std::vector<float> GatherWeights(const Layout& layout, const SendLists& lists,
                                 int32_t destination,
                                 std::span<const float> weights) {
  JF_CHECK(weights.size() == static_cast<size_t>(layout.tokens) * layout.k);
  std::vector<float> gathered;
  gathered.reserve(lists.SlotCount(destination));
  const std::span<const int32_t> counts = lists.SlotCounts(destination);
  const SendSlot* slot = lists.Slots(destination).data();
  for (size_t m = 0; m < counts.size(); ++m) {
    const int64_t token = lists.Tokens(destination)[m];
    for (int32_t q = 0; q < counts[m]; ++q, ++slot) {
      gathered.push_back(weights[token * layout.k + slot->k]);
    }
  }
  return gathered;
}

Status Damaged(const std::string& what) {
  return Status(StatusCode::kDataLoss, "damaged message: " + what);
}

Status CheckField(const char* name, int64_t theirs, int64_t ours) {
  if (theirs == ours) return OkStatus();
  return Status(StatusCode::kFailedPrecondition,
                std::string("the sender has ") + name + " = " +
                    std::to_string(theirs) + " where this rank has " +
                    std::to_string(ours) +
                    ": the program differs between ranks");
}

Status CheckRowBytes(int64_t theirs, int64_t ours) {
  if (theirs == ours) return OkStatus();
  return Status(StatusCode::kFailedPrecondition,
                "rank sends rows of " + std::to_string(theirs) +
                    " bytes where " + std::to_string(ours) +
                    " were expected: the program differs between ranks");
}

Status CheckFlag(const char* name, uint32_t flag, uint32_t theirs,
                 uint32_t ours) {
  return CheckField(name, (theirs & flag) != 0, (ours & flag) != 0);
}

// `ours` is what this rank would have sent.
Status CheckSameProgram(const Header& theirs, const Header& ours) {
  JF_RETURN_IF_ERROR(CheckField("kind", theirs.kind, ours.kind));
  JF_RETURN_IF_ERROR(CheckField("num_ranks", theirs.num_ranks, ours.num_ranks));
  JF_RETURN_IF_ERROR(CheckField("tokens", theirs.tokens, ours.tokens));
  JF_RETURN_IF_ERROR(CheckField("k", theirs.k, ours.k));
  JF_RETURN_IF_ERROR(
      CheckField("num_experts", theirs.num_experts, ours.num_experts));
  JF_RETURN_IF_ERROR(CheckField("capacity", theirs.capacity, ours.capacity));
  JF_RETURN_IF_ERROR(CheckField("expert_alignment", theirs.expert_alignment,
                                ours.expert_alignment));
  JF_RETURN_IF_ERROR(
      CheckFlag("expand", kExpandFlag, theirs.flags, ours.flags));
  JF_RETURN_IF_ERROR(
      CheckFlag("zero_tail", kZeroTailFlag, theirs.flags, ours.flags));
  JF_RETURN_IF_ERROR(
      CheckFlag("scalars", kScalarsFlag, theirs.flags, ours.flags));
  JF_RETURN_IF_ERROR(
      CheckFlag("e4m3 rows", kScaledFlag, theirs.flags, ours.flags));
  JF_RETURN_IF_ERROR(CheckField("flags", theirs.flags, ours.flags));
  JF_RETURN_IF_ERROR(
      CheckField("element type", theirs.element_type, ours.element_type));
  return CheckRowBytes(theirs.row_bytes, ours.row_bytes);
}

// Copies the header out of `message`, so that it cannot change any more, and
// checks all that does not depend on counts.
StatusOr<Header> ReadHeader(const Header& ours,
                            std::span<const std::byte> message) {
  if (message.size() < sizeof(Header)) {
    return Damaged(std::to_string(message.size()) +
                   " bytes are fewer than a header's 64");
  }
  Header theirs;
  std::memcpy(&theirs, message.data(), sizeof(Header));
  if (theirs.magic != kMagic) return Damaged("it has no header");
  JF_RETURN_IF_ERROR(
      CheckField("message version", theirs.version, ours.version));
  JF_RETURN_IF_ERROR(CheckSameProgram(theirs, ours));
  return theirs;
}

// The counts in `header` are bounded by the layout already.
Status CheckExtent(const Layout& layout, const Header& header,
                   size_t metadata_bytes, size_t message_bytes) {
  if (header.rows_offset != RowsOffset(metadata_bytes)) {
    return Damaged("rows begin at " + std::to_string(header.rows_offset) +
                   " and not at " + std::to_string(RowsOffset(metadata_bytes)));
  }
  const size_t needed = MessageBytes(layout, metadata_bytes, header.row_count);
  if (message_bytes < needed) {
    return Damaged(std::to_string(header.row_count) + " rows need " +
                   std::to_string(needed) + " bytes and " +
                   std::to_string(message_bytes) + " came");
  }
  return OkStatus();
}

Status CheckRowCount(const Header& header, int32_t row_count_expected) {
  if (header.row_count == static_cast<uint32_t>(row_count_expected)) {
    return OkStatus();
  }
  return Status(StatusCode::kFailedPrecondition,
                "the sender has " + std::to_string(header.row_count) +
                    " rows where the plan of this rank has " +
                    std::to_string(row_count_expected) +
                    ": the two ranks use different plans");
}

RouteView ViewOfStorage(std::unique_ptr<std::byte[]> storage, size_t row_count,
                        size_t slot_count) {
  RouteView view;
  // operator new[] aligns for every one of these types, and each part is a
  // multiple of 4 bytes.
  const auto* tokens = reinterpret_cast<const int32_t*>(storage.get());
  const int32_t* counts = tokens + row_count;
  const auto* slots = reinterpret_cast<const SendSlot*>(counts + row_count);
  const auto* weights = reinterpret_cast<const float*>(slots + slot_count);
  view.tokens = {tokens, row_count};
  view.slot_counts = {counts, row_count};
  view.slots = {slots, slot_count};
  view.weights = {weights, slot_count};
  view.storage = std::move(storage);
  return view;
}

Status CheckSlots(const Layout& layout, int32_t token,
                  std::span<const SendSlot> slots,
                  std::vector<int32_t>& last_token_of_expert) {
  int32_t k_before = -1;
  for (const SendSlot& slot : slots) {
    if (slot.k <= k_before || slot.k >= layout.k) {
      return Damaged("k = " + std::to_string(slot.k) + " in token " +
                     std::to_string(token));
    }
    if (slot.expert < 0 || slot.expert >= layout.experts_local() ||
        last_token_of_expert[slot.expert] == token) {
      return Damaged("local expert " + std::to_string(slot.expert) +
                     " in token " + std::to_string(token));
    }
    k_before = slot.k;
    last_token_of_expert[slot.expert] = token;
  }
  return OkStatus();
}

Status CheckRoutes(const Layout& layout, const RouteView& view) {
  std::vector<int32_t> last_token_of_expert(layout.experts_local(), -1);
  std::span<const SendSlot> slots = view.slots;
  int32_t token_before = -1;
  for (size_t m = 0; m < view.tokens.size(); ++m) {
    const int32_t token = view.tokens[m];
    if (token <= token_before || token >= layout.tokens) {
      return Damaged("token " + std::to_string(token) + " after token " +
                     std::to_string(token_before));
    }
    const int32_t count = view.slot_counts[m];
    if (count < 1 || count > layout.slots() ||
        static_cast<size_t>(count) > slots.size()) {
      return Damaged(std::to_string(count) + " slots in token " +
                     std::to_string(token));
    }
    JF_RETURN_IF_ERROR(
        CheckSlots(layout, token, slots.first(count), last_token_of_expert));
    slots = slots.subspan(count);
    token_before = token;
  }
  if (!slots.empty()) {
    return Damaged(std::to_string(slots.size()) + " slots without a row");
  }
  return OkStatus();
}

}  // namespace

size_t RouteMessageBytes(const Layout& layout, const SendLists& lists,
                         int32_t destination) {
  const size_t rows = lists.RowCount(destination);
  return MessageBytes(
      layout, RouteMetadataBytes(rows, lists.SlotCount(destination)), rows);
}

size_t RouteMessageBytesMax(const Layout& layout) {
  const size_t rows = layout.tokens;
  return MessageBytes(layout, RouteMetadataBytes(rows, rows * layout.slots()),
                      rows);
}

void PackRouteMessage(const Layout& layout, const SendLists& lists,
                      int32_t destination, std::span<const float> weights,
                      const std::byte* x, std::byte* out) {
  const std::span<const int32_t> tokens = lists.Tokens(destination);
  const std::span<const int32_t> counts = lists.SlotCounts(destination);
  const std::span<const SendSlot> slots = lists.Slots(destination);
  const std::vector<float> gathered =
      GatherWeights(layout, lists, destination, weights);
  Header header = MakeHeader(layout, Kind::kRoute);
  header.row_count = static_cast<uint32_t>(tokens.size());
  header.slot_count = static_cast<uint32_t>(slots.size());
  header.rows_offset =
      RowsOffset(RouteMetadataBytes(tokens.size(), slots.size()));

  Writer writer(out);
  writer.Append(&header, sizeof(header));
  writer.Append(tokens.data(), tokens.size_bytes());
  writer.Append(counts.data(), counts.size_bytes());
  writer.Append(slots.data(), slots.size_bytes());
  writer.Append(gathered.data(), gathered.size() * sizeof(float));
  writer.SkipTo(header.rows_offset);
  writer.AppendGathered(layout, tokens, x);
}

StatusOr<RouteView> ParseRouteMessage(const Layout& layout,
                                      std::span<const std::byte> message) {
  JF_ASSIGN_OR_RETURN(const Header header,
                      ReadHeader(MakeHeader(layout, Kind::kRoute), message));
  const size_t rows = header.row_count;
  const size_t slots = header.slot_count;
  if (rows > static_cast<size_t>(layout.tokens) ||
      slots > rows * layout.slots() || header.scalar_count != 0) {
    return Damaged(std::to_string(rows) + " rows with " +
                   std::to_string(slots) + " slots");
  }
  const size_t metadata_bytes = RouteMetadataBytes(rows, slots);
  JF_RETURN_IF_ERROR(
      CheckExtent(layout, header, metadata_bytes, message.size()));

  auto storage = std::make_unique_for_overwrite<std::byte[]>(metadata_bytes);
  std::memcpy(storage.get(), message.data() + sizeof(Header), metadata_bytes);
  RouteView view = ViewOfStorage(std::move(storage), rows, slots);
  view.rows = {.data = message.data() + header.rows_offset,
               .tokens = nullptr,
               .row_bytes = layout.row_bytes};
  JF_RETURN_IF_ERROR(CheckRoutes(layout, view));
  return view;
}

RouteView DirectRouteView(const Layout& layout, const SendLists& lists,
                          int32_t destination, std::span<const float> weights,
                          const std::byte* x) {
  RouteView view;
  view.tokens = lists.Tokens(destination);
  view.slot_counts = lists.SlotCounts(destination);
  view.slots = lists.Slots(destination);
  const std::vector<float> gathered =
      GatherWeights(layout, lists, destination, weights);
  const size_t bytes = gathered.size() * sizeof(float);
  view.storage = std::make_unique_for_overwrite<std::byte[]>(bytes);
  if (bytes > 0) std::memcpy(view.storage.get(), gathered.data(), bytes);
  view.weights = {reinterpret_cast<const float*>(view.storage.get()),
                  gathered.size()};
  view.rows = DirectRows(layout, lists, destination, x);
  return view;
}

size_t ReplayMessageBytes(const Layout& layout, int32_t row_count) {
  return MessageBytes(layout, 0, row_count);
}

void PackReplayMessage(const Layout& layout, const SendLists& lists,
                       int32_t destination, const std::byte* x,
                       std::byte* out) {
  Header header = MakeHeader(layout, Kind::kReplay);
  header.row_count = static_cast<uint32_t>(lists.RowCount(destination));
  Writer writer(out);
  writer.Append(&header, sizeof(header));
  writer.AppendGathered(layout, lists.Tokens(destination), x);
}

StatusOr<RowSource> ParseReplayMessage(const Layout& layout,
                                       int32_t row_count_expected,
                                       std::span<const std::byte> message) {
  JF_ASSIGN_OR_RETURN(const Header header,
                      ReadHeader(MakeHeader(layout, Kind::kReplay), message));
  JF_RETURN_IF_ERROR(CheckRowCount(header, row_count_expected));
  JF_RETURN_IF_ERROR(CheckExtent(layout, header, 0, message.size()));
  return RowSource{.data = message.data() + header.rows_offset,
                   .tokens = nullptr,
                   .row_bytes = layout.row_bytes};
}

RowSource DirectRows(const Layout& layout, const SendLists& lists,
                     int32_t destination, const std::byte* x) {
  return {.data = x,
          .tokens = lists.Tokens(destination).data(),
          .row_bytes = layout.row_bytes};
}

size_t ReduceMessageBytes(const Layout& layout, int32_t row_count,
                          bool with_scalars) {
  const size_t scalars = ScalarCount(layout, row_count, with_scalars);
  return MessageBytes(layout, scalars * sizeof(float), row_count);
}

ReduceParts StartReduceMessage(const Layout& layout, int32_t row_count,
                               bool with_scalars, std::byte* out) {
  const size_t scalars = ScalarCount(layout, row_count, with_scalars);
  Header header = MakeHeader(layout, Kind::kReduce);
  if (with_scalars) header.flags |= kScalarsFlag;
  header.row_count = static_cast<uint32_t>(row_count);
  header.scalar_count = static_cast<uint32_t>(scalars);
  header.rows_offset = RowsOffset(scalars * sizeof(float));
  std::memcpy(out, &header, sizeof(header));
  return {.scalars = with_scalars ? out + sizeof(Header) : nullptr,
          .rows = out + header.rows_offset};
}

StatusOr<ReduceView> ParseReduceMessage(const Layout& layout,
                                        int32_t row_count_expected,
                                        bool with_scalars,
                                        std::span<const std::byte> message) {
  Header ours = MakeHeader(layout, Kind::kReduce);
  if (with_scalars) ours.flags |= kScalarsFlag;
  JF_ASSIGN_OR_RETURN(const Header header, ReadHeader(ours, message));
  JF_RETURN_IF_ERROR(CheckRowCount(header, row_count_expected));
  const size_t scalars = ScalarCount(layout, header.row_count, with_scalars);
  if (header.scalar_count != scalars) {
    return Damaged(std::to_string(header.scalar_count) + " scalars for " +
                   std::to_string(header.row_count) + " rows");
  }
  JF_RETURN_IF_ERROR(
      CheckExtent(layout, header, scalars * sizeof(float), message.size()));
  ReduceView view;
  view.rows = {.data = message.data() + header.rows_offset,
               .tokens = nullptr,
               .row_bytes = layout.row_bytes};
  if (with_scalars) view.scalars = message.data() + sizeof(Header);
  return view;
}

}  // namespace jaxfabric::moe
