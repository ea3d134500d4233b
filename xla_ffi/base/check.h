// JF_CHECK: programmer errors stop the process with file, line and condition.
// Operating errors (a peer that dies, bad input) are a Status, never a check.

#ifndef JAXFABRIC_BASE_CHECK_H_
#define JAXFABRIC_BASE_CHECK_H_

#include <cstdio>
#include <cstdlib>

#define JF_CHECK(condition)                                                 \
  do {                                                                      \
    if (!(condition)) [[unlikely]] {                                        \
      std::fprintf(stderr, "%s:%d: jaxfabric check failed: %s\n", __FILE__, \
                   __LINE__, #condition);                                   \
      std::abort();                                                         \
    }                                                                       \
  } while (false)

#endif  // JAXFABRIC_BASE_CHECK_H_
