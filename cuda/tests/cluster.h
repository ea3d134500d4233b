// A group whose ranks are all in this process, spread over the GPUs there are:
// two ranks may share one, as long as their kernels fit side by side.

#ifndef JAXFABRIC_CUDA_TESTS_CLUSTER_H_
#define JAXFABRIC_CUDA_TESTS_CLUSTER_H_

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "driver_api.h"
#include "group.h"

namespace jaxfabric::cuda {

#define JF_CUDA_OK(call) ASSERT_EQ(call, cudaSuccess)

inline int DeviceCount() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// Why tests with GPUs are skipped here, or empty.
inline std::string Missing(int devices) {
  const int count = DeviceCount();
  if (count >= devices) return "";
  return "needs " + std::to_string(devices) + " GPUs, this machine has " +
         std::to_string(count);
}

// Device memory of one rank, filled with a pattern that no result has.
class DeviceBuffer {
 public:
  DeviceBuffer(int device, size_t bytes) : device_(device), bytes_(bytes) {
    const ScopedDevice current(device_);
    if (cudaMalloc(&data_, bytes + 16) != cudaSuccess) {
      data_ = nullptr;
    }
    Poison();
  }
  ~DeviceBuffer() {
    const ScopedDevice current(device_);
    cudaFree(data_);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : device_(other.device_),
        bytes_(other.bytes_),
        data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;

  void Poison() {
    const ScopedDevice current(device_);
    cudaMemset(data_, 0xAB, bytes_);
    cudaDeviceSynchronize();
  }
  void Fill(const void* from, size_t bytes) {
    const ScopedDevice current(device_);
    cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice);
  }
  template <typename T>
  std::vector<T> Read() const {
    const ScopedDevice current(device_);
    std::vector<T> out(bytes_ / sizeof(T));
    cudaMemcpy(out.data(), data_, out.size() * sizeof(T),
               cudaMemcpyDeviceToHost);
    return out;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  int device_;
  size_t bytes_;
  void* data_ = nullptr;
};

template <typename T>
DeviceBuffer Upload(int device, const std::vector<T>& values) {
  DeviceBuffer buffer(device, values.size() * sizeof(T));
  buffer.Fill(values.data(), values.size() * sizeof(T));
  return buffer;
}

class Cluster {
 public:
  Cluster(int ranks, int devices, uint64_t window_bytes, uint64_t mailbox_bytes)
      : Cluster(std::vector<int64_t>{ranks}, devices, window_bytes,
                mailbox_bytes) {}
  Cluster(const std::vector<int64_t>& mesh_shape, int devices,
          uint64_t window_bytes, uint64_t mailbox_bytes) {
    static int64_t key = 0;  // another one for each: nothing is kept for it
    auto created =
        Group::Create(++key, mesh_shape, window_bytes, mailbox_bytes);
    group_ = *std::move(created);
    for (size_t i = 0; i < mesh_shape.size(); ++i) {
      all_axes_.push_back(static_cast<int64_t>(i));
    }
    for (int rank = 0; rank < group_->ranks(); ++rank) {
      devices_.push_back(rank % devices);
      Check(group_->AddLocal(rank, devices_.back()));
    }
    Check(group_->Open());
    for (int rank = 0; rank < group_->ranks(); ++rank) {
      const ScopedDevice current(devices_[rank]);
      cudaStream_t stream = nullptr;
      cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      streams_.push_back(stream);
    }
  }
  ~Cluster() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
  }

  Group& group() { return *group_; }
  int ranks() const { return static_cast<int>(streams_.size()); }
  int device(int rank) const { return devices_[rank]; }
  cudaStream_t stream(int rank) const { return streams_[rank]; }
  Peers peers(int rank, double timeout_s = 20,
              Phase phase = Phase::kWhole) const {
    return *group_->PeersOf(rank, all_axes_, timeout_s, phase);
  }
  Peers peers_over(const std::vector<int64_t>& axes, int rank) const {
    return *group_->PeersOf(rank, axes, 20, Phase::kWhole);
  }
  // Blocks that let the kernels of all ranks of a device run side by side.
  int blocks_max(int rank) const {
    int sharing = 0;
    for (const int device : devices_) sharing += device == devices_[rank];
    return group_->BlocksMax(rank) / sharing;
  }

  // Runs launch(rank) with its device current, for all ranks.
  template <typename Launch>
  void ForEach(Launch launch) {
    for (int rank = 0; rank < ranks(); ++rank) {
      const ScopedDevice current(devices_[rank]);
      const cudaError_t error = launch(rank);
      EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
    }
  }
  void Synchronize() {
    ForEach([&](int rank) { return cudaStreamSynchronize(streams_[rank]); });
  }

 private:
  static void Check(const Status& status) {
    EXPECT_TRUE(status.ok()) << status.message();
  }

  std::unique_ptr<Group> group_;
  std::vector<int64_t> all_axes_;
  std::vector<int> devices_;
  std::vector<cudaStream_t> streams_;
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_TESTS_CLUSTER_H_
