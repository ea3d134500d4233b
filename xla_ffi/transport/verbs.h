// verbs: RDMA NICs such as ConnectX, by way of libibverbs: RoCE v2 and
// InfiniBand, with reliable connections.
//
// libibverbs is opened at run time, so that a program with this transport in it
// starts on any machine. One Domain is one port of one device.

#ifndef JAXFABRIC_TRANSPORT_VERBS_H_
#define JAXFABRIC_TRANSPORT_VERBS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "transport/availability.h"
#include "transport/transport.h"

namespace jaxfabric {

struct VerbsSettings {
  int32_t gid_index = -1;  // below 0: the best; see ChooseGid
  uint16_t pkey_index = 0;
  uint8_t traffic_class = 0;  // of the IP header: DSCP << 2
  uint8_t service_level = 0;
  // What is not acknowledged within 4.096 us * 2^timeout is sent again,
  // retry_count times; then the queue pair breaks. Not 7, the most there is,
  // which soft-RoCE takes for "without end".
  uint8_t timeout = 16;
  uint8_t retry_count = 6;
  uint16_t queue_depth = 256;
  // A peer that does not answer for so long is lost, when it is joined for the
  // first time or again.
  uint16_t patience_s = 10;
  bool relaxed_ordering = true;
};

struct VerbsOptions {
  // libibverbs.so.1, as dlopen takes it; empty: where the system has it.
  std::string library;
  // Devices or ports to use, as in "mlx5_0" or "mlx5_0:1", in this order.
  // Empty: all that are up.
  std::vector<std::string> nics;
  // Peers show that they know it before they are joined.
  std::string job_secret;
  VerbsSettings settings;
};

// By the names of VerbsSettings; fails with kInvalidArgument for another name
// or a number out of range.
StatusOr<VerbsSettings> ParseVerbsSettings(
    const std::map<std::string, double>& values);

// Fails with kUnimplemented where VerbsState is not kUsable, and with
// kInvalidArgument for a device that does not exist.
StatusOr<std::unique_ptr<Transport>> OpenVerbsTransport(
    const VerbsOptions& options);

// Ports that are up, as "mlx5_0:1"; none where the state says why.
std::vector<std::string> VerbsNicNames(const std::string& library);

// Looks without opening anything that stays open.
TransportState VerbsState(const std::string& library);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_VERBS_H_
