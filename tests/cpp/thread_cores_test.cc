#include "base/thread_cores.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "engine/transfer_engine.h"
#include "transport/fake.h"

namespace jaxfabric {
namespace {

std::vector<uint32_t> CoresOf(pid_t thread) {
  cpu_set_t set;
  std::vector<uint32_t> cores;
  if (sched_getaffinity(thread, sizeof set, &set) != 0) return cores;
  for (uint32_t core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

std::vector<uint32_t> After(const std::vector<uint32_t>& wanted) {
  std::vector<uint32_t> cores;
  std::thread([&] {
    KeepThisThreadOn(wanted);
    cores = CoresOf(0);
  }).join();
  return cores;
}

TEST(ThreadCoresTest, AThreadStaysOnThoseThatItMayRunOn) {
  const std::vector<uint32_t> all = CoresOf(0);
  ASSERT_FALSE(all.empty());
  const std::vector<uint32_t> last = {all.back()};
  constexpr uint32_t kNoCore = 1u << 20;
  EXPECT_EQ(After(last), last);
  EXPECT_EQ(After({kNoCore, all.back()}), last);
  EXPECT_EQ(After({kNoCore}), all);
  EXPECT_EQ(After({}), all);
}

TEST(ThreadCoresTest, TheWorkerOfATransferEngineStaysWhereItIsTold) {
  const std::vector<uint32_t> last = {CoresOf(0).back()};
  FakeOptions fake;
  fake.network = "thread_cores";
  auto transport = OpenFakeTransport(fake);
  ASSERT_TRUE(transport.ok());
  TransferEngineOptions options;
  options.worker_cores = last;
  const auto engine = TransferEngine::Open(options, *std::move(transport));
  ASSERT_TRUE(engine.ok());
  // The thread names itself, and then chooses its cores.
  const Deadline deadline = Deadline::AfterSeconds(10);
  std::vector<uint32_t> cores;
  while (cores != last && !deadline.Expired()) {
    std::this_thread::yield();
    for (const auto& task :
         std::filesystem::directory_iterator("/proc/self/task")) {
      std::string name;
      std::ifstream(task.path() / "comm") >> name;
      if (name == "jaxfabric-xfer") {
        cores = CoresOf(std::stoi(task.path().filename()));
      }
    }
  }
  EXPECT_EQ(cores, last);
}

}  // namespace
}  // namespace jaxfabric
