// Times of the kernels under CUDA graphs, two ranks in one process.
//
//   cuda_moe_bench [decode|prefill|primitives] [blocks ...]
//
// A graph holds a chain of one operation and is launched on all devices; a time
// is its wall-clock time over the length of the chain (so the slower rank's),
// the median of several launches, in microseconds.

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "moe_kernels.h"
#include "primitive_kernels.h"
#include "tests/cluster.h"

namespace jaxfabric::cuda {
namespace {

constexpr int kRanks = 2, kExperts = 256, kTopK = 8, kHidden = 7168;
constexpr int64_t kRowBytes = kHidden * 2;
constexpr int kLaunches = 11;

using Launch = std::function<cudaError_t(int rank)>;

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Microseconds of one `launch` in a chain of `length`.
double TimeInGraph(Cluster& cluster, int length, const Launch& launch) {
  std::vector<cudaGraphExec_t> graphs(cluster.ranks());
  cluster.ForEach([&](int rank) {
    const cudaStream_t stream = cluster.stream(rank);
    cudaGraph_t graph = nullptr;
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
    for (int i = 0; i < length; ++i) launch(rank);
    cudaStreamEndCapture(stream, &graph);
    const cudaError_t error = cudaGraphInstantiate(&graphs[rank], graph, 0);
    cudaGraphDestroy(graph);
    cudaGraphUpload(graphs[rank], stream);
    return error;
  });
  cluster.Synchronize();
  std::vector<double> times;
  for (int i = 0; i < kLaunches; ++i) {
    const auto began = std::chrono::steady_clock::now();
    for (int rank = 0; rank < cluster.ranks(); ++rank) {
      cudaSetDevice(cluster.device(rank));
      cudaGraphLaunch(graphs[rank], cluster.stream(rank));
    }
    cluster.Synchronize();
    const std::chrono::duration<double, std::micro> took =
        std::chrono::steady_clock::now() - began;
    times.push_back(took.count() / length);
  }
  for (cudaGraphExec_t graph : graphs) cudaGraphExecDestroy(graph);
  const Status failure = cluster.group().Failure();
  if (!failure.ok()) {
    std::printf("FAILED: %s\n", failure.message().c_str());
    std::exit(1);
  }
  return Median(times);
}

struct Operands {
  std::vector<DeviceBuffer> x, ids, weights, tokens, group_sizes, row_weights,
      row_index, recv_count, slot_row, sent, dropped, y;
};

MoeShape ShapeOf(int tokens, bool expand) {
  MoeShape shape = {};
  shape.ranks = kRanks;
  shape.tokens = tokens;
  shape.k = kTopK;
  shape.experts = kExperts / kRanks;
  shape.slots = kTopK;
  shape.alignment = 1;
  shape.row_bytes = kRowBytes;
  shape.rows = int64_t{kRanks} * tokens * kTopK;
  shape.kept_max = INT32_MAX;
  shape.expand = expand;
  shape.zero_tail = false;
  shape.type = RowType::kBf16;
  Complete(shape, false);
  return shape;
}

Operands MakeOperands(Cluster& cluster, const MoeShape& shape) {
  Operands o;
  for (int rank = 0; rank < kRanks; ++rank) {
    const int device = cluster.device(rank);
    std::mt19937 random(rank);
    std::vector<int32_t> ids, experts(kExperts);
    for (int e = 0; e < kExperts; ++e) experts[e] = e;
    for (int t = 0; t < shape.tokens; ++t) {
      for (int k = 0; k < kTopK; ++k) {
        std::swap(experts[k], experts[k + random() % (kExperts - k)]);
        ids.push_back(experts[k]);
      }
    }
    std::vector<uint16_t> x(int64_t{shape.tokens} * kHidden);
    for (uint16_t& value : x) value = 0x3f00 + random() % 256;
    o.x.push_back(Upload(device, x));
    o.ids.push_back(Upload(device, ids));
    o.weights.push_back(Upload(device, std::vector<float>(ids.size(), 0.125f)));
    o.tokens.emplace_back(device, shape.rows * kRowBytes);
    o.group_sizes.emplace_back(device, shape.experts * 4);
    o.row_weights.emplace_back(device, shape.rows * 4);
    o.row_index.emplace_back(device, shape.rows * 4);
    o.recv_count.emplace_back(device, kRanks * 4);
    o.slot_row.emplace_back(device, int64_t{kRanks} * shape.tokens * kTopK * 4);
    o.sent.emplace_back(device, kRanks * 4);
    o.dropped.emplace_back(device, 4);
    o.y.emplace_back(device, shape.tokens * kRowBytes);
  }
  return o;
}

DispatchBuffers DispatchOf(const Operands& o, int r, bool expand) {
  return {o.x[r].as<char>(),
          o.ids[r].as<int32_t>(),
          o.weights[r].as<float>(),
          o.tokens[r].as<char>(),
          o.group_sizes[r].as<int32_t>(),
          o.row_weights[r].as<float>(),
          expand ? nullptr : o.row_index[r].as<int32_t>(),
          o.recv_count[r].as<int32_t>(),
          o.slot_row[r].as<int32_t>(),
          o.sent[r].as<int32_t>(),
          o.dropped[r].as<int32_t>()};
}

CombineBuffers CombineOf(const Operands& o, int r) {
  return {o.tokens[r].as<char>(),
          o.row_weights[r].as<float>(),
          nullptr,
          o.ids[r].as<int32_t>(),
          o.recv_count[r].as<int32_t>(),
          o.slot_row[r].as<int32_t>(),
          o.y[r].as<char>(),
          nullptr};
}

void TimeMoe(Cluster& cluster, int tokens, Grid dispatch, Grid combine) {
  const MoeShape once = ShapeOf(tokens, false), each = ShapeOf(tokens, true);
  const Operands o = MakeOperands(cluster, each);
  const int length = tokens > 1024 ? 5 : tokens > 256 ? 20 : 100;
  const auto time_dispatch = [&](const MoeShape& shape) {
    return TimeInGraph(cluster, length, [&](int r) {
      return LaunchDispatch(cluster.peers(r), shape, dispatch,
                            DispatchOf(o, r, shape.expand),
                            cluster.group().Workspace(r), cluster.stream(r));
    });
  };
  const auto time_combine = [&](const MoeShape& shape) {
    return TimeInGraph(cluster, length, [&](int r) {
      return LaunchCombine(cluster.peers(r), shape, combine, CombineOf(o, r),
                           cluster.stream(r));
    });
  };
  const double unique = time_dispatch(once);
  const double partials = time_combine(once);
  const double grouped = time_dispatch(each);
  const double reduced = time_combine(each);
  std::printf(
      "T %5d  dispatch %3d/%2d/%d: once %7.2f  grouped %7.2f   "
      "combine %3d/%2d: once %7.2f  reduced %7.2f us\n",
      tokens, dispatch.blocks, dispatch.send_blocks, dispatch.segments_per_item,
      unique, grouped, combine.blocks, combine.send_blocks, partials, reduced);
  std::fflush(stdout);
}

void TimePrimitives(Cluster& cluster) {
  const double barrier = TimeInGraph(cluster, 200, [&](int r) {
    return LaunchBarrier(cluster.peers(r), cluster.stream(r));
  });
  std::printf("barrier %.2f us\n", barrier);
  std::vector<DeviceBuffer> source, target, offset, out;
  for (int r = 0; r < kRanks; ++r) {
    source.emplace_back(r, 1 << 20);
    target.push_back(Upload<int32_t>(r, {1 - r}));
    offset.push_back(Upload<int32_t>(r, {0}));
    out.emplace_back(r, 1 << 20);
  }
  for (const int64_t bytes : {int64_t{16}, kRowBytes, int64_t{1} << 20}) {
    const auto put = [&](int r) {
      return LaunchPut(cluster.peers(r),
                       {source[r].as<char>(), bytes, target[r].as<int32_t>(),
                        offset[r].as<int32_t>(), 1, kWindowsBegin, 1 << 20, 0},
                       64, cluster.stream(r));
    };
    const double alone = TimeInGraph(cluster, 200, put);
    const double both = TimeInGraph(cluster, 200, [&](int r) {
      const cudaError_t error = put(r);
      if (error != cudaSuccess) return error;
      return LaunchWait(cluster.peers(r),
                        {out[r].as<char>(), kWindowsBegin,
                         static_cast<uint64_t>(bytes), 0, 1},
                        64, cluster.stream(r));
    });
    std::printf("put of %lld bytes %.2f us, with its wait %.2f us\n",
                static_cast<long long>(bytes), alone, both);
  }
}

void Main(const std::string& what, const std::vector<int>& blocks) {
  if (what == "primitives") {
    Cluster cluster(kRanks, 2, 1 << 20, 1 << 20);
    TimePrimitives(cluster);
  } else if (what == "decode") {
    Cluster cluster(kRanks, 2, 1 << 20, MessageBytes(ShapeOf(1024, true)));
    for (const int n : blocks) {
      for (const int tokens : {1, 8, 32, 128, 256, 512}) {
        TimeMoe(cluster, tokens, {n, 0, 1}, {n, 0, 1});
      }
    }
  } else {
    const bool long_input = what == "long";
    Cluster cluster(kRanks, 2, 1 << 20,
                    MessageBytes(ShapeOf(long_input ? 16384 : 4096, true)));
    const std::vector<int> lengths =
        long_input ? std::vector<int>{16384}
                   : std::vector<int>{128, 256, 512, 1024, 4096};
    for (const int n : blocks) {
      for (const int tokens : lengths) {
        const MoeShape shape = ShapeOf(tokens, true);
        TimeMoe(cluster, tokens, DispatchGrid(shape, n), CombineGrid(shape, n));
        TimeMoe(cluster, tokens, {n, n / 4, 3}, {n, n / 3, 1});
        TimeMoe(cluster, tokens, {n, n / 4, 2}, {n, n / 2, 1});
      }
    }
  }
}

}  // namespace
}  // namespace jaxfabric::cuda

int main(int argc, char** argv) {
  const std::string missing = jaxfabric::cuda::Missing(2);
  if (!missing.empty()) {
    std::printf("skipped: %s\n", missing.c_str());
    return 0;
  }
  std::vector<int> blocks;
  for (int i = 2; i < argc; ++i) blocks.push_back(std::atoi(argv[i]));
  if (blocks.empty()) blocks = {128};
  jaxfabric::cuda::Main(argc > 1 ? argv[1] : "decode", blocks);
  return 0;
}
