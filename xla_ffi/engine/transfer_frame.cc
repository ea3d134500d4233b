#include "engine/transfer_frame.h"

#include "engine/byte_stream.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kMagic = 0x4654464a;  // "JFTF"

}  // namespace

std::string TransferFrame::Encode() const {
  ByteWriter writer;
  writer.Number(kMagic);
  writer.Number(kVersion);
  writer.Number(static_cast<uint16_t>(type));
  writer.Number(a);
  writer.Number(b);
  writer.Bytes(body);
  return writer.Take();
}

StatusOr<TransferFrame> TransferFrame::Decode(std::string_view bytes) {
  ByteReader reader(bytes);
  const uint32_t magic = reader.Number<uint32_t>();
  const uint16_t version = reader.Number<uint16_t>();
  const uint16_t type = reader.Number<uint16_t>();
  if (reader.ok() && magic == kMagic && version != kVersion) {
    return Status(StatusCode::kFailedPrecondition,
                  "the sender speaks version " + std::to_string(version) +
                      " of the engine's protocol, this engine version " +
                      std::to_string(kVersion));
  }
  TransferFrame frame;
  frame.a = reader.Number<uint64_t>();
  frame.b = reader.Number<uint64_t>();
  if (!reader.ok() || magic != kMagic ||
      type < static_cast<uint16_t>(Type::kHello) ||
      type > static_cast<uint16_t>(Type::kWithdrawn)) {
    return Status(
        StatusCode::kInvalidArgument,
        "a malformed message of " + std::to_string(bytes.size()) + " bytes");
  }
  frame.type = static_cast<Type>(type);
  frame.body = bytes.substr(kHeaderBytes);
  return frame;
}

}  // namespace jaxfabric
