#include "engine/rank_address.h"

#include <cstring>

namespace jaxfabric {
namespace {

constexpr uint32_t kMagic = 0x4a465241;
constexpr uint32_t kVersion = 1;
constexpr uint64_t kAddressBytesMax = 4096;

void Put(std::string& bytes, uint64_t value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// Takes values off the front of bytes that a peer wrote.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  uint64_t Number() {
    uint64_t value = 0;
    const std::string_view taken = Bytes(sizeof value);
    if (ok_) std::memcpy(&value, taken.data(), sizeof value);
    return value;
  }
  std::string_view Bytes(uint64_t count) {
    if (count > bytes_.size()) ok_ = false;
    if (!ok_) return {};
    const std::string_view taken = bytes_.substr(0, count);
    bytes_.remove_prefix(count);
    return taken;
  }
  bool ok() const { return ok_; }
  bool done() const { return ok_ && bytes_.empty(); }

 private:
  std::string_view bytes_;
  bool ok_ = true;
};

}  // namespace

std::string RankAddress::Encode() const {
  std::string bytes;
  Put(bytes, uint64_t{kVersion} << 32 | kMagic);
  Put(bytes, generation);
  Put(bytes, heap.base);
  Put(bytes, heap.length);
  Put(bytes, domains.size());
  for (size_t i = 0; i < domains.size(); ++i) {
    Put(bytes, heap.keys[i]);
    Put(bytes, domains[i].bytes.size());
    bytes += domains[i].bytes;
  }
  return bytes;
}

StatusOr<RankAddress> RankAddress::Decode(std::string_view bytes) {
  Reader reader(bytes);
  const uint64_t preamble = reader.Number();
  const Status malformed(StatusCode::kInvalidArgument,
                         "a rank's address is malformed (" +
                             std::to_string(bytes.size()) + " bytes)");
  if (!reader.ok() || static_cast<uint32_t>(preamble) != kMagic) {
    return malformed;
  }
  if (preamble >> 32 != kVersion) {
    return Status(StatusCode::kFailedPrecondition,
                  "a rank speaks version " + std::to_string(preamble >> 32) +
                      " of the fabric's protocol and this one version " +
                      std::to_string(kVersion) +
                      "; install the same jaxfabric everywhere");
  }
  RankAddress address;
  address.generation = static_cast<uint32_t>(reader.Number());
  address.heap.base = reader.Number();
  address.heap.length = reader.Number();
  const uint64_t domain_count = reader.Number();
  if (!reader.ok() || domain_count < 1 ||
      domain_count > DomainGroup::kDomainsMax) {
    return malformed;
  }
  for (uint64_t i = 0; i < domain_count; ++i) {
    address.heap.keys.push_back(reader.Number());
    const uint64_t length = reader.Number();
    if (length > kAddressBytesMax) return malformed;
    address.domains.push_back({std::string(reader.Bytes(length))});
  }
  if (!reader.done()) return malformed;
  return address;
}

}  // namespace jaxfabric
