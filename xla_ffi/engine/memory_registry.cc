#include "engine/memory_registry.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <string>
#include <utility>

namespace jaxfabric {
namespace {

// Whether all pages of it are mapped: registering others would fail late and in
// words of the NIC's, or not at all. MS_ASYNC does nothing but look.
bool IsMapped(const std::byte* base, uint64_t length) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(base);
  if (length > std::numeric_limits<uintptr_t>::max() - begin) return false;
  const uint64_t skipped = begin % page;
  auto* const first = const_cast<std::byte*>(base - skipped);
  return msync(first, skipped + length, MS_ASYNC) == 0;
}

Status CheckLength(uint64_t length) {
  if (length > 0) return OkStatus();
  return Status(StatusCode::kInvalidArgument,
                "a region has at least 1 byte; transfers of no bytes need any "
                "region, and none of its bytes");
}

}  // namespace

StatusOr<RegionId> MemoryRegistry::Register(DomainGroup& group, std::byte* base,
                                            uint64_t length,
                                            std::shared_ptr<const void> owner) {
  JF_RETURN_IF_ERROR(CheckLength(length));
  if (base == nullptr || !IsMapped(base, length)) {
    return Status(StatusCode::kInvalidArgument,
                  "the " + std::to_string(length) +
                      " bytes to register are not all memory of this process; "
                      "were they freed?");
  }
  Region region;
  region.local.base = base;
  region.local.length = length;
  region.owner = std::move(owner);
  region.target = !group.caps().direct_store;
  if (region.target) {
    JF_ASSIGN_OR_RETURN(region.local.keys,
                        group.RegisterMemory({base, length, -1}));
  }
  const RegionId id = next_++;
  regions_[id] = std::move(region);
  return id;
}

StatusOr<RegionId> MemoryRegistry::Allocate(DomainGroup& group,
                                            uint64_t length) {
  JF_RETURN_IF_ERROR(CheckLength(length));
  Region region;
  JF_ASSIGN_OR_RETURN(SharedMemory memory,
                      SharedMemory::Create("jaxfabric-region", length));
  region.memory = std::make_shared<SharedMemory>(std::move(memory));
  region.local.base = region.memory->data();
  region.local.length = length;
  region.target = true;
  JF_ASSIGN_OR_RETURN(region.local.keys,
                      group.RegisterMemory({region.memory->data(), length,
                                            region.memory->fd()}));
  const RegionId id = next_++;
  regions_[id] = std::move(region);
  return id;
}

StatusOr<MemoryRegistry::Region*> MemoryRegistry::Find(RegionId id) {
  const auto found = regions_.find(id);
  if (found == regions_.end() || found->second.closing) {
    return Status(StatusCode::kNotFound,
                  "the memory is not registered with this TransferEngine (any "
                  "more)");
  }
  return &found->second;
}

void MemoryRegistry::MarkStray(const std::string& peer) {
  ++strays_;
  for (auto& [id, region] : regions_) {
    if (!region.target || !region.described) continue;
    region.stray = peer;
    region.stray_number = strays_;
  }
}

bool MemoryRegistry::HasStray(RegionId id) const {
  const auto found = regions_.find(id);
  return found != regions_.end() && !found->second.stray.empty();
}

void MemoryRegistry::ClearStrays(uint64_t number) {
  for (auto& [id, region] : regions_) {
    if (region.stray_number <= number) region.stray.clear();
  }
}

void MemoryRegistry::BeginRemoval(RegionId id) {
  const auto found = regions_.find(id);
  if (found != regions_.end()) found->second.closing = true;
}

void MemoryRegistry::AbandonRemoval(RegionId id) {
  const auto found = regions_.find(id);
  if (found != regions_.end()) found->second.closing = false;
}

bool MemoryRegistry::Release(RegionId id) {
  const auto found = regions_.find(id);
  if (found == regions_.end()) return false;
  return --found->second.users == 0 && found->second.closing;
}

StatusOr<std::shared_ptr<const void>> MemoryRegistry::Remove(DomainGroup& group,
                                                             RegionId id) {
  const auto found = regions_.find(id);
  JF_CHECK(found != regions_.end() && found->second.users == 0);
  if (!found->second.stray.empty()) {
    return Status(StatusCode::kFailedPrecondition,
                  found->second.stray +
                      "; it may still have writes into the region under way, "
                      "which this transport cannot stop (over ofi/tcp, that "
                      "of libfabric 2 can): the region stays registered until "
                      "the TransferEngine is closed");
  }
  if (!found->second.local.keys.empty()) {
    JF_RETURN_IF_ERROR(group.UnregisterMemory(found->second.local.keys));
  }
  std::shared_ptr<const void> owner = std::move(found->second.owner);
  regions_.erase(found);
  return owner;
}

uint32_t MemoryRegistry::Users(RegionId id) const {
  const auto found = regions_.find(id);
  return found == regions_.end() ? 0 : found->second.users;
}

}  // namespace jaxfabric
