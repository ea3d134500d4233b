// VerbsLibrary: libibverbs, opened at run time.
//
// Headers come from the machine that builds (infiniband/verbs.h, 33 or newer);
// the library from the one that runs. What the header defines inline goes
// through the device's own table and needs no symbol; all else is looked up
// here, under its name without "ibv_".

#ifndef JAXFABRIC_TRANSPORT_VERBS_LIBRARY_H_
#define JAXFABRIC_TRANSPORT_VERBS_LIBRARY_H_

#if __has_include(<infiniband/verbs.h>)
#define JAXFABRIC_HAVE_LIBIBVERBS 1

#include <infiniband/verbs.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>

#include "base/status.h"

namespace jaxfabric {

struct VerbsLibrary {
  // The same path gives the same library, which stays loaded. An empty path
  // means libibverbs.so.1 where the system has it.
  static StatusOr<const VerbsLibrary*> Load(const std::string& path);

  decltype(&::ibv_get_device_list) get_device_list = nullptr;
  decltype(&::ibv_free_device_list) free_device_list = nullptr;
  decltype(&::ibv_get_device_name) get_device_name = nullptr;
  decltype(&::ibv_open_device) open_device = nullptr;
  decltype(&::ibv_close_device) close_device = nullptr;
  decltype(&::ibv_query_device) query_device = nullptr;
  int (*query_port)(ibv_context*, uint8_t, ibv_port_attr*) = nullptr;
  decltype(&::_ibv_query_gid_table) query_gid_table = nullptr;
  decltype(&::ibv_get_async_event) get_async_event = nullptr;
  decltype(&::ibv_ack_async_event) ack_async_event = nullptr;
  decltype(&::ibv_alloc_pd) alloc_pd = nullptr;
  decltype(&::ibv_dealloc_pd) dealloc_pd = nullptr;
  decltype(&::ibv_reg_mr_iova2) reg_mr_iova2 = nullptr;
  decltype(&::ibv_dereg_mr) dereg_mr = nullptr;
  decltype(&::ibv_create_comp_channel) create_comp_channel = nullptr;
  decltype(&::ibv_destroy_comp_channel) destroy_comp_channel = nullptr;
  decltype(&::ibv_create_cq) create_cq = nullptr;
  decltype(&::ibv_destroy_cq) destroy_cq = nullptr;
  decltype(&::ibv_get_cq_event) get_cq_event = nullptr;
  decltype(&::ibv_ack_cq_events) ack_cq_events = nullptr;
  decltype(&::ibv_create_srq) create_srq = nullptr;
  decltype(&::ibv_destroy_srq) destroy_srq = nullptr;
  decltype(&::ibv_create_qp) create_qp = nullptr;
  decltype(&::ibv_modify_qp) modify_qp = nullptr;
  decltype(&::ibv_destroy_qp) destroy_qp = nullptr;
  decltype(&::ibv_create_ah) create_ah = nullptr;
  decltype(&::ibv_destroy_ah) destroy_ah = nullptr;
  decltype(&::ibv_wc_status_str) wc_status_str = nullptr;
  decltype(&::ibv_event_type_str) event_type_str = nullptr;
  // Null in libraries before 34, and then device memory cannot be registered.
  decltype(&::ibv_reg_dmabuf_mr) reg_dmabuf_mr = nullptr;
};

// Its structures start as zeros, which not all of its enumerations have a name
// for.
template <typename T>
T VerbsZeroed() {
  static_assert(std::is_trivially_copyable_v<T>);
  alignas(T) std::byte zeros[sizeof(T)] = {};
  T value;
  std::memcpy(&value, zeros, sizeof(value));
  return value;
}

// An object of the library, with the call that ends it.
template <typename T>
using VerbsOwned = std::unique_ptr<T, int (*)(T*)>;

}  // namespace jaxfabric

#endif  // __has_include(<infiniband/verbs.h>)
#endif  // JAXFABRIC_TRANSPORT_VERBS_LIBRARY_H_
