#include "group.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "driver_api.h"
#include "moe_kernels.h"
#include "primitive_kernels.h"

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
  }
  return "call";
}

Status ToStatus(int rank, const ErrorWord& word) {
  const std::string who = std::string(OperationName(word.operation)) +
                          " on rank " + std::to_string(rank);
  const std::string peer = std::to_string(word.peer);
  const std::string detail = std::to_string(word.detail);
  switch (static_cast<ErrorCode>(word.code)) {
    case ErrorCode::kTimeout: {
      char seconds[32];
      std::snprintf(seconds, sizeof seconds, "%.1f",
                    static_cast<double>(word.elapsed_ns) * 1e-9);
      const bool own = static_cast<int>(word.peer) == rank;
      return Status(
          StatusCode::kDeadlineExceeded,
          who + ": " +
              (own ? std::string("what was waited for")
                   : "the message of rank " + peer) +
              " did not come within " + seconds + " s (number " +
              std::to_string(word.epoch) +
              "); see whether that rank failed or runs another program, or "
              "raise timeout_s (JAXFABRIC_TIMEOUT_S)");
    }
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
    case ErrorCode::kNone:
      break;
  }
  return OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<Group>> Group::Create(int ranks, uint64_t window_bytes,
                                               uint64_t mailbox_bytes) {
  if (ranks < 1 || ranks > kRanksMax) {
    return Status(StatusCode::kInvalidArgument,
                  "a group on NVLink has 1 to " + std::to_string(kRanksMax) +
                      " ranks, not " + std::to_string(ranks));
  }
  return std::unique_ptr<Group>(new Group(ranks, window_bytes, mailbox_bytes));
}

Group::Group(int ranks, uint64_t window_bytes, uint64_t mailbox_bytes)
    : ranks_(ranks),
      window_bytes_(RoundUp(window_bytes, kLineBytes)),
      mailbox_bytes_(RoundUp(mailbox_bytes, kLineBytes)),
      message_begin_(kWindowsBegin + window_bytes_),
      heaps_(ranks) {}

Group::~Group() {
  for (auto& [rank, local] : local_) {
    const ScopedDevice current(local.device);
    cudaDeviceSynchronize();  // nothing is freed under a kernel that spins
  }
  for (auto& [rank, local] : local_) {
    const ScopedDevice current(local.device);
    cudaFree(local.state);
    cudaFree(local.workspace);
    cudaFreeHost(local.error);
  }
}

size_t Group::HeapBytes() const {
  return message_begin_ +
         2 * static_cast<uint64_t>(ranks_ - 1) * mailbox_bytes_;
}

Status Group::AddLocal(int rank, int device) {
  if (rank < 0 || rank >= ranks_ || heaps_[rank] != nullptr) {
    return Status(StatusCode::kInvalidArgument,
                  "rank " + std::to_string(rank) + " is out of range or twice");
  }
  JF_ASSIGN_OR_RETURN(heaps_[rank],
                      SharedAllocation::Create(device, HeapBytes()));
  Local& local = local_[rank];
  local.device = device;
  const ScopedDevice current(device);
  int processors = 0;
  JF_RETURN_IF_ERROR(
      cuda::ToStatus(cudaDeviceGetAttribute(
                         &processors, cudaDevAttrMultiProcessorCount, device),
                     "cudaDeviceGetAttribute"));
  local.blocks_max = std::max(1, processors - kBlocksLeft);
  JF_RETURN_IF_ERROR(cuda::ToStatus(cudaMalloc(&local.state, sizeof(RankState)),
                                    "cudaMalloc"));
  JF_RETURN_IF_ERROR(cuda::ToStatus(
      cudaMalloc(&local.workspace, kWorkspaceBytes), "cudaMalloc"));
  JF_RETURN_IF_ERROR(
      cuda::ToStatus(cudaHostAlloc(&local.error, sizeof(ErrorWord),
                                   cudaHostAllocMapped | cudaHostAllocPortable),
                     "cudaHostAlloc"));
  *local.error = ErrorWord{};
  return cuda::ToStatus(cudaMemset(local.state, 0, sizeof(RankState)),
                        "cudaMemset");
}

StatusOr<int> Group::Export(int rank) const {
  const auto local = local_.find(rank);
  if (local == local_.end()) {
    return Status(StatusCode::kNotFound,
                  "rank " + std::to_string(rank) + " is not of this process");
  }
  const ScopedDevice current(local->second.device);
  return heaps_[rank]->Export();
}

Status Group::Import(int rank, int fd) {
  if (rank < 0 || rank >= ranks_ || heaps_[rank] != nullptr || local_.empty()) {
    return Status(StatusCode::kInvalidArgument,
                  "rank " + std::to_string(rank) + " is out of range or twice");
  }
  JF_ASSIGN_OR_RETURN(
      heaps_[rank],
      SharedAllocation::Import(fd, HeapBytes(), local_.begin()->second.device));
  return OkStatus();
}

Status Group::Open() {
  std::vector<int> devices;
  for (const auto& [rank, local] : local_) devices.push_back(local.device);
  for (int rank = 0; rank < ranks_; ++rank) {
    if (heaps_[rank] == nullptr) {
      return Status(StatusCode::kFailedPrecondition,
                    "the heap of rank " + std::to_string(rank) + " is missing");
    }
    const ScopedDevice current(local_.begin()->second.device);
    JF_RETURN_IF_ERROR(
        heaps_[rank]->Map(devices).Annotate("rank " + std::to_string(rank)));
  }
  for (const auto& [rank, local] : local_) {
    const ScopedDevice current(local.device);
    // Zero is the state before the first epoch, everywhere.
    JF_RETURN_IF_ERROR(cuda::ToStatus(
        cudaMemset(heaps_[rank]->data(), 0, heaps_[rank]->bytes()),
        "cudaMemset"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadPrimitiveKernels(), "loading the primitives"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadDispatchKernels(), "loading dispatch"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(PreloadCombineKernels(), "loading combine"));
    JF_RETURN_IF_ERROR(
        cuda::ToStatus(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
  }
  return OkStatus();
}

int Group::RankOn(int device) const {
  for (const auto& [rank, local] : local_) {
    if (local.device == device) return rank;
  }
  return -1;
}

Peers Group::PeersOf(int rank, double timeout_s) const {
  const Local& local = local_.at(rank);
  Peers peers = {};
  peers.rank = rank;
  peers.ranks = ranks_;
  for (int peer = 0; peer < ranks_; ++peer) {
    peers.heap[peer] = heaps_[peer]->data();
  }
  peers.state = local.state;
  peers.error = local.error;
  peers.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  peers.message_begin = message_begin_;
  peers.mailbox_bytes = mailbox_bytes_;
  return peers;
}

char* Group::Workspace(int rank) const { return local_.at(rank).workspace; }

int Group::BlocksMax(int rank) const { return local_.at(rank).blocks_max; }

Status Group::Failure() const {
  for (const auto& [rank, local] : local_) {
    if (local.error == nullptr) continue;
    // Written last, by a device.
    if (__atomic_load_n(&local.error->code, __ATOMIC_ACQUIRE) == 0) continue;
    return ToStatus(rank, *local.error);
  }
  return OkStatus();
}

}  // namespace jaxfabric::cuda
