// MemoryRegistry: the regions that a TransferEngine has registered, and how
// many operations use each.

#ifndef JAXFABRIC_ENGINE_MEMORY_REGISTRY_H_
#define JAXFABRIC_ENGINE_MEMORY_REGISTRY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "base/shared_memory.h"
#include "base/status.h"
#include "engine/domain_group.h"

namespace jaxfabric {

using RegionId = uint64_t;

// Not thread-safe: its owner serialises the calls, also with the group's.
class MemoryRegistry {
 public:
  struct Region {
    LocalRegion local;
    bool target = false;                   // peers may write into it
    std::shared_ptr<SharedMemory> memory;  // null for foreign memory
    std::shared_ptr<const void> owner;     // of foreign memory: keeps it
    bool described = false;                // so peers may know of it
    std::string stray;                     // who may write into it for ever
    uint64_t stray_number = 0;             // the how manieth stray it was
    uint32_t users = 0;
    bool closing = false;
  };

  // Memory of the caller, which stays until it is unregistered, or is kept by
  // `owner`. Over a transport that maps peers' memory it can only be a source.
  StatusOr<RegionId> Register(DomainGroup& group, std::byte* base,
                              uint64_t length,
                              std::shared_ptr<const void> owner);
  // New memory, zero-filled.
  StatusOr<RegionId> Allocate(DomainGroup& group, uint64_t length);

  // kNotFound for one that is unregistered, or about to be.
  StatusOr<Region*> Find(RegionId id);

  // `peer` may have writes under way, for ever, into what peers know of.
  void MarkStray(const std::string& peer);
  bool HasStray(RegionId id) const;
  uint64_t strays() const { return strays_; }  // so far
  // The first `number` of them were cut off.
  void ClearStrays(uint64_t number);

  // Keeps new users away.
  void BeginRemoval(RegionId id);
  // It could not be removed in time, and is as before.
  void AbandonRemoval(RegionId id);
  // True if the last user of a region that is to be removed has gone.
  bool Release(RegionId id);
  // Needs BeginRemoval before, and no users. Returns the owner, to be let go
  // outside of locks: it may be anything.
  StatusOr<std::shared_ptr<const void>> Remove(DomainGroup& group, RegionId id);
  // For error texts; 0 if there is no such region.
  uint32_t Users(RegionId id) const;

 private:
  std::unordered_map<RegionId, Region> regions_;
  RegionId next_ = 1;
  uint64_t strays_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_MEMORY_REGISTRY_H_
