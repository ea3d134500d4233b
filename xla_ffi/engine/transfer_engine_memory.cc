// TransferEngine: its memory, its watchers, and what it has counted.

#include <utility>

#include "base/registry.h"
#include "engine/immediate.h"
#include "engine/transfer_engine.h"

namespace jaxfabric {

StatusOr<std::shared_ptr<Watcher>> TransferEngine::AllocWatcher(
    Watcher::Callback callback) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) {
    return Status(StatusCode::kFailedPrecondition,
                  "alloc_watcher: the TransferEngine is closed");
  }
  JF_ASSIGN_OR_RETURN(const WatcherWords::Word word, watcher_words_.Take());
  Registry<Watcher>& registry = Registry<Watcher>::Get();
  auto watcher =
      std::make_shared<Watcher>(registry.NextId(), word.memory, word.word,
                                &transport_->doorbell(), std::move(callback));
  registry.Add(watcher->id(), watcher);
  watchers_.push_back(watcher);
  return watcher;
}

void TransferEngine::FreeWatcher(const std::shared_ptr<Watcher>& watcher) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::erase(watchers_, watcher);
  }
  Registry<Watcher>::Get().Remove(watcher->id());
  watcher->Close();
}

// Where it fails, the caller's reference to the owner outlives the lock.
StatusOr<RegionId> TransferEngine::RegisterMemory(
    std::byte* base, uint64_t length,
    const std::shared_ptr<const void>& owner) {
  std::lock_guard<std::mutex> lock(mutex_);
  return registry_.Register(*group_, base, length, owner);
}

StatusOr<RegionId> TransferEngine::AllocateMemory(uint64_t length) {
  std::lock_guard<std::mutex> lock(mutex_);
  return registry_.Allocate(*group_, length);
}

StatusOr<RegionAddress> TransferEngine::Describe(RegionId id) {
  std::lock_guard<std::mutex> lock(mutex_);
  JF_ASSIGN_OR_RETURN(MemoryRegistry::Region* const region, registry_.Find(id));
  if (!region->target) {
    return Status(StatusCode::kUnimplemented,
                  std::string("over ") + caps_.transport +
                      ", peers map the memory that they write into, so it must "
                      "be the engine's own: take it from alloc(), and copy");
  }
  region->described = true;
  return RegionAddress{self_.id,
                       id,
                       {reinterpret_cast<uintptr_t>(region->local.base),
                        region->local.length, region->local.keys}};
}

std::shared_ptr<SharedMemory> TransferEngine::Memory(RegionId id) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto region = registry_.Find(id);
  return region.ok() ? (*region)->memory : nullptr;
}

void TransferEngine::SubmitRecvs(MessageInbox::Callback callback) {
  inbox_->SetCallback(std::move(callback));
}

TransferEngineStats TransferEngine::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  TransferEngineStats stats = stats_;
  stats.counts_dropped += counters_.evicted();
  stats.nics = group_->stats();
  stats.messages_arrived = inbox_->arrived();
  stats.messages_handled = inbox_->handled();
  for (const auto& [name, peer] : peers_) {
    TransferPeerStats& of_peer = stats.peers[name] = peer->stats;
    of_peer.name = peer->address.Describe();
    of_peer.connected = peer->connected;
    of_peer.transfers_received = peer->units_received / kTransferUnits;
  }
  return stats;
}

}  // namespace jaxfabric
