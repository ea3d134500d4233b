#include "c_api.h"

#include <memory>
#include <string>
#include <utility>

#include "base/status.h"
#include "group.h"
#include "group_registry.h"

using jaxfabric::Status;
using jaxfabric::cuda::Group;
using jaxfabric::cuda::GroupRegistry;

struct jaxfabric_cuda_group {
  std::shared_ptr<Group> group;
};

namespace {

thread_local std::string last_error;

int Return(const Status& status) {
  last_error = status.message();
  return static_cast<int>(status.code());
}

}  // namespace

const char* jaxfabric_cuda_error() { return last_error.c_str(); }

int jaxfabric_cuda_create(int64_t key, const int64_t* mesh_shape, int mesh_axes,
                          uint64_t window_bytes, uint64_t mailbox_bytes,
                          jaxfabric_cuda_group** group) {
  auto created = Group::Create(key, {mesh_shape, mesh_shape + mesh_axes},
                               window_bytes, mailbox_bytes);
  if (!created.ok()) return Return(created.status());
  *group = new jaxfabric_cuda_group{*std::move(created)};
  return 0;
}

int jaxfabric_cuda_add_local(jaxfabric_cuda_group* group, int rank,
                             int device) {
  return Return(group->group->AddLocal(rank, device));
}

int jaxfabric_cuda_export(jaxfabric_cuda_group* group, int rank, int* fd) {
  auto exported = group->group->Export(rank);
  if (!exported.ok()) return Return(exported.status());
  *fd = *exported;
  return 0;
}

int jaxfabric_cuda_import(jaxfabric_cuda_group* group, int rank, int fd) {
  return Return(group->group->Import(rank, fd));
}

int jaxfabric_cuda_open(jaxfabric_cuda_group* group) {
  return Return(group->group->Open());
}

int jaxfabric_cuda_allocate_window(jaxfabric_cuda_group* group, uint64_t bytes,
                                   int* index) {
  auto allocated = group->group->AllocateWindow(bytes);
  if (!allocated.ok()) return Return(allocated.status());
  *index = *allocated;
  return 0;
}

int64_t jaxfabric_cuda_calls(jaxfabric_cuda_group* group) {
  return group->group->calls();
}

int jaxfabric_cuda_failure(jaxfabric_cuda_group* group) {
  return Return(group->group->Failure());
}

int jaxfabric_cuda_publish(jaxfabric_cuda_group* group, int64_t key,
                           double timeout_s) {
  return Return(GroupRegistry::Get().Add(key, {group->group, timeout_s}));
}

int jaxfabric_cuda_close(jaxfabric_cuda_group* group) {
  GroupRegistry::Get().Remove(group->group.get());
  const Status untold = group->group->Finish();
  delete group;
  return Return(untold);
}
