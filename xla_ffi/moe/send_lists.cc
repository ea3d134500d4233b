#include "moe/send_lists.h"

#include <cstddef>
#include <string>

#include "base/check.h"

namespace jaxfabric::moe {
namespace {

constexpr int32_t kSkip = -1;

std::string Where(int32_t token, int32_t k, int32_t id) {
  return "ids[" + std::to_string(token) + ", " + std::to_string(k) +
         "] = " + std::to_string(id);
}

Status RefuseRange(const Layout& layout, int32_t token, int32_t k, int32_t id) {
  return Status(StatusCode::kInvalidArgument,
                Where(token, k, id) + " is not an expert: valid are 0 to " +
                    std::to_string(layout.num_experts - 1) +
                    ", and -1 to skip");
}

Status RefuseTwice(int32_t token, int32_t k, int32_t id) {
  return Status(StatusCode::kInvalidArgument,
                Where(token, k, id) +
                    " names this expert a second time in "
                    "token " +
                    std::to_string(token) +
                    ": an expert may appear once per token");
}

// The destination of an expert, and the last token that was seen to use it.
struct ExpertState {
  int32_t owner = 0;
  int32_t last_token = -1;
};

// How much goes to a destination, then where its next row and slot are put.
struct DestinationState {
  int32_t rows = 0;
  int32_t slots = 0;
  int32_t last_token = -1;
};

std::vector<ExpertState> ListExperts(const Layout& layout) {
  std::vector<ExpertState> experts(layout.num_experts);
  for (int32_t e = 0; e < layout.num_experts; ++e) {
    experts[e].owner = e / layout.experts_local();
  }
  return experts;
}

Status Count(const Layout& layout, std::span<const int32_t> ids,
             std::vector<ExpertState>& experts,
             std::vector<DestinationState>& destinations) {
  const int32_t* id = ids.data();
  for (int32_t t = 0; t < layout.tokens; ++t) {
    for (int32_t k = 0; k < layout.k; ++k, ++id) {
      if (*id == kSkip) continue;
      // One comparison for both ends of the range.
      if (static_cast<uint32_t>(*id) >=
          static_cast<uint32_t>(layout.num_experts)) {
        return RefuseRange(layout, t, k, *id);
      }
      ExpertState& expert = experts[*id];
      if (expert.last_token == t) return RefuseTwice(t, k, *id);
      expert.last_token = t;
      DestinationState& destination = destinations[expert.owner];
      destination.rows += destination.last_token != t;
      destination.last_token = t;
      ++destination.slots;
    }
  }
  return OkStatus();
}

// Turns counts into positions.
void Allocate(std::vector<DestinationState>& destinations, SendLists& lists) {
  lists.row_begin.reserve(destinations.size() + 1);
  lists.slot_begin.reserve(destinations.size() + 1);
  int32_t rows = 0;
  int32_t slots = 0;
  lists.row_begin.push_back(0);
  lists.slot_begin.push_back(0);
  for (DestinationState& destination : destinations) {
    lists.row_begin.push_back(rows + destination.rows);
    lists.slot_begin.push_back(slots + destination.slots);
    destination = {.rows = rows, .slots = slots, .last_token = -1};
    rows = lists.row_begin.back();
    slots = lists.slot_begin.back();
  }
  lists.tokens.resize(rows);
  lists.slot_counts.resize(rows);
  lists.slots.resize(slots);
}

// `ids` was checked by Count. A destination's slots come in (token, k) order,
// so those of one row are neighbours.
void Fill(const Layout& layout, std::span<const int32_t> ids,
          const std::vector<ExpertState>& experts,
          std::vector<DestinationState>& destinations, SendLists& lists) {
  const int32_t experts_local = layout.experts_local();
  const int32_t* id = ids.data();
  for (int32_t t = 0; t < layout.tokens; ++t) {
    for (int32_t k = 0; k < layout.k; ++k, ++id) {
      if (*id == kSkip) continue;
      const int32_t owner = experts[*id].owner;
      DestinationState& destination = destinations[owner];
      if (destination.last_token != t) {
        destination.last_token = t;
        lists.tokens[destination.rows++] = t;
      }
      ++lists.slot_counts[destination.rows - 1];
      lists.slots[destination.slots++] = {.expert = *id - owner * experts_local,
                                          .k = k};
    }
  }
}

}  // namespace

StatusOr<SendLists> BuildSendLists(const Layout& layout,
                                   std::span<const int32_t> ids) {
  JF_CHECK(ids.size() == static_cast<size_t>(layout.tokens) * layout.k);
  std::vector<ExpertState> experts = ListExperts(layout);
  std::vector<DestinationState> destinations(layout.num_ranks);
  JF_RETURN_IF_ERROR(Count(layout, ids, experts, destinations));
  SendLists lists;
  Allocate(destinations, lists);
  Fill(layout, ids, experts, destinations, lists);
  return lists;
}

}  // namespace jaxfabric::moe
