#include "base/thread_cores.h"

#include <sched.h>

namespace jaxfabric {

void KeepThisThreadOn(const std::vector<uint32_t>& cores) {
  cpu_set_t allowed;
  cpu_set_t kept;
  CPU_ZERO(&kept);
  // It fails where the machine has more cores than the set; then nothing is
  // kept, and all is as it was.
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  for (const uint32_t core : cores) {
    if (core < CPU_SETSIZE && CPU_ISSET(core, &allowed)) CPU_SET(core, &kept);
  }
  if (CPU_COUNT(&kept) > 0) (void)sched_setaffinity(0, sizeof kept, &kept);
}

}  // namespace jaxfabric
