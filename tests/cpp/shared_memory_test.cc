#include "base/shared_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <fstream>
#include <utility>

namespace jaxfabric {
namespace {

constexpr uint64_t kBytes = 3 * 4096 + 5;

UniqueFd Duplicate(int fd) { return UniqueFd(fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

TEST(SharedMemoryTest, IsZeroAndSharedWithThoseWhoAttach) {
  StatusOr<SharedMemory> ours = SharedMemory::Create("test", kBytes);
  ASSERT_TRUE(ours.ok()) << ours.status().message();
  EXPECT_EQ(ours->size(), kBytes);
  for (uint64_t i = 0; i < kBytes; ++i) {
    ASSERT_EQ(ours->data()[i], std::byte{0});
  }
  const StatusOr<SharedMemory> theirs =
      SharedMemory::Attach(Duplicate(ours->fd()), kBytes);
  ASSERT_TRUE(theirs.ok()) << theirs.status().message();
  EXPECT_NE(theirs->data(), ours->data());
  EXPECT_EQ(theirs->fd(), -1);
  theirs->data()[kBytes - 1] = std::byte{7};
  EXPECT_EQ(ours->data()[kBytes - 1], std::byte{7});
}

TEST(SharedMemoryTest, AttachedMemoryOutlivesItsCreator) {
  StatusOr<SharedMemory> ours = SharedMemory::Create("test", kBytes);
  ASSERT_TRUE(ours.ok());
  ours->data()[0] = std::byte{9};
  const StatusOr<SharedMemory> theirs =
      SharedMemory::Attach(Duplicate(ours->fd()), kBytes);
  ASSERT_TRUE(theirs.ok());
  {
    const SharedMemory gone = *std::move(ours);
  }
  EXPECT_EQ(theirs->data()[0], std::byte{9});
}

TEST(SharedMemoryTest, NobodyCanChangeTheSize) {
  StatusOr<SharedMemory> memory = SharedMemory::Create("test", kBytes);
  ASSERT_TRUE(memory.ok());
  EXPECT_NE(ftruncate(memory->fd(), 1), 0);
  EXPECT_NE(ftruncate(memory->fd(), 1 << 20), 0);
}

TEST(SharedMemoryTest, RefusesWhatCouldKillItsReader) {
  // Too small.
  StatusOr<SharedMemory> memory = SharedMemory::Create("test", kBytes);
  ASSERT_TRUE(memory.ok());
  EXPECT_EQ(
      SharedMemory::Attach(Duplicate(memory->fd()), kBytes + 1).status().code(),
      StatusCode::kInvalidArgument);
  // Could shrink under the reader.
  UniqueFd shrinkable(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(shrinkable.get(), kBytes), 0);
  EXPECT_EQ(SharedMemory::Attach(std::move(shrinkable), kBytes).status().code(),
            StatusCode::kPermissionDenied);
  // No memory at all.
  EXPECT_FALSE(
      SharedMemory::Attach(UniqueFd(open("/dev/null", O_RDWR)), 0).ok());
  EXPECT_FALSE(SharedMemory::Attach(UniqueFd(), kBytes).ok());
}

TEST(SharedMemoryTest, CreateReportsWhatTheSystemRefuses) {
  const StatusOr<SharedMemory> memory =
      SharedMemory::Create("test", ~uint64_t{0} >> 1);
  ASSERT_FALSE(memory.ok());
  EXPECT_EQ(memory.status().code(), StatusCode::kResourceExhausted);
}

TEST(SharedMemoryTest, MovesAndCloses) {
  StatusOr<SharedMemory> created = SharedMemory::Create("test", kBytes);
  ASSERT_TRUE(created.ok());
  SharedMemory memory = *std::move(created);
  std::byte* const data = memory.data();
  const int fd = memory.fd();
  SharedMemory moved;
  moved = std::move(memory);
  EXPECT_EQ(moved.data(), data);
  EXPECT_EQ(moved.fd(), fd);
  moved.CloseFd();
  EXPECT_EQ(moved.fd(), -1);
  EXPECT_EQ(fcntl(fd, F_GETFD), -1);
  moved.data()[0] = std::byte{1};  // still mapped
}

}  // namespace
}  // namespace jaxfabric
