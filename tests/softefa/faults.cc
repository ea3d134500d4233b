#include "tests/softefa/faults.h"

#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "tests/softefa/settings.h"

namespace jaxfabric::softefa {
namespace {

constexpr int64_t kRefreshNs = 1'000'000;

std::optional<NicHealth> Parse(const std::string& word) {
  if (word == "up") return NicHealth{NicState::kUp};
  if (word == "stalled") return NicHealth{NicState::kStalled};
  if (word == "down") return NicHealth{NicState::kDown};
  if (word == "unacked") return NicHealth{NicState::kUnacked};
  if (word == "late") return NicHealth{NicState::kLate};
  if (word == "dying") return NicHealth{NicState::kDying};
  if (word.starts_with("rate=")) {
    return NicHealth{NicState::kUp, std::atof(word.c_str() + 5)};
  }
  return std::nullopt;
}

}  // namespace

NicHealth Faults::Of(const Gid& gid, int64_t now_ns) {
  if (now_ns >= refresh_ns_) {
    refresh_ns_ = now_ns + kRefreshNs;
    Refresh();
  }
  for (const Line& line : lines_) {
    if (line.host.value_or(GidHost(gid)) == GidHost(gid) &&
        line.nic == GidNic(gid)) {
      return line.health;
    }
  }
  return {};
}

void Faults::Refresh() {
  const std::string path = TheSettings().directory + "/faults";
  struct stat found;
  if (stat(path.c_str(), &found) != 0) {
    lines_.clear();
    version_ = 0;
    return;
  }
  // A file that replaces another has a new inode or a new time.
  const uint64_t version = found.st_ino * 1'000'003 +
                           found.st_mtim.tv_sec * 1'000'000'000ull +
                           found.st_mtim.tv_nsec;
  if (version == version_) return;
  version_ = version;
  lines_.clear();
  std::ifstream file(path);
  for (std::string text; std::getline(file, text);) {
    std::istringstream words(text);
    std::string host, state;
    int nic = -1;
    words >> host >> nic >> state;
    const std::optional<NicHealth> health = Parse(state);
    if (!health.has_value() || nic < 0) {
      std::fprintf(stderr, "softefa: faults: cannot read \"%s\"\n",
                   text.c_str());
      std::abort();
    }
    Line& line = lines_.emplace_back(Line{std::nullopt, nic, *health});
    if (host != "*") line.host = std::strtoul(host.c_str(), nullptr, 10);
  }
}

}  // namespace jaxfabric::softefa
