#include "python/fabric_py.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "base/elastic_pool.h"
#include "base/registry.h"
#include "engine/engine.h"
#include "handlers/fabric.h"
#include "python/open_transport.h"
#include "python/status_error.h"
#include "python/trace_py.h"

namespace nb = nanobind;

namespace jaxfabric {
namespace {

class NativeFabric {
 public:
  NativeFabric(const std::string& name, std::vector<int64_t> mesh_shape,
               const std::vector<std::pair<int64_t, uint32_t>>& local,
               uint32_t generation, const std::string& transport,
               const nb::bytes& secret, double timeout_s,
               uint64_t mailbox_bytes, uint64_t window_bytes, double spin_s,
               const std::map<std::string, double>& chaos,
               const std::string& network, const std::string& libfabric,
               const std::vector<std::string>& nics)
      : fabric_(std::make_shared<Fabric>()) {
    EngineOptions options;
    options.name = name;
    options.ranks = 1;
    for (int64_t size : mesh_shape) {
      options.ranks *= static_cast<uint32_t>(size);
    }
    for (const auto& [device, rank] : local) {
      options.local_ranks.push_back(rank);
      fabric_->rank_by_device[device] = rank;
    }
    options.generation = generation;
    options.timeout_s = timeout_s;
    options.mailbox_bytes = mailbox_bytes;
    options.window_bytes = window_bytes;
    options.spin_ns = static_cast<int64_t>(spin_s * 1e9);
    fabric_->name = name;
    fabric_->mesh_shape = std::move(mesh_shape);
    const std::string secret_bytes(secret.c_str(), secret.size());
    nb::gil_scoped_release release;
    options.worker_cores = CoresNear(nics);
    fabric_->engine = Value(Engine::Open(
        std::move(options), Value(OpenTransport(transport, secret_bytes, chaos,
                                                network, libfabric, nics))));
  }

  ~NativeFabric() { Close(); }

  nb::bytes Address(uint32_t rank) const {
    const std::string bytes = Value(engine().LocalAddress(rank));
    return nb::bytes(bytes.data(), bytes.size());
  }

  void Connect(uint32_t rank, const nb::bytes& address, double timeout_s) {
    const std::string bytes(address.c_str(), address.size());
    nb::gil_scoped_release release;
    Check(engine().Connect(rank, bytes, Deadline::AfterSeconds(timeout_s)));
  }

  void Publish(int64_t key) {
    if (!Registry<Fabric>::Get().Add(key, fabric_)) {
      Check(Status(StatusCode::kAlreadyExists,
                   "a Fabric of this name is open over this mesh; close it, or "
                   "give one of them another name="));
    }
    key_ = key;
  }

  std::pair<size_t, uint64_t> AllocateWindow(uint64_t bytes) {
    const uint64_t offset = Value(engine().AllocateWindow(bytes));
    std::lock_guard<std::mutex> lock(fabric_->mutex);
    fabric_->windows.push_back({offset, bytes});
    return {fabric_->windows.size() - 1, offset};
  }

  // (code, text, lost ranks), or None.
  std::optional<std::tuple<int, std::string, std::vector<uint32_t>>> Failure()
      const {
    if (fabric_ == nullptr) return std::nullopt;
    const Status status = engine().failure();
    if (status.ok()) return std::nullopt;
    return std::tuple(static_cast<int>(status.code()), status.message(),
                      engine().lost_ranks());
  }

  void Drain(double timeout_s) {
    nb::gil_scoped_release release;
    Check(engine().Drain(Deadline::AfterSeconds(timeout_s)));
  }

  nb::dict Stats() const {
    nb::dict by_rank;
    for (uint32_t rank : engine().options().local_ranks) {
      nb::dict by_peer;
      const auto stats = fabric_->engine->endpoint(rank)->stats();
      for (const auto& [peer, of_peer] : stats) {
        nb::dict row;
        row["messages_sent"] = of_peer.messages_sent;
        row["message_bytes_sent"] = of_peer.message_bytes_sent;
        row["messages_received"] = of_peer.messages_received;
        row["message_bytes_received"] = of_peer.message_bytes_received;
        row["puts"] = of_peer.puts;
        row["put_bytes"] = of_peer.put_bytes;
        row["control_messages"] = of_peer.control_messages;
        row["stale_dropped"] = of_peer.stale_dropped;
        by_peer[nb::int_(peer)] = row;
      }
      by_rank[nb::int_(rank)] = by_peer;
    }
    return by_rank;
  }

  void StartTrace(size_t events_max) {
    for (const uint32_t rank : engine().options().local_ranks) {
      engine().endpoint(rank)->trace().Start(events_max);
    }
  }
  // By local rank.
  nb::dict StopTrace() {
    nb::dict by_rank;
    for (const uint32_t rank : engine().options().local_ranks) {
      by_rank[nb::int_(rank)] =
          ToPython(engine().endpoint(rank)->trace().Stop());
    }
    return by_rank;
  }

  size_t OperationsUnderWay() const { return engine().operations_under_way(); }

  // Ends the generation on all ranks.
  void Abort(const std::string& why) {
    nb::gil_scoped_release release;
    engine().Fail(Status(StatusCode::kAborted, why), /*tell_peers=*/true);
  }

  // What is under way fails with "closed". Returns once it let go of its
  // buffers, or after a bounded time.
  void Close() {
    if (fabric_ == nullptr) return;
    nb::gil_scoped_release release;
    if (key_) Registry<Fabric>::Get().Remove(*key_);
    (void)engine().Drain(Deadline::AfterSeconds(kCloseDrainS));
    engine().SayGoodbye();
    engine().Fail(Status(StatusCode::kFailedPrecondition,
                         "the Fabric '" + fabric_->name + "' was closed"),
                  /*tell_peers=*/false);
    fabric_.reset();
  }

 private:
  static constexpr double kCloseDrainS = 5;

  Engine& engine() const {
    if (fabric_ == nullptr) {
      throw StatusError(
          Status(StatusCode::kFailedPrecondition, "the Fabric is closed"));
    }
    return *fabric_->engine;
  }

  std::shared_ptr<Fabric> fabric_;
  std::optional<int64_t> key_;
};

}  // namespace

void RegisterFabric(nb::module_& m) {
  const nb::exception<StatusError> status_error(m, "StatusError");
  m.def("pool_threads", [] { return ElasticPool::Get().ThreadCount(); });
  m.def("transport_states", &TransportStates, nb::arg("libfabric"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("open_for_caps",
        [](const std::string& kind, const std::string& libfabric) {
          DomainCaps caps;
          {
            nb::gil_scoped_release release;
            caps = Value(OpenForCaps(kind, libfabric));
          }
          nb::dict row;
          row["write_bytes_max"] = caps.write_bytes_max;
          row["queue_depth"] = caps.queue_depth;
          row["emulated_writes"] = caps.emulated_writes;
          row["removal_fences"] = caps.removal_fences;
          return row;
        });
  m.def("share_nics", &ShareNics, nb::arg("transport"), nb::arg("libfabric"),
        nb::arg("cores"), nb::arg("gpus"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("nearest_nics", &NearestNics, nb::arg("transport"),
        nb::arg("libfabric"), nb::arg("cores"), nb::arg("gpus"),
        nb::call_guard<nb::gil_scoped_release>());
  nb::class_<NativeFabric>(m, "NativeFabric")
      .def(nb::init<const std::string&, std::vector<int64_t>,
                    const std::vector<std::pair<int64_t, uint32_t>>&, uint32_t,
                    const std::string&, const nb::bytes&, double, uint64_t,
                    uint64_t, double, const std::map<std::string, double>&,
                    const std::string&, const std::string&,
                    const std::vector<std::string>&>(),
           nb::arg("name"), nb::arg("mesh_shape"), nb::arg("local"),
           nb::arg("generation"), nb::arg("transport"), nb::arg("secret"),
           nb::arg("timeout_s"), nb::arg("mailbox_bytes"),
           nb::arg("window_bytes"), nb::arg("spin_s"), nb::arg("chaos"),
           nb::arg("network"), nb::arg("libfabric") = "",
           nb::arg("nics") = std::vector<std::string>())
      .def("address", &NativeFabric::Address)
      .def("connect", &NativeFabric::Connect)
      .def("publish", &NativeFabric::Publish)
      .def("allocate_window", &NativeFabric::AllocateWindow)
      .def("failure", &NativeFabric::Failure)
      .def("drain", &NativeFabric::Drain)
      .def("stats", &NativeFabric::Stats)
      .def("start_trace", &NativeFabric::StartTrace)
      .def("stop_trace", &NativeFabric::StopTrace)
      .def("operations_under_way", &NativeFabric::OperationsUnderWay)
      .def("abort", &NativeFabric::Abort)
      .def("close", &NativeFabric::Close);
}

}  // namespace jaxfabric
