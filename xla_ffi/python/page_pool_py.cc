#include "python/page_pool_py.h"

#include <nanobind/stl/shared_ptr.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "base/registry.h"
#include "engine/page_pool.h"
#include "engine/watcher.h"

namespace jaxfabric {
namespace {

namespace nb = nanobind;

// A pool, and what keeps its memory.
class NativePagePool {
 public:
  NativePagePool(uint64_t address, nb::object memory, uint64_t layers,
                 uint64_t pages, uint64_t page_bytes,
                 std::shared_ptr<Watcher> watcher)
      : memory_(std::move(memory)),
        pool_(std::make_shared<PagePool>(
            reinterpret_cast<std::byte*>(address),  // NOLINT
            PagePool::Shape{layers, pages, page_bytes}, std::move(watcher))) {
    Registry<PagePool>::Get().Add(pool_->id(), pool_);
  }
  NativePagePool(const NativePagePool&) = delete;
  NativePagePool& operator=(const NativePagePool&) = delete;
  ~NativePagePool() { Close(); }

  int64_t id() const { return pool_->id(); }
  nb::list Take() {
    nb::list notes;
    for (const PagePool::Note& note : pool_->Take()) {
      notes.append(nb::make_tuple(note.request, note.layer));
    }
    return notes;
  }
  void Close() {
    nb::gil_scoped_release release;  // a copy may be under way
    Registry<PagePool>::Get().Remove(pool_->id());
    pool_->Close();
  }

 private:
  nb::object memory_;
  std::shared_ptr<PagePool> pool_;
};

}  // namespace

void RegisterPagePool(nb::module_& m) {
  nb::class_<NativePagePool>(m, "NativePagePool")
      .def(nb::init<uint64_t, nb::object, uint64_t, uint64_t, uint64_t,
                    std::shared_ptr<Watcher>>(),
           nb::arg("address"), nb::arg("memory"), nb::arg("layers"),
           nb::arg("pages"), nb::arg("page_bytes"), nb::arg("watcher"))
      .def_prop_ro("id", &NativePagePool::id)
      .def("take", &NativePagePool::Take)
      .def("close", &NativePagePool::Close);
}

}  // namespace jaxfabric
