#include "engine/trace.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

namespace jaxfabric {
namespace {

TraceEvent Named(const char* name) {
  TraceEvent event;
  event.name = name;
  return event;
}

TEST(TraceTest, NothingIsDescribedWhileItIsOff) {
  Trace trace;
  int described = 0;
  const auto describe = [&] {
    ++described;
    return Named("write");
  };
  EXPECT_EQ(trace.Begin(describe), 0u);
  trace.Mark(describe);
  trace.End(0, describe);
  trace.End(0);
  EXPECT_EQ(described, 0);
  EXPECT_TRUE(trace.Stop().events.empty());
}

TEST(TraceTest, SpansHaveTheirTimesAndWhatWasSaidOfThem) {
  Trace trace;
  ASSERT_TRUE(trace.Start(10));
  EXPECT_FALSE(trace.Start(10)) << "one recording at a time";
  const uint64_t outer = trace.Begin([] { return Named("call"); });
  uint64_t inner = 0;
  {
    const TraceScope scope(trace, [&] {
      TraceEvent event = Named("pack");
      event.parent = outer;
      event.peer = 3;
      event.bytes = 64;
      return event;
    });
    inner = outer + 1;
  }
  trace.End(outer, StatusCode::kUnavailable);
  const TraceRecording recording = trace.Stop();
  ASSERT_EQ(recording.events.size(), 2u);
  const TraceEvent& pack = recording.events[0];
  const TraceEvent& call = recording.events[1];
  EXPECT_EQ(pack.name, "pack");
  EXPECT_EQ(pack.span, inner);
  EXPECT_EQ(pack.parent, outer);
  EXPECT_EQ(pack.peer, 3u);
  EXPECT_FALSE(pack.nic.has_value());
  EXPECT_EQ(pack.bytes, 64u);
  EXPECT_EQ(call.name, "call");
  EXPECT_EQ(call.status, StatusCode::kUnavailable);
  EXPECT_LE(recording.begin_ns, call.begin_ns);
  EXPECT_LE(call.begin_ns, pack.begin_ns);
  EXPECT_LE(pack.begin_ns, pack.end_ns);
  EXPECT_LE(pack.end_ns, call.end_ns);
  EXPECT_LE(call.end_ns, recording.end_ns);
  EXPECT_EQ(recording.dropped, 0u);
}

TEST(TraceTest, TheOldestGiveWayAndAreCounted) {
  Trace trace;
  ASSERT_TRUE(trace.Start(4));
  for (uint32_t i = 0; i < 11; ++i) {
    trace.Mark([&] {
      TraceEvent event = Named("mark");
      event.id = i;
      return event;
    });
  }
  const TraceRecording recording = trace.Stop();
  EXPECT_EQ(recording.dropped, 7u);
  ASSERT_EQ(recording.events.size(), 4u);
  for (uint32_t i = 0; i < 4; ++i) EXPECT_EQ(recording.events[i].id, 7 + i);
}

TEST(TraceTest, WhatIsUnderWayAtTheEndIsThereWithoutAnEnd) {
  Trace trace;
  ASSERT_TRUE(trace.Start(4));
  const uint64_t hangs = trace.Begin([] { return Named("wait"); });
  const TraceRecording recording = trace.Stop();
  ASSERT_EQ(recording.events.size(), 1u);
  EXPECT_EQ(recording.events[0].name, "wait");
  EXPECT_EQ(recording.events[0].end_ns, 0);
  // It ends during the next recording, which does not know it.
  ASSERT_TRUE(trace.Start(4));
  trace.End(hangs);
  EXPECT_TRUE(trace.Stop().events.empty());
}

TEST(TraceTest, TheEndMayKnowMoreThanTheBeginning) {
  Trace trace;
  ASSERT_TRUE(trace.Start(4));
  const uint64_t span = trace.Begin([] {
    TraceEvent event = Named("operation");
    event.label = "single write of 4096 bytes";
    event.parent = 99;
    return event;
  });
  trace.End(span, [] {
    TraceEvent event = Named("single write");
    event.bytes = 4096;
    event.status = StatusCode::kCancelled;
    return event;
  });
  const TraceRecording recording = trace.Stop();
  ASSERT_EQ(recording.events.size(), 1u);
  const TraceEvent& event = recording.events[0];
  EXPECT_EQ(event.name, "single write");
  EXPECT_EQ(event.label, "single write of 4096 bytes");
  EXPECT_EQ(event.span, span);
  EXPECT_EQ(event.parent, 99u);
  EXPECT_EQ(event.bytes, 4096u);
  EXPECT_EQ(event.status, StatusCode::kCancelled);
  EXPECT_GE(event.end_ns, event.begin_ns);
}

TEST(TraceTest, MemoryIsBounded) {
  Trace trace;
  ASSERT_TRUE(trace.Start(4));
  const auto long_label = [] {
    TraceEvent event = Named("call");
    event.label = std::string(4096, 'x');
    return event;
  };
  for (size_t i = 0; i < Trace::kOpenMax; ++i) {
    EXPECT_NE(trace.Begin(long_label), 0u);
  }
  EXPECT_EQ(trace.Begin(long_label), 0u);
  const TraceRecording recording = trace.Stop();
  EXPECT_EQ(recording.events.size(), Trace::kOpenMax);
  EXPECT_EQ(recording.dropped, 1u);
  EXPECT_EQ(recording.events[0].label.size(), Trace::kLabelBytesMax);
}

// For ThreadSanitizer: many threads record while another starts and stops.
TEST(TraceTest, ThreadsMayRecordWhileRecordingsBeginAndEnd) {
  constexpr uint32_t kThreads = 4;
  Trace trace;
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (uint32_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      while (!stop.load(std::memory_order_relaxed)) {
        const uint64_t span = trace.Begin([&] {
          TraceEvent event = Named("write");
          event.peer = thread;
          return event;
        });
        trace.Mark([&] { return Named("mark"); });
        trace.End(span, StatusCode::kOk);
        trace.End(span, StatusCode::kInternal);  // it has ended already
      }
    });
  }
  std::unordered_set<uint64_t> spans;
  for (int recordings = 0; recordings < 50; ++recordings) {
    ASSERT_TRUE(trace.Start(256));
    std::this_thread::yield();
    for (const TraceEvent& event : trace.Stop().events) {
      EXPECT_TRUE(spans.insert(event.span).second) << "told twice";
      EXPECT_EQ(event.status, StatusCode::kOk);
      EXPECT_GT(event.begin_ns, 0);
    }
  }
  stop.store(true, std::memory_order_relaxed);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace jaxfabric
