// Times of the kernels under CUDA graphs, two ranks in one process.
//
//   cuda_moe_bench [decode|prefill|long|sweep|primitives] [blocks ...]
//
// A graph holds a barrier and then a chain of one operation between two events,
// and is launched on all devices. A time is what the slower rank took for the
// chain over the chain's length, in microseconds: the median of kLaunches
// launches / the 99th of 100.

#include <cuda_runtime.h>

#include <algorithm>
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
constexpr int kLaunches = 300;

using Launch = std::function<cudaError_t(int rank)>;

struct Times {
  double p50, p99;
};

Times QuantilesOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values[values.size() * 99 / 100]};
}

// One rank's chain, and the events before and after it.
struct Chain {
  cudaGraphExec_t graph = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
};

cudaError_t Capture(Cluster& cluster, int rank, int length,
                    const Launch& launch, Chain& chain) {
  const cudaStream_t stream = cluster.stream(rank);
  cudaEventCreate(&chain.begin);
  cudaEventCreate(&chain.end);
  cudaGraph_t graph = nullptr;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
  LaunchBarrier(cluster.peers(rank), stream);  // who was launched first waits
  cudaEventRecordWithFlags(chain.begin, stream, cudaEventRecordExternal);
  for (int i = 0; i < length; ++i) launch(rank);
  cudaEventRecordWithFlags(chain.end, stream, cudaEventRecordExternal);
  cudaStreamEndCapture(stream, &graph);
  const cudaError_t error = cudaGraphInstantiate(&chain.graph, graph, 0);
  cudaGraphDestroy(graph);
  cudaGraphUpload(chain.graph, stream);
  return error;
}

// Microseconds of one `launch` in a chain of `length`.
Times TimeInGraph(Cluster& cluster, int length, const Launch& launch) {
  std::vector<Chain> chains(cluster.ranks());
  cluster.ForEach([&](int rank) {
    return Capture(cluster, rank, length, launch, chains[rank]);
  });
  cluster.Synchronize();
  std::vector<double> times;
  for (int i = -3; i < kLaunches; ++i) {
    cluster.ForEach([&](int rank) {
      return cudaGraphLaunch(chains[rank].graph, cluster.stream(rank));
    });
    cluster.Synchronize();
    double slowest = 0;
    for (const Chain& chain : chains) {
      float ms = 0;
      cudaEventElapsedTime(&ms, chain.begin, chain.end);
      slowest = std::max(slowest, ms * 1e3 / length);
    }
    if (i >= 0) times.push_back(slowest);
  }
  for (const Chain& chain : chains) {
    cudaGraphExecDestroy(chain.graph);
    cudaEventDestroy(chain.begin);
    cudaEventDestroy(chain.end);
  }
  const Status failure = cluster.group().Failure();
  if (!failure.ok()) {
    std::printf("FAILED: %s\n", failure.message().c_str());
    std::exit(1);
  }
  return QuantilesOf(times);
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

struct Grids {
  Grid dispatch, combine;
};
using GridsFor = std::function<Grids(const MoeShape& shape)>;

// One of the forms: rows once per rank, or one for each expert.
void TimeForm(Cluster& cluster, const Operands& o, const MoeShape& shape,
              const Grids& grids) {
  const int length = shape.tokens > 1024 ? 5 : 20;
  const Times dispatch = TimeInGraph(cluster, length, [&](int r) {
    return LaunchDispatch(cluster.peers(r), shape, grids.dispatch,
                          DispatchOf(o, r, shape.expand),
                          cluster.group().Workspace(r), cluster.stream(r));
  });
  const Times combine = TimeInGraph(cluster, length, [&](int r) {
    return LaunchCombine(cluster.peers(r), shape, grids.combine,
                         CombineOf(o, r), cluster.stream(r));
  });
  std::printf(
      "T %5d %s  dispatch %3d/%2d/%d %7.2f/%7.2f  combine %3d/%2d/%d "
      "%7.2f/%7.2f us\n",
      shape.tokens, shape.expand ? "each" : "once", grids.dispatch.blocks,
      grids.dispatch.send_blocks, grids.dispatch.segments_per_item,
      dispatch.p50, dispatch.p99, grids.combine.blocks,
      grids.combine.send_blocks, grids.combine.segments_per_item, combine.p50,
      combine.p99);
  std::fflush(stdout);
}

void TimeMoe(Cluster& cluster, int tokens, const GridsFor& grids_for) {
  const MoeShape once = ShapeOf(tokens, false), each = ShapeOf(tokens, true);
  const Operands o = MakeOperands(cluster, each);
  TimeForm(cluster, o, once, grids_for(once));
  TimeForm(cluster, o, each, grids_for(each));
}

// Other grids than those chosen, for few tokens.
void Sweep(Cluster& cluster, int tokens, int blocks) {
  for (const int send : {blocks / 8, blocks / 4, blocks * 5 / 16}) {
    for (const int per_item : {1, 2, 3}) {
      TimeMoe(cluster, tokens, [&](const MoeShape&) {
        return Grids{{blocks, send, per_item, false},
                     {blocks, send + blocks / 4, per_item, false}};
      });
    }
  }
}

void TimePrimitives(Cluster& cluster) {
  const Times barrier = TimeInGraph(cluster, 200, [&](int r) {
    return LaunchBarrier(cluster.peers(r), cluster.stream(r));
  });
  std::printf("barrier %.2f/%.2f us\n", barrier.p50, barrier.p99);
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
                       {source[r].as<char>(),
                        bytes,
                        1,
                        target[r].as<int32_t>(),
                        offset[r].as<int32_t>(),
                        1,
                        {kWindowsBegin, 1 << 20, 0}},
                       64, cluster.stream(r));
    };
    const Times alone = TimeInGraph(cluster, 200, put);
    const Times both = TimeInGraph(cluster, 200, [&](int r) {
      const cudaError_t error = put(r);
      if (error != cudaSuccess) return error;
      return LaunchWait(cluster.peers(r),
                        {out[r].as<char>(),
                         {kWindowsBegin, static_cast<uint64_t>(bytes), 0},
                         1},
                        64, cluster.stream(r));
    });
    std::printf("put of %lld bytes %.2f/%.2f us, with its wait %.2f/%.2f us\n",
                static_cast<long long>(bytes), alone.p50, alone.p99, both.p50,
                both.p99);
  }
}

void Main(const std::string& what, const std::vector<int>& blocks) {
  if (what == "primitives") {
    Cluster cluster(kRanks, 2, 1 << 20, 1 << 20);
    TimePrimitives(cluster);
    return;
  }
  const std::vector<int> lengths =
      what == "decode"  ? std::vector<int>{1, 8, 32, 128, 256, 512}
      : what == "long"  ? std::vector<int>{16384}
      : what == "sweep" ? std::vector<int>{32, 128}
                        : std::vector<int>{1024, 4096};
  Cluster cluster(kRanks, 2, 1 << 20,
                  MessageBytes(ShapeOf(lengths.back(), true)));
  for (const int n : blocks) {
    for (const int tokens : lengths) {
      TimeMoe(cluster, tokens, [n](const MoeShape& shape) {
        return Grids{DispatchGrid(shape, n), CombineGrid(shape, n)};
      });
      if (what == "sweep") Sweep(cluster, tokens, n);
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
