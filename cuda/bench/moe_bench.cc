// Times of the kernels under CUDA graphs, two ranks in one process, and of bare
// probes beside them.
//
//   cuda_moe_bench [all|decode|prefill|long|primitives|128|4096|grids|push|
//                  again] [blocks]
//
// A graph holds a barrier and then a chain of one operation between two events,
// and is launched on all devices. A time is what the slower rank took for the
// chain over the chain's length, in microseconds: the median and the 99th of
// 100 of kLaunches launches. A grid is blocks / those that send / segments that
// a warp takes / items before the plan (see Grid).

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
#include "probe_kernels.h"
#include "tests/cluster.h"

namespace jaxfabric::cuda {
namespace {

constexpr int kRanks = 2, kExperts = 256, kTopK = 8, kHidden = 7168;
constexpr int64_t kRowBytes = kHidden * 2;
constexpr int kLaunches = 300, kLaunchesOfMany = 60;

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
Times TimeInGraph(Cluster& cluster, int length, const Launch& launch,
                  int launches = kLaunches) {
  std::vector<Chain> chains(cluster.ranks());
  cluster.ForEach([&](int rank) {
    return Capture(cluster, rank, length, launch, chains[rank]);
  });
  cluster.Synchronize();
  std::vector<double> times;
  for (int i = -3; i < launches; ++i) {
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
  std::vector<DeviceBuffer> x, ids, weights, tokens, scales, group_sizes,
      row_weights, row_index, recv_count, slot_row, sent, dropped, y;
};

enum class Wire { kBf16, kKept, kUnscaled };

const char* NameOf(Wire wire) {
  return wire == Wire::kBf16   ? "bf16"
         : wire == Wire::kKept ? "e4m3"
                               : "e4m3>bf16";
}

MoeShape ShapeOf(int tokens, bool expand, Wire wire = Wire::kBf16) {
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
  shape.scaled = wire != Wire::kBf16;
  shape.keep = wire == Wire::kKept;
  shape.hidden = kHidden;
  if (shape.keep) shape.row_bytes = kHidden;
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
    o.scales.emplace_back(device, shape.rows * (kHidden / kScaleBlock) * 4);
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
          o.scales[r].as<float>(),
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

void PrintTimes(const char* what, const MoeShape& shape, Wire wire,
                const Grid& grid, const Times& times) {
  std::printf("%5d tokens  %-8s %-4s %-9s  %3d/%2d/%d/%d  %8.2f %8.2f us\n",
              shape.tokens, what, shape.expand ? "each" : "once", NameOf(wire),
              grid.blocks, grid.send_blocks, grid.segments_per_item,
              grid.items_before_plan, times.p50, times.p99);
  std::fflush(stdout);
}

int ChainLength(const MoeShape& shape) { return shape.tokens > 1024 ? 5 : 20; }

void TimeDispatch(Cluster& cluster, const Operands& o, const MoeShape& shape,
                  Wire wire, const Grid& grid, int launches = kLaunches) {
  const Times times = TimeInGraph(
      cluster, ChainLength(shape),
      [&](int r) {
        return LaunchDispatch(cluster.peers(r), shape, grid,
                              DispatchOf(o, r, shape.expand),
                              cluster.group().Workspace(r), cluster.stream(r));
      },
      launches);
  PrintTimes("dispatch", shape, wire, grid, times);
}

void TimeCombine(Cluster& cluster, const Operands& o, const MoeShape& shape,
                 const Grid& grid, int launches = kLaunches) {
  const Times times = TimeInGraph(
      cluster, ChainLength(shape),
      [&](int r) {
        return LaunchCombine(cluster.peers(r), shape, grid, CombineOf(o, r),
                             cluster.stream(r));
      },
      launches);
  PrintTimes("combine", shape, Wire::kBf16, grid, times);
}

constexpr Wire kWires[] = {Wire::kBf16, Wire::kKept, Wire::kUnscaled};

// Rows once per rank, and one for each expert.
void TimeMoe(Cluster& cluster, int tokens, int blocks) {
  const Operands o = MakeOperands(cluster, ShapeOf(tokens, true));
  for (const bool expand : {false, true}) {
    for (const Wire wire : kWires) {
      const MoeShape shape = ShapeOf(tokens, expand, wire);
      TimeDispatch(cluster, o, shape, wire, DispatchGrid(shape, blocks));
    }
    const MoeShape shape = ShapeOf(tokens, expand);
    TimeCombine(cluster, o, shape, CombineGrid(shape, blocks));
  }
}

// Other grids than those chosen.
void TimeGrids(Cluster& cluster, int tokens, int blocks) {
  const Operands o = MakeOperands(cluster, ShapeOf(tokens, true));
  for (const bool expand : {false, true}) {
    for (const Wire wire : kWires) {
      const MoeShape shape = ShapeOf(tokens, expand, wire);
      const Grid chosen = DispatchGrid(shape, blocks);
      for (const int sixteenths : {2, 3, 4, 5, 6, 7}) {
        for (const int per_item : {1, 2, 4}) {
          for (const int before_plan : {0, 1, 2, 3, 4, 6, 8}) {
            if (before_plan > 0 && chosen.items_before_plan == 0) break;
            TimeDispatch(cluster, o, shape, wire,
                         {blocks, blocks * sixteenths / 16, per_item,
                          chosen.plan_together, before_plan},
                         kLaunchesOfMany);
          }
        }
      }
    }
  }
  for (const bool expand : {false, true}) {
    const MoeShape shape = ShapeOf(tokens, expand);
    for (const int sixteenths : {4, 6, 7, 8, 9}) {
      for (const int per_item : {1, 2, 3}) {
        TimeCombine(cluster, o, shape,
                    {blocks, blocks * sixteenths / 16, per_item, false, 0},
                    kLaunchesOfMany);
      }
    }
  }
}

// What the link does with plain stores, both ways at once.
void TimeProbes(Cluster& cluster) {
  constexpr int64_t kBytes = int64_t{56} << 20;
  std::vector<DeviceBuffer> source;
  for (int r = 0; r < kRanks; ++r) source.emplace_back(r, kBytes);
  const auto time = [&](Probe kind, int64_t bytes, int length) {
    return TimeInGraph(cluster, length, [&](int r) {
      return LaunchProbe(cluster.peers(r),
                         {kind,
                          {kWindowsBegin, kBytes + kProbeData, kIdsMax - 1},
                          source[r].as<char>(),
                          bytes},
                         128, cluster.stream(r));
    });
  };
  const Times empty = time(Probe::kEmpty, 0, 200);
  const Times barrier = time(Probe::kBarrier, 0, 200);
  const Times put = time(Probe::kPut, kRowBytes, 200);
  const Times stores = time(Probe::kStores, kBytes, 5);
  std::printf(
      "probe: empty %.2f/%.2f us, barrier %.2f/%.2f us, put of %lld "
      "bytes %.2f/%.2f us, stores %.1f GB/s each way\n",
      empty.p50, empty.p99, barrier.p50, barrier.p99,
      static_cast<long long>(kRowBytes), put.p50, put.p99,
      static_cast<double>(kBytes) / stores.p50 * 1e-3);
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

// Rows stored straight where they belong, beside ours, in turns.
void TimePush(int blocks) {
  constexpr int kTurns = 3, kTokensMost = 16384;
  constexpr int64_t kBytes = kTokensMost * kRowBytes;
  Cluster cluster(kRanks, 2, 2 * kBytes + kProbeData,
                  MessageBytes(ShapeOf(kTokensMost, false)));
  std::vector<DeviceBuffer> source;
  for (int r = 0; r < kRanks; ++r) source.emplace_back(r, kBytes);
  for (const int tokens : {128, 512, 1024, 4096, kTokensMost}) {
    const Operands o = MakeOperands(cluster, ShapeOf(tokens, false));
    for (int turn = 0; turn < kTurns; ++turn) {
      for (const Wire wire : {Wire::kBf16, Wire::kKept}) {
        const MoeShape shape = ShapeOf(tokens, false, wire);
        const int64_t row =
            shape.row_bytes + (shape.keep ? shape.scale_blocks * 4 : 0);
        TimeDispatch(cluster, o, shape, wire, DispatchGrid(shape, blocks),
                     kLaunchesOfMany);
        const Times push = TimeInGraph(
            cluster, ChainLength(shape),
            [&](int r) {
              return LaunchProbe(cluster.peers(r),
                                 {Probe::kPush,
                                  {kWindowsBegin, 2 * kBytes + kProbeData, 0},
                                  source[r].as<char>(),
                                  tokens * row},
                                 blocks, cluster.stream(r));
            },
            kLaunchesOfMany);
        PrintTimes("push", shape, wire, {blocks, blocks, 0, false, 0}, push);
      }
    }
  }
}

// Combine of the same rows, again and again.
void TimeAgain(int blocks) {
  constexpr int kTurns = 8, kLaunchesOfTurn = 1000;
  const MoeShape shape = ShapeOf(128, true);
  Cluster cluster(kRanks, 2, 1 << 20, MessageBytes(shape));
  const Operands o = MakeOperands(cluster, shape);
  TimeDispatch(cluster, o, shape, Wire::kBf16, DispatchGrid(shape, blocks));
  for (int turn = 0; turn < kTurns; ++turn) {
    TimeCombine(cluster, o, shape, CombineGrid(shape, blocks), kLaunchesOfTurn);
  }
}

void TimeBoth() {
  Cluster cluster(kRanks, 2, uint64_t{64} << 20, 1 << 20);
  TimeProbes(cluster);
  TimePrimitives(cluster);
}

void Main(const std::string& what, int blocks) {
  const bool all = what == "all";
  if (all || what == "primitives") TimeBoth();
  std::vector<int> lengths;
  if (what == "decode" || all) lengths = {1, 8, 32, 128, 256, 512};
  if (what == "prefill" || all) {
    lengths.insert(lengths.end(), {1024, 4096});
  }
  if (what == "long" || all) lengths.push_back(16384);
  if (what == "128" || what == "4096") lengths = {std::stoi(what)};
  if (what == "grids") lengths = {128, 4096};
  if (what == "push") return TimePush(blocks);
  if (what == "again") return TimeAgain(blocks);
  if (lengths.empty()) return;
  Cluster cluster(kRanks, 2, 1 << 20,
                  MessageBytes(ShapeOf(lengths.back(), true)));
  for (const int tokens : lengths) {
    if (what == "grids") {
      TimeGrids(cluster, tokens, blocks);
    } else {
      TimeMoe(cluster, tokens, blocks);
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
  jaxfabric::cuda::Main(argc > 1 ? argv[1] : "all",
                        argc > 2 ? std::atoi(argv[2]) : 128);
  return 0;
}
