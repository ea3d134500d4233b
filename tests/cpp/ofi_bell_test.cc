#include "transport/ofi_bell.h"

#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <system_error>
#include <thread>

#include "base/check.h"
#include "base/deadline.h"
#include "base/unique_fd.h"

namespace jaxfabric {
namespace {

namespace fs = std::filesystem;

constexpr double kPatienceSeconds = 30;
constexpr int64_t kMillisecond = 1'000'000;

class OfiBellTest : public testing::Test {
 protected:
  OfiBellTest() : nic_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    auto bell = OfiBell::Open();
    JF_CHECK(bell.ok());
    bell_ = *std::move(bell);
    JF_CHECK(bell_->Add(nic_.get()).ok());
  }

  void BringNews() {
    const uint64_t one = 1;
    JF_CHECK(write(nic_.get(), &one, sizeof(one)) == sizeof(one));
  }
  // Whether Wait came back before the `deadline`; it may do so for no reason.
  bool WaitedLessThan(int64_t nanoseconds) {
    const int64_t begin_ns = MonotonicNanoseconds();
    bell_->Wait(bell_->Sequence(), Deadline::AfterNanoseconds(nanoseconds));
    return MonotonicNanoseconds() - begin_ns < nanoseconds;
  }

  UniqueFd nic_;
  std::unique_ptr<OfiBell> bell_;
};

TEST_F(OfiBellTest, NewsOfANicWakesWhoSleeps) {
  std::thread nic([this] { BringNews(); });
  EXPECT_TRUE(WaitedLessThan(static_cast<int64_t>(kPatienceSeconds * 1e9)));
  nic.join();
}

TEST_F(OfiBellTest, MutedOnlyARingWakes) {
  bell_->Mute();
  BringNews();
  EXPECT_FALSE(WaitedLessThan(20 * kMillisecond));
  const uint32_t seen = bell_->Sequence();
  std::thread ringer([this] { bell_->Ring(); });
  const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
  while (bell_->Sequence() == seen) bell_->Wait(seen, deadline);
  EXPECT_FALSE(deadline.Expired());
  ringer.join();
  bell_->Unmute();
}

TEST_F(OfiBellTest, NewsThatCameWhileItWasMutedIsHeardOnceAllAreDone) {
  bell_->Mute();
  bell_->Mute();
  BringNews();
  bell_->Unmute();
  EXPECT_FALSE(WaitedLessThan(20 * kMillisecond)) << "one still polls";
  std::thread sleeper([&] {
    // First the timer may wake it, then the news do.
    for (int i = 0; i < 2; ++i) {
      bell_->Wait(bell_->Sequence(), Deadline::AfterSeconds(kPatienceSeconds));
    }
  });
  const int64_t begin_ns = MonotonicNanoseconds();
  bell_->Unmute();
  sleeper.join();
  EXPECT_LT(MonotonicNanoseconds() - begin_ns,
            static_cast<int64_t>(kPatienceSeconds / 2 * 1e9));
}

// As after a post to a device that works in its caller's thread.
TEST_F(OfiBellTest, WhoPolledForLongIsWaitedForForAsLong) {
  bell_->Mute();
  EXPECT_TRUE(bell_->muted());
  BringNews();
  const Deadline worked = Deadline::AfterNanoseconds(5 * kMillisecond);
  while (!worked.Expired()) continue;
  const int64_t begin_ns = MonotonicNanoseconds();
  bell_->Unmute();
  EXPECT_FALSE(bell_->muted());
  bell_->Wait(bell_->Sequence(), Deadline::AfterSeconds(kPatienceSeconds));
  EXPECT_GE(MonotonicNanoseconds() - begin_ns, kMillisecond);
}

// What the kernel says is left of the only timer of this process.
int64_t TimerLeftNs() {
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code error;  // that of the listing itself has gone
    const fs::path target = fs::read_symlink(entry.path(), error);
    if (target != "anon_inode:[timerfd]") continue;
    std::ifstream info("/proc/self/fdinfo" / entry.path().filename());
    for (std::string line; std::getline(info, line);) {
      int64_t seconds = 0;
      int64_t nanoseconds = 0;
      if (std::sscanf(line.c_str(), "it_value: (%" SCNd64 ", %" SCNd64 ")",
                      &seconds, &nanoseconds) == 2) {
        return seconds * 1000 * kMillisecond + nanoseconds;
      }
    }
  }
  return -1;
}

TEST_F(OfiBellTest, LongCallsShareATimer) {
  const auto call = [&] {
    bell_->Mute();
    const Deadline worked = Deadline::AfterNanoseconds(kMillisecond);
    while (!worked.Expired()) continue;
    bell_->Unmute();
    return TimerLeftNs();
  };
  bool shared = false;  // but for a pause of this thread
  for (int i = 0; i < 100 && !shared; ++i) {
    const int64_t first_ns = call();
    const int64_t second_ns = call();
    ASSERT_GT(first_ns, 0);
    ASSERT_LE(first_ns, 8 * kMillisecond);
    shared = second_ns > 0 && second_ns <= first_ns - kMillisecond;
  }
  EXPECT_TRUE(shared);
}

TEST_F(OfiBellTest, WhoIsRemovedWakesNobody) {
  bell_->Remove(nic_.get());
  BringNews();
  EXPECT_FALSE(WaitedLessThan(20 * kMillisecond));
}

}  // namespace
}  // namespace jaxfabric
