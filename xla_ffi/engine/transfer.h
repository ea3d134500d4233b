// Transfer: pieces that are written to one peer and counted there as one.

#ifndef JAXFABRIC_ENGINE_TRANSFER_H_
#define JAXFABRIC_ENGINE_TRANSFER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

// A registered region of a peer: one key per Domain of the peer.
struct MrDesc {
  uint64_t base = 0;
  uint64_t length = 0;
  std::vector<uint64_t> keys;
};

// Memory of this rank that is registered on each of its Domains.
struct LocalRegion {
  const std::byte* base = nullptr;
  uint64_t length = 0;
  std::vector<uint64_t> keys;
};

// Names a transfer while it is under way; never used again, never 0.
using TransferHandle = uint64_t;

// One write of a transfer: `count` of its pieces, from `first` on.
struct Chunk {
  uint32_t first = 0;
  uint32_t count = 0;
  uint64_t bytes = 0;
  std::optional<uint32_t> immediate;
};

struct Transfer {
  uint32_t peer = 0;
  LocalRegion local;
  MrDesc remote;
  std::vector<Piece> pieces;  // each lies in one chunk
  std::vector<Chunk> chunks;
  std::optional<uint32_t> id;
  std::function<void(Status)> done;
  TransferHandle handle = 0;
  uint64_t span = 0;  // in the trace
  bool small = false;
  uint32_t next = 0;     // first chunk that was never posted
  uint32_t open = 0;     // posted, or to be posted again, and not over
  uint32_t repairs = 0;  // that the peer has not acknowledged
  Status status;

  bool over() const {
    return open == 0 && repairs == 0 && next == chunks.size();
  }
};

// What is not longer goes whole on one Domain: cutting it gains less than one
// more write costs. benchmarks/split_threshold.cc measured 75 to 270 KB over
// libfabric TCP on loopback (2 cores, others busy: 13 us a write, 5 GB/s).
inline constexpr uint64_t kSplitBytes = uint64_t{1} << 17;
// Chunks are not longer: others' turns come, and a dead link held little.
inline constexpr uint64_t kChunkBytes = uint64_t{1} << 20;

// Cuts `pieces` for `links` links, and puts up to `pieces_max` of those that
// are small into one chunk. Chunks shrink towards the end, so that a slow link
// that took one of the last is not what all wait for. There is at least one, so
// that a transfer of no bytes is counted too. Fails where there are more than
// can be counted as one transfer.
Status CutIntoChunks(std::span<const Piece> pieces, size_t links,
                     uint64_t write_bytes_max, uint32_t pieces_max,
                     Transfer* transfer);

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_H_
