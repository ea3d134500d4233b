#include "engine/span_allocator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

TEST(SpanAllocatorTest, FillsFromTheStart) {
  SpanAllocator spans(4 * kCacheLineBytes);
  EXPECT_EQ(spans.Allocate(1), 0u);
  EXPECT_EQ(spans.Allocate(kCacheLineBytes + 1), kCacheLineBytes);
  EXPECT_EQ(spans.Allocate(kCacheLineBytes), 3 * kCacheLineBytes);
  EXPECT_EQ(spans.Allocate(1), std::nullopt);
  spans.Free(kCacheLineBytes);
  EXPECT_EQ(spans.Allocate(2 * kCacheLineBytes + 1), std::nullopt);
  EXPECT_EQ(spans.Allocate(2 * kCacheLineBytes), kCacheLineBytes);
}

TEST(SpanAllocatorTest, ZeroBytesHaveAPlaceOfTheirOwn) {
  SpanAllocator spans(2 * kCacheLineBytes);
  EXPECT_EQ(spans.Allocate(0), 0u);
  EXPECT_EQ(spans.Allocate(0), kCacheLineBytes);
}

TEST(SpanAllocatorTest, AllOfItCanBeHadAtOnceWhateverItsSize) {
  for (uint64_t capacity : {1, 63, 64, 65, 100, 127, 128, 129, 4095}) {
    SpanAllocator spans(capacity);
    EXPECT_EQ(spans.Allocate(capacity), 0u) << capacity;
    EXPECT_EQ(spans.Allocate(1), std::nullopt) << capacity;
    spans.Free(0);
    EXPECT_EQ(spans.Allocate(capacity + 1), std::nullopt) << capacity;
    EXPECT_EQ(spans.Allocate(capacity), 0u) << capacity;
  }
}

TEST(SpanAllocatorTest, HugeRequestsDoNotWrapAround) {
  SpanAllocator spans(1 << 20);
  EXPECT_EQ(spans.Allocate(~uint64_t{0} >> 1), std::nullopt);
  EXPECT_EQ(spans.Allocate(uint64_t{1} << 40), std::nullopt);
}

TEST(SpanAllocatorDeathTest, FreeingWhatIsFreeStops) {
  SpanAllocator spans(1 << 10);
  EXPECT_DEATH(spans.Free(0), "check failed");
}

// Against a map of used lines: disjoint, in range, first fit, and it never
// says no while there is a gap.
TEST(SpanAllocatorTest, AgreesWithASimpleModel) {
  Seeded seeded;
  const uint64_t capacity = 1 + seeded.Below(200 * kCacheLineBytes);
  const uint64_t lines = AlignUp(capacity, kCacheLineBytes) / kCacheLineBytes;
  SpanAllocator spans(capacity);
  std::vector<bool> used(lines, false);
  struct Span {
    uint64_t first;  // lines
    uint64_t count;
  };
  std::vector<Span> live;
  for (int step = 0; step < 20'000; ++step) {
    if (!live.empty() && seeded.OneIn(2)) {
      const size_t pick = seeded.Below(live.size());
      const Span span = live[pick];
      spans.Free(span.first * kCacheLineBytes);
      std::fill_n(used.begin() + static_cast<ptrdiff_t>(span.first), span.count,
                  false);
      live.erase(live.begin() + static_cast<ptrdiff_t>(pick));
      continue;
    }
    const uint64_t bytes =
        seeded.Below(seeded.OneIn(10) ? capacity + 1 : 8 * kCacheLineBytes);
    const uint64_t count = std::max<uint64_t>(
        1, AlignUp(bytes, kCacheLineBytes) / kCacheLineBytes);
    std::optional<uint64_t> expected;
    for (uint64_t first = 0; first + count <= lines && !expected; ++first) {
      const auto begin = used.begin() + static_cast<ptrdiff_t>(first);
      const bool free =
          std::find(begin, begin + static_cast<ptrdiff_t>(count), true) ==
          begin + static_cast<ptrdiff_t>(count);
      if (free && first * kCacheLineBytes + bytes <= capacity) {
        expected = first * kCacheLineBytes;
      }
    }
    const std::optional<uint64_t> offset = spans.Allocate(bytes);
    ASSERT_EQ(offset, expected)
        << "step " << step << ", " << bytes << " of " << capacity << " bytes";
    if (!offset) continue;
    const Span span = {*offset / kCacheLineBytes, count};
    std::fill_n(used.begin() + static_cast<ptrdiff_t>(span.first), span.count,
                true);
    live.push_back(span);
  }
}

}  // namespace
}  // namespace jaxfabric
