// TransferEngine: what to say of an operation that has not ended in time.

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "engine/transfer_engine.h"

namespace jaxfabric {
namespace {

// More of them make an error no clearer.
constexpr size_t kNamesMax = 3;

std::string Seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, seconds < 10 ? "%.2g s" : "%.0f s", seconds);
  return text;
}

// For who waits in vain: perhaps somebody answers whom we do not understand.
std::string RefusedFrames(const TransferEngineStats& stats,
                          const std::vector<DomainStats>& nics) {
  uint64_t refused = stats.refused_seal + stats.refused_version;
  for (const DomainStats& nic : nics) refused += nic.refused_frames;
  if (refused == 0) return "";
  return "; " + std::to_string(refused) +
         " messages of another version or token were dropped so far: do both "
         "sides have the same jaxfabric and the same token=?";
}

}  // namespace

std::string TransferEngine::DescribeLocked(const Submission& submission) const {
  const double elapsed_s = static_cast<double>(MonotonicNanoseconds() -
                                               submission.future->begin_ns()) /
                           1e9;
  std::string text = submission.future->label() + ": " + Seconds(elapsed_s) +
                     " into a time limit of " + Seconds(submission.timeout_s) +
                     ", ";
  std::string missing;
  const auto list = [&](uint32_t peer) {
    missing += (missing.empty() ? "" : ", ") + NameLocked(peer);
  };
  switch (submission.kind) {
    case SubmissionKind::kWrites:
    case SubmissionKind::kSend:
      for (const Submission::Part& part : submission.parts) {
        if (part.open && missing.size() < 500) list(part.peer);
      }
      return text + std::to_string(submission.open_parts) + " of " +
             std::to_string(submission.parts.size()) +
             (submission.kind == SubmissionKind::kWrites
                  ? " transfers have not ended: to "
                  : " messages are not sent: to ") +
             missing;
    case SubmissionKind::kBarrier:
      for (const auto& [peer, count] : submission.arrivals) {
        const auto found = peers_.find(peer);
        if (found == peers_.end() ||
            found->second->barriers[*submission.id].theirs < count) {
          list(peer);
        }
      }
      return text + "waiting for " + missing;
    case SubmissionKind::kExpect:
      for (const uint32_t peer : submission.sources) list(peer);
      text += std::to_string(counters_.Transfers(*submission.id)) + " of " +
              std::to_string(submission.transfers) + " transfers have come";
      if (!missing.empty()) text += " from " + missing;
      missing.clear();
      for (auto lost = lost_.rbegin(); lost != lost_.rend(); ++lost) {
        const size_t named =
            static_cast<size_t>(std::distance(lost_.rbegin(), lost));
        if (named == kNamesMax) {
          missing += " and " + std::to_string(lost_.size() - named) + " more";
          break;
        }
        list(lost->first);
      }
      if (!missing.empty()) text += "; lost meanwhile or before: " + missing;
      return text;
    case SubmissionKind::kConnect:
      return text + "no answer from " + NameLocked(submission.peer) +
             RefusedFrames(stats_, group_->stats());
    case SubmissionKind::kUnregister:
      for (const uint32_t peer : submission.unanswered) list(peer);
      text += std::to_string(registry_.Users(submission.region)) +
              " operations still use the region";
      if (!missing.empty()) {
        text += ", and these have not said that they write no more into it: " +
                missing;
      }
      if (std::find(ending_.exposed.begin(), ending_.exposed.end(),
                    submission.region) != ending_.exposed.end()) {
        text += ", and what a lost peer may have under way is being cut off";
      }
      return text + "; the region stays registered";
    case SubmissionKind::kFence:
      return text + "what lost peers may have under way is being cut off";
  }
  return text;
}

}  // namespace jaxfabric
