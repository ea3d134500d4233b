#include "engine/link.h"

#include <algorithm>

namespace jaxfabric {
namespace {

// A rate is taken over at least this much.
constexpr uint64_t kSampleBytes = kSplitBytes;
constexpr double kSampleWeight = 0.25;

}  // namespace

void RateMeter::Done(uint64_t bytes, int64_t now_ns, bool telling) {
  const int64_t took_ns = now_ns - since_ns_;
  since_ns_ = now_ns;
  if (!telling) return;
  bytes_ += bytes;
  busy_ns_ += took_ns;
  // Several that are polled at once took the time of the first.
  if (bytes_ < kSampleBytes || took_ns == 0) return;
  const double sample =
      static_cast<double>(bytes_) / static_cast<double>(busy_ns_);
  bytes_per_ns_ =
      bytes_per_ns_ == 0
          ? sample
          : bytes_per_ns_ + kSampleWeight * (sample - bytes_per_ns_);
  bytes_ = 0;
  busy_ns_ = 0;
}

void UnitLedger::Add(LinkCount count) {
  if (units_.size() >= kKeysMax && !units_.contains(count.key)) {
    overflowed_ = true;
    return;
  }
  units_[count.key] += count.units;
}

uint32_t UnitLedger::Units(uint32_t key) const {
  const auto found = units_.find(key);
  return found == units_.end() ? 0 : found->second;
}

void UnitLedger::Clear() {
  units_.clear();
  overflowed_ = false;
}

bool IsOfThePost(const Status& status) {
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
    case StatusCode::kOutOfRange:
    case StatusCode::kNotFound:
    case StatusCode::kPermissionDenied:
    case StatusCode::kUnimplemented:
      return true;
    default:
      return false;
  }
}

bool ReplayWindow::Accept(uint64_t number) {
  if (number > newest_) {
    const uint64_t ahead = std::min(number - newest_, kNumbers);
    for (uint64_t i = 1; i <= ahead; ++i) {
      seen_.reset((number - ahead + i) % kNumbers);
    }
    newest_ = number;
  } else if (newest_ - number >= kNumbers || seen_[number % kNumbers]) {
    return false;
  }
  seen_.set(number % kNumbers);
  return true;
}

}  // namespace jaxfabric
