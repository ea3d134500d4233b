#include "engine/transfer.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "engine/immediate.h"

namespace jaxfabric {
namespace {

constexpr uint64_t kAnyBytes = ~uint64_t{0};

std::vector<Piece> Pages(size_t count, uint64_t bytes) {
  std::vector<Piece> pages;
  for (size_t i = 0; i < count; ++i) {
    pages.push_back({i * bytes, 2 * i * bytes, bytes});
  }
  return pages;
}

// The pieces follow each other as those that were cut, and each is in one
// chunk; the shares of all chunks make one transfer.
void ExpectWhole(const std::vector<Piece>& pieces, const Transfer& transfer) {
  size_t piece = 0;
  uint64_t done = 0;
  uint32_t next = 0;
  uint64_t units = 0;
  for (const Chunk& chunk : transfer.chunks) {
    EXPECT_EQ(chunk.first, next);
    next += chunk.count;
    uint64_t bytes = 0;
    for (uint32_t i = chunk.first; i < next; ++i) {
      const Piece& cut = transfer.pieces.at(i);
      bytes += cut.length;
      EXPECT_EQ(cut.local_offset, pieces.at(piece).local_offset + done);
      EXPECT_EQ(cut.remote_offset, pieces.at(piece).remote_offset + done);
      done += cut.length;
      if (done == pieces[piece].length) {
        ++piece;
        done = 0;
      }
    }
    EXPECT_EQ(chunk.bytes, bytes);
    units += Immediate::Decode(*chunk.immediate).Units();
  }
  EXPECT_EQ(next, transfer.pieces.size());
  EXPECT_EQ(piece, pieces.size());
  EXPECT_EQ(units, kTransferUnits);
}

Transfer Cut(const std::vector<Piece>& pieces, size_t links,
             uint64_t write_bytes_max, uint32_t pieces_max) {
  Transfer transfer;
  transfer.id = 7;
  EXPECT_TRUE(
      CutIntoChunks(pieces, links, write_bytes_max, pieces_max, &transfer)
          .ok());
  ExpectWhole(pieces, transfer);
  return transfer;
}

TEST(Transfer, SmallPiecesShareWritesWhereTheTransportTakesSeveral) {
  EXPECT_EQ(Cut(Pages(9, 4096), 1, kAnyBytes, 1).chunks.size(), 9u);
  EXPECT_EQ(Cut(Pages(9, 4096), 1, kAnyBytes, 4).chunks.size(), 3u);
}

TEST(Transfer, AWriteOfSeveralPiecesIsNoLongerThanOthers) {
  for (const uint64_t page : {kChunkBytes / 3, kChunkBytes, kChunkBytes + 1}) {
    for (const size_t links : {1, 3}) {
      const Transfer transfer = Cut(Pages(10, page), links, kAnyBytes, 4);
      for (const Chunk& chunk : transfer.chunks) {
        EXPECT_LE(chunk.bytes, kChunkBytes);
      }
    }
  }
  for (const Chunk& chunk : Cut(Pages(10, 4096), 1, 10'000, 4).chunks) {
    EXPECT_LE(chunk.count, 2u);
    EXPECT_LE(chunk.bytes, 10'000u);
  }
}

TEST(Transfer, NoBytesAreOneWrite) {
  Transfer transfer;
  transfer.id = 7;
  const std::vector<Piece> one = {{5, 6, 0}};
  ASSERT_TRUE(CutIntoChunks(one, 2, kAnyBytes, 4, &transfer).ok());
  ASSERT_EQ(transfer.chunks.size(), 1u);
  EXPECT_EQ(transfer.chunks[0].bytes, 0u);
  EXPECT_EQ(transfer.pieces.at(0).remote_offset, 6u);
}

}  // namespace
}  // namespace jaxfabric
