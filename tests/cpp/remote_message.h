// What the two ends of a RemoteTransport say to each other, and the memory that
// both have. They are one program on hosts of one kind: values go as they are.

#ifndef JAXFABRIC_TESTS_CPP_REMOTE_MESSAGE_H_
#define JAXFABRIC_TESTS_CPP_REMOTE_MESSAGE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/status.h"
#include "base/unique_fd.h"

namespace jaxfabric {

enum class RemoteCall : uint32_t {
  kOpenTransport,
  kOpenDomain,
  kCloseDomain,
  kRegister,
  kUnregister,
  kAddPeer,
  kRemovePeer,
  kWrite,
  kWritePieces,
  kSend,
  kPoll,
  kMirror,
};

// Values one after the other; taken out in the order in which they were put.
class RemoteMessage {
 public:
  RemoteMessage() = default;
  explicit RemoteMessage(std::string bytes) : bytes_(std::move(bytes)) {}

  const std::string& bytes() const { return bytes_; }

  template <typename T>
  void Put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  void PutText(std::string_view text) {
    Put(uint64_t{text.size()});
    bytes_.append(text);
  }
  void PutStatus(const Status& status) {
    Put(status.code());
    PutText(status.message());
  }

  template <typename T>
  T Take() {
    T value = {};
    std::memcpy(&value, Next(sizeof(value)).data(), sizeof(value));
    return value;
  }
  std::string_view TakeText() { return Next(Take<uint64_t>()); }
  Status TakeStatus() {
    const auto code = Take<StatusCode>();
    const std::string text(TakeText());
    return code == StatusCode::kOk ? OkStatus() : Status(code, text);
  }

 private:
  std::string_view Next(uint64_t size) {
    JF_CHECK(size <= bytes_.size() - at_);
    at_ += size;
    return {bytes_.data() + at_ - size, size};
  }

  std::string bytes_;
  size_t at_ = 0;
};

// A connection, or a socket that takes some; by IPv4 address.
StatusOr<UniqueFd> ConnectRemote(const std::string& address, uint16_t port);
StatusOr<UniqueFd> ListenRemote(const std::string& address, uint16_t port);

// Both wait at most for a minute, and fail for good if the other end is gone.
// A server waits for the next question as long as its connection lasts.
Status SendRemote(int socket, const RemoteMessage& message);
StatusOr<RemoteMessage> ReceiveRemote(int socket, bool for_ever = false);

// Memory whose equal is at the other end, and what both were when last
// compared.
class TwinMemory {
 public:
  TwinMemory(std::byte* data, uint64_t size)
      : data_(data), size_(size), agreed_(size) {}

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  bool Holds(const std::byte* at) const {
    return at >= data_ && at <= data_ + size_;
  }

  // Puts the pages that this end has changed; returns whether there are any.
  bool PutChanges(RemoteMessage& message) {
    bool any = false;
    for (uint64_t at = 0; at < size_; at += kPageBytes) {
      const uint64_t size = std::min(kPageBytes, size_ - at);
      if (std::memcmp(data_ + at, agreed_.data() + at, size) == 0) continue;
      std::memcpy(agreed_.data() + at, data_ + at, size);
      any = true;
      message.Put(at);
      message.PutText({reinterpret_cast<const char*>(&agreed_[at]), size});
    }
    message.Put(kNoMore);
    return any;
  }

  // Makes the other end's changes here, byte by byte: its neighbours may have
  // been changed at this end meanwhile.
  void TakeChanges(RemoteMessage& message) {
    for (;;) {
      const auto at = message.Take<uint64_t>();
      if (at == kNoMore) return;
      const std::string_view page = message.TakeText();
      JF_CHECK(at <= size_ && page.size() <= size_ - at);
      for (size_t i = 0; i < page.size(); ++i) {
        const auto byte = static_cast<std::byte>(page[i]);
        if (byte == agreed_[at + i]) continue;
        data_[at + i] = agreed_[at + i] = byte;
      }
    }
  }

 private:
  static constexpr uint64_t kPageBytes = 4096;
  static constexpr uint64_t kNoMore = ~uint64_t{0};

  std::byte* const data_;
  const uint64_t size_;
  std::vector<std::byte> agreed_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_REMOTE_MESSAGE_H_
