// SpoiltIds: ids under which a part of a transfer may have been counted that
// will never be whole, see transfer_engine_spoilt.cc.

#ifndef JAXFABRIC_ENGINE_SPOILT_IDS_H_
#define JAXFABRIC_ENGINE_SPOILT_IDS_H_

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <utility>

#include "base/status.h"
#include "engine/random_id.h"
#include "engine/recent_map.h"

namespace jaxfabric {

class SpoiltIds {
 public:
  // So many later ones after it, an id is forgotten, and its part with it in
  // all likelihood: receivers keep counts of no more ids.
  static constexpr size_t kIdsMax = 1u << 16;

  // False if it is known already. `receiver` counts under it; `why` is what
  // Check says, "peer 1 ... gave up a transfer".
  bool Add(const RandomId& receiver, uint32_t id, const std::string& why) {
    return ids_.Add({receiver, id}, why);
  }
  // Whether a transfer under `id` may be sent to, or waited for at `receiver`.
  Status Check(const RandomId& receiver, uint32_t id) const {
    const std::string* const why = ids_.Find({receiver, id});
    if (why == nullptr) return OkStatus();
    return Status(StatusCode::kFailedPrecondition,
                  *why +
                      " under this id, which could not be told from what comes "
                      "later; use a new id");
  }

  // Of a transfer to `peer` that has not quite ended.
  void Note(uint32_t peer, uint32_t id) { noted_.insert({peer, id}); }
  bool TakeNote(uint32_t peer, uint32_t id) {
    return noted_.erase({peer, id}) > 0;
  }

 private:
  RecentMap<std::pair<RandomId, uint32_t>, std::string> ids_{kIdsMax};
  std::set<std::pair<uint32_t, uint32_t>> noted_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_SPOILT_IDS_H_
