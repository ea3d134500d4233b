// Topology: which NICs are near which cores and GPUs of this machine.
//
// It is a tree: machine, packages, NUMA nodes, PCI bridges, devices. Two things
// are the closer, the deeper the lowest object that holds both. It comes from
// hwloc (libhwloc.so.15 by dlopen, by way of its XML), or where that is missing
// from sysfs, which knows NUMA nodes and the PCI tree but no caches.

#ifndef JAXFABRIC_BASE_TOPOLOGY_H_
#define JAXFABRIC_BASE_TOPOLOGY_H_

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace jaxfabric {

// Where a rank runs. Either may be left out.
struct RankPlace {
  std::vector<std::string> gpus;  // PCI addresses, as 0000:3b:00.0
  std::optional<uint32_t> core;
};

class Topology {
 public:
  // hwloc's export, version 2.
  static StatusOr<Topology> FromHwlocXml(std::string_view xml);
  // `root` is /sys, or a test's.
  static Topology FromSysfs(const std::string& root);
  static Topology OfThisMachine();

  // "hwloc" or "sysfs".
  const std::string& origin() const { return origin_; }
  // Names of all network and RDMA devices.
  std::vector<std::string> nics() const;

  // How close `nic` is to the nearest GPU of `place`, then to its core. It is a
  // device's name, its PCI address, or a port as libfabric and libibverbs call
  // it: "rdmap0s6-rdm", "mlx5_0:1". Larger is closer; 0 is not known.
  std::pair<uint32_t, uint32_t> Closeness(const std::string& nic,
                                          const RankPlace& place) const;
  // Those of `nics` that are closest to a process, in their order: for each of
  // its GPUs the closest to that, or where it has none, or all are as close,
  // those of the NUMA node of the `cores` that it may run on. All of them,
  // where those cores are of several nodes: then none is closer than another.
  std::vector<std::string> Nearest(
      const std::vector<std::string>& nics, const std::vector<uint32_t>& cores,
      const std::vector<std::string>& gpus = {}) const;
  // The cores of the NUMA nodes that `nics` are at. None where there is only
  // one node, or where that is not known.
  std::vector<uint32_t> CoresNear(const std::vector<std::string>& nics) const;
  // `nics` from the closest to the farthest; equals keep their order.
  std::vector<std::string> ByDistance(std::vector<std::string> nics,
                                      const RankPlace& place) const;

 private:
  struct Object {
    int parent = -1;
    uint32_t depth = 0;
    std::string type;
    std::string name;  // of a device; PCI address; number of a PU
    bool nic = false;
  };
  int Add(int parent, std::string type, std::string name, bool nic = false);
  int FindChild(int parent, const std::string& name) const;
  // Adds what is missing of the path of a sysfs device; -1 if it is none.
  int AddSysfsDevice(const std::string& link, int node_parent);
  int Find(const std::string& name) const;
  // Those of `nics` that no other is closer to `place` than.
  std::vector<std::string> Closest(const std::vector<std::string>& nics,
                                   const RankPlace& place) const;
  // Objects whose descendants are one NUMA node's.
  std::set<int> NodeHolders() const;
  int AncestorIn(const std::set<int>& objects, int object) const;
  uint32_t DepthOfCommon(int a, int b) const;

  std::string origin_;
  std::vector<Object> objects_;  // parents first
};

// Gives each of `ranks` its NICs, by the closest pairs first: as many to each
// as to the others (what does not divide evenly stays unused), or, where there
// are fewer NICs than ranks, one to each, with as many ranks on each NIC.
std::vector<std::vector<std::string>> SplitNics(
    const Topology& topology, const std::vector<std::string>& nics,
    const std::vector<RankPlace>& ranks);

}  // namespace jaxfabric

#endif  // JAXFABRIC_BASE_TOPOLOGY_H_
