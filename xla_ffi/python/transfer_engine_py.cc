#include "python/transfer_engine_py.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/callback_queue.h"
#include "engine/transfer_engine.h"
#include "python/callback.h"
#include "python/open_transport.h"
#include "python/status_error.h"
#include "python/trace_py.h"
#include "python/transfer_stats_py.h"

namespace nb = nanobind;

namespace jaxfabric {
namespace {

using Indices =
    nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
using MaybeId = std::optional<uint32_t>;
using MaybeSeconds = std::optional<double>;

std::string ToString(const nb::bytes& bytes) {
  return std::string(bytes.c_str(), bytes.size());
}

nb::bytes ToBytes(const std::string& text) {
  return nb::bytes(text.data(), text.size());
}

TransferEngine::MaybeDeadline ToDeadline(MaybeSeconds timeout_s) {
  if (!timeout_s) return std::nullopt;
  return Deadline::AfterSeconds(*timeout_s);
}

// What Python sees of a TransferFuture.
class NativeFuture {
 public:
  NativeFuture(TransferFuturePtr future, std::weak_ptr<TransferEngine> engine)
      : future_(std::move(future)), engine_(std::move(engine)) {}

  const TransferFuture& future() const { return *future_; }
  std::string label() const { return future_->label(); }
  bool done() const { return future_->done(); }

  // The code of its Status, or kGoesOn.
  int Wait(double timeout_s) const {
    // Most have ended by the time that somebody waits for them.
    const Status* const outcome = future_->outcome();
    if (outcome != nullptr) return static_cast<int>(outcome->code());
    nb::gil_scoped_release release;
    const Deadline deadline = Deadline::AfterSeconds(timeout_s);
    if (const auto engine = engine_.lock()) engine->Help(*future_, deadline);
    const auto status = future_->Wait(deadline);
    return status ? static_cast<int>(status->code()) : kGoesOn;
  }
  std::string failure() const {
    const Status* const outcome = future_->outcome();
    return outcome == nullptr ? "" : outcome->message();
  }
  std::optional<uint32_t> peer() const {
    const uint32_t peer = future_->peer();
    return peer == kUnknownPeer ? std::nullopt : std::optional(peer);
  }
  void OnDone(nb::callable function) {
    future_->OnDone([callback = Callback(std::move(function))](const Status&) {
      callback([] { return nb::make_tuple(); });
    });
  }

 private:
  static constexpr int kGoesOn = -1;

  TransferFuturePtr future_;
  std::weak_ptr<TransferEngine> engine_;
};

PageList Pages(const Indices& indices, uint64_t stride, uint64_t offset) {
  return {
      std::vector<uint64_t>(indices.data(), indices.data() + indices.size()),
      stride, offset};
}

// So long, Close waits for threads that are inside a call.
constexpr std::chrono::seconds kCloseMax{10};
// And for callbacks of operations that it has ended.
constexpr double kCallbacksMaxS = 1;

class NativeTransferEngine {
 public:
  NativeTransferEngine(const std::string& transport, const nb::bytes& secret,
                       const std::map<std::string, double>& chaos,
                       const std::string& job, const nb::bytes& token,
                       const std::string& name, uint32_t nics, double timeout_s,
                       double spin_s, double heartbeat_s, double peer_timeout_s,
                       const std::string& libfabric,
                       const std::vector<std::string>& interfaces) {
    TransferEngineOptions options;
    options.job = job;
    options.token = ToString(token);
    options.name = name;
    options.nics = nics;
    options.timeout_s = timeout_s;
    options.spin_ns = static_cast<int64_t>(spin_s * 1e9);
    options.heartbeat_s = heartbeat_s;
    options.peer_timeout_s = peer_timeout_s;
    const std::string secret_bytes = ToString(secret);
    nb::gil_scoped_release release;
    options.worker_cores = CoresNear(interfaces);
    auto engine = Value(TransferEngine::Open(
        std::move(options),
        Value(OpenTransport(transport, secret_bytes, chaos, "transfer",
                            libfabric, interfaces))));
    const auto gone = std::make_shared<std::promise<void>>();
    gone_ = gone->get_future().share();
    engine_ = std::shared_ptr<TransferEngine>(engine.release(),
                                              [gone](TransferEngine* last) {
                                                delete last;
                                                gone->set_value();
                                              });
  }
  ~NativeTransferEngine() { Close(); }

  // Threads that are inside a call are sent home and waited for: the last of
  // them closes the engine.
  void Close() {
    nb::gil_scoped_release release;
    std::shared_ptr<TransferEngine> engine;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      engine.swap(engine_);
    }
    if (engine == nullptr) return;
    engine->BeginClose();
    engine.reset();
    gone_.wait_for(kCloseMax);
    // One that wants the GIL when the interpreter ends would abort the process.
    CallbackQueue::Get().Drain(Deadline::AfterSeconds(kCallbacksMaxS));
  }

  nb::bytes Address() const {
    std::string address;
    {
      nb::gil_scoped_release release;
      address = engine()->address();
    }
    return ToBytes(address);
  }
  std::string TransportName() const {
    nb::gil_scoped_release release;
    return engine()->caps().transport;
  }

  NativeFuture Connect(const nb::bytes& address, MaybeSeconds timeout_s) {
    const std::string bytes = ToString(address);
    nb::gil_scoped_release release;
    return Submitted(engine()->Connect(bytes, ToDeadline(timeout_s)));
  }
  void Disconnect(uint32_t peer) {
    nb::gil_scoped_release release;
    Check(engine()->Disconnect(peer));
  }
  NativeFuture SubmitFence(MaybeSeconds timeout_s) {
    nb::gil_scoped_release release;
    return Submitted(engine()->SubmitFence(ToDeadline(timeout_s)));
  }
  uint32_t AddPeerGroup(const std::vector<uint32_t>& peers) {
    nb::gil_scoped_release release;
    return Value(engine()->AddPeerGroup(peers));
  }
  void RemovePeerGroup(uint32_t group) {
    nb::gil_scoped_release release;
    Check(engine()->RemovePeerGroup(group));
  }

  // Keeps `buffer`, whose memory it is, until no NIC can touch it.
  RegionId RegisterMemory(uint64_t address, uint64_t length,
                          nb::object buffer) {
    const std::shared_ptr<const void> owner(
        new nb::object(std::move(buffer)), [](const void* gone) {
          nb::gil_scoped_acquire acquire;
          delete static_cast<const nb::object*>(gone);
        });
    nb::gil_scoped_release release;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): Python has it as a number.
    auto* const base = reinterpret_cast<std::byte*>(address);
    return Value(engine()->RegisterMemory(base, length, owner));
  }
  // The region, and all of it as an array that keeps the memory.
  std::pair<RegionId, Bytes> AllocateMemory(uint64_t length) {
    RegionId region = 0;
    std::shared_ptr<SharedMemory> memory;
    {
      nb::gil_scoped_release release;
      const auto engine = this->engine();
      region = Value(engine->AllocateMemory(length));
      memory = engine->Memory(region);
    }
    auto* const owner = new std::shared_ptr<SharedMemory>(std::move(memory));
    const nb::capsule keeps(owner, [](void* gone) noexcept {
      delete static_cast<std::shared_ptr<SharedMemory>*>(gone);
    });
    return {region, Bytes((*owner)->data(), {length}, keeps)};
  }
  NativeFuture UnregisterMemory(RegionId region, MaybeSeconds timeout_s) {
    nb::gil_scoped_release release;
    return Submitted(engine()->UnregisterMemory(region, ToDeadline(timeout_s)));
  }
  RegionAddress Describe(RegionId region) {
    nb::gil_scoped_release release;
    return Value(engine()->Describe(region));
  }

  NativeFuture SubmitSend(uint32_t peer, const nb::bytes& message,
                          MaybeSeconds timeout_s) {
    std::string bytes = ToString(message);
    nb::gil_scoped_release release;
    return Submitted(engine()->SubmitSend(peer, bytes, ToDeadline(timeout_s)));
  }
  // The function gets (peer, bytes, how many messages were lost here).
  void SubmitRecvs(std::optional<nb::callable> function) {
    MessageInbox::Callback receive;
    if (function) {
      receive = [callback = Callback(*function)](TransferMessage message) {
        callback([&] {
          return nb::make_tuple(message.peer, ToBytes(message.text),
                                message.dropped);
        });
      };
    }
    function.reset();
    nb::gil_scoped_release release;
    engine()->SubmitRecvs(std::move(receive));
  }
  // Calls once when Receive has something to give, or to raise.
  void OnMessage(nb::callable function) {
    std::function<void()> ready = [callback = Callback(std::move(function))] {
      callback([] { return nb::make_tuple(); });
    };
    nb::gil_scoped_release release;
    engine()->inbox().OnReady(std::move(ready));
  }
  // (peer, bytes, how many messages were lost here).
  std::optional<std::tuple<uint32_t, nb::bytes, uint64_t>> Receive(
      double timeout_s) {
    std::optional<TransferMessage> message;
    {
      nb::gil_scoped_release release;
      const auto engine = this->engine();
      message = engine->inbox().Take(Deadline::AfterSeconds(timeout_s));
      if (!message && engine->inbox().closed()) throw Closed();
    }
    if (!message) return std::nullopt;
    return std::tuple(message->peer, ToBytes(message->text), message->dropped);
  }

  NativeFuture SubmitSingleWrite(RegionId source, uint64_t source_offset,
                                 const RegionAddress& target,
                                 uint64_t target_offset, uint64_t length,
                                 MaybeId id, MaybeSeconds timeout_s) {
    nb::gil_scoped_release release;
    const auto engine = this->engine();
    auto future = Value(engine->SubmitSingleWrite(source, source_offset, target,
                                                  target_offset, length, id,
                                                  ToDeadline(timeout_s)));
    return NativeFuture(std::move(future), engine);
  }
  NativeFuture SubmitPagedWrites(RegionId source, const Indices& source_pages,
                                 uint64_t source_stride, uint64_t source_offset,
                                 const RegionAddress& target,
                                 const Indices& target_pages,
                                 uint64_t target_stride, uint64_t target_offset,
                                 uint64_t page_bytes, MaybeId id,
                                 MaybeSeconds timeout_s) {
    nb::gil_scoped_release release;
    return Submitted(engine()->SubmitPagedWrites(
        source, Pages(source_pages, source_stride, source_offset), target,
        Pages(target_pages, target_stride, target_offset), page_bytes, id,
        ToDeadline(timeout_s)));
  }
  using Target = std::tuple<RegionAddress, uint64_t, uint64_t, uint64_t>;
  NativeFuture SubmitScatter(RegionId source,
                             const std::vector<Target>& targets, MaybeId id,
                             MaybeSeconds timeout_s) {
    nb::gil_scoped_release release;
    std::vector<ScatterTarget> list;
    for (const auto& [region, from, to, length] : targets) {
      list.push_back({region, from, to, length});
    }
    return Submitted(
        engine()->SubmitScatter(source, list, id, ToDeadline(timeout_s)));
  }
  NativeFuture SubmitBarrier(uint32_t group, uint32_t id,
                             MaybeSeconds timeout_s) {
    nb::gil_scoped_release release;
    return Submitted(engine()->SubmitBarrier(group, id, ToDeadline(timeout_s)));
  }
  NativeFuture ExpectImmCount(uint32_t id, uint64_t transfers,
                              const std::vector<uint32_t>& peers,
                              MaybeSeconds timeout_s) {
    nb::gil_scoped_release release;
    return Submitted(
        engine()->ExpectImmCount(id, transfers, peers, ToDeadline(timeout_s)));
  }
  uint64_t ImmCount(uint32_t id) const {
    nb::gil_scoped_release release;
    return engine()->ImmCount(id);
  }

  std::shared_ptr<Watcher> AllocWatcher(nb::callable function) {
    Watcher::Callback watch = [callback = Callback(std::move(function))](
                                  uint64_t before, uint64_t after) {
      callback([&] { return nb::make_tuple(before, after); });
    };
    nb::gil_scoped_release release;
    return Value(engine()->AllocWatcher(std::move(watch)));
  }
  void FreeWatcher(const std::shared_ptr<Watcher>& watcher) {
    nb::gil_scoped_release release;
    engine()->FreeWatcher(watcher);
  }

  bool Cancel(const NativeFuture& future) {
    nb::gil_scoped_release release;
    return engine()->Cancel(future.future());
  }
  void Drain(double timeout_s) {
    nb::gil_scoped_release release;
    Check(engine()->Drain(Deadline::AfterSeconds(timeout_s)));
  }
  void StartTrace(size_t events_max) const {
    nb::gil_scoped_release release;
    engine()->trace().Start(events_max);
  }
  TraceRecording StopTrace() const {
    nb::gil_scoped_release release;
    return engine()->trace().Stop();
  }
  TransferEngineStats Stats() const {
    nb::gil_scoped_release release;
    return engine()->stats();
  }

 private:
  static StatusError Closed() {
    return StatusError(Status(StatusCode::kFailedPrecondition,
                              "the TransferEngine is closed"));
  }
  NativeFuture Submitted(TransferEngine::Submitted submitted) const {
    return NativeFuture(Value(std::move(submitted)), engine());
  }
  // To be called with the GIL released: the last one to let go closes it.
  std::shared_ptr<TransferEngine> engine() const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (engine_ == nullptr) throw Closed();
    return engine_;
  }

  mutable std::mutex mutex_;
  std::shared_ptr<TransferEngine> engine_;  // guarded by mutex_
  std::shared_future<void> gone_;           // ready once it is
};

void RegisterValues(nb::module_& m) {
  nb::class_<NativeFuture>(m, "NativeTransferFuture")
      .def_prop_ro("label", &NativeFuture::label)
      .def_prop_ro("peer", &NativeFuture::peer)
      .def("done", &NativeFuture::done)
      .def("wait", &NativeFuture::Wait)
      .def_prop_ro("failure", &NativeFuture::failure)
      .def("on_done", &NativeFuture::OnDone);
  nb::class_<RegionAddress>(m, "NativeMrDesc")
      .def_static("from_bytes",
                  [](const nb::bytes& bytes) {
                    return Value(RegionAddress::Decode(ToString(bytes)));
                  })
      .def("to_bytes",
           [](const RegionAddress& self) { return ToBytes(self.Encode()); })
      .def_prop_ro("nbytes",
                   [](const RegionAddress& self) { return self.memory.length; })
      .def_prop_ro("owner", [](const RegionAddress& self) {
        return self.owner.Short();
      });
  nb::class_<Watcher>(m, "NativeWatcher")
      .def_prop_ro("id", &Watcher::id)
      .def_prop_ro("value", &Watcher::value)
      .def("bump", &Watcher::Bump, nb::call_guard<nb::gil_scoped_release>());
  // (id, job, name) of an engine's address.
  m.def("parse_engine_address", [](const nb::bytes& bytes) {
    const EngineAddress address = Value(EngineAddress::Decode(ToString(bytes)));
    return std::tuple(address.id.Short(), address.job, address.name);
  });
}

}  // namespace

void RegisterTransferEngine(nb::module_& m) {
  RegisterValues(m);
  using Engine = NativeTransferEngine;
  nb::class_<Engine>(m, "NativeTransferEngine")
      .def(nb::init<const std::string&, const nb::bytes&,
                    const std::map<std::string, double>&, const std::string&,
                    const nb::bytes&, const std::string&, uint32_t, double,
                    double, double, double, const std::string&,
                    const std::vector<std::string>&>(),
           nb::arg("transport"), nb::arg("secret"), nb::arg("chaos"),
           nb::arg("job"), nb::arg("token"), nb::arg("name"), nb::arg("nics"),
           nb::arg("timeout_s"), nb::arg("spin_s"), nb::arg("heartbeat_s"),
           nb::arg("peer_timeout_s"), nb::arg("libfabric"),
           nb::arg("interfaces"))
      .def("address", &Engine::Address)
      .def("transport", &Engine::TransportName)
      .def("connect", &Engine::Connect)
      .def("disconnect", &Engine::Disconnect)
      .def("submit_fence", &Engine::SubmitFence)
      .def("add_peer_group", &Engine::AddPeerGroup)
      .def("remove_peer_group", &Engine::RemovePeerGroup)
      .def("register_memory", &Engine::RegisterMemory)
      .def("allocate_memory", &Engine::AllocateMemory)
      .def("unregister_memory", &Engine::UnregisterMemory)
      .def("describe", &Engine::Describe)
      .def("submit_send", &Engine::SubmitSend)
      .def("submit_recvs", &Engine::SubmitRecvs, nb::arg("callback").none())
      .def("receive", &Engine::Receive)
      .def("on_message", &Engine::OnMessage)
      .def("submit_single_write", &Engine::SubmitSingleWrite)
      .def("submit_paged_writes", &Engine::SubmitPagedWrites)
      .def("submit_scatter", &Engine::SubmitScatter)
      .def("submit_barrier", &Engine::SubmitBarrier)
      .def("expect_imm_count", &Engine::ExpectImmCount)
      .def("imm_count", &Engine::ImmCount)
      .def("alloc_watcher", &Engine::AllocWatcher)
      .def("free_watcher", &Engine::FreeWatcher)
      .def("cancel", &Engine::Cancel)
      .def("drain", &Engine::Drain)
      .def("start_trace", &Engine::StartTrace)
      .def("stop_trace",
           [](const Engine& self) { return ToPython(self.StopTrace()); })
      .def("stats", [](const Engine& self) { return ToPython(self.Stats()); })
      .def("close", &Engine::Close);
}

}  // namespace jaxfabric
