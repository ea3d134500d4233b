#include "engine/match_table.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace jaxfabric {
namespace {

constexpr size_t kUnmatchedShown = 4;

}  // namespace

bool MatchTable::Complete(const Entry& entry) {
  return entry.ready != nullptr &&
         std::all_of(entry.sources.begin(), entry.sources.end(),
                     [&](uint32_t s) { return entry.arrivals.contains(s); });
}

std::vector<Arrival> MatchTable::TakeArrivals(Entry& entry) {
  std::vector<Arrival> arrivals;
  arrivals.reserve(entry.sources.size());
  for (uint32_t source : entry.sources) {
    arrivals.push_back(entry.arrivals.at(source));
  }
  return arrivals;
}

std::function<void()> MatchTable::Add(const Arrival& arrival,
                                      std::string label) {
  Entry& entry = entries_[arrival.key];
  entry.arrivals.emplace(arrival.source, arrival);  // a second is never read
  if (entry.label.empty()) entry.label = std::move(label);
  if (!Complete(entry)) return nullptr;
  std::vector<Arrival> arrivals = TakeArrivals(entry);
  Ready ready = std::move(entry.ready);
  OperationPtr operation = std::move(entry.operation);
  entries_.erase(arrival.key);
  return [ready = std::move(ready), operation = std::move(operation),
          arrivals = std::move(arrivals)]() mutable {
    ready(std::move(arrivals));
  };
}

bool MatchTable::Expect(MatchKey key, std::vector<uint32_t> sources,
                        const OperationPtr& operation, Ready ready,
                        std::vector<Arrival>* arrivals) {
  if (over_) return false;
  Entry& entry = entries_[key];
  entry.sources = std::move(sources);
  entry.ready = std::move(ready);
  entry.operation = operation;
  if (!Complete(entry)) return false;
  *arrivals = TakeArrivals(entry);
  entries_.erase(key);
  return true;
}

std::vector<uint32_t> MatchTable::Missing(MatchKey key) const {
  std::vector<uint32_t> missing;
  const auto found = entries_.find(key);
  if (found == entries_.end()) return missing;
  for (uint32_t source : found->second.sources) {
    if (!found->second.arrivals.contains(source)) missing.push_back(source);
  }
  return missing;
}

bool MatchTable::Awaits(uint32_t source) const {
  return std::any_of(entries_.begin(), entries_.end(), [&](const auto& item) {
    const Entry& entry = item.second;
    return entry.ready != nullptr && !entry.arrivals.contains(source) &&
           std::find(entry.sources.begin(), entry.sources.end(), source) !=
               entry.sources.end();
  });
}

std::string MatchTable::DescribeUnmatched() const {
  std::string text;
  size_t shown = 0;
  for (const auto& [key, entry] : entries_) {
    if (entry.ready != nullptr) continue;
    for (const auto& [source, arrival] : entry.arrivals) {
      if (++shown > kUnmatchedShown) return text + ", and more";
      if (!text.empty()) text += ", ";
      text += entry.label + " from rank " + std::to_string(source);
    }
  }
  return text;
}

std::vector<MatchTable::Ready> MatchTable::TakeExpectations() {
  std::vector<Ready> taken;
  over_ = true;
  for (auto it = entries_.begin(); it != entries_.end();) {
    Entry& entry = it->second;
    if (entry.ready != nullptr) {
      // The operation goes along, so that neither is destroyed under a lock.
      taken.push_back(
          [ready = std::move(entry.ready),
           operation = std::move(entry.operation)](
              std::vector<Arrival> arrivals) { ready(std::move(arrivals)); });
      entry.ready = nullptr;
    }
    it = entry.arrivals.empty() ? entries_.erase(it) : std::next(it);
  }
  return taken;
}

}  // namespace jaxfabric
