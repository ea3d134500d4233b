#include "engine/page_pool.h"

#include <cstring>
#include <string>
#include <utility>

#include "base/registry.h"

namespace jaxfabric {

PagePool::PagePool(std::byte* base, const Shape& shape,
                   std::shared_ptr<Watcher> watcher)
    : id_(Registry<PagePool>::Get().NextId()),
      shape_(shape),
      watcher_(std::move(watcher)),
      base_(base) {}

Status PagePool::Put(const Note& note, std::span<const std::byte> rows,
                     std::span<const int32_t> from,
                     std::span<const int32_t> to) {
  const uint64_t bytes = shape_.page_bytes;
  const uint64_t count = rows.size() / bytes;
  if (from.size() != to.size() || count * bytes != rows.size() ||
      note.layer < 0 || static_cast<uint64_t>(note.layer) >= shape_.layers) {
    return Status(StatusCode::kInvalidArgument,
                  "the operands do not fit the pool's layout");
  }
  {
    std::shared_lock<std::shared_mutex> lock(open_);
    if (base_ == nullptr) {
      return Status(StatusCode::kFailedPrecondition,
                    "the PageSender was closed");
    }
    std::byte* const layer =
        base_ + static_cast<uint64_t>(note.layer) * shape_.pages * bytes;
    for (size_t i = 0; i < from.size(); ++i) {
      if (from[i] < 0 || to[i] < 0) continue;
      const auto row = static_cast<uint64_t>(from[i]);
      const auto page = static_cast<uint64_t>(to[i]);
      if (row >= count || page >= shape_.pages) {
        return Status(StatusCode::kOutOfRange,
                      "row " + std::to_string(row) + " of " +
                          std::to_string(count) + " to page " +
                          std::to_string(page) + " of " +
                          std::to_string(shape_.pages) + ": out of range");
      }
      std::memcpy(layer + page * bytes, rows.data() + row * bytes, bytes);
    }
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (notes_.size() >= kNotesMax) {
      return Status(StatusCode::kResourceExhausted,
                    "2^20 layers wait to be sent");
    }
    notes_.push_back(note);
  }
  watcher_->Bump();
  return OkStatus();
}

std::vector<PagePool::Note> PagePool::Take() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(notes_, {});
}

void PagePool::Close() {
  std::unique_lock<std::shared_mutex> lock(open_);
  base_ = nullptr;
}

}  // namespace jaxfabric
