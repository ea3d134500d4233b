#include "engine/transfer_engine.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <utility>

#include "base/check.h"
#include "base/thread_cores.h"
#include "engine/immediate.h"
#include "engine/submission_trace.h"

namespace jaxfabric {
namespace {

// The worker looks at deadlines and peers at least this often.
constexpr int64_t kSleepMaxNs = 50'000'000;
// So often a device that cannot ring is looked at while nothing is under way
// here: peers may write, or wait for answers.
constexpr int64_t kIdlePollNs = 1'000'000;
// About a round trip over a network: who waits for longer sleeps meanwhile.
constexpr int64_t kHelpNs = 50'000;
// Who has had the mutex for so long is at something that takes longer than
// waking the worker, as posting to a device that works in its caller's thread.
constexpr int64_t kBusyNs = 50'000;
// So long, writes that were posted may take to end after their deadline. Then
// only cutting the connection takes the buffers back.
constexpr int64_t kTakeBackNs = 2'000'000'000;
// So long, peers may take to accept a farewell.
constexpr double kFarewellS = 0.5;

Status ClosedStatus() {
  return Status(StatusCode::kFailedPrecondition,
                "the TransferEngine was closed");
}

}  // namespace

TransferEngine::TransferEngine(TransferEngineOptions options,
                               std::unique_ptr<Transport> transport)
    : options_(std::move(options)),
      transport_(std::move(transport)),
      inbox_(std::make_shared<MessageInbox>()) {}

StatusOr<std::unique_ptr<TransferEngine>> TransferEngine::Open(
    TransferEngineOptions options, std::unique_ptr<Transport> transport) {
  if (options.nics > DomainGroup::kDomainsMax) {
    return Status(StatusCode::kInvalidArgument,
                  "a TransferEngine has 1 to 8 NICs, not " +
                      std::to_string(options.nics));
  }
  for (const std::string* text : {&options.job, &options.name}) {
    if (text->size() > EngineAddress::kNameBytesMax) {
      return Status(StatusCode::kInvalidArgument,
                    "a TransferEngine's job and name have up to 128 bytes");
    }
    if (!EngineAddress::IsText(*text)) {
      return Status(StatusCode::kInvalidArgument,
                    "a TransferEngine's job and name are UTF-8 without control "
                    "characters");
    }
  }
  if (!std::isfinite(options.heartbeat_s) || options.heartbeat_s <= 0 ||
      !std::isfinite(options.peer_timeout_s) ||
      options.peer_timeout_s <= options.heartbeat_s) {
    return Status(StatusCode::kInvalidArgument,
                  "a TransferEngine's heartbeat_s and peer_timeout_s are "
                  "finite and above 0, and the second is the longer one");
  }
  std::unique_ptr<TransferEngine> engine(
      new TransferEngine(std::move(options), std::move(transport)));
  std::vector<std::unique_ptr<Domain>> domains;
  size_t nics = engine->options_.nics;
  if (nics == 0) {
    nics = std::min(engine->transport_->nic_count(), DomainGroup::kDomainsMax);
  }
  for (size_t i = 0; i < nics; ++i) {
    JF_ASSIGN_OR_RETURN(auto domain, engine->transport_->OpenDomain());
    domains.push_back(std::move(domain));
  }
  engine->group_ = std::make_unique<DomainGroup>(std::move(domains));
  engine->caps_ = engine->group_->caps();
  engine->self_ = {.id = RandomId::Make(),
                   .job = engine->options_.job,
                   .name = engine->options_.name,
                   .domains = engine->group_->addresses()};
  engine->group_->set_on_spoilt(
      [engine = engine.get()](uint32_t peer, uint32_t id) {
        engine->spoilt_.Note(peer, id);
      });
  engine->last_housekeeping_ns_ = MonotonicNanoseconds();
  engine->worker_ = std::thread([engine = engine.get()] { engine->Work(); });
  return engine;
}

void TransferEngine::BeginClose() {
  std::vector<std::shared_ptr<Watcher>> watchers;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    watchers.swap(watchers_);
    for (const auto& [number, submission] : std::map(live_)) {
      StopLocked(submission, ClosedStatus());
    }
  }
  for (const auto& watcher : watchers) FreeWatcher(watcher);
  inbox_->Close();
}

TransferEngine::~TransferEngine() {
  if (worker_.joinable()) {
    BeginClose();
    std::unique_lock<std::mutex> lock(mutex_);
    for (auto& [name, peer] : peers_) SayGoodbyeLocked(*peer);
    lock.unlock();
    const Deadline farewell = Deadline::AfterSeconds(kFarewellS);
    Doorbell& doorbell = transport_->doorbell();
    for (;;) {
      lock.lock();
      const bool idle = group_->Idle() && live_.empty();
      lock.unlock();
      if (idle || farewell.Expired()) break;
      doorbell.Wait(doorbell.Sequence(), Deadline::AfterNanoseconds(1'000'000));
    }
    // Those who ask for memory find that nobody wants it any more.
    for (lock.lock(); mapped_.tasks > 0; lock.lock()) {
      lock.unlock();
      doorbell.Wait(doorbell.Sequence(), Deadline::AfterNanoseconds(1'000'000));
    }
    lock.unlock();
    stop_.store(true, std::memory_order_release);
    doorbell.Ring();
    worker_.join();
  }
  const Status closed = ClosedStatus();
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [number, submission] : live_) submission->failure = closed;
  group_.reset();  // no NIC touches anything from here on
  for (const auto& [number, submission] : std::map(live_)) {
    FinishLocked(submission, closed.Annotate(submission->future->label()));
  }
}

// A Domain's address changes where it had to be opened anew.
std::string TransferEngine::address() const {
  std::lock_guard<std::mutex> lock(mutex_);
  EngineAddress address = self_;
  address.domains = group_->addresses();
  return address.Encode(options_.token);
}

// --- Operations ---

StatusOr<SubmissionPtr> TransferEngine::BeginLocked(SubmissionKind kind,
                                                    OperationLabel label,
                                                    MaybeDeadline deadline) {
  if (closing_) {
    return Status(StatusCode::kFailedPrecondition,
                  label.ToString() + ": the TransferEngine is closed");
  }
  const int64_t now_ns = MonotonicNanoseconds();
  auto submission = std::make_shared<Submission>();
  submission->kind = kind;
  submission->future = std::make_shared<TransferFuture>(std::move(label),
                                                        next_number_++, now_ns);
  submission->deadline =
      deadline ? *deadline : Deadline::AfterSeconds(options_.timeout_s, now_ns);
  const int64_t left_ns = submission->deadline.nanoseconds() - now_ns;
  submission->timeout_s =
      static_cast<double>(std::max<int64_t>(0, left_ns)) / 1e9;
  submission->span = group_->trace().Begin([&] {
    return TraceEvent{.name = "operation",
                      .label = submission->future->label()};
  });
  live_[submission->future->number()] = submission;
  ++stats_.operations;
  return submission;
}

void TransferEngine::FinishLocked(const SubmissionPtr& submission,
                                  const Status& status, uint32_t peer) {
  if (submission->over) return;
  submission->over = true;
  const TransferFuturePtr future = submission->future;
  if (!status.ok()) ++stats_.operations_failed;
  live_.erase(future->number());
  if (submission->kind == SubmissionKind::kBarrier) {
    std::erase(barriers_, submission);
  }
  if (group_ != nullptr) {
    group_->trace().End(submission->span,
                        [&] { return TraceOf(*submission, status); });
  }
  future->Finish(status, submission->lost.value_or(peer));
  if (submission->kind == SubmissionKind::kWrites && group_ != nullptr) {
    // Not here: the group may be in the middle of something.
    if (registry_.Release(submission->region)) {
      ending_.unused.push_back(submission->region);
    }
  }
}

// Ends an operation early: at once where nobody else holds its buffers, else
// once its open writes have ended.
void TransferEngine::StopLocked(const SubmissionPtr& submission,
                                const Status& why) {
  if (submission->over || submission->stopped_ns) return;
  if (submission->failure.ok()) submission->failure = why;
  std::vector<std::function<void()>> ready;
  switch (submission->kind) {
    case SubmissionKind::kWrites:
      submission->stopped_ns = MonotonicNanoseconds();
      for (size_t i = 0; i < submission->parts.size(); ++i) {
        Submission::Part& part = submission->parts[i];
        if (std::exchange(part.unmapped, false)) {
          EndPartLocked(submission, i, why);
        } else if (part.open && part.handle != 0) {
          group_->Cancel(part.handle);
        }
      }
      return;
    case SubmissionKind::kExpect:
      // Met just now: its callback is on the way.
      if (!counters_.Cancel(submission->expectation, &ready)) return;
      break;
    case SubmissionKind::kUnregister:
      ending_.regions.erase(submission->region);
      registry_.AbandonRemoval(submission->region);
      break;
    case SubmissionKind::kConnect:
    case SubmissionKind::kBarrier:
    case SubmissionKind::kFence:
    case SubmissionKind::kSend:  // its bytes were copied
      break;
  }
  FinishLocked(submission, why);
  for (const std::function<void()>& callback : ready) callback();
}

bool TransferEngine::Cancel(const TransferFuture& future) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = live_.find(future.number());
  if (found == live_.end() || found->second->future.get() != &future) {
    return false;
  }
  const SubmissionPtr submission = found->second;
  StopLocked(submission, Status(StatusCode::kCancelled,
                                future.label() + ": cancelled by the caller"));
  return true;
}

Status TransferEngine::Drain(Deadline deadline) {
  uint64_t last = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    last = next_number_;
  }
  for (;;) {
    TransferFuturePtr oldest;
    std::string missing;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& [number, submission] : live_) {
        if (number >= last) break;
        if (submission->kind != SubmissionKind::kWrites &&
            submission->kind != SubmissionKind::kSend) {
          continue;
        }
        oldest = submission->future;
        missing = DescribeLocked(*submission);
        break;
      }
    }
    if (oldest == nullptr) return OkStatus();
    if (!oldest->Wait(deadline)) {
      return Status(StatusCode::kDeadlineExceeded, "drain: " + missing);
    }
  }
}

// --- The worker ---

void TransferEngine::EndExpiredLocked(int64_t now_ns) {
  std::vector<SubmissionPtr> expired;
  std::unordered_set<uint32_t> stuck;
  for (const auto& [number, submission] : live_) {
    if (submission->stopped_ns) {
      if (now_ns - *submission->stopped_ns < kTakeBackNs) continue;
      for (const Submission::Part& part : submission->parts) {
        if (part.open && part.handle != 0) stuck.insert(part.peer);
      }
    } else if (submission->deadline.nanoseconds() <= now_ns) {
      expired.push_back(submission);
    }
  }
  for (const SubmissionPtr& submission : expired) {
    // Some of it may have been posted.
    const char* const unknown = submission->kind == SubmissionKind::kWrites
                                    ? "; what has not ended may have arrived"
                                    : "";
    StopLocked(submission,
               Status(StatusCode::kDeadlineExceeded,
                      DescribeLocked(*submission) + unknown +
                          "; a slow step needs a larger time limit"));
  }
  for (const uint32_t peer : stuck) {
    LosePeerLocked(peer,
                   Status(StatusCode::kUnavailable,
                          "its writes neither ended nor could be taken back"));
  }
}

void TransferEngine::HousekeepLocked(int64_t now_ns) {
  // This process may have been stopped: then nobody else was silent.
  const int64_t asleep_ns = now_ns - last_housekeeping_ns_ - kSleepMaxNs;
  if (asleep_ns > 10 * kSleepMaxNs) {
    for (auto& [name, peer] : peers_) peer->last_heard_ns += asleep_ns;
  }
  last_housekeeping_ns_ = now_ns;
  EndExpiredLocked(now_ns);
  WatchPeersLocked(now_ns);
}

void TransferEngine::HandleLocked(DomainGroup::Event& event) {
  using Kind = DomainGroup::Event::Kind;
  const auto found = peers_.find(event.peer);
  TransferPeer* const peer =
      found == peers_.end() ? nullptr : found->second.get();
  if (peer != nullptr) peer->last_heard_ns = MonotonicNanoseconds();
  if (event.kind == Kind::kStranger) {
    HandleStrangerLocked(event.message);
  } else if (event.kind == Kind::kMessage) {
    if (peer != nullptr) HandleFrameLocked(event.peer, event.message);
  } else if (event.kind == Kind::kPeerLost) {
    if (peer != nullptr) LosePeerLocked(event.peer, event.status);
  } else {
    CountLocked(peer, Immediate::Decode(event.immediate));
  }
}

bool TransferEngine::Progress() {
  std::lock_guard<std::mutex> lock(mutex_);
  return ProgressLocked();
}

bool TransferEngine::ProgressLocked() {
  std::vector<DomainGroup::Event> events;
  bool moved = group_->Poll(&events);
  for (DomainGroup::Event& event : events) HandleLocked(event);
  for (const auto& watcher : watchers_) moved |= watcher->Look();
  RemoveUnusedLocked();
  return moved;
}

// The worker does not sleep on the mutex at once: waking it would be work for
// whoever submits something.
std::optional<bool> TransferEngine::ProgressUnlessBusy() {
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return std::nullopt;
  return ProgressLocked();
}

void TransferEngine::Help(const TransferFuture& future, Deadline deadline) {
  if (future.done()) return;
  const auto soon = [&] {
    return std::min(deadline, Deadline::AfterNanoseconds(kHelpNs));
  };
  const DoorbellMute mute(transport_->doorbell());
  for (Deadline until = soon(); !future.done() && !until.Expired();) {
    if (ProgressUnlessBusy().value_or(false)) {
      until = soon();  // the worker would have as much to do
    } else {
      // Where cores are few, what it waits for may need this one.
      std::this_thread::yield();
    }
  }
}

int64_t TransferEngine::SleepNs() {
  const int64_t poll_ns = transport_->poll_interval_ns();
  if (poll_ns == 0) return kSleepMaxNs;
  std::lock_guard<std::mutex> lock(mutex_);
  return live_.empty() && group_->Idle() ? kIdlePollNs : poll_ns;
}

void TransferEngine::Work() {
  pthread_setname_np(pthread_self(), "jaxfabric-xfer");
  KeepThisThreadOn(options_.worker_cores);
  Doorbell& doorbell = transport_->doorbell();
  int64_t last_moved_ns = MonotonicNanoseconds();
  int64_t busy_since_ns = 0;  // 0: it was not
  uint32_t looked = doorbell.Sequence();
  while (!stop_.load(std::memory_order_acquire)) {
    const uint32_t seen = doorbell.Sequence();
    std::optional<bool> moved = ProgressUnlessBusy();
    int64_t now_ns = MonotonicNanoseconds();
    if (!moved && busy_since_ns == 0) busy_since_ns = now_ns;
    if (!moved && now_ns - busy_since_ns >= kBusyNs) {
      // The doorbell may ring on and on until somebody polls.
      moved = Progress();
      now_ns = MonotonicNanoseconds();
    }
    if (moved) {
      looked = seen;
      busy_since_ns = 0;
    }
    if (now_ns - last_housekeeping_ns_ >= kSleepMaxNs) {
      std::lock_guard<std::mutex> lock(mutex_);
      HousekeepLocked(now_ns);
    }
    if (moved.value_or(false)) {
      last_moved_ns = now_ns;
    } else if (now_ns - last_moved_ns < options_.spin_ns) {
      CpuRelax();
    } else {
      doorbell.Wait(looked, Deadline::AfterNanoseconds(SleepNs()));
    }
  }
}

}  // namespace jaxfabric
