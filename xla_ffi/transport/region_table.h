// RegionTable: the regions that one Domain has registered, by key.

#ifndef JAXFABRIC_TRANSPORT_REGION_TABLE_H_
#define JAXFABRIC_TRANSPORT_REGION_TABLE_H_

#include <cstdint>
#include <functional>
#include <unordered_map>

#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

// Whether [offset, offset + length) lies within `size`, without overflow.
inline constexpr bool InRange(uint64_t offset, uint64_t length, uint64_t size) {
  return offset <= size && length <= size - offset;
}

class RegionTable {
 public:
  void Add(uint64_t key, const MemoryRegion& region) { regions_[key] = region; }
  bool Remove(uint64_t key) { return regions_.erase(key) > 0; }
  const MemoryRegion* Find(uint64_t key) const {
    const auto found = regions_.find(key);
    return found == regions_.end() ? nullptr : &found->second;
  }

  // Whether `local` may be the source of a write of `length` bytes.
  Status CheckSource(const LocalSpan& local, uint64_t length) const {
    const MemoryRegion* region = Find(local.key);
    if (region == nullptr) {
      return Status(StatusCode::kInvalidArgument,
                    "the source's key is not registered with this Domain");
    }
    // std::less orders unrelated pointers too.
    if (std::less<const std::byte*>()(local.data, region->base) ||
        !InRange(static_cast<uint64_t>(local.data - region->base), length,
                 region->length)) {
      return Status(StatusCode::kOutOfRange,
                    "the source lies outside the region of its key");
    }
    return OkStatus();
  }

  auto begin() const { return regions_.begin(); }
  auto end() const { return regions_.end(); }

 private:
  std::unordered_map<uint64_t, MemoryRegion> regions_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_REGION_TABLE_H_
