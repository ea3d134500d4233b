// ByteWriter and ByteReader: how addresses and messages are put into bytes, and
// taken out of bytes that anybody may have written.
//
// Numbers travel as they lie in memory: all hosts are little-endian.

#ifndef JAXFABRIC_ENGINE_BYTE_STREAM_H_
#define JAXFABRIC_ENGINE_BYTE_STREAM_H_

#include <bit>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "base/status.h"

namespace jaxfabric {

static_assert(std::endian::native == std::endian::little);

class ByteWriter {
 public:
  template <typename T>
  void Number(T value) {
    static_assert(std::is_integral_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void Bytes(std::string_view bytes) { bytes_ += bytes; }
  // With its length before it.
  void Text(std::string_view text) {
    Number(static_cast<uint32_t>(text.size()));
    Bytes(text);
  }
  std::string Take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

// Once something is missing, all that follows is empty, and ok() is false: look
// at the end, before any of it is used.
class ByteReader {
 public:
  explicit ByteReader(std::string_view bytes) : bytes_(bytes) {}

  template <typename T>
  T Number() {
    static_assert(std::is_integral_v<T>);
    T value = 0;
    const std::string_view taken = Bytes(sizeof value);
    taken.copy(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  std::string_view Bytes(uint64_t count) {
    if (count > bytes_.size()) ok_ = false;
    if (!ok_) return {};
    const std::string_view taken = bytes_.substr(0, count);
    bytes_.remove_prefix(count);
    return taken;
  }
  std::string_view Text(uint64_t bytes_max) {
    const uint32_t count = Number<uint32_t>();
    if (count > bytes_max) ok_ = false;
    return Bytes(count);
  }
  bool ok() const { return ok_; }
  // All was there, and nothing is left.
  bool AtEnd() const { return ok_ && bytes_.empty(); }

 private:
  std::string_view bytes_;
  bool ok_ = true;
};

// What serialised things begin with. `what` begins the error of another
// version, as in "the address is".
inline Status ReadHeader(ByteReader& reader, uint32_t magic, uint32_t version,
                         const std::string& what, const Status& malformed) {
  const bool ours = reader.Number<uint32_t>() == magic;
  const uint32_t theirs = reader.Number<uint32_t>();
  if (!ours || !reader.ok()) return malformed;
  if (theirs == version) return OkStatus();
  return Status(StatusCode::kFailedPrecondition,
                what + " of version " + std::to_string(theirs) +
                    " of the engine's protocol, this engine speaks version " +
                    std::to_string(version) +
                    "; install the same jaxfabric on both sides");
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_BYTE_STREAM_H_
