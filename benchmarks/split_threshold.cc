// From what size on does it pay to cut a transfer for two NICs?
//
// Cutting saves half the time on the wire and costs one more write. So it pays
// above 2 * (cost of a write) * (rate of a NIC). Both are measured over
// libfabric TCP on loopback, both ends in one thread:
//   split_threshold [path of libfabric.so.1]

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/shared_memory.h"
#include "engine/domain_group.h"
#include "engine/transfer.h"
#include "transport/ofi.h"

namespace jaxfabric {
namespace {

constexpr uint64_t kBytes = uint64_t{1} << 22;
constexpr double kSeconds = 0.1;
constexpr int kRepeats = 10;  // the best counts: others use the machine too

struct End {
  std::unique_ptr<Transport> transport;
  std::unique_ptr<DomainGroup> group;
  SharedMemory memory;
  std::vector<uint64_t> keys;
};

End Open(const std::string& library) {
  End end;
  OfiOptions options;
  options.provider = "tcp";
  options.library = library;
  auto transport = OpenOfiTransport(std::move(options));
  if (!transport.ok()) {
    std::fprintf(stderr, "%s\n", transport.status().message().c_str());
    std::exit(1);
  }
  end.transport = *std::move(transport);
  std::vector<std::unique_ptr<Domain>> domains;
  domains.push_back(*end.transport->OpenDomain());
  end.group = std::make_unique<DomainGroup>(std::move(domains));
  end.memory = *SharedMemory::Create("split-threshold", kBytes);
  end.keys =
      *end.group->RegisterMemory({end.memory.data(), kBytes, end.memory.fd()});
  return end;
}

// Seconds that one write of `bytes` takes when sixteen are under way.
double SecondsPerWrite(End& from, End& to, uint64_t bytes) {
  const LocalRegion local = {from.memory.data(), kBytes, from.keys};
  const MrDesc remote = {reinterpret_cast<uintptr_t>(to.memory.data()), kBytes,
                         to.keys};
  uint64_t ended = 0;
  uint64_t open = 0;
  std::vector<DomainGroup::Event> events;
  const int64_t start_ns = MonotonicNanoseconds();
  const Deadline end = Deadline::AfterSeconds(kSeconds);
  while (!end.Expired()) {
    for (; open < 16; ++open) {
      const Piece piece = {0, 0, bytes};
      const auto submitted = from.group->SubmitWrite(
          1, local, remote, {&piece, 1}, 1, [&](const Status& status) {
            JF_CHECK(status.ok());
            --open;
            ++ended;
          });
      JF_CHECK(submitted.ok());
    }
    from.group->Poll(&events);
    to.group->Poll(&events);
    events.clear();
  }
  const double took_s =
      static_cast<double>(MonotonicNanoseconds() - start_ns) * 1e-9;
  return took_s / static_cast<double>(ended);
}

int Main(const std::string& library) {
  End from = Open(library);
  End to = Open(library);
  const Deadline deadline = Deadline::AfterSeconds(10);
  JF_CHECK(from.group->AddPeer(1, to.group->addresses(), deadline).ok());
  JF_CHECK(to.group->AddPeer(0, from.group->addresses(), deadline).ok());
  std::printf("%10s %12s %10s\n", "bytes", "us a write", "GB/s");
  double write_s = 0;
  double rate = 0;
  for (uint64_t bytes = 8; bytes <= kChunkBytes; bytes *= 4) {
    double one_s = SecondsPerWrite(from, to, bytes);
    for (int i = 1; i < kRepeats; ++i) {
      one_s = std::min(one_s, SecondsPerWrite(from, to, bytes));
    }
    const double one_rate = static_cast<double>(bytes) / one_s;
    std::printf("%10" PRIu64 " %12.2f %10.3f\n", bytes, one_s * 1e6,
                one_rate * 1e-9);
    if (bytes == 8) write_s = one_s;
    rate = std::max(rate, one_rate);
  }
  std::printf("cutting pays above %.0f bytes here; kSplitBytes is %" PRIu64
              "\n",
              2 * write_s * rate, kSplitBytes);
  return 0;
}

}  // namespace
}  // namespace jaxfabric

int main(int argc, char** argv) {
  return jaxfabric::Main(argc > 1 ? argv[1] : "");
}
