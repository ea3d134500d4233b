#include "engine/engine.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "base/thread_cores.h"

namespace jaxfabric {
namespace {

// The worker looks at deadlines at least this often.
constexpr int64_t kSleepMaxNs = 50'000'000;
// So often a device that cannot ring is looked at while nothing is under way
// here: peers may wait for its answers.
constexpr int64_t kIdlePollNs = 1'000'000;
// What is under way when an Engine closes has failed by then and only finishes
// copies; should one be stuck in the user's program, closing goes on.
constexpr double kCloseWaitS = 10;
// So long, peers may take to accept what was said last.
constexpr double kFlushWaitS = 1;

}  // namespace

Engine::Engine(EngineOptions options, std::unique_ptr<Transport> transport)
    : options_(std::move(options)), transport_(std::move(transport)) {}

StatusOr<std::unique_ptr<Engine>> Engine::Open(
    EngineOptions options, std::unique_ptr<Transport> transport) {
  std::unique_ptr<Engine> engine(
      new Engine(std::move(options), std::move(transport)));
  JF_RETURN_IF_ERROR(engine->OpenEndpoints());
  engine->worker_ = std::thread([engine = engine.get()] { engine->Work(); });
  return engine;
}

Status Engine::OpenEndpoints() {
  size_t domain_count = options_.domains_per_rank;
  if (domain_count == 0) {
    domain_count = std::min(transport_->nic_count(), DomainGroup::kDomainsMax);
  }
  for (uint32_t rank : options_.local_ranks) {
    std::vector<std::unique_ptr<Domain>> domains;
    for (size_t i = 0; i < domain_count; ++i) {
      JF_ASSIGN_OR_RETURN(auto domain, transport_->OpenDomain());
      domains.push_back(std::move(domain));
    }
    const EndpointOptions endpoint_options = {
        .rank = rank,
        .generation = options_.generation,
        .heap = {.ranks = options_.ranks,
                 .mailbox_bytes = options_.mailbox_bytes,
                 .window_bytes = options_.window_bytes}};
    JF_ASSIGN_OR_RETURN(endpoints_[rank],
                        Endpoint::Open(endpoint_options, std::move(domains),
                                       [this](Endpoint::Loss loss) {
                                         OnLost(std::move(loss));
                                       }));
  }
  return OkStatus();
}

Engine::~Engine() {
  Fail(Status(StatusCode::kFailedPrecondition,
              "the Fabric '" + options_.name + "' was closed"),
       /*tell_peers=*/false);
  const Deadline deadline = Deadline::AfterSeconds(kCloseWaitS);
  while (operations_under_way() > 0 && !deadline.Expired()) {
    Doorbell& doorbell = transport_->doorbell();
    doorbell.Wait(doorbell.Sequence(), Deadline::AfterNanoseconds(1'000'000));
  }
  const Deadline flush = Deadline::AfterSeconds(kFlushWaitS);
  while (worker_.joinable() && !Drained() && !flush.Expired()) {
    Doorbell& doorbell = transport_->doorbell();
    doorbell.Wait(doorbell.Sequence(), Deadline::AfterNanoseconds(1'000'000));
  }
  stop_.store(true, std::memory_order_release);
  transport_->doorbell().Ring();
  if (worker_.joinable()) worker_.join();
  endpoints_.clear();  // before the transport that their Domains are of
}

Endpoint* Engine::endpoint(uint32_t rank) {
  const auto found = endpoints_.find(rank);
  return found == endpoints_.end() ? nullptr : found->second.get();
}

StatusOr<std::string> Engine::LocalAddress(uint32_t rank) const {
  const auto found = endpoints_.find(rank);
  if (found == endpoints_.end()) {
    return Status(StatusCode::kNotFound,
                  "rank " + std::to_string(rank) + " is not of this process");
  }
  return found->second->address().Encode();
}

Status Engine::Connect(uint32_t rank, const std::string& address,
                       Deadline deadline) {
  const std::string context = "connecting to rank " + std::to_string(rank);
  auto decoded = RankAddress::Decode(address);
  if (!decoded.ok()) return decoded.status().Annotate(context);
  for (auto& [local_rank, endpoint] : endpoints_) {
    if (local_rank == rank) continue;
    const Status connected = endpoint->Connect(rank, *decoded, deadline);
    if (!connected.ok()) return connected.Annotate(context);
  }
  return OkStatus();
}

StatusOr<uint64_t> Engine::AllocateWindow(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t offset = windows_used_;
  if (bytes > options_.window_bytes - offset) {
    return Status(
        StatusCode::kResourceExhausted,
        "a window of " + std::to_string(bytes) + " bytes does not fit the " +
            std::to_string(options_.window_bytes - offset) +
            " bytes left for windows; raise JAXFABRIC_WINDOW_BYTES on all "
            "ranks");
  }
  windows_used_ = AlignUp(offset + bytes, kCacheLineBytes);
  windows_used_ = std::min(windows_used_, options_.window_bytes);
  return offset;
}

StatusOr<OperationPtr> Engine::Begin(std::string label, double timeout_s,
                                     Operation::Done done) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_.ok()) return failure_.Annotate(label);
  const uint64_t number = next_operation_++;
  auto operation = std::make_shared<Operation>(
      std::move(label), timeout_s > 0 ? timeout_s : options_.timeout_s,
      [this, number, done = std::move(done)](Status status) {
        {
          std::lock_guard<std::mutex> erase_lock(mutex_);
          operations_.erase(number);
        }
        done(std::move(status));
      });
  operations_[number] = operation;
  return operation;
}

std::vector<OperationPtr> Engine::LiveOperations() const {
  std::vector<OperationPtr> live;
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [number, weak] : operations_) {
    if (OperationPtr operation = weak.lock()) {
      live.push_back(std::move(operation));
    }
  }
  return live;
}

void Engine::Fail(const Status& status, bool tell_peers) {
  std::optional<uint32_t> lost_rank;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_.ok()) return;
    failure_ = status;
    if (!lost_ranks_.empty()) lost_rank = lost_ranks_.front();
  }
  for (const OperationPtr& operation : LiveOperations()) {
    operation->Fail(status.Annotate(operation->Describe()));
  }
  for (auto& [rank, endpoint] : endpoints_) {
    if (tell_peers) endpoint->BroadcastAbort(status, lost_rank);
    endpoint->DropWaiting();
  }
}

Status Engine::failure() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

std::vector<uint32_t> Engine::lost_ranks() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return lost_ranks_;
}

void Engine::OnLost(Endpoint::Loss loss) {
  if (loss.rank) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::find(lost_ranks_.begin(), lost_ranks_.end(), *loss.rank) ==
        lost_ranks_.end()) {
      lost_ranks_.push_back(*loss.rank);
    }
  }
  if (loss.rank && !loss.told) {
    loss.status =
        loss.status.Annotate("rank " + std::to_string(*loss.rank) + " is lost");
  }
  Fail(loss.status, /*tell_peers=*/!loss.told);
}

void Engine::EndFailedAndExpired() {
  for (const OperationPtr& operation : LiveOperations()) {
    const Status failed = operation->status();
    if (!failed.ok()) {
      // One that failed while sending waits for answers that may never come.
      Fail(failed, /*tell_peers=*/true);
      continue;
    }
    if (!operation->deadline().Expired()) continue;
    const std::string text =
        operation->Describe() +
        "; a slow step needs a larger timeout_s= or JAXFABRIC_TIMEOUT_S";
    operation->Fail(Status(StatusCode::kDeadlineExceeded, text));
    Fail(Status(StatusCode::kDeadlineExceeded, text), /*tell_peers=*/true);
  }
}

Status Engine::Drain(Deadline deadline) {
  for (auto& [rank, endpoint] : endpoints_) {
    while (!endpoint->Drained()) {
      if (!failure().ok()) return failure();
      if (deadline.Expired()) {
        return Status(StatusCode::kDeadlineExceeded,
                      "drain: rank " + std::to_string(rank) +
                          " still has writes on their way");
      }
      Doorbell& doorbell = transport_->doorbell();
      doorbell.Wait(doorbell.Sequence(), Deadline::AfterNanoseconds(1'000'000));
    }
  }
  return OkStatus();
}

void Engine::SayGoodbye() {
  Status failed;
  std::optional<uint32_t> lost_rank;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    failed = failure_;
    if (!lost_ranks_.empty()) lost_rank = lost_ranks_.front();
  }
  for (auto& [rank, endpoint] : endpoints_) {
    // Who told this rank told all, but a farewell may come first, and whoever
    // hears only that would blame this rank.
    if (!failed.ok()) endpoint->BroadcastAbort(failed, lost_rank);
    endpoint->SayGoodbye();
  }
}

bool Engine::Drained() const {
  return std::all_of(endpoints_.begin(), endpoints_.end(),
                     [](const auto& item) { return item.second->Drained(); });
}

size_t Engine::operations_under_way() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return operations_.size();
}

// A device that cannot ring is looked at more often while it may have news.
int64_t Engine::SleepNs() const {
  const int64_t poll_ns = transport_->poll_interval_ns();
  if (poll_ns == 0) return kSleepMaxNs;
  return operations_under_way() > 0 || !Drained() ? poll_ns : kIdlePollNs;
}

void Engine::Work() {
  pthread_setname_np(pthread_self(), "jaxfabric-work");
  KeepThisThreadOn(options_.worker_cores);
  Doorbell& doorbell = transport_->doorbell();
  int64_t last_moved_ns = MonotonicNanoseconds();
  int64_t last_check_ns = last_moved_ns;
  while (!stop_.load(std::memory_order_acquire)) {
    const uint32_t seen = doorbell.Sequence();
    bool moved = false;
    for (auto& [rank, endpoint] : endpoints_) moved |= endpoint->Progress();
    const int64_t now_ns = MonotonicNanoseconds();
    if (now_ns - last_check_ns >= kSleepMaxNs) {
      last_check_ns = now_ns;
      EndFailedAndExpired();
    }
    if (moved) {
      last_moved_ns = now_ns;
    } else if (now_ns - last_moved_ns < options_.spin_ns) {
      CpuRelax();
    } else {
      doorbell.Wait(seen, Deadline::AfterNanoseconds(SleepNs()));
    }
  }
}

}  // namespace jaxfabric
