#include "engine/message_inbox.h"

#include <gtest/gtest.h>

#include <future>
#include <thread>
#include <vector>

namespace jaxfabric {
namespace {

Deadline Patience() { return Deadline::AfterSeconds(30); }

class MessageInboxTest : public testing::Test {
 protected:
  void Fill() {
    for (size_t i = 0; i < MessageInbox::kMessagesMax; ++i) {
      ASSERT_TRUE(inbox_->Push({.peer = 1, .text = "x"}));
    }
  }

  const std::shared_ptr<MessageInbox> inbox_ = std::make_shared<MessageInbox>();
};

TEST_F(MessageInboxTest, WhatIsLostIsReportedInItsPlace) {
  Fill();
  EXPECT_FALSE(inbox_->Push({.peer = 2, .text = "lost"}));
  EXPECT_FALSE(inbox_->Push({.peer = 1, .text = "lost"}));
  EXPECT_FALSE(inbox_->Push({.peer = 2, .text = "lost"}));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(inbox_->Take(Patience())->text, "x");
  EXPECT_TRUE(inbox_->Push({.peer = 2, .text = "later"}));
  for (size_t i = 3; i < MessageInbox::kMessagesMax; ++i) {
    ASSERT_EQ(inbox_->Take(Patience())->dropped, 0u);
  }
  auto message = inbox_->Take(Patience());
  EXPECT_EQ(message->peer, 1u);
  EXPECT_EQ(message->dropped, 1u);
  message = inbox_->Take(Patience());
  EXPECT_EQ(message->peer, 2u);
  EXPECT_EQ(message->dropped, 2u);
  EXPECT_EQ(inbox_->Take(Patience())->text, "later");
  EXPECT_FALSE(inbox_->Take(Deadline()));
}

TEST_F(MessageInboxTest, ALossIsReportedThoughNothingComesAfterIt) {
  Fill();
  EXPECT_FALSE(inbox_->Push({.peer = 3, .text = "lost"}));
  for (size_t i = 0; i < MessageInbox::kMessagesMax; ++i) {
    ASSERT_EQ(inbox_->Take(Patience())->dropped, 0u);
  }
  EXPECT_EQ(inbox_->Take(Patience())->dropped, 1u);
  EXPECT_FALSE(inbox_->Take(Deadline()));
}

TEST_F(MessageInboxTest, AMessageIsHandledOnceItsCallbackIsOver) {
  for (int i = 0; i < 3; ++i) inbox_->Push({.peer = 1, .text = "x"});
  EXPECT_EQ(inbox_->arrived(), 3u);
  EXPECT_EQ(inbox_->handled(), 0u);
  ASSERT_TRUE(inbox_->Take(Patience()));
  EXPECT_EQ(inbox_->handled(), 1u);
  std::promise<void> entered, left, last;
  int calls = 0;
  inbox_->SetCallback([&](const TransferMessage&) {
    if (++calls == 2) return last.set_value();
    entered.set_value();
    left.get_future().wait();
  });
  entered.get_future().wait();
  EXPECT_EQ(inbox_->handled(), 1u);
  EXPECT_EQ(inbox_->arrived(), 3u);
  left.set_value();
  last.get_future().wait();
  const Deadline deadline = Patience();
  while (inbox_->handled() < 3 && !deadline.Expired()) {
    std::this_thread::yield();
  }
  EXPECT_EQ(inbox_->handled(), 3u);
  EXPECT_EQ(inbox_->arrived(), 3u);
  inbox_->SetCallback(nullptr);
}

TEST_F(MessageInboxTest, WhoWaitsIsCalledOnceByAMessageOrTheEnd) {
  const auto wait = [&] {
    const auto called = std::make_shared<std::promise<void>>();
    inbox_->OnReady([called] { called->set_value(); });
    return called->get_future();
  };
  const auto is_called = [](std::future<void>& called) {
    return called.wait_for(std::chrono::seconds(30)) ==
           std::future_status::ready;
  };
  auto first = wait();
  EXPECT_EQ(first.wait_for(std::chrono::milliseconds(20)),
            std::future_status::timeout);
  EXPECT_TRUE(inbox_->Push({.peer = 1, .text = "a"}));
  EXPECT_TRUE(is_called(first));
  EXPECT_TRUE(inbox_->Push({.peer = 1, .text = "b"}));
  auto at_once = wait();
  EXPECT_TRUE(is_called(at_once));
  EXPECT_EQ(inbox_->Take(Patience())->text, "a");
  EXPECT_EQ(inbox_->Take(Patience())->text, "b");
  auto closed = wait();
  inbox_->Close();
  EXPECT_TRUE(is_called(closed));
}

// Nobody who gave up can say so, and others ask again.
TEST_F(MessageInboxTest, ThoseWhoWaitAreBounded) {
  const auto called = std::make_shared<std::promise<void>>();
  inbox_->OnReady([called] { called->set_value(); });
  for (size_t i = 0; i < MessageInbox::kWaitingMax; ++i) inbox_->OnReady([] {});
  EXPECT_EQ(called->get_future().wait_for(std::chrono::seconds(30)),
            std::future_status::ready);
  inbox_->Close();
}

}  // namespace
}  // namespace jaxfabric
