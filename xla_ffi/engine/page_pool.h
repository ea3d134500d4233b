// PagePool: a registered pool of KV pages that programs copy layers into.
//
// A program's handler copies the rows of an operand to their pages, notes which
// layer of which request is there now, and bumps a Watcher, whose callback
// takes the notes and sends the layers while the program goes on.

#ifndef JAXFABRIC_ENGINE_PAGE_POOL_H_
#define JAXFABRIC_ENGINE_PAGE_POOL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/watcher.h"

namespace jaxfabric {

class PagePool {
 public:
  // Which layer of which request a program has copied.
  struct Note {
    uint64_t request = 0;
    int64_t layer = 0;
  };
  struct Shape {
    uint64_t layers = 0;
    uint64_t pages = 0;
    uint64_t page_bytes = 0;
  };
  // Notes that nobody takes, at most: the sender is stuck.
  static constexpr size_t kNotesMax = 1u << 20;

  // The memory, layers of pages, must live until Close.
  PagePool(std::byte* base, const Shape& shape,
           std::shared_ptr<Watcher> watcher);

  // Names it in this process, in compiled programs too; never used twice.
  int64_t id() const { return id_; }

  // Copies row from[i] of `rows` to page to[i] of the layer; an entry that is
  // negative on either side is padding. Any thread; several may be at it.
  Status Put(const Note& note, std::span<const std::byte> rows,
             std::span<const int32_t> from, std::span<const int32_t> to);
  // The notes so far, in their order.
  std::vector<Note> Take();
  // Nothing is copied any more.
  void Close();

 private:
  const int64_t id_;
  const Shape shape_;
  const std::shared_ptr<Watcher> watcher_;
  std::shared_mutex open_;  // held, shared, while copying
  std::byte* base_;         // guarded by open_; null once closed
  std::mutex mutex_;
  std::vector<Note> notes_;  // guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_PAGE_POOL_H_
