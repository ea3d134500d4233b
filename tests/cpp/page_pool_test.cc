#include "engine/page_pool.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/doorbell.h"
#include "base/registry.h"
#include "engine/watcher.h"

namespace jaxfabric {
namespace {

constexpr uint64_t kPageBytes = 4;

struct Pool {
  std::vector<std::byte> memory = std::vector<std::byte>(2 * 3 * kPageBytes);
  WatcherWords words;
  std::shared_ptr<Watcher> watcher;
  std::shared_ptr<PagePool> pool;

  Pool() {
    const WatcherWords::Word word = *words.Take();
    watcher = std::make_shared<Watcher>(1, word.memory, word.word, nullptr,
                                        Watcher::Callback());
    pool = std::make_shared<PagePool>(
        memory.data(), PagePool::Shape{2, 3, kPageBytes}, watcher);
  }
};

std::vector<std::byte> Rows(size_t count) {
  std::vector<std::byte> rows(count * kPageBytes);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = static_cast<std::byte>(i + 1);
  }
  return rows;
}

TEST(PagePool, CopiesRowsToPagesOfALayerAndNotesIt) {
  Pool p;
  const std::vector<std::byte> rows = Rows(2);
  const std::vector<int32_t> from = {1, 0, -1, 0};
  const std::vector<int32_t> to = {2, 0, 1, -1};
  const uint64_t request = uint64_t{1} << 63;
  ASSERT_TRUE(p.pool->Put({request, 1}, rows, from, to).ok());
  EXPECT_EQ(p.watcher->value(), 1u);
  for (size_t i = 0; i < p.memory.size(); ++i) {
    int want = 0;
    if (i >= 12 && i < 16) want = static_cast<int>(i - 12 + 1);  // row 0
    if (i >= 20) want = static_cast<int>(i - 20 + 5);            // row 1
    EXPECT_EQ(static_cast<int>(p.memory[i]), want) << i;
  }
  ASSERT_TRUE(p.pool->Put({7, 0}, rows, {}, {}).ok());
  const std::vector<PagePool::Note> notes = p.pool->Take();
  ASSERT_EQ(notes.size(), 2u);
  EXPECT_EQ(notes[0].request, request);
  EXPECT_EQ(notes[0].layer, 1);
  EXPECT_EQ(notes[1].request, 7u);
  EXPECT_TRUE(p.pool->Take().empty());
}

TEST(PagePool, RefusesWhatDoesNotFit) {
  Pool p;
  const std::vector<std::byte> rows = Rows(2);
  const std::vector<int32_t> zero = {0};
  const std::vector<int32_t> two = {0, 1};
  const std::vector<int32_t> far = {3};
  const std::vector<int32_t> row = {2};
  EXPECT_FALSE(p.pool->Put({1, 2}, rows, zero, zero).ok());
  EXPECT_FALSE(p.pool->Put({1, -1}, rows, zero, zero).ok());
  EXPECT_FALSE(p.pool->Put({1, 0}, rows, zero, two).ok());
  EXPECT_FALSE(p.pool->Put({1, 0}, rows, zero, far).ok());
  EXPECT_FALSE(p.pool->Put({1, 0}, rows, row, zero).ok());
  EXPECT_FALSE(p.pool->Put({1, 0}, std::span(rows).first(5), zero, zero).ok());
  EXPECT_TRUE(p.pool->Take().empty());
  EXPECT_EQ(p.watcher->value(), 0u);
  for (const std::byte byte : p.memory) EXPECT_EQ(byte, std::byte{0});
}

TEST(PagePool, NothingIsCopiedOnceItIsClosed) {
  Pool p;
  Registry<PagePool>::Get().Add(p.pool->id(), p.pool);
  EXPECT_EQ(Registry<PagePool>::Get().Find(p.pool->id()), p.pool);
  Registry<PagePool>::Get().Remove(p.pool->id());
  EXPECT_EQ(Registry<PagePool>::Get().Find(p.pool->id()), nullptr);
  p.pool->Close();
  const std::vector<int32_t> zero = {0};
  EXPECT_FALSE(p.pool->Put({1, 0}, Rows(1), zero, zero).ok());
}

}  // namespace
}  // namespace jaxfabric
