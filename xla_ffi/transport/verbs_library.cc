#include "transport/verbs_library.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <dlfcn.h>

#include <map>
#include <mutex>

namespace jaxfabric {
namespace {

constexpr char kSystemLibrary[] = "libibverbs.so.1";

class Symbols {
 public:
  explicit Symbols(void* handle) : handle_(handle) {}

  template <typename Function>
  void Want(const char* name, Function* function) {
    if (!May(name, function) && missing_ == nullptr) missing_ = name;
  }
  template <typename Function>
  bool May(const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(handle_, name));
    return *function != nullptr;
  }
  const char* missing() const { return missing_; }

 private:
  void* const handle_;
  const char* missing_ = nullptr;
};

// Returns the name of the first symbol that is not there, or nullptr.
const char* LookUp(void* handle, VerbsLibrary* library) {
  Symbols symbols(handle);
  symbols.Want("ibv_get_device_list", &library->get_device_list);
  symbols.Want("ibv_free_device_list", &library->free_device_list);
  symbols.Want("ibv_get_device_name", &library->get_device_name);
  symbols.Want("ibv_open_device", &library->open_device);
  symbols.Want("ibv_close_device", &library->close_device);
  symbols.Want("ibv_query_device", &library->query_device);
  symbols.Want("ibv_query_port", &library->query_port);
  symbols.Want("_ibv_query_gid_table", &library->query_gid_table);
  symbols.Want("ibv_get_async_event", &library->get_async_event);
  symbols.Want("ibv_ack_async_event", &library->ack_async_event);
  symbols.Want("ibv_alloc_pd", &library->alloc_pd);
  symbols.Want("ibv_dealloc_pd", &library->dealloc_pd);
  symbols.Want("ibv_reg_mr_iova2", &library->reg_mr_iova2);
  symbols.Want("ibv_dereg_mr", &library->dereg_mr);
  symbols.Want("ibv_create_comp_channel", &library->create_comp_channel);
  symbols.Want("ibv_destroy_comp_channel", &library->destroy_comp_channel);
  symbols.Want("ibv_create_cq", &library->create_cq);
  symbols.Want("ibv_destroy_cq", &library->destroy_cq);
  symbols.Want("ibv_get_cq_event", &library->get_cq_event);
  symbols.Want("ibv_ack_cq_events", &library->ack_cq_events);
  symbols.Want("ibv_create_srq", &library->create_srq);
  symbols.Want("ibv_destroy_srq", &library->destroy_srq);
  symbols.Want("ibv_create_qp", &library->create_qp);
  symbols.Want("ibv_modify_qp", &library->modify_qp);
  symbols.Want("ibv_destroy_qp", &library->destroy_qp);
  symbols.Want("ibv_create_ah", &library->create_ah);
  symbols.Want("ibv_destroy_ah", &library->destroy_ah);
  symbols.Want("ibv_wc_status_str", &library->wc_status_str);
  symbols.Want("ibv_event_type_str", &library->event_type_str);
  symbols.May("ibv_reg_dmabuf_mr", &library->reg_dmabuf_mr);
  return symbols.missing();
}

}  // namespace

StatusOr<const VerbsLibrary*> VerbsLibrary::Load(const std::string& path) {
  static std::mutex mutex;
  static auto* const loaded =
      new std::map<std::string, std::unique_ptr<VerbsLibrary>>();
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<VerbsLibrary>& slot = (*loaded)[path];
  if (slot != nullptr) return static_cast<const VerbsLibrary*>(slot.get());

  const char* const name = path.empty() ? kSystemLibrary : path.c_str();
  void* const handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* const why = dlerror();
    return Status(StatusCode::kNotFound,
                  std::string("libibverbs cannot be loaded: ") +
                      (why == nullptr ? name : why));
  }
  auto library = std::make_unique<VerbsLibrary>();
  if (const char* const missing = LookUp(handle, library.get())) {
    return Status(StatusCode::kNotFound,
                  std::string(name) + " is loaded, but has no " + missing +
                      ": it is too old, or no libibverbs");
  }
  slot = std::move(library);
  return static_cast<const VerbsLibrary*>(slot.get());
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
