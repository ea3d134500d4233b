#include "tests/softefa/address_handle.h"

#include <errno.h>

#include <cstring>
#include <mutex>

#include "tests/softefa/efa_abi.h"
#include "tests/softefa/host.h"

namespace jaxfabric::softefa {
namespace {

struct AddressHandle : ibv_ah {
  Gid gid;
  AddressHandleEntry* entry;
  uint16_t number;
};

}  // namespace

Gid GidOf(const ibv_ah* handle) {
  return static_cast<const AddressHandle*>(handle)->gid;
}

std::optional<uint16_t> HandleNumber(int nic, const Gid& gid) {
  const auto& entries = TheHost().process->address_handles[nic];
  for (uint16_t number = 0; number < entries.size(); ++number) {
    const AddressHandleEntry& entry = entries[number];
    if (entry.gid == Gid{}) break;
    if (entry.gid != gid) continue;
    if (entry.references.load(std::memory_order_relaxed) == 0) break;
    return number;
  }
  return std::nullopt;
}

}  // namespace jaxfabric::softefa

using namespace jaxfabric::softefa;  // NOLINT: the functions below are C

extern "C" {

// Handles of the same peer share their number, as on the real device.
ibv_ah* ibv_create_ah(ibv_pd* domain, ibv_ah_attr* attributes) {
  Host& host = TheHost();
  const std::lock_guard lock(host.mutex);
  Gid gid;
  std::memcpy(gid.data(), attributes->grh.dgid.raw, gid.size());
  auto& entries = host.process->address_handles[NicOf(domain->context).index];
  for (uint16_t number = 0; number < entries.size(); ++number) {
    AddressHandleEntry& entry = entries[number];
    if (entry.gid == Gid{}) entry.gid = gid;
    if (entry.gid != gid) continue;
    entry.references.fetch_add(1, std::memory_order_release);
    auto* handle = new AddressHandle{};
    handle->context = domain->context;
    handle->pd = domain;
    handle->gid = gid;
    handle->entry = &entry;
    handle->number = number;
    return handle;
  }
  errno = ENOMEM;
  return nullptr;
}

int ibv_destroy_ah(ibv_ah* verbs) {
  auto* handle = static_cast<AddressHandle*>(verbs);
  handle->entry->references.fetch_sub(1, std::memory_order_release);
  delete handle;
  return 0;
}

int efadv_query_ah(ibv_ah* handle, efadv_ah_attr* attributes, uint32_t bytes) {
  std::memset(attributes, 0, bytes);
  attributes->ahn = static_cast<AddressHandle*>(handle)->number;
  return 0;
}

}  // extern "C"
