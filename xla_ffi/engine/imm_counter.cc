#include "engine/imm_counter.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/immediate.h"

namespace jaxfabric {

Status ImmCounterTable::Add(uint32_t id, uint64_t units,
                            std::vector<std::function<void()>>* ready,
                            uint32_t source) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = counters_.find(id);
  if (found == counters_.end()) {
    if (!MakeRoomLocked(source)) {
      return Status(StatusCode::kResourceExhausted,
                    "too many of the " + std::to_string(kIdsMax) +
                        " ids hold transfers that nobody waits for");
    }
    HoldLocked(id, counters_[id], source);
  } else if (found->second.early && found->second.holder == kNobody &&
             source != kAnySource && MakeRoomLocked(source)) {
    // That may have dropped what was there.
    Counter& counter = counters_[id];
    LetGoLocked(counter);
    HoldLocked(id, counter, source);
  }
  counters_[id].units += units;
  SettleLocked(id, ready);
  return OkStatus();
}

bool ImmCounterTable::MakeRoomLocked(uint32_t source) {
  const auto held = held_.find(source);
  const size_t own =
      source == kAnySource || held == held_.end() ? 0 : held->second;
  while (early_ + own >= kIdsMax && !left_.empty()) {
    EraseLocked(counters_.find(left_.front()));
    ++evicted_;
  }
  return early_ + own < kIdsMax;
}

void ImmCounterTable::HoldLocked(uint32_t id, Counter& counter,
                                 uint32_t holder) {
  counter.early = true;
  counter.holder = holder;
  ++early_;
  ++held_[holder];
  if (holder == kNobody) counter.place = left_.insert(left_.end(), id);
}

void ImmCounterTable::LetGoLocked(Counter& counter) {
  if (!counter.early) return;
  counter.early = false;
  --early_;
  if (counter.holder == kNobody) left_.erase(counter.place);
  const auto held = held_.find(counter.holder);
  if (--held->second == 0) held_.erase(held);
}

void ImmCounterTable::EraseLocked(Counters::iterator counter) {
  LetGoLocked(counter->second);
  counters_.erase(counter);
}

void ImmCounterTable::Leave(uint32_t source) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!held_.contains(source)) return;
  for (auto& [id, counter] : counters_) {
    if (!counter.early || counter.holder != source) continue;
    LetGoLocked(counter);
    HoldLocked(id, counter, kNobody);
  }
}

uint64_t ImmCounterTable::evicted() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return evicted_;
}

void ImmCounterTable::SettleLocked(uint32_t id,
                                   std::vector<std::function<void()>>* ready) {
  Counter& counter = counters_[id];
  while (!counter.expectations.empty() &&
         counter.units >= counter.expectations.front().units) {
    Expectation& first = counter.expectations.front();
    counter.units -= first.units;
    id_by_handle_.erase(first.handle);
    ready->push_back(std::move(first.callback));
    counter.expectations.pop_front();
  }
  if (!counter.expectations.empty()) return;
  if (counter.units == 0) {
    EraseLocked(counters_.find(id));
  } else if (!counter.early) {
    HoldLocked(id, counter, kNobody);
  }
}

ImmCounterTable::Handle ImmCounterTable::Expect(
    uint32_t id, uint64_t transfers, std::function<void()> callback) {
  const uint64_t units = transfers * kTransferUnits;
  std::lock_guard<std::mutex> lock(mutex_);
  if (units == 0) return 0;
  if (over_) return next_handle_++;
  Counter& counter = counters_[id];
  if (counter.expectations.empty() && counter.units >= units) {
    counter.units -= units;
    if (counter.units == 0) EraseLocked(counters_.find(id));
    return 0;
  }
  LetGoLocked(counter);
  const Handle handle = next_handle_++;
  counter.expectations.push_back({handle, units, std::move(callback)});
  id_by_handle_[handle] = id;
  return handle;
}

bool ImmCounterTable::Cancel(Handle handle,
                             std::vector<std::function<void()>>* ready) {
  std::function<void()> dropped;  // destroyed after the lock is released
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = id_by_handle_.find(handle);
  if (found == id_by_handle_.end()) return false;
  const uint32_t id = found->second;
  std::list<Expectation>& expectations = counters_.at(id).expectations;
  for (auto it = expectations.begin(); it != expectations.end(); ++it) {
    if (it->handle != handle) continue;
    dropped = std::move(it->callback);
    expectations.erase(it);
    break;
  }
  id_by_handle_.erase(found);
  SettleLocked(id, ready);
  return true;
}

std::vector<std::function<void()>> ImmCounterTable::TakeExpectations() {
  std::vector<std::function<void()>> taken;
  std::lock_guard<std::mutex> lock(mutex_);
  over_ = true;
  for (auto& [id, counter] : counters_) {
    for (Expectation& expectation : counter.expectations) {
      taken.push_back(std::move(expectation.callback));
    }
    counter.expectations.clear();
  }
  id_by_handle_.clear();
  return taken;
}

void ImmCounterTable::Drop(uint32_t id, uint64_t units) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = counters_.find(id);
  if (found == counters_.end()) return;
  Counter& counter = found->second;
  counter.units -= std::min(units, counter.units);
  if (counter.units == 0 && counter.expectations.empty()) EraseLocked(found);
}

bool ImmCounterTable::HasPart(uint32_t id) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = counters_.find(id);
  return found != counters_.end() && found->second.units % kTransferUnits != 0;
}

uint64_t ImmCounterTable::Transfers(uint32_t id) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = counters_.find(id);
  return found == counters_.end() ? 0 : found->second.units / kTransferUnits;
}

}  // namespace jaxfabric
