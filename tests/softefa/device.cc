// Devices and what they say of themselves. The provider lists the devices,
// opens each of vendor 0x1d0f whose id is an EFA's, and derives from these
// attributes which of its fabrics (efa, efa-direct) it offers and with which
// limits.

#include <errno.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "tests/softefa/completion_queue.h"
#include "tests/softefa/efa_abi.h"
#include "tests/softefa/host.h"
#include "tests/softefa/queue_pair.h"

#undef ibv_query_port

namespace jaxfabric::softefa {
namespace {

constexpr uint32_t kVendor = 0x1d0f;
constexpr uint32_t kPart = 0xefa2;

int QueryPort(ibv_context*, uint8_t, ibv_port_attr* attributes, size_t bytes) {
  ibv_port_attr port{};
  port.state = IBV_PORT_ACTIVE;
  port.max_mtu = port.active_mtu = IBV_MTU_4096;
  port.gid_tbl_len = 1;
  port.pkey_tbl_len = 1;
  // The provider's MTU: the largest packet of its own protocol.
  port.max_msg_sz = TheSettings().message_bytes_max;
  port.phys_state = 5;  // link up
  port.active_width = 2;
  port.active_speed = 32;
  port.link_layer = IBV_LINK_LAYER_UNSPECIFIED;
  std::memcpy(attributes, &port, std::min(bytes, sizeof(port)));
  return 0;
}

}  // namespace
}  // namespace jaxfabric::softefa

using namespace jaxfabric::softefa;  // NOLINT: the functions below are C

extern "C" {

ibv_device** ibv_get_device_list(int* count) {
  Host& host = TheHost();
  // The caller may not keep the list, but the devices stay.
  auto** list = static_cast<ibv_device**>(
      std::calloc(host.nics.size() + 1, sizeof(ibv_device*)));
  for (size_t i = 0; i < host.nics.size(); ++i) list[i] = host.nics[i].get();
  if (count != nullptr) *count = host.nics.size();
  return list;
}

void ibv_free_device_list(ibv_device** list) { std::free(list); }

const char* ibv_get_device_name(ibv_device* device) { return device->name; }

ibv_context* ibv_open_device(ibv_device* device) {
  auto* context = new verbs_context{};
  context->sz = sizeof(verbs_context);
  context->query_port = QueryPort;
  context->create_cq_ex = CreateCompletionQueue;
  context->context.device = device;
  context->context.abi_compat = __VERBS_ABI_IS_EXTENDED;
  context->context.num_comp_vectors = 1;
  context->context.cmd_fd = context->context.async_fd = -1;
  context->context.ops.post_recv = PostReceives;
  return &context->context;
}

int ibv_close_device(ibv_context* context) {
  delete verbs_get_ctx(context);
  return 0;
}

int ibv_query_device(ibv_context*, ibv_device_attr* attributes) {
  *attributes = {};
  std::strcpy(attributes->fw_ver, "0.0.0.0");
  attributes->vendor_id = kVendor;
  attributes->vendor_part_id = kPart;
  attributes->max_mr_size = uint64_t{1} << 40;
  attributes->page_size_cap = 0xfffff000;
  attributes->max_qp = 256;
  attributes->max_qp_wr = TheSettings().send_depth;
  attributes->max_cq = 512;
  attributes->max_cqe = 65536;
  attributes->max_mr = kRegionsMax - 1;
  attributes->max_pd = 256;
  attributes->max_ah = kAddressHandlesMax;
  attributes->max_sge = 2;
  attributes->phys_port_cnt = 1;
  return 0;
}

int efadv_query_device(ibv_context*, efadv_device_attr* attributes,
                       uint32_t bytes) {
  const Settings& settings = TheSettings();
  efadv_device_attr device{};
  device.max_sq_wr = settings.send_depth;
  device.max_rq_wr = settings.receive_depth;
  device.max_sq_sge = 2;
  device.max_rq_sge = 3;
  device.inline_buf_size = settings.inline_bytes_max;
  device.max_rdma_size = settings.rdma ? settings.rdma_bytes_max : 0;
  device.device_caps =
      EFADV_DEVICE_ATTR_CAPS_RNR_RETRY | EFADV_DEVICE_ATTR_CAPS_CQ_WITH_SGID;
  if (settings.rdma) {
    device.device_caps |= EFADV_DEVICE_ATTR_CAPS_RDMA_READ | kCapRdmaWrite;
  }
  if (settings.unsolicited) device.device_caps |= kCapUnsolicitedWriteRecv;
  std::memset(attributes, 0, bytes);
  std::memcpy(attributes, &device, std::min<size_t>(bytes, sizeof(device)));
  return 0;
}

// Exported for callers of old; the header's macro goes through the context.
int ibv_query_port(ibv_context* context, uint8_t port,
                   _compat_ibv_port_attr* attributes) {
  constexpr size_t kCompatBytes = 48;
  return QueryPort(context, port, reinterpret_cast<ibv_port_attr*>(attributes),
                   kCompatBytes);
}

int ibv_query_gid(ibv_context* context, uint8_t, int index, ibv_gid* gid) {
  if (index != 0) return EINVAL;
  std::memcpy(gid->raw, NicOf(context).gid.data(), sizeof(gid->raw));
  return 0;
}

ibv_pd* ibv_alloc_pd(ibv_context* context) {
  auto* domain = new ibv_pd{};
  domain->context = context;
  return domain;
}

int ibv_dealloc_pd(ibv_pd* domain) {
  delete domain;
  return 0;
}

int ibv_fork_init() { return 0; }

ibv_fork_status ibv_is_fork_initialized() { return IBV_FORK_UNNEEDED; }

// No sleeping on completions: the provider then polls.
ibv_comp_channel* ibv_create_comp_channel(ibv_context*) {
  errno = EOPNOTSUPP;
  return nullptr;
}

int ibv_destroy_comp_channel(ibv_comp_channel*) { return EOPNOTSUPP; }

int ibv_get_cq_event(ibv_comp_channel*, ibv_cq**, void**) { return -1; }

void ibv_ack_cq_events(ibv_cq*, unsigned int) {}

}  // extern "C"
