# Sets LIBFABRIC_INCLUDE_DIR, where rdma/fabric.h is (pass
# -DLIBFABRIC_INCLUDE_DIR=... to override). Debian: apt install libfabric-dev.
find_path(LIBFABRIC_INCLUDE_DIR rdma/fabric.h)
if(LIBFABRIC_INCLUDE_DIR)
  message(STATUS "libfabric headers: ${LIBFABRIC_INCLUDE_DIR}/rdma")
else()
  message(STATUS "libfabric headers: none, the ofi transport is not built")
  set(LIBFABRIC_INCLUDE_DIR "")
endif()
