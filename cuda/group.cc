#include "group.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "driver_api.h"
#include "engine/mesh_group.h"
#include "moe_kernels.h"
#include "primitive_kernels.h"
#include "probe_kernels.h"

namespace jaxfabric::cuda {

namespace {

// For the model's own kernels and for NCCL's, which wait for their peers too.
constexpr int kBlocksLeft = 4;

uint64_t RoundUp(uint64_t value, uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

const char* OperationName(uint32_t operation) {
  switch (static_cast<Operation>(operation)) {
    case Operation::kBarrier:
      return "barrier";
    case Operation::kPut:
      return "put";
    case Operation::kWait:
      return "wait";
    case Operation::kDispatch:
      return "dispatch";
    case Operation::kCombine:
      return "combine";
    case Operation::kReplay:
      return "replay";
    case Operation::kScatter:
      return "scatter";
    case Operation::kPutPages:
      return "put_pages";
    case Operation::kExchange:
      return "exchange";
  }
  return "call";
}

std::string LateText(int rank, const ErrorWord& word) {
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.1f",
                static_cast<double>(word.elapsed_ns) * 1e-9);
  const std::string number = std::to_string(word.epoch);
  std::string what = "the message of rank " + std::to_string(word.peer) +
                     " did not come (number " + number + ")";
  if (word.operation == static_cast<uint32_t>(Operation::kWait)) {
    what = number + " transfers into the window, of which " +
           std::to_string(word.detail) + " have come";
  } else if (static_cast<int>(word.peer) == rank) {
    what = "its own blocks did not come together (number " + number + ")";
  }
  return what + " within " + seconds +
         " s; see whether a rank failed or runs another program, or raise "
         "timeout_s (JAXFABRIC_TIMEOUT_S)";
}

Status ToStatus(int rank, const ErrorWord& word) {
  const std::string who = std::string(OperationName(word.operation)) +
                          " on rank " + std::to_string(rank);
  const std::string peer = std::to_string(word.peer);
  const std::string detail = std::to_string(word.detail);
  switch (static_cast<ErrorCode>(word.code)) {
    case ErrorCode::kTimeout:
      return Status(StatusCode::kDeadlineExceeded,
                    who + ": " + LateText(rank, word));
    case ErrorCode::kBadExpert:
      return Status(StatusCode::kInvalidArgument,
                    who + ": entry " + detail + " of rank " + peer +
                        "'s ids (flattened) names no expert, or one that its "
                        "token has already; use -1 for none");
    case ErrorCode::kBadTarget:
      return Status(StatusCode::kOutOfRange,
                    who + ": rank " + peer + " at offset " + detail +
                        " is outside of the group or the window");
    case ErrorCode::kWrongPosition:
      return Status(StatusCode::kFailedPrecondition,
                    who + ": the program's mesh gives this device index " +
                        detail + "; open the Fabric over the program's mesh");
    case ErrorCode::kBadPlan:
      return Status(StatusCode::kInvalidArgument,
                    who + ": the plan holds " + detail +
                        ", which no dispatch of this shape wrote there");
    case ErrorCode::kBadPage:
      return Status(StatusCode::kOutOfRange,
                    who + ": entry " + detail + " for rank " + peer +
                        " names a page that `pages` or the window has not");
    case ErrorCode::kPageTwice:
      return Status(StatusCode::kInvalidArgument,
                    who + ": the page of entry " + detail + " is in dst_idx " +
                        "twice; writes have no order, so that either could "
                        "be the last");
    case ErrorCode::kNotPending:
      return Status(StatusCode::kInvalidArgument,
                    who +
                        ": the second half of a call that is not under way; "
                        "at most two may be, each is finished once");
    case ErrorCode::kNone:
      break;
  }
  return OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<Group>> Group::Create(
    int64_t key, const std::vector<int64_t>& mesh_shape, uint64_t window_bytes,
    uint64_t mailbox_bytes) {
  int64_t ranks = 1;
  for (const int64_t size : mesh_shape) {
    const bool fits = size >= 1 && size <= kRanksMax / ranks;
    if (!fits) {
      return Status(StatusCode::kInvalidArgument,
                    "a Fabric over NVLink has 1 to " +
                        std::to_string(kRanksMax) + " ranks");
    }
    ranks *= size;
  }
  std::unique_ptr<Group> group(new Group(mesh_shape, static_cast<int>(ranks),
                                         window_bytes, mailbox_bytes));
  group->memory_ = GroupMemory::Take(
      key, {mesh_shape, group->window_bytes_, group->mailbox_bytes_});
  return group;
}

Group::Group(const std::vector<int64_t>& mesh_shape, int ranks,
             uint64_t window_bytes, uint64_t mailbox_bytes)
    : mesh_shape_(mesh_shape),
      ranks_(ranks),
      window_bytes_(RoundUp(window_bytes, kLineBytes)),
      mailbox_bytes_(RoundUp(mailbox_bytes, kLineBytes)),
      heap_bytes_(kWindowsBegin + window_bytes_),
      heaps_(ranks) {
  std::vector<uint64_t> sizes;  // of the axes that make a difference
  for (const int64_t size : mesh_shape_) {
    if (size > 1) sizes.push_back(size);
  }
  for (uint32_t set = 1; set < 1u << sizes.size(); ++set) {
    uint64_t members = 1;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if ((set >> i & 1) != 0) members *= sizes[i];
    }
    message_begin_.push_back(heap_bytes_);
    heap_bytes_ += 4 * (members - 1) * mailbox_bytes_;
  }
  if (sizes.empty()) message_begin_.push_back(heap_bytes_);
}

int Group::AxisSetOf(const std::vector<int64_t>& axes) const {
  uint32_t set = 0, bit = 1;
  for (size_t axis = 0; axis < mesh_shape_.size(); ++axis) {
    if (mesh_shape_[axis] <= 1) continue;
    const auto at = static_cast<int64_t>(axis);
    if (std::find(axes.begin(), axes.end(), at) != axes.end()) set |= bit;
    bit <<= 1;
  }
  return set == 0 ? 0 : static_cast<int>(set) - 1;  // a rank alone has no peers
}

Group::~Group() {
  for (auto& [rank, local] : local_) {
    const ScopedDevice current(local.memory.device);
    cudaDeviceSynchronize();  // nothing is freed under a kernel that spins
  }
  heaps_.clear();
  if (memory_ != nullptr) GroupMemory::Leave(std::move(memory_));
}

Status Group::AddLocal(int rank, int device) {
  if (rank < 0 || rank >= ranks_ || heaps_[rank] != nullptr) {
    return Status(StatusCode::kInvalidArgument,
                  "rank " + std::to_string(rank) + " is out of range or twice");
  }
  JF_ASSIGN_OR_RETURN(heaps_[rank],
                      SharedAllocation::Create(device, heap_bytes_));
  int processors = 0;
  JF_RETURN_IF_ERROR(
      cuda::ToStatus(cudaDeviceGetAttribute(
                         &processors, cudaDevAttrMultiProcessorCount, device),
                     "cudaDeviceGetAttribute"));
  JF_ASSIGN_OR_RETURN(const GroupMemory::Local memory,
                      memory_->ForRank(rank, device));
  local_[rank] = {std::max(1, processors - kBlocksLeft), memory};
  return OkStatus();
}

StatusOr<int> Group::Export(int rank) const {
  const auto local = local_.find(rank);
  if (local == local_.end()) {
    return Status(StatusCode::kNotFound,
                  "rank " + std::to_string(rank) + " is not of this process");
  }
  const ScopedDevice current(local->second.memory.device);
  return heaps_[rank]->Export();
}

Status Group::Import(int rank, int fd) {
  if (rank < 0 || rank >= ranks_ || heaps_[rank] != nullptr || local_.empty()) {
    return Status(StatusCode::kInvalidArgument,
                  "rank " + std::to_string(rank) + " is out of range or twice");
  }
  JF_ASSIGN_OR_RETURN(
      heaps_[rank], SharedAllocation::Import(
                        fd, heap_bytes_, local_.begin()->second.memory.device));
  return OkStatus();
}

Status Group::Open() {
  std::vector<int> devices;
  for (const auto& [rank, local] : local_)
    devices.push_back(local.memory.device);
  for (int rank = 0; rank < ranks_; ++rank) {
    if (heaps_[rank] == nullptr) {
      return Status(StatusCode::kFailedPrecondition,
                    "the heap of rank " + std::to_string(rank) + " is missing");
    }
    const ScopedDevice current(local_.begin()->second.memory.device);
    JF_ASSIGN_OR_RETURN(const AddressRange* const range,
                        memory_->ForHeap(rank, heaps_[rank]->bytes()));
    JF_RETURN_IF_ERROR(heaps_[rank]
                           ->Map(devices, *range)
                           .Annotate("rank " + std::to_string(rank)));
  }
  for (const auto& [rank, local] : local_) {
    const ScopedDevice current(local.memory.device);
    // Zero is the state before the first epoch, everywhere.
    JF_RETURN_IF_ERROR(cuda::ToStatus(
        cudaMemset(heaps_[rank]->data(), 0, heaps_[rank]->bytes()),
        "cudaMemset"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadPrimitiveKernels(), "loading the primitives"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadExchangeKernel(), "loading exchange"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadProbeKernels(), "loading the probes"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadDispatchKernels(), "loading dispatch"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadCombineKernels(), "loading combine"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadReplayKernels(), "loading replay"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
  }
  return OkStatus();
}

int Group::RankOn(int device) const {
  for (const auto& [rank, local] : local_) {
    if (local.memory.device == device) return rank;
  }
  return -1;
}

StatusOr<int> Group::AllocateWindow(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (windows_.size() == kWindowsMax || bytes > window_bytes_ - windows_used_) {
    return Status(StatusCode::kResourceExhausted,
                  "a window of " + std::to_string(bytes) +
                      " bytes does not fit the " +
                      std::to_string(window_bytes_ - windows_used_) +
                      " bytes left for windows, of which there are at most " +
                      std::to_string(kWindowsMax) +
                      "; raise JAXFABRIC_WINDOW_BYTES on all ranks");
  }
  windows_.push_back({kWindowsBegin + windows_used_, bytes});
  windows_used_ =
      std::min(RoundUp(windows_used_ + bytes, kLineBytes), window_bytes_);
  return static_cast<int>(windows_.size()) - 1;
}

StatusOr<Group::Window> Group::FindWindow(int64_t index) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (index < 0 || index >= static_cast<int64_t>(windows_.size())) {
    return Status(StatusCode::kFailedPrecondition,
                  "the Fabric has no window " + std::to_string(index) +
                      "; make it again after the Fabric was opened again");
  }
  return windows_[static_cast<size_t>(index)];
}

StatusOr<Peers> Group::PeersOf(int rank, const std::vector<int64_t>& axes,
                               double timeout_s, Phase phase) const {
  JF_ASSIGN_OR_RETURN(const MeshGroup members,
                      GroupOf(mesh_shape_, axes, static_cast<uint32_t>(rank)));
  const GroupMemory::Local& local = local_.at(rank).memory;
  const int set = AxisSetOf(axes);
  Peers peers = {};
  peers.rank = static_cast<int32_t>(members.position);
  peers.ranks = static_cast<int32_t>(members.ranks.size());
  for (int peer = 0; peer < peers.ranks; ++peer) {
    const uint32_t number = members.ranks[peer];
    peers.heap[peer] = heaps_[number]->data();
    peers.mesh_rank[peer] = static_cast<int32_t>(number);
  }
  peers.state = local.state;
  peers.sequence = &local.state->sequences[set];
  peers.flags_begin = set * kFlagsBytes;
  peers.error = local.error;
  peers.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  peers.message_begin = message_begin_[set];
  peers.mailbox_bytes = mailbox_bytes_;
  peers.counter = &peers.sequence->messages;
  peers.phase = phase;
  if (phase != Phase::kWhole) {  // with parts and numbers of their own
    peers.message_begin += 2 * (peers.ranks - 1) * mailbox_bytes_;
    peers.counter = &peers.sequence->halves;
  }
  return peers;
}

char* Group::Workspace(int rank) const {
  return local_.at(rank).memory.workspace;
}

uint32_t* Group::PageStamps(int rank) const {
  return local_.at(rank).memory.stamps;
}

int Group::BlocksMax(int rank) const { return local_.at(rank).blocks_max; }

Status Group::Failure() const {
  for (const auto& [rank, local] : local_) {
    const ErrorWord* const error = local.memory.error;
    // Written last, by a device.
    if (__atomic_load_n(&error->code, __ATOMIC_ACQUIRE) == 0) continue;
    failure_known_.store(true, std::memory_order_relaxed);
    return ToStatus(rank, *error);
  }
  return OkStatus();
}

Status Group::Finish() {
  for (const auto& [rank, local] : local_) {
    const ScopedDevice current(local.memory.device);
    cudaDeviceSynchronize();
  }
  const bool known = failure_known_.load(std::memory_order_relaxed);
  return known ? OkStatus() : Failure();
}

}  // namespace jaxfabric::cuda
