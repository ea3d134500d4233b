#include "tests/softefa/host.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

namespace jaxfabric::softefa {
namespace {

// The process that opened the device; a forked child must not clean up for it.
int32_t owner_pid = 0;

// The provider takes a NIC's PCI address from where its sysfs `device` link
// leads, and the directory itself from SYSFS_PATH. Processes may race here.
void MakeSysfs(Nic& nic) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::path root = fs::path(TheSettings().directory) / "sys";
  fs::create_directories(root / "class/infiniband_verbs", ignored);
  std::ofstream(root / "class/infiniband_verbs/abi_version") << "6\n";
  fs::create_directories(root / "drivers/efa", ignored);

  char pci_address[32];
  std::snprintf(pci_address, sizeof(pci_address), "0000:%02x:1d.0",
                0x10 + nic.index);
  const fs::path pci = root / pci_address;
  const fs::path device = root / "class/infiniband" / nic.name;
  fs::create_directories(pci, ignored);
  fs::create_directories(device, ignored);
  fs::create_directory_symlink(root / "drivers/efa", pci / "driver", ignored);
  fs::create_directory_symlink(pci, device / "device", ignored);
  std::snprintf(nic.ibdev_path, sizeof(nic.ibdev_path), "%s", device.c_str());
  std::snprintf(nic.dev_path, sizeof(nic.dev_path), "%s", device.c_str());
  setenv("SYSFS_PATH", root.c_str(), 1);
}

std::unique_ptr<Nic> MakeNic(int index) {
  auto nic = std::make_unique<Nic>();
  std::snprintf(nic->name, sizeof(nic->name), "softefa%d", index);
  std::snprintf(nic->dev_name, sizeof(nic->dev_name), "uverbs%d", index);
  nic->node_type = IBV_NODE_UNSPECIFIED;
  nic->transport_type = IBV_TRANSPORT_UNSPECIFIED;
  nic->index = index;
  nic->gid = MakeGid(TheSettings().host, index);
  MakeSysfs(*nic);
  return nic;
}

Host* Open() {
  const Settings& settings = TheSettings();
  auto* host = new Host;
  owner_pid = getpid();
  host->process = MapProcess(owner_pid, /*create=*/true);
  host->chaos = Chaos(settings.chaos_seed, settings.host);
  // Peers store into this process's memory, as its NICs would.
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
  for (int index = 0; index < settings.nics; ++index) {
    host->nics.push_back(MakeNic(index));
  }
  return host;
}

__attribute__((destructor)) void RemoveProcessFile() {
  if (owner_pid == getpid()) RemoveFile(ProcessName(owner_pid));
}

}  // namespace

Host& TheHost() {
  static Host* host = Open();
  return *host;
}

}  // namespace jaxfabric::softefa
