// Host: what this process sees of the machine it plays. Its NICs, its queue
// pairs, and the lock that stands for the hardware's own concurrency.

#ifndef JAXFABRIC_TESTS_SOFTEFA_HOST_H_
#define JAXFABRIC_TESTS_SOFTEFA_HOST_H_

#include <infiniband/verbs.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "tests/softefa/faults.h"
#include "tests/softefa/settings.h"
#include "tests/softefa/wire.h"

namespace jaxfabric::softefa {

struct QueuePair;

struct Nic : ibv_device {
  int index;
  Gid gid;
  // When the wire is free again; only paced NICs are ever busy.
  int64_t free_ns = 0;
};

struct Host {
  // Recursive: work requests are built, and completions read, between two calls
  // of the provider.
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<Nic>> nics;
  ProcessFile* process = nullptr;
  std::vector<QueuePair*> queue_pairs;
  Faults faults;
  Chaos chaos{0, 0};
};

// Opened by the first call: the library is also loaded into shells and the like
// that a test starts on the way.
Host& TheHost();

inline Nic& NicOf(const ibv_context* context) {
  return *static_cast<Nic*>(context->device);
}

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_HOST_H_
