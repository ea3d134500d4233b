#include "engine/transfer.h"

#include <algorithm>
#include <string>

#include "engine/immediate.h"

namespace jaxfabric {
namespace {

// A chunk is this share of what remains, per link. With two chunks on each
// link, one that is four times slower than three others still ends with them.
constexpr uint64_t kChunksPerLink = 8;

}  // namespace

Status CutIntoChunks(std::span<const Piece> pieces, size_t links,
                     uint64_t write_bytes_max, uint32_t pieces_max,
                     Transfer* transfer) {
  uint64_t rest = 0;
  for (const Piece& piece : pieces) rest += piece.length;
  std::vector<Piece>& cut = transfer->pieces;
  std::vector<Chunk>& chunks = transfer->chunks;
  for (const Piece& piece : pieces) {
    for (uint64_t begin = 0; begin < piece.length;) {
      uint64_t size = kChunkBytes;
      if (links > 1) {
        size = std::clamp(rest / (kChunksPerLink * links), kSplitBytes,
                          kChunkBytes);
      }
      const uint64_t chunk_max = std::min(size, write_bytes_max);
      size = std::min(chunk_max, piece.length - begin);
      const auto first = static_cast<uint32_t>(cut.size());
      cut.push_back(
          {piece.local_offset + begin, piece.remote_offset + begin, size});
      begin += size;
      rest -= size;
      if (!chunks.empty() && chunks.back().count < pieces_max &&
          chunks.back().bytes + size <= chunk_max) {
        ++chunks.back().count;
        chunks.back().bytes += size;
        continue;
      }
      chunks.push_back({first, 1, size, std::nullopt});
      if (chunks.size() > kWritesPerTransferMax) {
        return Status(StatusCode::kInvalidArgument,
                      "a transfer of more writes than can be counted as one: "
                      "2^20; submit it in parts, or give it longer pieces");
      }
    }
  }
  if (chunks.empty()) {
    const uint64_t remote = pieces.empty() ? 0 : pieces[0].remote_offset;
    cut.push_back({0, remote, 0});
    chunks.push_back({0, 1, 0, std::nullopt});
  }
  if (transfer->id) {
    const auto count = static_cast<uint32_t>(chunks.size());
    for (uint32_t i = 0; i < count; ++i) {
      chunks[i].immediate =
          Immediate{*transfer->id, ShareOfWrite(i, count)}.Encode();
    }
  }
  return OkStatus();
}

}  // namespace jaxfabric
