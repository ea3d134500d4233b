// OfiLibrary: libfabric, opened at run time.
//
// Headers come from the machine that builds (rdma/fabric.h, 1.17 or newer); the
// library from the one that runs. Only what it exports is looked up here, all
// else goes through its tables. Structures that it has extended since were
// extended at their ends, and are made by the library itself.

#ifndef JAXFABRIC_TRANSPORT_OFI_LIBRARY_H_
#define JAXFABRIC_TRANSPORT_OFI_LIBRARY_H_

#if __has_include(<rdma/fabric.h>)
#define JAXFABRIC_HAVE_LIBFABRIC 1

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"

namespace jaxfabric {

class OfiLibrary {
 public:
  // The same path gives the same library, which stays loaded. An empty path
  // means libfabric.so.1 where the system has it.
  static StatusOr<const OfiLibrary*> Load(const std::string& path);

  using Info = std::unique_ptr<fi_info, decltype(&::fi_freeinfo)>;

  // An empty one, for hints.
  Info NewInfo() const { return Info(dupinfo_(nullptr), freeinfo_); }
  Info Copy(const fi_info* info) const {
    return Info(dupinfo_(info), freeinfo_);
  }
  // Null if there is nothing; `error` then says why.
  Info GetInfo(const fi_info* hints, int* error) const;
  int OpenFabric(fi_info* info, fid_fabric** fabric) const {
    return fabric_(info->fabric_attr, fabric, nullptr);
  }
  // What a libfabric error number, of either sign, means.
  std::string ErrorText(int64_t error) const;
  std::string Version() const;
  uint32_t NumericVersion() const { return version_(); }

 private:
  OfiLibrary() = default;

  // The newest API that is asked for: RDMA writes of EFA came with 1.18.
  uint32_t ApiVersion() const;

  decltype(&::fi_getinfo) getinfo_ = nullptr;
  decltype(&::fi_freeinfo) freeinfo_ = nullptr;
  decltype(&::fi_dupinfo) dupinfo_ = nullptr;
  decltype(&::fi_fabric) fabric_ = nullptr;
  decltype(&::fi_strerror) strerror_ = nullptr;
  decltype(&::fi_version) version_ = nullptr;
};

}  // namespace jaxfabric

#endif  // __has_include(<rdma/fabric.h>)
#endif  // JAXFABRIC_TRANSPORT_OFI_LIBRARY_H_
