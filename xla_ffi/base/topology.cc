#include "base/topology.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <system_error>
#include <tuple>

namespace jaxfabric {
namespace {

namespace fs = std::filesystem;

// More than any machine has; a bound for the parser.
constexpr size_t kObjectsMax = 1 << 17;

// hwloc's numbers of operating system devices.
constexpr char kOsNetwork[] = "2";
constexpr char kOsOpenFabrics[] = "3";

// The value of an attribute of an XML tag, "" if it has none.
std::string AttributeOf(std::string_view tag, const std::string& name) {
  const size_t at = tag.find(" " + name + "=\"");
  if (at == std::string_view::npos) return "";
  const size_t begin = at + name.size() + 3;
  const size_t end = tag.find('"', begin);
  return std::string(tag.substr(begin, end - begin));
}

// Numbers of a list like 0-3,8,10-11.
std::vector<uint32_t> NumbersOf(const std::string& list) {
  std::vector<uint32_t> numbers;
  for (size_t at = 0; at < list.size();) {
    char* end = nullptr;
    const uint64_t first = std::strtoul(list.c_str() + at, &end, 10);
    uint64_t last = first;
    if (*end == '-') last = std::strtoul(end + 1, &end, 10);
    for (uint64_t n = first; n <= last && n - first < kObjectsMax; ++n) {
      numbers.push_back(static_cast<uint32_t>(n));
    }
    at = static_cast<size_t>(end - list.c_str()) + 1;
  }
  return numbers;
}

std::string FirstLine(const fs::path& file) {
  std::ifstream stream(file);
  std::string line;
  std::getline(stream, line);
  return line;
}

std::vector<fs::path> EntriesOf(const fs::path& folder) {
  std::vector<fs::path> entries;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error)) {
    entries.push_back(it->path());
  }
  std::sort(entries.begin(), entries.end());
  return entries;
}

// The machine's topology as XML; empty where there is no hwloc.
std::string HwlocXml() {
  void* const library = dlopen("libhwloc.so.15", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return "";
  const auto init =
      reinterpret_cast<int (*)(void**)>(dlsym(library, "hwloc_topology_init"));
  const auto filter = reinterpret_cast<int (*)(void*, int)>(
      dlsym(library, "hwloc_topology_set_io_types_filter"));
  const auto load =
      reinterpret_cast<int (*)(void*)>(dlsym(library, "hwloc_topology_load"));
  const auto to_xml = reinterpret_cast<int (*)(void*, char**, int*, uint64_t)>(
      dlsym(library, "hwloc_topology_export_xmlbuffer"));
  const auto free_xml = reinterpret_cast<void (*)(void*, char*)>(
      dlsym(library, "hwloc_free_xmlbuffer"));
  const auto destroy = reinterpret_cast<void (*)(void*)>(
      dlsym(library, "hwloc_topology_destroy"));
  std::string xml;
  void* topology = nullptr;
  constexpr int kKeepImportant = 3;  // HWLOC_TYPE_FILTER_KEEP_IMPORTANT
  if (init && filter && load && to_xml && free_xml && destroy &&
      init(&topology) == 0) {
    char* bytes = nullptr;
    int length = 0;
    if (filter(topology, kKeepImportant) == 0 && load(topology) == 0 &&
        to_xml(topology, &bytes, &length, 0) == 0) {
      xml.assign(bytes, strnlen(bytes, static_cast<size_t>(length)));
      free_xml(topology, bytes);
    }
    destroy(topology);
  }
  dlclose(library);
  return xml;
}

}  // namespace

int Topology::Add(int parent, std::string type, std::string name, bool nic) {
  const uint32_t depth =
      parent < 0 ? 1 : objects_[static_cast<size_t>(parent)].depth + 1;
  objects_.push_back({parent, depth, std::move(type), std::move(name), nic});
  return static_cast<int>(objects_.size()) - 1;
}

StatusOr<Topology> Topology::FromHwlocXml(std::string_view xml) {
  const Status malformed(StatusCode::kInvalidArgument,
                         "not a topology as hwloc 2 exports it");
  Topology topology;
  topology.origin_ = "hwloc";
  if (xml.find("<topology version=\"2") == std::string_view::npos) {
    return malformed;
  }
  int parent = -1;
  for (size_t at = xml.find('<'); at != std::string_view::npos;
       at = xml.find('<', at + 1)) {
    const size_t end = xml.find('>', at);
    if (end == std::string_view::npos) return malformed;
    const std::string_view tag = xml.substr(at, end - at + 1);
    if (tag == "</object>") {
      if (parent < 0) return malformed;
      parent = topology.objects_[static_cast<size_t>(parent)].parent;
    } else if (tag.substr(0, 8) == "<object ") {
      const std::string type = AttributeOf(tag, "type");
      const std::string os_type = AttributeOf(tag, "osdev_type");
      std::string name = AttributeOf(tag, "name");
      if (type == "PCIDev") name = AttributeOf(tag, "pci_busid");
      if (type == "PU") name = AttributeOf(tag, "os_index");
      const int object =
          topology.Add(parent, type, std::move(name),
                       os_type == kOsNetwork || os_type == kOsOpenFabrics);
      if (tag[tag.size() - 2] != '/') parent = object;
      if (topology.objects_.size() > kObjectsMax) return malformed;
    }
  }
  if (parent != -1 || topology.objects_.empty()) return malformed;
  return topology;
}

int Topology::FindChild(int parent, const std::string& name) const {
  for (size_t i = 0; i < objects_.size(); ++i) {
    if (objects_[i].parent == parent && objects_[i].name == name) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

int Topology::AddSysfsDevice(const std::string& link, int node_parent) {
  std::error_code error;
  const fs::path real = fs::canonical(link, error);
  if (error) return -1;
  int parent = node_parent;
  bool pci = false;
  for (const fs::path& part : real) {
    const std::string name = part.string();
    pci |= name.rfind("pci", 0) == 0;
    if (!pci) continue;  // /sys/devices, or a virtual device
    const int known = FindChild(parent, name);
    parent = known >= 0 ? known : Add(parent, "PCIDev", name);
  }
  return pci ? parent : -1;
}

Topology Topology::FromSysfs(const std::string& root) {
  Topology topology;
  topology.origin_ = "sysfs";
  const int machine = topology.Add(-1, "Machine", "");
  std::map<std::string, int> nodes;
  for (const fs::path& node : EntriesOf(root + "/devices/system/node")) {
    const std::string name = node.filename();
    if (name.rfind("node", 0) != 0) continue;
    const int object = topology.Add(machine, "NUMANode", name);
    nodes[name.substr(4)] = object;
    for (const uint32_t core : NumbersOf(FirstLine(node / "cpulist"))) {
      topology.Add(object, "PU", std::to_string(core));
    }
  }
  const auto add = [&](const fs::path& device) {
    const auto node = nodes.find(FirstLine(device / "numa_node"));
    return topology.AddSysfsDevice(
        device, node == nodes.end() ? machine : node->second);
  };
  for (const fs::path& device : EntriesOf(root + "/bus/pci/devices")) {
    add(device);
  }
  for (const char* const kind : {"net", "infiniband"}) {
    for (const fs::path& nic : EntriesOf(root + "/class/" + kind)) {
      const int parent = add(nic / "device");
      topology.Add(parent < 0 ? machine : parent, "OSDev", nic.filename(),
                   /*nic=*/true);
    }
  }
  return topology;
}

Topology Topology::OfThisMachine() {
  auto topology = FromHwlocXml(HwlocXml());
  return topology.ok() ? *std::move(topology) : FromSysfs("/sys");
}

std::vector<std::string> Topology::nics() const {
  std::vector<std::string> names;
  for (const Object& object : objects_) {
    if (object.nic) names.push_back(object.name);
  }
  return names;
}

int Topology::Find(const std::string& name) const {
  for (size_t i = 0; i < objects_.size(); ++i) {
    const Object& object = objects_[i];
    const bool device = object.type == "OSDev" || object.type == "PCIDev";
    if (device && object.name == name) return static_cast<int>(i);
  }
  // Transports open ports, which have the names of their devices, and more.
  const size_t port = name.find_last_of(":-");
  return port == std::string::npos ? -1 : Find(name.substr(0, port));
}

// hwloc has a NUMA node beside the cores that it is local to; our sysfs tree
// has the cores in it.
std::set<int> Topology::NodeHolders() const {
  std::set<int> parents;
  for (const Object& object : objects_) parents.insert(object.parent);
  std::set<int> holders;
  for (size_t i = 0; i < objects_.size(); ++i) {
    if (objects_[i].type != "NUMANode") continue;
    const int node = static_cast<int>(i);
    holders.insert(parents.contains(node) ? node : objects_[i].parent);
  }
  return holders;
}

int Topology::AncestorIn(const std::set<int>& objects, int object) const {
  while (object >= 0 && !objects.contains(object)) {
    object = objects_[static_cast<size_t>(object)].parent;
  }
  return object;
}

std::vector<std::string> Topology::Closest(const std::vector<std::string>& nics,
                                           const RankPlace& place) const {
  std::pair<uint32_t, uint32_t> closest;
  for (const std::string& nic : nics) {
    closest = std::max(closest, Closeness(nic, place));
  }
  std::vector<std::string> found;
  for (const std::string& nic : nics) {
    if (Closeness(nic, place) == closest) found.push_back(nic);
  }
  return found;
}

std::vector<std::string> Topology::Nearest(
    const std::vector<std::string>& nics, const std::vector<uint32_t>& cores,
    const std::vector<std::string>& gpus) const {
  std::set<std::string> near_gpus;
  for (const std::string& gpu : gpus) {
    const std::vector<std::string> closest = Closest(nics, {.gpus = {gpu}});
    if (closest.size() == nics.size()) continue;  // says nothing, or unknown
    near_gpus.insert(closest.begin(), closest.end());
  }
  if (!near_gpus.empty()) {
    std::vector<std::string> nearest = nics;
    std::erase_if(nearest, [&](const std::string& nic) {
      return !near_gpus.contains(nic);
    });
    return nearest;
  }
  const std::set<int> holders = NodeHolders();
  std::set<int> nodes;
  for (size_t i = 0; i < objects_.size(); ++i) {
    if (objects_[i].type != "PU") continue;
    const auto number =
        std::find_if(cores.begin(), cores.end(), [&](const uint32_t core) {
          return objects_[i].name == std::to_string(core);
        });
    if (number != cores.end()) {
      nodes.insert(AncestorIn(holders, static_cast<int>(i)));
    }
  }
  if (nodes.size() != 1) return nics;
  return Closest(nics, {.core = cores.front()});
}

std::vector<uint32_t> Topology::CoresNear(
    const std::vector<std::string>& nics) const {
  const std::set<int> holders = NodeHolders();
  std::set<int> nodes;
  for (const std::string& nic : nics) {
    const int node = AncestorIn(holders, Find(nic));
    if (node >= 0) nodes.insert(node);
  }
  std::vector<uint32_t> cores;
  if (holders.size() < 2) return cores;
  for (size_t i = 0; i < objects_.size(); ++i) {
    if (objects_[i].type != "PU") continue;
    if (!nodes.contains(AncestorIn(holders, static_cast<int>(i)))) continue;
    cores.push_back(static_cast<uint32_t>(
        std::strtoul(objects_[i].name.c_str(), nullptr, 10)));
  }
  return cores;
}

uint32_t Topology::DepthOfCommon(int a, int b) const {
  while (a >= 0 && b >= 0 && a != b) {
    const Object& one = objects_[static_cast<size_t>(a)];
    const Object& other = objects_[static_cast<size_t>(b)];
    (one.depth >= other.depth ? a : b) =
        one.depth >= other.depth ? one.parent : other.parent;
  }
  return a < 0 || b < 0 ? 0 : objects_[static_cast<size_t>(a)].depth;
}

std::pair<uint32_t, uint32_t> Topology::Closeness(
    const std::string& nic, const RankPlace& place) const {
  const int device = Find(nic);
  uint32_t to_core = 0;
  for (size_t i = 0; i < objects_.size() && place.core; ++i) {
    if (objects_[i].type == "PU" &&
        objects_[i].name == std::to_string(*place.core)) {
      to_core = DepthOfCommon(device, static_cast<int>(i));
    }
  }
  uint32_t to_gpu = 0;
  for (const std::string& gpu : place.gpus) {
    to_gpu = std::max(to_gpu, DepthOfCommon(device, Find(gpu)));
  }
  return {to_gpu, to_core};
}

std::vector<std::string> Topology::ByDistance(std::vector<std::string> nics,
                                              const RankPlace& place) const {
  std::stable_sort(nics.begin(), nics.end(),
                   [&](const std::string& a, const std::string& b) {
                     return Closeness(a, place) > Closeness(b, place);
                   });
  return nics;
}

std::vector<std::vector<std::string>> SplitNics(
    const Topology& topology, const std::vector<std::string>& nics,
    const std::vector<RankPlace>& ranks) {
  std::vector<std::vector<std::string>> given(ranks.size());
  if (nics.empty() || ranks.empty()) return given;
  const size_t each = std::max<size_t>(1, nics.size() / ranks.size());
  const size_t sharers = (ranks.size() + nics.size() - 1) / nics.size();
  using Pair = std::tuple<std::pair<uint32_t, uint32_t>, size_t, size_t>;
  std::vector<Pair> pairs;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    for (size_t nic = 0; nic < nics.size(); ++nic) {
      pairs.emplace_back(topology.Closeness(nics[nic], ranks[rank]), rank, nic);
    }
  }
  std::stable_sort(pairs.begin(), pairs.end(),
                   [](const Pair& a, const Pair& b) {
                     return std::get<0>(a) > std::get<0>(b);
                   });
  std::vector<size_t> users(nics.size(), 0);
  for (const auto& [closeness, rank, nic] : pairs) {
    if (given[rank].size() == each || users[nic] == sharers) continue;
    given[rank].push_back(nics[nic]);
    ++users[nic];
  }
  return given;
}

}  // namespace jaxfabric
