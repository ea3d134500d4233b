// One end of a TransferEngine under test, driven by lines on standard input.
//
//   link_peer PROVIDER NIC[,NIC...] BYTES LIBRARY
//
// Opens an engine over ofi/PROVIDER, or over verbs if that is PROVIDER, with
// a source and a target of BYTES each. Prints its address and the target's,
// then answers each line with one line of JSON:
//
//   connect ADDRESS TARGET TIMEOUT_S  to the other end, as it printed them
//   fill SEED                         the source, by a pattern
//   write ID COUNT TIMEOUT_S          COUNT times into the other end's target
//   expect ID COUNT TIMEOUT_S         so many transfers of the other end
//   count ID                          transfers that came and were not expected
//   send COUNT TIMEOUT_S              numbered messages to the other end
//   receive COUNT TIMEOUT_S           so many of the other end, in their order
//   unregister TIMEOUT_S              the source; nothing may use it afterwards
//   withdraw TIMEOUT_S                the same for the target
//   disconnect                        from the other end
//   store SEED                        the pattern in the target
//   check SEED                        that the target holds the pattern
//   stats                             bytes written by each NIC
//
// tests/network/link_pair.py starts two of them and joins them by pipes, so
// that they need no network but the one under test.

#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "engine/transfer_engine.h"
#include "transport/ofi.h"
#include "transport/verbs.h"

namespace jaxfabric {
namespace {

std::string ToHex(std::string_view bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const char byte : bytes) {
    hex += kDigits[static_cast<uint8_t>(byte) >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

std::string FromHex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

std::string Quoted(std::string_view text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') json += '\\';
    json += c == '\n' ? ' ' : c;
  }
  return json + "\"";
}

// What stands at byte 8 * i of a region that was filled with `seed`.
uint64_t PatternWord(uint64_t seed, uint64_t i) {
  return (i + seed * 0x9e37'79b9'7f4a'7c15) * 0xd6e8'feb8'6659'fd93;
}

class LinkPeer {
 public:
  LinkPeer(std::unique_ptr<TransferEngine> engine, uint64_t bytes)
      : engine_(std::move(engine)),
        source_(*engine_->AllocateMemory(bytes)),
        source_memory_(engine_->Memory(source_)),
        own_target_(*engine_->AllocateMemory(bytes)),
        own_target_memory_(engine_->Memory(own_target_)) {}

  std::string Introduction() {
    return "{\"address\": " + Quoted(ToHex(engine_->address())) +
           ", \"region\": " +
           Quoted(ToHex(engine_->Describe(own_target_)->Encode())) + "}";
  }

  // Returns the outcome; `extra` is added to the answer's JSON object.
  Status Obey(const std::string& line, std::string* extra) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    if (command == "connect") return Connect(words);
    if (command == "write") return Write(words, extra);
    if (command == "expect") return Expect(words);
    if (command == "stats") return Stats(extra);
    if (command == "send") return Send(words);
    if (command == "receive") return Receive(words);
    if (command == "unregister") return Unregister(source_, words);
    if (command == "withdraw") return Unregister(own_target_, words);
    if (command == "disconnect") return engine_->Disconnect(peer_);
    uint64_t seed = 0;  // or an id
    words >> seed;
    if (command == "fill") return Fill(*source_memory_, seed);
    if (command == "store") return Fill(*own_target_memory_, seed);
    if (command == "check") return Check(seed);
    if (command == "count") {
      *extra = ", \"count\": " + std::to_string(engine_->ImmCount(seed));
      return OkStatus();
    }
    return Status(StatusCode::kInvalidArgument, "no command \"" + line + "\"");
  }

 private:
  Status WaitFor(const TransferEngine::Submitted& submitted,
                 Deadline deadline) {
    JF_RETURN_IF_ERROR(submitted.status());
    // The engine ends its operations by their deadline; a little more shows one
    // that does not.
    constexpr int64_t kGraceNs = 5'000'000'000;
    const auto outcome = (*submitted)
                             ->Wait(Deadline::AfterNanoseconds(
                                 deadline.RemainingNanoseconds() + kGraceNs));
    if (!outcome.has_value()) {
      return Status(StatusCode::kInternal,
                    (*submitted)->label() + " outlived its deadline");
    }
    return *outcome;
  }

  Status Connect(std::istringstream& words) {
    std::string address, region;
    double timeout_s = 0;
    words >> address >> region >> timeout_s;
    const Deadline deadline = Deadline::AfterSeconds(timeout_s);
    JF_ASSIGN_OR_RETURN(target_, RegionAddress::Decode(FromHex(region)));
    const auto connect = engine_->Connect(FromHex(address), deadline);
    JF_RETURN_IF_ERROR(WaitFor(connect, deadline));
    peer_ = (*connect)->peer();
    return OkStatus();
  }

  Status Send(std::istringstream& words) {
    int count = 0;
    double timeout_s = 0;
    words >> count >> timeout_s;
    const Deadline deadline = Deadline::AfterSeconds(timeout_s);
    std::vector<TransferEngine::Submitted> sends;
    for (int i = 0; i < count; ++i) {
      const std::string text = std::to_string(sent_++);
      sends.push_back(engine_->SubmitSend(peer_, text, deadline));
    }
    for (const auto& send : sends) JF_RETURN_IF_ERROR(WaitFor(send, deadline));
    return OkStatus();
  }

  Status Receive(std::istringstream& words) {
    int count = 0;
    double timeout_s = 0;
    words >> count >> timeout_s;
    const Deadline deadline = Deadline::AfterSeconds(timeout_s);
    for (int i = 0; i < count; ++i) {
      const auto message = engine_->inbox().Take(deadline);
      const std::string expected = std::to_string(received_);
      if (!message.has_value()) {
        return Status(StatusCode::kDeadlineExceeded,
                      "message " + expected + " has not come");
      }
      if (message->text != expected) {
        return Status(StatusCode::kDataLoss,
                      "message " + message->text + " instead of " + expected);
      }
      ++received_;
    }
    return OkStatus();
  }

  Status Unregister(RegionId region, std::istringstream& words) {
    double timeout_s = 0;
    words >> timeout_s;
    const Deadline deadline = Deadline::AfterSeconds(timeout_s);
    return WaitFor(engine_->UnregisterMemory(region, deadline), deadline);
  }

  Status Write(std::istringstream& words, std::string* extra) {
    uint32_t id = 0;
    int count = 0;
    double timeout_s = 0;
    words >> id >> count >> timeout_s;
    const Deadline deadline = Deadline::AfterSeconds(timeout_s);
    std::vector<TransferEngine::Submitted> writes;
    for (int i = 0; i < count; ++i) {
      writes.push_back(engine_->SubmitSingleWrite(
          source_, 0, target_, 0, source_memory_->size(), id, deadline));
    }
    Status first;
    int written = 0;
    for (const auto& write : writes) {
      const Status status = WaitFor(write, deadline);
      if (status.ok()) ++written;
      if (first.ok()) first = status;
    }
    *extra = ", \"written\": " + std::to_string(written);
    return first;
  }

  Status Expect(std::istringstream& words) {
    uint32_t id = 0;
    uint64_t count = 0;
    double timeout_s = 0;
    words >> id >> count >> timeout_s;
    const Deadline deadline = Deadline::AfterSeconds(timeout_s);
    return WaitFor(engine_->ExpectImmCount(id, count, {}, deadline), deadline);
  }

  static Status Fill(SharedMemory& memory, uint64_t seed) {
    for (uint64_t i = 0; i < memory.size() / 8; ++i) {
      const uint64_t word = PatternWord(seed, i);
      std::memcpy(memory.data() + 8 * i, &word, sizeof(word));
    }
    return OkStatus();
  }

  Status Check(uint64_t seed) {
    for (uint64_t i = 0; i < own_target_memory_->size() / 8; ++i) {
      const uint64_t word = PatternWord(seed, i);
      if (std::memcmp(own_target_memory_->data() + 8 * i, &word,
                      sizeof(word)) == 0) {
        continue;
      }
      return Status(StatusCode::kDataLoss,
                    "wrong bytes at offset " + std::to_string(8 * i));
    }
    return OkStatus();
  }

  Status Stats(std::string* extra) {
    *extra = ", \"nic_bytes\": [";
    for (const DomainStats& nic : engine_->stats().nics) {
      if (extra->back() != '[') *extra += ", ";
      *extra += std::to_string(nic.write_bytes);
    }
    *extra += "]";
    return OkStatus();
  }

  std::unique_ptr<TransferEngine> engine_;
  RegionId source_;
  std::shared_ptr<SharedMemory> source_memory_;
  RegionId own_target_;
  std::shared_ptr<SharedMemory> own_target_memory_;
  RegionAddress target_;
  uint32_t peer_ = kUnknownPeer;
  uint64_t sent_ = 0;      // messages
  uint64_t received_ = 0;  // messages
};

StatusOr<std::unique_ptr<Transport>> OpenTransport(
    const std::string& provider, const std::vector<std::string>& nics,
    const std::string& library) {
  if (provider == "verbs") {
    return OpenVerbsTransport(
        {.library = library, .nics = nics, .job_secret = "link_peer"});
  }
  return OpenOfiTransport({.provider = provider,
                           .library = library,
                           .nics = nics,
                           .job_secret = "link_peer"});
}

StatusOr<std::unique_ptr<TransferEngine>> OpenEngine(char** argv) {
  std::vector<std::string> nics;
  std::istringstream text(argv[2]);
  for (std::string nic; std::getline(text, nic, ',');) nics.push_back(nic);
  TransferEngineOptions options;
  options.job = options.token = options.name = "link_peer";
  options.nics = nics.size();
  JF_ASSIGN_OR_RETURN(auto transport, OpenTransport(argv[1], nics, argv[4]));
  return TransferEngine::Open(options, std::move(transport));
}

int Main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "link_peer PROVIDER NIC[,NIC...] BYTES LIBRARY\n");
    return 2;
  }
  auto engine = OpenEngine(argv);
  if (!engine.ok()) {
    std::fprintf(stderr, "%s\n", engine.status().message().c_str());
    return 1;
  }
  LinkPeer peer(*std::move(engine), std::strtoull(argv[3], nullptr, 10));
  std::printf("%s\n", peer.Introduction().c_str());
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    const int64_t begin_ns = MonotonicNanoseconds();
    std::string extra;
    const Status status = peer.Obey(line, &extra);
    std::printf("{\"seconds\": %.6f, \"error\": %s%s}\n",
                (MonotonicNanoseconds() - begin_ns) * 1e-9,
                status.ok() ? "null" : Quoted(status.message()).c_str(),
                extra.c_str());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace jaxfabric

int main(int argc, char** argv) { return jaxfabric::Main(argc, argv); }
