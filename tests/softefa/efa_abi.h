// What newer versions of infiniband/efadv.h (rdma-core 50 and later, under
// GPL-2.0 OR BSD-2-Clause) define and Debian 12's version 44 does not, and the
// completion codes of the EFA device. The names are ours, so that a header that
// has them does not collide.

#ifndef JAXFABRIC_TESTS_SOFTEFA_EFA_ABI_H_
#define JAXFABRIC_TESTS_SOFTEFA_EFA_ABI_H_

#include <infiniband/efadv.h>

#include <cstdint>

namespace jaxfabric::softefa {

// efadv.h: EFADV_DEVICE_ATTR_CAPS_RDMA_WRITE, _UNSOLICITED_WRITE_RECV.
inline constexpr uint32_t kCapRdmaWrite = 1 << 3;
inline constexpr uint32_t kCapUnsolicitedWriteRecv = 1 << 4;

// efadv.h: struct efadv_qp_init_attr has `uint16_t flags` after its driver QP
// type, where version 44 has reserved bytes, and the flag
// EFADV_QP_FLAGS_UNSOLICITED_WRITE_RECV.
inline constexpr uint32_t kQpFlagsOffset = 12;
inline constexpr uint16_t kQpUnsolicitedWriteRecv = 1 << 0;

// efadv.h: struct efadv_cq, with the last member that version 44 lacks.
struct EfadvCq {
  uint64_t comp_mask;
  int (*wc_read_sgid)(efadv_cq* cq, ibv_gid* gid);
  bool (*wc_is_unsolicited)(efadv_cq* cq);
};

// The `vendor_err` of a completion and libfabric's prov_errno:
// enum efa_io_comp_status of the EFA driver's efa_io_defs.h.
enum class CompletionCode : uint32_t {
  kOk = 0,
  kFlushed = 1,
  kLocalBadKey = 5,
  kLocalBadLength = 6,
  kRemoteBadAddress = 7,
  kRemoteBadQueuePair = 9,
  kRemoteNotReady = 10,
  kLocalUnresponsiveRemote = 13,
  kLocalUnknownPeer = 14,
};

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_EFA_ABI_H_
