// The software device itself, by way of the verbs calls that it stands in for.
// What it does under the real provider, the transport conformance suite shows.

#include <gtest/gtest.h>
#include <infiniband/verbs.h>
#include <stdlib.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/deadline.h"
#include "tests/softefa/efa_abi.h"

namespace jaxfabric::softefa {
namespace {

constexpr uint64_t kBytes = 100'000;
constexpr uint32_t kQueueKey = 77;
constexpr double kPatienceSeconds = 10;
constexpr int64_t kLateNs = 50'000'000;

// The settings of this process, and its directory.
class Network : public testing::Environment {
 public:
  void SetUp() override {
    std::string path =
        std::filesystem::temp_directory_path() / "softefa-XXXXXX";
    JF_CHECK(mkdtemp(path.data()) != nullptr);
    directory_ = path;
    setenv("SOFTEFA_DIR", path.c_str(), 1);
    setenv("SOFTEFA_NDEV", "2", 1);
    setenv("SOFTEFA_HOST", "1", 1);
    setenv("SOFTEFA_RNR_MS", "1", 1);
    setenv("SOFTEFA_LATE_MS", "50", 1);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  // Waits until the device has seen it, which it does within a millisecond.
  void SetFaults(const std::string& lines) const {
    std::ofstream(directory_ / "faults.new") << lines;
    std::filesystem::rename(directory_ / "faults.new", directory_ / "faults");
    const Deadline seen = Deadline::AfterSeconds(0.01);
    while (!seen.Expired()) {
    }
  }

 private:
  std::filesystem::path directory_;
};

Network* const network = static_cast<Network*>(
    testing::AddGlobalTestEnvironment(new Network));  // NOLINT: gtest owns it

struct Got {
  uint64_t id;
  CompletionCode code;
  ibv_wc_opcode opcode;
  uint32_t immediate;
};

// One endpoint on one NIC, as the provider would open it.
class Endpoint {
 public:
  explicit Endpoint(int nic, bool unsolicited = true) : data(kBytes) {
    ibv_device** devices = ibv_get_device_list(nullptr);
    context_ = ibv_open_device(devices[nic]);
    ibv_free_device_list(devices);
    domain_ = ibv_alloc_pd(context_);
    ibv_cq_init_attr_ex queue{};
    queue.cqe = 512;
    queue_ = efadv_create_cq(context_, &queue, nullptr, 0);
    ibv_qp_init_attr_ex pair{};
    pair.send_cq = pair.recv_cq = ibv_cq_ex_to_cq(queue_);
    pair.cap.max_send_wr = pair.cap.max_recv_wr = 16;
    pair.pd = domain_;
    struct {
      efadv_qp_init_attr attributes{};
    } efa;
    const uint16_t flags = unsolicited ? kQpUnsolicitedWriteRecv : 0;
    std::memcpy(reinterpret_cast<std::byte*>(&efa) + kQpFlagsOffset, &flags,
                sizeof(flags));
    pair_ = efadv_create_qp_ex(context_, &pair, &efa.attributes, sizeof(efa));
    ibv_qp_attr ready{};
    ready.qp_state = IBV_QPS_RTS;
    ready.qkey = kQueueKey;
    ready.rnr_retry = 0;
    ibv_modify_qp(pair_, &ready, IBV_QP_STATE | IBV_QP_QKEY | IBV_QP_RNR_RETRY);
    region = ibv_reg_mr_iova2(domain_, data.data(), kBytes, 0,
                              IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
  }
  ~Endpoint() {
    ForgetPeers();
    if (region != nullptr) ibv_dereg_mr(region);
    ibv_destroy_qp(pair_);
    ibv_destroy_cq(ibv_cq_ex_to_cq(queue_));
    ibv_dealloc_pd(domain_);
    ibv_close_device(context_);
  }
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  ibv_ah* Know(const Endpoint& peer) {
    ibv_ah_attr attributes{};
    ibv_query_gid(peer.context_, 1, 0, &attributes.grh.dgid);
    return handles_.emplace_back(ibv_create_ah(domain_, &attributes));
  }

  void ForgetPeers() {
    for (ibv_ah* handle : handles_) ibv_destroy_ah(handle);
    handles_.clear();
  }

  void Deregister() { ibv_dereg_mr(std::exchange(region, nullptr)); }

  void PostReceive(uint64_t id) {
    ibv_recv_wr receive{};
    receive.wr_id = id;
    ibv_recv_wr* refused = nullptr;
    ASSERT_EQ(ibv_post_recv(pair_, &receive, &refused), 0);
  }

  // All of `data` to the same place of the peer. Returns what wr_complete did.
  int Write(const Endpoint& peer, uint64_t id, uint32_t key) {
    ibv_qp_ex* pair = ibv_qp_to_qp_ex(pair_);
    ibv_wr_start(pair);
    pair->wr_id = id;
    ibv_wr_rdma_write_imm(
        pair, key, reinterpret_cast<uint64_t>(peer.data.data()), 1000 + id);
    ibv_wr_set_sge(pair, region->lkey, reinterpret_cast<uint64_t>(data.data()),
                   kBytes);
    ibv_wr_set_ud_addr(pair, handles_.front(), peer.pair_->qp_num, kQueueKey);
    return ibv_wr_complete(pair);
  }
  int Write(const Endpoint& peer, uint64_t id) {
    return Write(peer, id, peer.region->rkey);
  }

  void Poll() {
    ibv_poll_cq_attr attributes{};
    if (ibv_start_poll(queue_, &attributes) != 0) return;
    do {
      got.push_back(
          {queue_->wr_id,
           static_cast<CompletionCode>(ibv_wc_read_vendor_err(queue_)),
           ibv_wc_read_opcode(queue_),
           (ibv_wc_read_wc_flags(queue_) & IBV_WC_WITH_IMM) != 0
               ? ibv_wc_read_imm_data(queue_)
               : 0});
    } while (ibv_next_poll(queue_) == 0);
    ibv_end_poll(queue_);
  }
  // Until there are `count` completions, or patience ends.
  bool PollUntil(size_t count) {
    const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
    while (got.size() < count && !deadline.Expired()) Poll();
    return got.size() >= count;
  }
  void PollFor(double seconds) {
    const Deadline deadline = Deadline::AfterSeconds(seconds);
    while (!deadline.Expired()) Poll();
  }

  std::vector<uint8_t> data;
  ibv_mr* region;
  std::vector<Got> got;

 private:
  ibv_context* context_;
  ibv_pd* domain_;
  ibv_cq_ex* queue_;
  ibv_qp* pair_;
  std::vector<ibv_ah*> handles_;
};

class SoftEfaTest : public testing::Test {
 protected:
  SoftEfaTest() {
    network->SetFaults("");
    from_.Know(to_);
    to_.Know(from_);
    std::fill(from_.data.begin(), from_.data.end(), 9);
  }

  // Reads each byte once, for the device may be writing: memcmp reads a byte
  // that differed again, and calls all equal if that one has come meanwhile.
  bool Delivered() {
    return std::equal(
        to_.data.begin(), to_.data.end(), from_.data.begin(),
        [](const volatile uint8_t& got, uint8_t sent) { return got == sent; });
  }
  // What becomes of one write.
  CompletionCode Outcome() {
    EXPECT_EQ(from_.Write(to_, 1), 0);
    EXPECT_TRUE(from_.PollUntil(1));
    return from_.got.back().code;
  }

  Endpoint from_{0};
  Endpoint to_{1};
};

TEST_F(SoftEfaTest, AWriteArrivesWithItsImmediate) {
  EXPECT_EQ(Outcome(), CompletionCode::kOk);
  EXPECT_EQ(from_.got[0].id, 1);
  EXPECT_EQ(from_.got[0].opcode, IBV_WC_RDMA_WRITE);
  ASSERT_TRUE(to_.PollUntil(1));
  EXPECT_EQ(to_.got[0].opcode, IBV_WC_RECV_RDMA_WITH_IMM);
  EXPECT_EQ(to_.got[0].immediate, 1001);
  EXPECT_TRUE(Delivered());
}

TEST_F(SoftEfaTest, AnImmediateConsumesAReceiveUnlessUnsolicited) {
  Endpoint to(1, /*unsolicited=*/false);
  to.PostReceive(5);
  ASSERT_EQ(from_.Write(to, 1), 0);
  ASSERT_TRUE(to.PollUntil(1));
  EXPECT_EQ(to.got[0].id, 5);
  EXPECT_EQ(to.got[0].immediate, 1001);
  ASSERT_EQ(from_.Write(to, 2), 0);
  ASSERT_TRUE(from_.PollUntil(2));
  EXPECT_EQ(from_.got[1].code, CompletionCode::kRemoteNotReady);
}

TEST_F(SoftEfaTest, TheDeviceMovesWhenNobodyPolls) {
  network->SetFaults("* 0 rate=0.1\n");
  ASSERT_EQ(from_.Write(to_, 1), 0);
  EXPECT_FALSE(Delivered());
  const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
  while (!Delivered() && !deadline.Expired()) {
  }
  EXPECT_TRUE(Delivered());
}

TEST_F(SoftEfaTest, AFullSendQueueRefuses) {
  network->SetFaults("* 0 stalled\n");
  for (int i = 0; i < 16; ++i) ASSERT_EQ(from_.Write(to_, i), 0);
  EXPECT_EQ(from_.Write(to_, 16), ENOMEM);
  network->SetFaults("");
  EXPECT_TRUE(from_.PollUntil(16));
  EXPECT_EQ(from_.Write(to_, 17), 0);
}

TEST_F(SoftEfaTest, KeysBelongToOneNicAndEndWithTheirRegion) {
  const uint32_t key = to_.region->rkey;
  ASSERT_EQ(from_.Write(to_, 1, from_.region->rkey), 0);
  ASSERT_EQ(from_.Write(to_, 2, key + (1 << 16)), 0);
  to_.Deregister();
  ASSERT_EQ(from_.Write(to_, 3, key), 0);
  ASSERT_TRUE(from_.PollUntil(3));
  for (const Got& got : from_.got) {
    EXPECT_EQ(got.code, CompletionCode::kRemoteBadAddress);
  }
  EXPECT_FALSE(Delivered());
}

TEST_F(SoftEfaTest, ATargetMustKnowItsInitiator) {
  to_.ForgetPeers();
  EXPECT_EQ(Outcome(), CompletionCode::kLocalUnknownPeer);
  EXPECT_FALSE(Delivered());
}

TEST_F(SoftEfaTest, ADestroyedTargetIsABadQueuePair) {
  auto to = std::make_unique<Endpoint>(1);
  to->Know(from_);
  ASSERT_EQ(from_.Write(*to, 1), 0);
  ASSERT_TRUE(from_.PollUntil(1));
  network->SetFaults("* 0 stalled\n");
  ASSERT_EQ(from_.Write(*to, 2), 0);
  to.reset();
  network->SetFaults("");
  ASSERT_TRUE(from_.PollUntil(2));
  EXPECT_EQ(from_.got[1].code, CompletionCode::kRemoteBadQueuePair);
}

TEST_F(SoftEfaTest, ANicThatIsDownFailsBothWays) {
  network->SetFaults("1 1 down\n");
  EXPECT_EQ(Outcome(), CompletionCode::kLocalUnresponsiveRemote);
  ASSERT_EQ(to_.Write(from_, 1), 0);
  ASSERT_TRUE(to_.PollUntil(1));
  EXPECT_EQ(to_.got[0].code, CompletionCode::kLocalUnresponsiveRemote);
}

TEST_F(SoftEfaTest, FaultsAreOfOneHost) {
  network->SetFaults("2 1 down\n");
  EXPECT_EQ(Outcome(), CompletionCode::kOk);
}

TEST_F(SoftEfaTest, AStalledNicWaits) {
  network->SetFaults("* 1 stalled\n");
  ASSERT_EQ(from_.Write(to_, 1), 0);
  from_.PollFor(0.05);
  EXPECT_TRUE(from_.got.empty());
  EXPECT_FALSE(Delivered());
  network->SetFaults("* 1 up\n");
  EXPECT_TRUE(from_.PollUntil(1));
  EXPECT_TRUE(to_.PollUntil(1));
  EXPECT_TRUE(Delivered());
}

TEST_F(SoftEfaTest, AnUnackedWriteFailsAndIsThere) {
  network->SetFaults("* 0 unacked\n");
  EXPECT_EQ(Outcome(), CompletionCode::kLocalUnresponsiveRemote);
  EXPECT_TRUE(to_.PollUntil(1));
  EXPECT_TRUE(Delivered());
}

TEST_F(SoftEfaTest, ALateWriteFailsAndComesWithItsOldBytes) {
  network->SetFaults("* 0 late\n");
  const int64_t begin_ns = MonotonicNanoseconds();
  EXPECT_EQ(Outcome(), CompletionCode::kLocalUnresponsiveRemote);
  EXPECT_FALSE(Delivered());
  const std::vector<uint8_t> old = from_.data;
  std::fill(from_.data.begin(), from_.data.end(), 4);
  const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
  while (to_.got.empty() && !deadline.Expired()) {
    from_.Poll();
    to_.Poll();
  }
  ASSERT_EQ(to_.got.size(), 1);
  EXPECT_GE(MonotonicNanoseconds() - begin_ns, kLateNs);
  EXPECT_EQ(to_.data, old);
  EXPECT_EQ(from_.got.size(), 1);
}

TEST_F(SoftEfaTest, ALateWriteCannotLandInMemoryThatIsGone) {
  network->SetFaults("* 0 late\n");
  EXPECT_EQ(Outcome(), CompletionCode::kLocalUnresponsiveRemote);
  to_.Deregister();
  from_.PollFor(0.1);
  to_.Poll();
  EXPECT_TRUE(to_.got.empty());
  EXPECT_FALSE(Delivered());
}

TEST_F(SoftEfaTest, ADyingNicHasAllThreeOutcomes) {
  network->SetFaults("* 0 dying\n");
  std::array<int, 2> failed{};  // by whether the immediate came
  int well = 0;
  for (uint64_t id = 0; id < 100; ++id) {
    to_.got.clear();
    ASSERT_EQ(from_.Write(to_, id), 0);
    ASSERT_TRUE(from_.PollUntil(id + 1));
    to_.Poll();
    if (from_.got.back().code == CompletionCode::kOk) {
      ++well;
      EXPECT_EQ(to_.got.size(), 1);
    } else {
      ++failed[to_.got.size()];
    }
  }
  EXPECT_GT(well, 0);
  EXPECT_GT(failed[0], 0);
  EXPECT_GT(failed[1], 0);
}

TEST_F(SoftEfaTest, ARateIsKeptHoweverLateThePoll) {
  constexpr int kWrites = 10;
  constexpr double kGigabitsPerSecond = 0.1;
  const double seconds = kWrites * kBytes * 8 / (kGigabitsPerSecond * 1e9);
  network->SetFaults("* 0 rate=0.1\n");
  const int64_t begin_ns = MonotonicNanoseconds();
  for (int i = 0; i < kWrites; ++i) ASSERT_EQ(from_.Write(to_, i), 0);
  // Nobody polls for half of the time.
  const Deadline half = Deadline::AfterSeconds(seconds / 2);
  while (!half.Expired()) {
  }
  ASSERT_TRUE(from_.PollUntil(kWrites));
  const double took = (MonotonicNanoseconds() - begin_ns) * 1e-9;
  EXPECT_GE(took, 0.99 * seconds);
  EXPECT_LT(took, 1.5 * seconds);
}

}  // namespace
}  // namespace jaxfabric::softefa
