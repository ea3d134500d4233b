// Dispatch: one kernel that sends routes and rows, plans, and places what
// comes.
//
// The first blocks only send, so that the link is busy from the first
// microsecond to the last, while the others plan and place rows as they come.
// Few tokens: each of them makes the whole plan in its shared memory, and no
// block waits for another; very few: every block does everything. Many tokens:
// they plan together.

#include <algorithm>
#include <cstdint>

#include "bounded_wait.cuh"
#include "dispatch_place.cuh"
#include "dispatch_plan.cuh"
#include "ll128.cuh"
#include "moe_kernels.h"
#include "moe_shape.h"
#include "plain_rows.cuh"
#include "row_segments.cuh"
#include "scaled_rows.cuh"

namespace jaxfabric::cuda {

namespace {

// Loads that a warp has in flight, for few tokens less, so that more warps have
// work. Both divide the 30 packets of 7168 bf16.
constexpr int kPacketsOfFew = 3, kPacketsOfMany = 5;

// The plan's tables, at `memory`, which may be null to get the size only.
__host__ __device__ size_t LayTables(const MoeShape& shape, int blocks,
                                     char* memory, PlanTables* tables) {
  const size_t columns = shape.experts + 1;
  size_t used = 0;
  const auto take = [&](size_t words) {
    char* const at = memory + used;
    used += (words * 4 + 15) / 16 * 16;
    return at;
  };
  tables->ids = reinterpret_cast<int32_t*>(
      take(size_t(shape.ranks) * shape.tokens * shape.k));
  tables->bits = reinterpret_cast<uint32_t*>(take(shape.tiles * columns));
  tables->before = reinterpret_cast<uint32_t*>(take(shape.tiles * columns));
  tables->block_sum = reinterpret_cast<uint32_t*>(take(blocks * columns));
  tables->arrivals = reinterpret_cast<uint32_t*>(take(shape.tiles));
  return used;
}

// Shared memory: three words per column, a buffer per warp, and in the small
// form the plan's tables. The buffer holds routes, then a segment's packets.
__host__ __device__ size_t WarpBufferWords(const MoeShape& shape) {
  const int segment =
      shape.scaled
          ? static_cast<int>(PacketsFor(kSegmentBytes)) * kPacketData / 4
          : 0;
  const int routes = kTileTokens * shape.k;
  const int columns = shape.experts + 1;
  const int most = routes > columns ? routes : columns;
  return ((segment > most ? segment : most) + 3) / 4 * 4;
}

__host__ __device__ size_t TotalsWords(const MoeShape& shape) {
  return (3 * (shape.experts + 1) + 3) / 4 * 4;
}

// Without the plan's tables.
__host__ __device__ size_t BuffersBytes(const MoeShape& shape) {
  return (TotalsWords(shape) + kDispatchWarps * WarpBufferWords(shape)) * 4;
}

size_t SharedBytes(const MoeShape& shape, bool with_tables) {
  PlanTables unused;
  return BuffersBytes(shape) +
         (with_tables ? LayTables(shape, 1, nullptr, &unused) : 0);
}

template <class Rows>
__device__ void Send(const DispatchWork& w, WarpShare share) {
  const MoeShape& shape = w.shape;
  const int routes = shape.tiles_per_source * 2;
  for (int i = share.index; i < routes; i += share.count) {
    const bool weights = i >= shape.tiles_per_source;
    const int tile = weights ? i - shape.tiles_per_source : i;
    const void* const array =
        weights ? static_cast<const void*>(w.io.weights) : w.io.ids;
    SendRoutes(w.peers, shape, tile, weights, w.flag, array);
  }
  // The warps that sent routes are the last to send rows.
  Rows::Send(w,
             {(share.index + share.count - routes % share.count) % share.count,
              share.count});
}

// A tile's ids, received or copied into the tables.
__device__ bool TakeIds(const DispatchWork& w, const Tile& tile) {
  const int64_t at =
      (int64_t{tile.source} * w.shape.tokens + tile.first) * w.shape.k;
  if (tile.source != w.peers.rank) {
    return ReceiveRoutes(w.peers, w.shape, tile, false, w.flag,
                         w.tables.ids + at);
  }
  const int32_t* const from = w.io.ids + int64_t{tile.first} * w.shape.k;
  for (int i = w.lane; i < tile.tokens * w.shape.k; i += kLanes) {
    w.tables.ids[at + i] = from[i];
  }
  __syncwarp();
  return true;
}

__device__ void Mark(const DispatchWork& w, int tile, const Tile& at) {
  const int columns = PlanColumns(w.shape);
  const int64_t first =
      w.shape.kept_max < INT32_MAX ? ArrivalsBefore(w, tile) : 0;
  uint32_t* const table = w.tables.bits + tile * columns;
  uint32_t* const row = w.many ? w.warp_buffer : table;
  const int bad =
      MarkTile(w.shape, w.peers.rank, at.tokens, TileIds(w, at), first, row);
  if (bad >= 0) {
    Fail(w.peers, ErrorCode::kBadExpert, Operation::kDispatch, at.source,
         (at.first + w.lane) * w.shape.k + bad, w.flag, 0);
  }
  if (w.many) {
    for (int c = w.lane; c < columns; c += kLanes) table[c] = row[c];
    __syncwarp();
  }
}

__device__ bool MakePlan(const DispatchWork& w, PlanTeam team) {
  const int begin = FirstTile(w.shape, team, team.block);
  const int end = FirstTile(w.shape, team, team.block + 1);
  const bool limited = w.shape.kept_max < INT32_MAX;
  const int warp = threadIdx.x / kLanes;
  bool good = true;
  for (int tile = begin + warp; tile < end; tile += kDispatchWarps) {
    const Tile at = TileAt(w.shape, tile);
    good &= TakeIds(w, at);
    if (limited) {
      const uint32_t count =
          CountArrivals(w.shape, w.peers.rank, at.tokens, TileIds(w, at));
      if (w.lane == 0) w.tables.arrivals[tile] = count;
    } else {
      Mark(w, tile, at);
    }
  }
  if (limited) {
    if (!SyncTeam(w.peers, team, w.flag)) return false;
    for (int tile = begin + warp; tile < end; tile += kDispatchWarps) {
      Mark(w, tile, TileAt(w.shape, tile));
    }
  }
  // A warp that waited in vain has marked garbage: nobody may follow the plan.
  if (__syncthreads_or(!good)) return false;
  SumOwnTiles(w.shape, team, w.tables, w.totals);
  if (!SyncTeam(w.peers, team, w.flag)) return false;
  if (team.blocks == 1) {
    if (threadIdx.x < kLanes) PlaceGroups(w.shape, w.totals);
    __syncthreads();
    return true;
  }
  SumBlocks(w.shape, team, w.tables, w.totals);
  return SyncTeam(w.peers, team, w.flag);
}

template <class Rows>
__device__ void Place(const DispatchWork& w, WarpShare share) {
  const MoeShape& shape = w.shape;
  for (int job = share.index; job < shape.tiles + 1; job += share.count) {
    if (job < shape.tiles) PlaceRoutes(w, job);
    if (job == shape.tiles) PlaceCounts(w);
  }
  Rows::Place(w, share);
  PlaceNothing<Rows>(w, share);
}

// Without a plan yet. `shared` is BuffersBytes() and, for few tokens, tables.
__device__ DispatchWork WorkOf(const Peers& peers, const MoeShape& shape,
                               const DispatchBuffers& io, uint64_t flag,
                               bool many, int per_item, uint4* shared) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(shared);
  const int columns = PlanColumns(shape);
  const int warp = threadIdx.x / kLanes;
  DispatchWork w = {
      peers,    shape, io,       {},
      {},       words, flag,     static_cast<int>(threadIdx.x) % kLanes,
      {},       many,  per_item, false,
      INT32_MAX};
  w.part = MyPart(w.lane);
  w.totals = {words, words + columns, words + 2 * columns};
  w.warp_buffer = words + TotalsWords(shape) + warp * WarpBufferWords(shape);
  if (shape.scaled) {
    // A lane's elements are all inside or all outside of a row then, too: of
    // float32 they are two vectors.
    w.aligned = shape.hidden % kLaneElements == 0 &&
                IsVector(io.x, shape.x_row_bytes) &&
                IsVector(io.tokens, shape.row_bytes);
  }
  return w;
}

template <bool kMany, class Rows>
__global__ void __launch_bounds__(kDispatchThreads, 1)
    DispatchKernel(const __grid_constant__ Peers peers,
                   const __grid_constant__ MoeShape shape,
                   const __grid_constant__ DispatchBuffers io, char* workspace,
                   int send_blocks, int per_item, int items_before_plan) {
  extern __shared__ uint4 shared[];
  const uint64_t epoch = ReadEpoch(peers, Operation::kDispatch);
  if (epoch == 0) return;
  const int warp = threadIdx.x / kLanes;
  DispatchWork w = WorkOf(peers, shape, io, PacketFlag(peers, epoch), kMany,
                          per_item, shared);
  const int receive_blocks = gridDim.x - send_blocks;
  const bool roles = send_blocks > 0;
  char* const tables =
      kMany ? workspace : reinterpret_cast<char*>(shared) + BuffersBytes(shape);
  LayTables(shape, kMany ? receive_blocks : 1, tables, &w.tables);
  const bool senders_place = kMany && items_before_plan > 0;
  if (senders_place) {
    w.own_items = items_before_plan * send_blocks * kDispatchWarps;
  }
  int block = blockIdx.x;
  // Late and by a warp in the middle, which nobody waits for: it takes a
  // microsecond.
  const bool enters = block == 0 && threadIdx.x == kDispatchThreads / 2;
  if (peers.phase == Phase::kDone) {
    if (blockIdx.x == gridDim.x - 1) CountSent(w);
    if (enters) EnterProgramCall(peers, Operation::kDispatch, epoch);
  } else if (!roles || block < send_blocks) {
    // A block's warps are far apart in the order of the work.
    const int blocks = roles ? send_blocks : gridDim.x;
    const WarpShare share = {warp * blocks + block, blocks * kDispatchWarps};
    Send<Rows>(w, share);
    if (!senders_place && block == blocks - 1) CountSent(w);
    if (enters) EnterProgramCall(peers, Operation::kDispatch, epoch);
    if (roles) {
      __syncthreads();
      if (threadIdx.x == 0) AdvanceEpoch(peers, epoch);
      return;
    }
  } else {
    block -= send_blocks;
    // Senders that place rows too have no time left; here routes are waited
    // for.
    if (senders_place && block == 0) CountSent(w);
  }
  const PlanTeam team =
      kMany ? PlanTeam{block, receive_blocks} : PlanTeam{0, 1};
  if (!MakePlan(w, team)) return;
  // Only where somebody waits: halves have epochs of the same numbers.
  if (senders_place && block == 0) AnnouncePlan(peers, epoch);
  // Not by the first warps, which have the routes to place.
  if (threadIdx.x == kLanes) AdvanceEpoch(peers, epoch);
  const WarpShare share = {warp * receive_blocks + block,
                           receive_blocks * kDispatchWarps};
  Place<Rows>(w, share);
  if (peers.phase == Phase::kDone) Release(peers, epoch);
}

// The first half: what the whole kernel sends, once its place is free.
template <class Rows>
__global__ void __launch_bounds__(kDispatchThreads, 1)
    DispatchStartKernel(const __grid_constant__ Peers peers,
                        const __grid_constant__ MoeShape shape,
                        const __grid_constant__ DispatchBuffers io,
                        char* /*workspace*/, int /*send_blocks*/, int per_item,
                        int /*items_before_plan*/) {
  extern __shared__ uint4 shared[];
  const uint64_t epoch = ReadEpoch(peers, Operation::kDispatch);
  if (epoch == 0) return;
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
    EnterProgramCall(peers, Operation::kDispatch, epoch);
  }
  if (!AwaitReleases(peers, Operation::kDispatch, epoch)) return;
  if (threadIdx.x == 0) AdvanceEpoch(peers, epoch);
  const int blocks = gridDim.x;
  const int warp = threadIdx.x / kLanes;
  Send<Rows>(
      WorkOf(peers, shape, io, PacketFlag(peers, epoch), false, per_item,
             shared),
      {warp * blocks + static_cast<int>(blockIdx.x), blocks * kDispatchWarps});
}

using Kernel = void (*)(Peers, MoeShape, DispatchBuffers, char*, int, int, int);

// What a call is to a kernel.
enum class Form { kFew, kMany, kStart };

template <class FewRows, class ManyRows>
Kernel KernelOf(Form form) {
  switch (form) {
    case Form::kFew:
      return DispatchKernel<false, FewRows>;
    case Form::kMany:
      return DispatchKernel<true, ManyRows>;
    case Form::kStart:
      return DispatchStartKernel<ManyRows>;
  }
  return nullptr;
}

Kernel PlainKernel(Form form, bool vector) {
  return vector ? KernelOf<PlainRows<true, kPacketsOfFew>,
                           PlainRows<true, kPacketsOfMany>>(form)
                : KernelOf<PlainRows<false, kPacketsOfFew>,
                           PlainRows<false, kPacketsOfMany>>(form);
}

Kernel ScaledKernel(Form form, RowType type) {
  switch (type) {
    case RowType::kF32:
      return KernelOf<ScaledRows<RowType::kF32>, ScaledRows<RowType::kF32>>(
          form);
    case RowType::kBf16:
      return KernelOf<ScaledRows<RowType::kBf16>, ScaledRows<RowType::kBf16>>(
          form);
    case RowType::kF16:
      return KernelOf<ScaledRows<RowType::kF16>, ScaledRows<RowType::kF16>>(
          form);
  }
  return nullptr;
}

}  // namespace

size_t PlanBytes(const MoeShape& shape, Grid grid) {
  PlanTables unused;
  return LayTables(shape, grid.blocks, nullptr, &unused);
}

Grid DispatchGrid(const MoeShape& shape, int blocks_max) {
  const bool many =
      SharedBytes(shape, true) > kSharedPlanBytesMax || shape.tokens > 256;
  constexpr int kTokensForRoles = 32;
  const auto with = [&](int sixteenths, int segments) {
    return Grid{blocks_max, std::max(1, blocks_max * sixteenths / 16), segments,
                many, 0};
  };
  // Numbers of e4m3 are made by senders and, of own rows, by receivers.
  if (shape.scaled && shape.tokens >= kTokensForRoles) {
    if (!many) return with(4, 2);
    if (shape.expand) return with(shape.keep ? 4 : 3, 1);
    // The plan takes 17 us, however long the rest does.
    Grid grid = with(6, 1);
    grid.items_before_plan =
        std::clamp(shape.tokens / 256, 2, shape.keep ? 10 : 8);
    return grid;
  }
  // The senders are as many as keep the link busy; repeated rows keep the
  // receivers busy too.
  if (many) {
    if (shape.tokens > 1024 && !shape.expand) return with(7, 4);
    const int share = shape.expand ? 6 : 4;
    return {blocks_max, std::max(1, blocks_max / share),
            shape.tokens > 1024 ? 3 : 2, true, 0};
  }
  if (shape.tokens < kTokensForRoles) return {blocks_max, 0, 1, false, 0};
  const int share = shape.tokens <= 128 ? 8 : 4;
  return {blocks_max, std::max(1, blocks_max / share), 2, false, 0};
}

cudaError_t LaunchDispatch(const Peers& peers, const MoeShape& shape, Grid grid,
                           const DispatchBuffers& buffers, char* workspace,
                           cudaStream_t stream) {
  const bool start = peers.phase == Phase::kStart;
  const bool many = grid.plan_together;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(kDispatchThreads);
  config.dynamicSmemBytes = SharedBytes(shape, !many && !start);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = many && !start ? 1 : 0;
  const Form form = start ? Form::kStart : many ? Form::kMany : Form::kFew;
  const bool vector = IsVector(buffers.x, shape.row_bytes) &&
                      IsVector(buffers.tokens, shape.row_bytes);
  const Kernel kernel =
      shape.scaled ? ScaledKernel(form, shape.type) : PlainKernel(form, vector);
  // All blocks of a half have the same role.
  const int send_blocks = peers.phase == Phase::kWhole ? grid.send_blocks : 0;
  const bool senders_place =
      send_blocks > 0 && many && shape.scaled && !shape.expand;
  return cudaLaunchKernelEx(&config, kernel, peers, shape, buffers, workspace,
                            send_blocks, grid.segments_per_item,
                            senders_place ? grid.items_before_plan : 0);
}

cudaError_t PreloadDispatchKernels() {
  constexpr int kShared = 200 << 10;
  for (const Form form : {Form::kFew, Form::kMany, Form::kStart}) {
    for (const Kernel kernel :
         {PlainKernel(form, false), PlainKernel(form, true),
          ScaledKernel(form, RowType::kF32), ScaledKernel(form, RowType::kBf16),
          ScaledKernel(form, RowType::kF16)}) {
      const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace jaxfabric::cuda
