// efadv_query_mr: newer providers ask which interconnect a region uses, and
// Debian 12's libefa does not have the call. Alone in its file, without
// efadv.h, because a newer header declares it with a structure that the older
// one lacks.

#include <infiniband/verbs.h>

#include <cstring>

extern "C" int efadv_query_mr(ibv_mr*, void* attributes, uint32_t bytes) {
  std::memset(attributes, 0, bytes);  // no information
  return 0;
}
