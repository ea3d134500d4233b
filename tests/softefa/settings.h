// Settings of the software EFA device, read once from the environment.
//
//   SOFTEFA_DIR          directory that all processes of one network share; it
//                        must exist and belongs to the test, which removes it
//   SOFTEFA_HOST         number of the host this process plays (its process id)
//   SOFTEFA_NDEV         NICs of a host, 1 to 4 (1)
//   SOFTEFA_CHAOS        seed that shuffles segments, work requests and
//                        completions; 0 is off (0)
//   SOFTEFA_SEG          bytes that move at a time (262144; 16384 with chaos)
//   SOFTEFA_GBPS         Gbit/s of each NIC, comma-separated, the last one for
//                        all that follow; 0 is unlimited (0)
//   SOFTEFA_SQ           work requests of a send queue (256)
//   SOFTEFA_RQ           posted receives of a queue pair, at most 1024 (1024)
//   SOFTEFA_MTU          largest message of a send, at most 9216 (8928)
//   SOFTEFA_INLINE       bytes of inline data (32)
//   SOFTEFA_MAX_RDMA     largest write or read (1 GiB)
//   SOFTEFA_RDMA         0: no RDMA in the device, sends only (1)
//   SOFTEFA_UNSOLICITED  0: each immediate consumes a posted receive (1)
//   SOFTEFA_NEED_AH      0: a target need not know its initiator (1)
//   SOFTEFA_RNR_MS       patience with a target without receives, for each of
//                        the retries that the queue pair asks for (100)
//   SOFTEFA_LATE_MS      how late a `late` NIC delivers, see faults.h (50)

#ifndef JAXFABRIC_TESTS_SOFTEFA_SETTINGS_H_
#define JAXFABRIC_TESTS_SOFTEFA_SETTINGS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace jaxfabric::softefa {

inline constexpr int kNicsMax = 4;
inline constexpr uint32_t kReceivesMax = 1024;
inline constexpr uint32_t kPacketBytesMax = 9216;

struct Settings {
  std::string directory;
  uint32_t host;
  int nics;
  uint64_t chaos_seed;
  uint64_t segment_bytes;
  std::vector<double> gigabits_per_second;  // by NIC
  uint32_t send_depth;
  uint32_t receive_depth;
  uint32_t message_bytes_max;
  uint32_t inline_bytes_max;
  uint32_t rdma_bytes_max;
  bool rdma;
  bool unsolicited;
  bool need_address_handle;
  int64_t rnr_wait_ns;
  int64_t late_ns;
};

// Ends the process with a sentence on a setting that makes no sense: a test
// would otherwise pass without testing what it says.
const Settings& TheSettings();

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_SETTINGS_H_
