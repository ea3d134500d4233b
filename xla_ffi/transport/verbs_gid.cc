#include "transport/verbs_gid.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>

namespace jaxfabric {
namespace {

bool IsIpv4(const VerbsGid& gid) {
  return std::all_of(gid.begin(), gid.begin() + 10,
                     [](uint8_t byte) { return byte == 0; }) &&
         gid[10] == 0xff && gid[11] == 0xff;
}

bool IsLinkLocal(const VerbsGid& gid) {
  return gid[0] == 0xfe && (gid[1] & 0xc0) == 0x80;
}

// Higher is better; 0 is never chosen.
int Rank(const VerbsGidEntry& entry) {
  const bool is_empty = std::all_of(entry.gid.begin(), entry.gid.end(),
                                    [](uint8_t byte) { return byte == 0; });
  if (is_empty) return 0;
  switch (entry.type) {
    case VerbsGidType::kInfiniBand:
      return 4;
    case VerbsGidType::kRoceV2:
      if (IsIpv4(entry.gid)) return 3;
      return IsLinkLocal(entry.gid) ? 1 : 2;
    case VerbsGidType::kRoceV1:
      return 0;
  }
  return 0;
}

}  // namespace

const VerbsGidEntry* ChooseGid(std::span<const VerbsGidEntry> entries,
                               int wanted) {
  const VerbsGidEntry* best = nullptr;
  for (const VerbsGidEntry& entry : entries) {
    if (wanted >= 0) {
      if (entry.index == static_cast<uint32_t>(wanted)) return &entry;
      continue;
    }
    if (Rank(entry) == 0) continue;
    if (best == nullptr || Rank(entry) > Rank(*best)) best = &entry;
  }
  return best;
}

std::string DescribeGid(const VerbsGid& gid) {
  char text[INET6_ADDRSTRLEN] = {};
  if (IsIpv4(gid)) {
    inet_ntop(AF_INET, gid.data() + 12, text, sizeof(text));
  } else {
    inet_ntop(AF_INET6, gid.data(), text, sizeof(text));
  }
  return text;
}

}  // namespace jaxfabric
