#include "engine/handshake.h"

#include <optional>

#include "engine/byte_stream.h"
#include "engine/hmac.h"

namespace jaxfabric {
namespace {

constexpr size_t kSealBytes = sizeof(Sha256Digest);
constexpr size_t kAddressBytesMax = 16384;
// In front of what is sealed, so that one kind never passes for another.
constexpr std::string_view kHelloLabel = "jaxfabric hello 1";
constexpr std::string_view kWelcomeLabel = "jaxfabric welcome 1";

std::string Seal(std::string_view label, std::string_view body,
                 std::string_view token) {
  std::string sealed(label);
  sealed += body;
  return std::string(AsBytes(HmacSha256(token, sealed)));
}

// The body, or nothing if its seal is not of this token.
std::optional<std::string_view> Unseal(std::string_view label,
                                       std::string_view bytes,
                                       std::string_view token) {
  if (bytes.size() < kSealBytes) return std::nullopt;
  const std::string_view body = bytes.substr(0, bytes.size() - kSealBytes);
  if (!ConstantTimeEqual(bytes.substr(body.size()), Seal(label, body, token))) {
    return std::nullopt;
  }
  return body;
}

void Put(ByteWriter& writer, const RandomId& id) {
  for (const uint64_t word : id.words) writer.Number(word);
}

RandomId TakeId(ByteReader& reader) {
  RandomId id;
  for (uint64_t& word : id.words) word = reader.Number<uint64_t>();
  return id;
}

Status Unauthenticated(const char* what) {
  return Status(StatusCode::kUnauthenticated,
                std::string(what) +
                    " is truncated, altered, or sealed with another token");
}

}  // namespace

std::string Hello::Encode(std::string_view token) const {
  ByteWriter writer;
  Put(writer, target);
  Put(writer, nonce);
  writer.Text(sender.Encode(token));
  const std::string body = writer.Take();
  return body + Seal(kHelloLabel, body, token);
}

StatusOr<Hello> Hello::Verify(std::string_view bytes, std::string_view token,
                              const EngineAddress& receiver) {
  const auto body = Unseal(kHelloLabel, bytes, token);
  if (!body) return Unauthenticated("a hello");
  ByteReader reader(*body);
  Hello hello;
  hello.target = TakeId(reader);
  hello.nonce = TakeId(reader);
  const std::string_view sender = reader.Text(kAddressBytesMax);
  if (!reader.AtEnd()) {
    return Status(StatusCode::kInvalidArgument, "a malformed hello");
  }
  JF_ASSIGN_OR_RETURN(hello.sender, EngineAddress::Decode(sender));
  if (hello.sender.job != receiver.job) {
    return Status(StatusCode::kPermissionDenied,
                  "a hello from job '" + hello.sender.job +
                      "'; this engine is of job '" + receiver.job + "'");
  }
  if (hello.target != receiver.id || hello.sender.id == receiver.id) {
    return Status(StatusCode::kPermissionDenied,
                  "a hello for another engine, perhaps the one that ran here "
                  "before");
  }
  return hello;
}

std::string Welcome::Encode(std::string_view token) const {
  ByteWriter writer;
  for (const RandomId& id : {target, sender, echo, nonce}) Put(writer, id);
  const std::string body = writer.Take();
  return body + Seal(kWelcomeLabel, body, token);
}

StatusOr<Welcome> Welcome::Verify(std::string_view bytes,
                                  std::string_view token) {
  const auto body = Unseal(kWelcomeLabel, bytes, token);
  if (!body) return Unauthenticated("a welcome");
  ByteReader reader(*body);
  Welcome welcome;
  for (RandomId* id :
       {&welcome.target, &welcome.sender, &welcome.echo, &welcome.nonce}) {
    *id = TakeId(reader);
  }
  if (!reader.AtEnd()) {
    return Status(StatusCode::kInvalidArgument, "a malformed welcome");
  }
  return welcome;
}

}  // namespace jaxfabric
