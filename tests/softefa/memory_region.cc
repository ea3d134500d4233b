#include "tests/softefa/memory_region.h"

#include <errno.h>

#include <mutex>

#include "tests/softefa/host.h"

#undef ibv_reg_mr
#undef ibv_reg_mr_iova

namespace jaxfabric::softefa {
namespace {

// A key is the entry's index and, above it, how often entries were handed out,
// so that a key of deregistered memory stays wrong for long.
ibv_mr* Register(ibv_pd* domain, void* address, size_t bytes,
                 unsigned int access) {
  Host& host = TheHost();
  const std::lock_guard lock(host.mutex);
  static uint32_t last_index = 0;
  static uint32_t generation = 0;
  for (uint32_t tries = 0; tries < kRegionsMax; ++tries) {
    last_index = last_index % (kRegionsMax - 1) + 1;  // never 0
    RegionEntry& entry = host.process->Region(last_index);
    if (entry.key.load(std::memory_order_relaxed) != 0) continue;
    generation = generation % 0x7fff + 1;
    const uint32_t key = generation * kRegionsMax + last_index;
    entry.base = reinterpret_cast<uint64_t>(address);
    entry.length = bytes;
    entry.access = access;
    entry.nic = NicOf(domain->context).index;
    entry.key.store(key, std::memory_order_seq_cst);

    auto* region = new ibv_mr{};
    region->context = domain->context;
    region->pd = domain;
    region->addr = address;
    region->length = bytes;
    region->lkey = region->rkey = key;
    return region;
  }
  errno = ENOMEM;
  return nullptr;
}

}  // namespace

bool IsRegistered(const ibv_sge& span, int nic) {
  return span.length == 0 || TheHost().process->Region(span.lkey).Covers(
                                 span.lkey, nic, span.addr, span.length);
}

}  // namespace jaxfabric::softefa

using namespace jaxfabric::softefa;  // NOLINT: the functions below are C

extern "C" {

ibv_mr* ibv_reg_mr(ibv_pd* domain, void* address, size_t bytes, int access) {
  return Register(domain, address, bytes, access);
}

ibv_mr* ibv_reg_mr_iova2(ibv_pd* domain, void* address, size_t bytes, uint64_t,
                         unsigned int access) {
  return Register(domain, address, bytes, access);
}

ibv_mr* ibv_reg_dmabuf_mr(ibv_pd*, uint64_t, size_t, uint64_t, int, int) {
  errno = EOPNOTSUPP;  // there is no device memory
  return nullptr;
}

// When this returns nobody writes there any more, as on the real device.
int ibv_dereg_mr(ibv_mr* region) {
  RegionEntry& entry = TheHost().process->Region(region->rkey);
  entry.key.store(0, std::memory_order_seq_cst);
  entry.users.Drain();
  delete region;
  return 0;
}

}  // extern "C"
