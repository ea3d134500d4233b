#include "transport/ofi_library.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <dlfcn.h>
#include <signal.h>

#include <algorithm>
#include <map>
#include <mutex>

namespace jaxfabric {
namespace {

constexpr char kSystemLibrary[] = "libfabric.so.1";

// Some providers of old versions install handlers when they are loaded, and
// would then catch crashes that are none of theirs.
class KeepSignalHandlers {
 public:
  KeepSignalHandlers() {
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      sigaction(kSignals[i], nullptr, &actions_[i]);
    }
  }
  ~KeepSignalHandlers() {
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      sigaction(kSignals[i], &actions_[i], nullptr);
    }
  }
  KeepSignalHandlers(const KeepSignalHandlers&) = delete;
  KeepSignalHandlers& operator=(const KeepSignalHandlers&) = delete;

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE,
                                     SIGABRT, SIGINT, SIGTERM};
  struct sigaction actions_[std::size(kSignals)] = {};
};

template <typename Function>
bool Look(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  return *function != nullptr;
}

}  // namespace

StatusOr<const OfiLibrary*> OfiLibrary::Load(const std::string& path) {
  static std::mutex mutex;
  static auto* const loaded =
      new std::map<std::string, std::unique_ptr<OfiLibrary>>();
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<OfiLibrary>& slot = (*loaded)[path];
  if (slot != nullptr) return static_cast<const OfiLibrary*>(slot.get());

  const KeepSignalHandlers keep;
  const char* const name = path.empty() ? kSystemLibrary : path.c_str();
  void* const handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* const why = dlerror();
    return Status(StatusCode::kNotFound,
                  std::string("libfabric cannot be loaded: ") +
                      (why == nullptr ? name : why));
  }
  std::unique_ptr<OfiLibrary> library(new OfiLibrary());
  if (!Look(handle, "fi_getinfo", &library->getinfo_) ||
      !Look(handle, "fi_freeinfo", &library->freeinfo_) ||
      !Look(handle, "fi_dupinfo", &library->dupinfo_) ||
      !Look(handle, "fi_fabric", &library->fabric_) ||
      !Look(handle, "fi_strerror", &library->strerror_) ||
      !Look(handle, "fi_version", &library->version_)) {
    return Status(StatusCode::kNotFound,
                  std::string(name) + " is loaded, but is no libfabric");
  }
  // The first call loads all providers.
  int error = 0;
  (void)library->GetInfo(nullptr, &error);
  slot = std::move(library);
  return static_cast<const OfiLibrary*>(slot.get());
}

OfiLibrary::Info OfiLibrary::GetInfo(const fi_info* hints, int* error) const {
  fi_info* found = nullptr;
  *error = getinfo_(ApiVersion(), nullptr, nullptr, 0, hints, &found);
  return Info(*error == 0 ? found : nullptr, freeinfo_);
}

uint32_t OfiLibrary::ApiVersion() const {
  return std::min<uint32_t>(FI_VERSION(1, 18), version_());
}

std::string OfiLibrary::ErrorText(int64_t error) const {
  return strerror_(static_cast<int>(error < 0 ? -error : error));
}

std::string OfiLibrary::Version() const {
  return std::to_string(FI_MAJOR(version_())) + "." +
         std::to_string(FI_MINOR(version_()));
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
