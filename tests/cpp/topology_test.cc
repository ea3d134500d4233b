#include "base/topology.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace jaxfabric {
namespace {

using testing::ElementsAre;
namespace fs = std::filesystem;

std::string Pu(uint32_t number) {
  return "<object type=\"PU\" os_index=\"" + std::to_string(number) + "\"/>";
}

// A switch with one GPU and two NICs, named by `unit`.
std::string Switch(uint32_t unit) {
  const std::string u = std::to_string(unit);
  const std::string bus = "0000:" + u + "0:0";
  return "<object type=\"Bridge\" bridge_type=\"1-1\">"
         "<object type=\"PCIDev\" pci_busid=\"" +
         bus +
         "0.0\">"
         "<object type=\"OSDev\" name=\"cuda" +
         u +
         "\" osdev_type=\"5\"/>"
         "</object>"
         "<object type=\"PCIDev\" pci_busid=\"" +
         bus +
         "1.0\">"
         "<object type=\"OSDev\" name=\"rdma" +
         u +
         "a\" osdev_type=\"3\">"
         "<info name=\"NodeGUID\" value=\"1\"/></object></object>"
         "<object type=\"PCIDev\" pci_busid=\"" +
         bus +
         "2.0\">"
         "<object type=\"OSDev\" name=\"rdma" +
         u +
         "b\" osdev_type=\"3\"/>"
         "</object></object>";
}

// Two packages, each with two cores, and two switches behind one host bridge.
std::string TwoPackages() {
  std::string xml =
      "<?xml version=\"1.0\"?>\n<topology version=\"2.0\">\n"
      "<object type=\"Machine\" os_index=\"0\">";
  for (uint32_t package = 0; package < 2; ++package) {
    xml +=
        "<object type=\"Package\"><object type=\"NUMANode\"/>"
        "<object type=\"Core\">" +
        Pu(2 * package) +
        "</object>"
        "<object type=\"Core\">" +
        Pu(2 * package + 1) +
        "</object>"
        "<object type=\"Bridge\" bridge_type=\"0-1\">" +
        Switch(2 * package) + Switch(2 * package + 1) + "</object></object>";
  }
  return xml + "</object>\n</topology>\n";
}

TEST(TopologyTest, NicsAreOrderedByTheirWayToTheGpuThenToTheCore) {
  const auto topology = Topology::FromHwlocXml(TwoPackages());
  ASSERT_TRUE(topology.ok()) << topology.status().message();
  EXPECT_EQ(topology->origin(), "hwloc");
  EXPECT_THAT(topology->nics(),
              ElementsAre("rdma0a", "rdma0b", "rdma1a", "rdma1b", "rdma2a",
                          "rdma2b", "rdma3a", "rdma3b"));
  EXPECT_THAT(
      topology->ByDistance(topology->nics(), {.gpus = {"0000:30:00.0"}}),
      ElementsAre("rdma3a", "rdma3b", "rdma2a", "rdma2b", "rdma0a", "rdma0b",
                  "rdma1a", "rdma1b"));
  EXPECT_THAT(topology->ByDistance(topology->nics(), {.core = 2}),
              ElementsAre("rdma2a", "rdma2b", "rdma3a", "rdma3b", "rdma0a",
                          "rdma0b", "rdma1a", "rdma1b"));
  // The GPU counts before the core, and NICs have PCI addresses too.
  EXPECT_THAT(topology->ByDistance({"0000:00:01.0", "rdma2a"},
                                   {.gpus = {"0000:20:00.0"}, .core = 0}),
              ElementsAre("rdma2a", "0000:00:01.0"));
  EXPECT_THAT(topology->ByDistance({"unheard of", "rdma1a"}, {.core = 0}),
              ElementsAre("rdma1a", "unheard of"));
}

TEST(TopologyTest, EachRankGetsTheNicsOfItsSwitch) {
  const auto topology = *Topology::FromHwlocXml(TwoPackages());
  std::vector<RankPlace> ranks;
  for (const char* const gpu :
       {"0000:30:00.0", "0000:00:00.0", "0000:20:00.0", "0000:10:00.0"}) {
    ranks.push_back({.gpus = {gpu}});
  }
  EXPECT_THAT(SplitNics(topology, topology.nics(), ranks),
              ElementsAre(ElementsAre("rdma3a", "rdma3b"),
                          ElementsAre("rdma0a", "rdma0b"),
                          ElementsAre("rdma2a", "rdma2b"),
                          ElementsAre("rdma1a", "rdma1b")));
}

// A process may have several GPUs, and then needs the NICs of each.
TEST(TopologyTest, AProcessTakesTheNicsOfItsGpus) {
  const auto topology = *Topology::FromHwlocXml(TwoPackages());
  const std::vector<std::string> nics = {"rdma3a", "rdma1b", "rdma1a",
                                         "rdma3b"};  // two GPUs' switches
  const std::string gpu1 = "0000:10:00.0";
  const std::string gpu3 = "0000:30:00.0";
  EXPECT_THAT(topology.Nearest(nics, {0}, {gpu1}),
              ElementsAre("rdma1b", "rdma1a"));
  EXPECT_THAT(topology.Nearest(nics, {0}, {gpu3}),
              ElementsAre("rdma3a", "rdma3b"));
  EXPECT_EQ(topology.Nearest(nics, {0}, {gpu3, gpu1}), nics);
  // The cores decide, where the GPU is unknown, or all are as far from it.
  EXPECT_THAT(topology.Nearest(nics, {0}, {"0000:77:00.0"}),
              ElementsAre("rdma1b", "rdma1a"));
  EXPECT_THAT(topology.Nearest({"rdma2a", "rdma2b"}, {0}, {gpu3}),
              ElementsAre("rdma2a", "rdma2b"));
  EXPECT_THAT(SplitNics(topology, nics, {{.gpus = {gpu3}}, {.gpus = {gpu1}}}),
              ElementsAre(ElementsAre("rdma3a", "rdma3b"),
                          ElementsAre("rdma1b", "rdma1a")));
  EXPECT_THAT(
      SplitNics(topology, topology.nics(),
                {{.gpus = {gpu3, gpu1}},
                 {.gpus = {"0000:00:00.0", "0000:20:00.0"}, .core = 3}}),
      ElementsAre(ElementsAre("rdma1a", "rdma1b", "rdma3a", "rdma3b"),
                  ElementsAre("rdma2a", "rdma2b", "rdma0a", "rdma0b")));
}

TEST(TopologyTest, AProcessOfOneNodeTakesTheNicsOfThatNode) {
  const auto topology = *Topology::FromHwlocXml(TwoPackages());
  const auto nics = topology.nics();
  const auto first = ElementsAre("rdma0a", "rdma0b", "rdma1a", "rdma1b");
  EXPECT_THAT(topology.Nearest(nics, {0}), first);
  EXPECT_THAT(topology.Nearest(nics, {0, 1}), first);
  EXPECT_THAT(topology.Nearest(nics, {2, 3}),
              ElementsAre("rdma2a", "rdma2b", "rdma3a", "rdma3b"));
  // Where it may run anywhere, none is closer than another.
  EXPECT_EQ(topology.Nearest(nics, {0, 1, 2, 3}), nics);
  EXPECT_EQ(topology.Nearest(nics, {}), nics);
  EXPECT_EQ(topology.Nearest(nics, {77}), nics) << "no such core";
  // All that there are, where none is near, or nothing is known of them.
  EXPECT_THAT(topology.Nearest({"rdma3b", "rdma2a"}, {0}),
              ElementsAre("rdma3b", "rdma2a"));
  EXPECT_THAT(topology.Nearest({"one", "two"}, {0}), ElementsAre("one", "two"));
  EXPECT_TRUE(topology.Nearest({}, {0}).empty());
}

TEST(TopologyTest, NicsHaveTheCoresOfTheirNodes) {
  const auto topology = *Topology::FromHwlocXml(TwoPackages());
  EXPECT_THAT(topology.CoresNear({"rdma0a"}), ElementsAre(0, 1));
  EXPECT_THAT(topology.CoresNear({"rdma3b", "rdma2a"}), ElementsAre(2, 3));
  EXPECT_THAT(topology.CoresNear({"rdma0a", "rdma3b"}),
              ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(topology.CoresNear({"unheard of", "rdma3b"}), ElementsAre(2, 3));
  EXPECT_TRUE(topology.CoresNear({"unheard of"}).empty());
  EXPECT_TRUE(topology.CoresNear({}).empty());
  // Ports, as transports call them.
  EXPECT_THAT(topology.CoresNear({"rdma3b-rdm"}), ElementsAre(2, 3));
  EXPECT_THAT(topology.CoresNear({"rdma0a:1"}), ElementsAre(0, 1));
}

TEST(TopologyTest, OneNodeIsNoReasonToStayAnywhere) {
  const auto topology = *Topology::FromHwlocXml(
      "<topology version=\"2.0\"><object type=\"Machine\">"
      "<object type=\"NUMANode\"/>" +
      Pu(0) + Pu(1) + Switch(0) + "</object></topology>");
  EXPECT_TRUE(topology.CoresNear({"rdma0a"}).empty());
  EXPECT_THAT(topology.Nearest(topology.nics(), {1}),
              ElementsAre("rdma0a", "rdma0b"));
}

TEST(TopologyTest, NicsAreSplitEvenlyWhateverTheirNumber) {
  const auto topology = *Topology::FromHwlocXml(TwoPackages());
  for (size_t nic_count = 1; nic_count <= 8; ++nic_count) {
    std::vector<std::string> nics = topology.nics();
    nics.resize(nic_count);
    for (uint32_t rank_count = 1; rank_count <= 12; ++rank_count) {
      std::vector<RankPlace> ranks;
      for (uint32_t i = 0; i < rank_count; ++i) ranks.push_back({.core = i});
      const auto given = SplitNics(topology, nics, ranks);
      std::map<std::string, size_t> users;
      for (const auto& mine : given) {
        EXPECT_EQ(mine.size(), std::max<size_t>(1, nic_count / rank_count));
        for (const std::string& nic : mine) ++users[nic];
      }
      for (const auto& [nic, count] : users) {
        EXPECT_LE(count, (rank_count + nic_count - 1) / nic_count);
      }
    }
  }
  EXPECT_THAT(SplitNics(topology, {}, {{}, {}}),
              ElementsAre(ElementsAre(), ElementsAre()));
  EXPECT_TRUE(SplitNics(topology, {"rdma0a"}, {}).empty());
}

TEST(TopologyTest, WhatIsNoTopologyIsRefused) {
  const std::string good = TwoPackages();
  for (const std::string& xml :
       {std::string(), std::string("<topology version=\"1.0\"></topology>"),
        std::string("<topology version=\"2.0\"></topology>"),
        good.substr(0, good.size() / 2), "</object>" + good}) {
    EXPECT_FALSE(Topology::FromHwlocXml(xml).ok()) << xml.substr(0, 40);
  }
}

// A sysfs of two NUMA nodes.
class SysfsTest : public testing::Test {
 protected:
  SysfsTest() : root_(Root()) {
    fs::remove_all(root_);
    Node(0, "0-1");
    Node(1, "2,3");
    Device("pci0000:00/0000:00:01.0/0000:01:00.0", 0, "net", "near0");
    Device("pci0000:80/0000:80:01.0/0000:81:00.0", 1, "net", "near1");
    Device("pci0000:80/0000:80:01.0/0000:82:00.0", 1, "", "");  // a GPU
    Device("pci0000:80/0000:80:02.0/0000:83:00.0", 1, "infiniband", "mlx5_0");
    fs::create_directories(root_ / "devices/virtual/net/lo");
    fs::create_directories(root_ / "class/net/lo");
  }
  ~SysfsTest() override { fs::remove_all(root_); }

  void Write(const fs::path& file, const std::string& text) {
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  }
  void Node(int number, const std::string& cores) {
    Write(root_ / ("devices/system/node/node" + std::to_string(number)) /
              "cpulist",
          cores);
  }
  void Device(const std::string& path, int node, const std::string& kind,
              const std::string& name) {
    const fs::path device = root_ / "devices" / path;
    Write(device / "numa_node", std::to_string(node));
    fs::create_directories(root_ / "bus/pci/devices");
    fs::create_symlink(device, root_ / "bus/pci/devices" / device.filename());
    if (name.empty()) return;
    fs::create_directories(root_ / "class" / kind / name);
    fs::create_symlink(device, root_ / "class" / kind / name / "device");
  }

  const fs::path root_;

 private:
  // ctest runs the tests of this file side by side, each in its own process.
  static fs::path Root() {
    return fs::path(testing::TempDir()) /
           ("jaxfabric-sysfs-" + std::to_string(getpid()));
  }
};

TEST_F(SysfsTest, NumaNodesAndThePciTreeAreKnown) {
  const Topology topology = Topology::FromSysfs(root_);
  EXPECT_EQ(topology.origin(), "sysfs");
  EXPECT_THAT(topology.nics(),
              testing::UnorderedElementsAre("lo", "near0", "near1", "mlx5_0"));
  EXPECT_THAT(topology.ByDistance({"near1", "mlx5_0", "near0"}, {.core = 1}),
              ElementsAre("near0", "near1", "mlx5_0"));
  EXPECT_THAT(topology.ByDistance({"near0", "mlx5_0", "near1"},
                                  {.gpus = {"0000:82:00.0"}, .core = 0}),
              ElementsAre("near1", "mlx5_0", "near0"));
}

TEST_F(SysfsTest, NodesAreNearTheirNicsAndCores) {
  const Topology topology = Topology::FromSysfs(root_);
  const std::vector<std::string> nics = {"near1", "near0", "mlx5_0", "lo"};
  EXPECT_THAT(topology.Nearest(nics, {2}), ElementsAre("near1", "mlx5_0"));
  EXPECT_THAT(topology.Nearest(nics, {0, 1}), ElementsAre("near0"));
  EXPECT_EQ(topology.Nearest(nics, {1, 2}), nics);
  EXPECT_THAT(topology.CoresNear({"mlx5_0", "near1"}), ElementsAre(2, 3));
  EXPECT_TRUE(topology.CoresNear({"lo"}).empty());
}

TEST(TopologyTest, ThisMachineHasOne) {
  const Topology topology = Topology::OfThisMachine();
  // Whatever there is, ordering and splitting work.
  const auto nics = topology.nics();
  EXPECT_EQ(topology.ByDistance(nics, {.core = 0}).size(), nics.size());
  EXPECT_EQ(SplitNics(topology, nics, {{.core = 0}, {.core = 1}}).size(), 2u);
}

}  // namespace
}  // namespace jaxfabric
