#include "engine/operation.h"

#include <cstdio>
#include <utility>

#include "base/elastic_pool.h"

namespace jaxfabric {
namespace {

thread_local bool t_complete_here = false;

}  // namespace

Operation::CompleteHere::CompleteHere() : before_(t_complete_here) {
  t_complete_here = true;
}

Operation::CompleteHere::~CompleteHere() { t_complete_here = before_; }

Operation::Operation(std::string label, double timeout_s, Done done)
    : label_(std::move(label)),
      timeout_s_(timeout_s),
      begin_ns_(MonotonicNanoseconds()),
      deadline_(Deadline::AfterSeconds(timeout_s)),
      done_(std::move(done)) {}

Operation::~Operation() {
  if (t_complete_here) {
    // What runs now is the user's program, which is not ours to complete from.
    t_complete_here = false;
    done_(std::move(status_));
    t_complete_here = true;
    return;
  }
  ElasticPool::Get().Post(
      [done = std::move(done_), status = std::move(status_)] { done(status); });
}

void Operation::Fail(Status status) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (status_.ok()) status_ = std::move(status);
}

Status Operation::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

void Operation::SetWaitingFor(std::function<std::string()> describe) {
  std::lock_guard<std::mutex> lock(mutex_);
  waiting_for_ = std::move(describe);
}

std::string Operation::Describe() const {
  const double elapsed_s =
      static_cast<double>(MonotonicNanoseconds() - begin_ns_) * 1e-9;
  char times[96];
  std::snprintf(times, sizeof times, ": %.1f s into a time limit of %g s",
                elapsed_s, timeout_s_);
  std::function<std::string()> waiting_for;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_for = waiting_for_;
  }
  // Called without the lock: it takes others.
  std::string text = label_ + times;
  const std::string what = waiting_for ? waiting_for() : "";
  if (!what.empty()) text += ", waiting for " + what;
  return text;
}

}  // namespace jaxfabric
