#include "tests/softefa/settings.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace jaxfabric::softefa {
namespace {

[[noreturn]] void Refuse(std::string_view name, std::string_view why) {
  std::fprintf(stderr, "softefa: %.*s: %.*s\n", static_cast<int>(name.size()),
               name.data(), static_cast<int>(why.size()), why.data());
  std::abort();
}

int64_t Number(const char* name, int64_t otherwise, int64_t least,
               int64_t most) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end = nullptr;
  const int64_t value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < least || value > most) {
    Refuse(name, "\"" + std::string(text) + "\" is not a number from " +
                     std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

std::string Directory() {
  const char* path = std::getenv("SOFTEFA_DIR");
  struct stat found;
  if (path == nullptr || stat(path, &found) != 0 || !S_ISDIR(found.st_mode)) {
    Refuse("SOFTEFA_DIR", "give each test an existing directory of its own");
  }
  return path;
}

std::vector<double> Rates(int nics) {
  std::vector<double> rates;
  const char* text = std::getenv("SOFTEFA_GBPS");
  while (text != nullptr && *text != '\0') {
    char* end = nullptr;
    rates.push_back(std::strtod(text, &end));
    if (end == text || (*end != ',' && *end != '\0') || rates.back() < 0) {
      Refuse("SOFTEFA_GBPS", "wants numbers of Gbit/s with commas between");
    }
    text = *end == ',' ? end + 1 : end;
  }
  if (rates.empty()) rates.push_back(0);
  rates.resize(nics, rates.back());
  return rates;
}

Settings Read() {
  Settings s;
  s.directory = Directory();
  s.host = Number("SOFTEFA_HOST", getpid(), 0, 0x7fffffff);
  s.nics = Number("SOFTEFA_NDEV", 1, 1, kNicsMax);
  s.chaos_seed = Number("SOFTEFA_CHAOS", 0, 0, INT64_MAX);
  s.segment_bytes = Number("SOFTEFA_SEG", s.chaos_seed != 0 ? 16384 : 262144, 1,
                           int64_t{1} << 30);
  s.gigabits_per_second = Rates(s.nics);
  s.send_depth = Number("SOFTEFA_SQ", 256, 1, 65536);
  s.receive_depth = Number("SOFTEFA_RQ", kReceivesMax, 1, kReceivesMax);
  s.message_bytes_max = Number("SOFTEFA_MTU", 8928, 1024, kPacketBytesMax);
  s.inline_bytes_max = Number("SOFTEFA_INLINE", 32, 0, 1024);
  s.rdma_bytes_max =
      Number("SOFTEFA_MAX_RDMA", 1 << 30, 4096, int64_t{1} << 31);
  s.rdma = Number("SOFTEFA_RDMA", 1, 0, 1) != 0;
  s.unsolicited = Number("SOFTEFA_UNSOLICITED", 1, 0, 1) != 0;
  s.need_address_handle = Number("SOFTEFA_NEED_AH", 1, 0, 1) != 0;
  s.rnr_wait_ns = Number("SOFTEFA_RNR_MS", 100, 0, 60000) * 1'000'000;
  s.late_ns = Number("SOFTEFA_LATE_MS", 50, 0, 60000) * 1'000'000;
  return s;
}

}  // namespace

const Settings& TheSettings() {
  static const Settings* settings = new Settings(Read());
  return *settings;
}

}  // namespace jaxfabric::softefa
