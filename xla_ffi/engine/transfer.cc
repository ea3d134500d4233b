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

StatusOr<std::vector<Chunk>> CutIntoChunks(const std::vector<Piece>& pieces,
                                           size_t links,
                                           uint64_t write_bytes_max,
                                           std::optional<uint32_t> id) {
  uint64_t rest = 0;
  for (const Piece& piece : pieces) rest += piece.length;
  std::vector<Chunk> chunks;
  for (const Piece& piece : pieces) {
    for (uint64_t begin = 0; begin < piece.length;) {
      uint64_t size = kChunkBytes;
      if (links > 1) {
        size = std::clamp(rest / (kChunksPerLink * links), kSplitBytes,
                          kChunkBytes);
      }
      size = std::min({size, write_bytes_max, piece.length - begin});
      chunks.push_back(
          {{piece.local_offset + begin, piece.remote_offset + begin, size},
           std::nullopt});
      begin += size;
      rest -= size;
      if (chunks.size() > kWritesPerTransferMax) {
        return Status(StatusCode::kInvalidArgument,
                      "a transfer of more writes than can be counted as one: "
                      "2^20; submit it in parts, or give it longer pieces");
      }
    }
  }
  if (chunks.empty()) {
    const uint64_t remote = pieces.empty() ? 0 : pieces[0].remote_offset;
    chunks.push_back({{0, remote, 0}, std::nullopt});
  }
  if (id) {
    const auto count = static_cast<uint32_t>(chunks.size());
    for (uint32_t i = 0; i < count; ++i) {
      chunks[i].immediate = Immediate{*id, ShareOfWrite(i, count)}.Encode();
    }
  }
  return chunks;
}

}  // namespace jaxfabric
