// The C interface of libjaxfabric_cuda: what Python calls, through ctypes.
//
// Functions return 0, or a code of base/status.h; the text is then in
// jaxfabric_cuda_error(), which belongs to the calling thread.

#ifndef JAXFABRIC_CUDA_C_API_H_
#define JAXFABRIC_CUDA_C_API_H_

#include <stdint.h>

#define JAXFABRIC_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

struct jaxfabric_cuda_group;

JAXFABRIC_CUDA_EXPORT const char* jaxfabric_cuda_error();

// The steps of Group, in group.h.
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_create(int64_t key,
                                                const int64_t* mesh_shape,
                                                int mesh_axes,
                                                uint64_t window_bytes,
                                                uint64_t mailbox_bytes,
                                                jaxfabric_cuda_group** group);
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_add_local(jaxfabric_cuda_group* group,
                                                   int rank, int device);
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_export(jaxfabric_cuda_group* group,
                                                int rank, int* fd);
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_import(jaxfabric_cuda_group* group,
                                                int rank, int fd);
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_open(jaxfabric_cuda_group* group);
// The index of a new window of all ranks; see Group::AllocateWindow.
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_allocate_window(
    jaxfabric_cuda_group* group, uint64_t bytes, int* index);
// Calls that XLA has asked for; it replays a captured one without asking.
JAXFABRIC_CUDA_EXPORT int64_t jaxfabric_cuda_calls(jaxfabric_cuda_group* group);
// The first failure of a kernel so far; never blocks.
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_failure(jaxfabric_cuda_group* group);

// From here on programs find the group by its Fabric's key.
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_publish(jaxfabric_cuda_group* group,
                                                 int64_t key, double timeout_s);
// Waits for the kernels under way and frees the group; its key is unknown then.
// A failure that no call and no jaxfabric_cuda_failure has told is returned.
JAXFABRIC_CUDA_EXPORT int jaxfabric_cuda_close(jaxfabric_cuda_group* group);

#endif  // JAXFABRIC_CUDA_C_API_H_
