#include "transport/ofi_bell.h"

#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <thread>

#include "base/check.h"
#include "base/deadline.h"
#include "base/unique_fd.h"

namespace jaxfabric {
namespace {

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

TEST_F(OfiBellTest, WhoIsRemovedWakesNobody) {
  bell_->Remove(nic_.get());
  BringNews();
  EXPECT_FALSE(WaitedLessThan(20 * kMillisecond));
}

}  // namespace
}  // namespace jaxfabric
