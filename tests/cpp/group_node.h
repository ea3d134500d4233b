// GroupNode: a DomainGroup over fake Domains with a source and a target region,
// and what came to it.

#ifndef JAXFABRIC_TESTS_CPP_GROUP_NODE_H_
#define JAXFABRIC_TESTS_CPP_GROUP_NODE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/shared_memory.h"
#include "engine/domain_group.h"
#include "engine/immediate.h"
#include "transport/fake.h"
#include "transport/fake_link.h"

namespace jaxfabric {

using Pieces = std::vector<Piece>;

inline constexpr std::byte kPoison{0xa5};
inline constexpr double kGroupPatienceSeconds = 30;

class GroupNode {
 public:
  using Event = DomainGroup::Event;

  GroupNode(const FakeOptions& options, size_t domains, uint64_t bytes)
      : network(options.network) {
    transport_ = *OpenFakeTransport(options);
    std::vector<std::unique_ptr<Domain>> opened;
    for (size_t i = 0; i < domains; ++i) {
      opened.push_back(*transport_->OpenDomain());
    }
    source_ = *SharedMemory::Create("test-source", bytes);
    target_ = *SharedMemory::Create("test-target", bytes);
    std::memset(target_.data(), static_cast<int>(kPoison), bytes);
    group = std::make_unique<DomainGroup>(std::move(opened), options.clock_ns);
    local = {source_.data(), bytes,
             *group->RegisterMemory({source_.data(), bytes, -1})};
    remote = {0, bytes, *group->RegisterMemory({target_.data(), bytes, -1})};
  }

  // Domains go before their Transport.
  ~GroupNode() { group.reset(); }
  GroupNode(const GroupNode&) = delete;
  GroupNode& operator=(const GroupNode&) = delete;

  void Connect(uint32_t name, GroupNode& other) {
    const Status added =
        group->AddPeer(name, other.group->addresses(), Deadline());
    ASSERT_TRUE(added.ok()) << added.message();
  }
  bool Poll() {
    std::vector<Event> events;
    const bool moved = group->Poll(&events);
    for (const Event& event : events) {
      if (event.kind == Event::Kind::kImmediate) {
        const Immediate immediate = Immediate::Decode(event.immediate);
        const auto key = std::pair(event.peer, immediate.id);
        units[key] += immediate.Units();
        if (on_units) on_units(key.first, key.second, units[key]);
      } else if (event.kind == Event::Kind::kMessage) {
        messages.push_back(event.message);
      } else if (event.kind == Event::Kind::kStranger) {
        strangers.push_back(event.message);
      } else {
        lost.push_back(event.peer);
      }
    }
    return moved;
  }
  void Kill() {
    for (const NetAddr& address : group->addresses()) {
      EXPECT_TRUE(KillFakeDomain(network, address));
    }
  }
  std::byte* source() { return source_.data(); }
  std::byte* target() { return target_.data(); }
  DomainStats Total() const {
    DomainStats total;
    for (const DomainStats& one : group->stats()) {
      total.writes += one.writes;
      total.write_bytes += one.write_bytes;
      total.errors += one.errors;
      total.writes_again += one.writes_again;
      total.links_failed += one.links_failed;
      total.links_revived += one.links_revived;
      total.strangers_dropped += one.strangers_dropped;
      total.malformed_dropped += one.malformed_dropped;
      total.open_writes += one.open_writes;
    }
    return total;
  }

  const std::string network;
  std::unique_ptr<DomainGroup> group;
  LocalRegion local;
  MrDesc remote;
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> units;  // by peer and id
  std::function<void(uint32_t peer, uint32_t id, uint64_t units)> on_units;
  std::vector<std::string> messages;
  std::vector<std::string> strangers;
  std::vector<uint32_t> lost;

 private:
  SharedMemory source_;
  SharedMemory target_;
  std::unique_ptr<Transport> transport_;
};

inline bool PollUntil(std::initializer_list<GroupNode*> nodes,
                      const std::function<bool()>& met) {
  const Deadline deadline = Deadline::AfterSeconds(kGroupPatienceSeconds);
  while (!met()) {
    if (deadline.Expired()) {
      ADD_FAILURE() << "nothing more happens";
      return false;
    }
    for (GroupNode* node : nodes) node->Poll();
  }
  return true;
}

// A clock that moves only when nothing happens: tests with it depend on their
// seed alone, and seconds take no time.
class SimulatedClock {
 public:
  SimulatedClock() { now_ns_ = 1'000'000'000; }

  static int64_t Now() { return now_ns_; }

  // Polls until `met`, or until `limit_s` have passed.
  static bool Run(std::initializer_list<GroupNode*> nodes,
                  const std::function<bool()>& met, double limit_s = 60) {
    constexpr int64_t kStepNs = 1'000'000;  // timers need no finer one
    const std::string& network = (*nodes.begin())->network;
    const int64_t end_ns = now_ns_ + static_cast<int64_t>(limit_s * 1e9);
    while (!met()) {
      if (now_ns_ > end_ns) return false;
      bool moved = false;
      for (GroupNode* node : nodes) moved |= node->Poll();
      if (moved) continue;
      const int64_t step_ns = now_ns_ + kStepNs;
      const auto next_ns = NextFakeEventNs(network);
      now_ns_ = std::clamp(next_ns.value_or(step_ns), now_ns_ + 1, step_ns);
    }
    return true;
  }
  static void RunFor(std::initializer_list<GroupNode*> nodes, double seconds) {
    Run(nodes, [] { return false; }, seconds);
  }

 private:
  static inline int64_t now_ns_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_GROUP_NODE_H_
