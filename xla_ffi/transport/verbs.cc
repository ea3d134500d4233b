#include "transport/verbs.h"

#include <cmath>
#include <utility>

#include "transport/job_key.h"
#include "transport/verbs_library.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS
#include "transport/ofi_bell.h"
#include "transport/verbs_domain.h"
#include "transport/verbs_port.h"
#endif

namespace jaxfabric {

StatusOr<VerbsSettings> ParseVerbsSettings(
    const std::map<std::string, double>& values) {
  VerbsSettings settings;
  for (const auto& [name, value] : values) {
    const auto take = [&, &value = value](auto* field, double least,
                                          double most) {
      if (value < least || value > most || std::trunc(value) != value) {
        return false;
      }
      using Field = std::remove_pointer_t<decltype(field)>;
      *field = static_cast<Field>(value);
      return true;
    };
    bool taken = false;
    if (name == "gid_index") taken = take(&settings.gid_index, -1, 255);
    if (name == "pkey_index") taken = take(&settings.pkey_index, 0, 65535);
    if (name == "traffic_class") taken = take(&settings.traffic_class, 0, 255);
    if (name == "service_level") taken = take(&settings.service_level, 0, 15);
    if (name == "timeout") taken = take(&settings.timeout, 1, 31);
    if (name == "retry_count") taken = take(&settings.retry_count, 0, 7);
    if (name == "queue_depth") taken = take(&settings.queue_depth, 16, 8192);
    if (name == "patience_s") taken = take(&settings.patience_s, 1, 3600);
    if (name == "relaxed_ordering") {
      taken = take(&settings.relaxed_ordering, 0, 1);
    }
    if (!taken) {
      return Status(StatusCode::kInvalidArgument,
                    "the verbs transport has no setting " + name + " = " +
                        std::to_string(value) +
                        "; see JAXFABRIC_VERBS in jaxfabric._config");
    }
  }
  return settings;
}

#ifndef JAXFABRIC_HAVE_LIBIBVERBS

TransportState VerbsState(const std::string&) {
  return {Availability::kNotBuilt,
          "jaxfabric was compiled without libibverbs' headers",
          "install them (Debian: apt install libibverbs-dev) and build "
          "jaxfabric from source"};
}

std::vector<std::string> VerbsNicNames(const std::string&) { return {}; }

StatusOr<std::unique_ptr<Transport>> OpenVerbsTransport(
    const VerbsOptions& options) {
  return VerbsState(options.library).ToStatus("verbs");
}

#else

namespace {

class VerbsTransport final : public Transport {
 public:
  VerbsTransport(const VerbsLibrary& library, std::vector<VerbsPortName> ports,
                 const VerbsOptions& options)
      : library_(library),
        ports_(std::move(ports)),
        settings_(options.settings),
        key_(options.job_secret) {}

  Status Start() {
    JF_ASSIGN_OR_RETURN(bell_, OfiBell::Open());
    return OkStatus();
  }

  StatusOr<std::unique_ptr<Domain>> OpenDomain() override {
    const VerbsPortName& port = ports_[opened_++ % ports_.size()];
    JF_ASSIGN_OR_RETURN(
        std::unique_ptr<VerbsDomain> domain,
        VerbsDomain::Open(library_, port, settings_, key_, bell_.get()));
    return std::unique_ptr<Domain>(std::move(domain));
  }
  size_t nic_count() const override { return ports_.size(); }
  Doorbell& doorbell() override { return *bell_; }

 private:
  const VerbsLibrary& library_;
  const std::vector<VerbsPortName> ports_;
  const VerbsSettings settings_;
  const JobKey key_;
  std::unique_ptr<OfiBell> bell_;
  size_t opened_ = 0;
};

struct Found {
  const VerbsLibrary* library = nullptr;
  std::vector<VerbsPortName> ports;
  TransportState state;
};

std::string Names(const std::vector<VerbsPortName>& ports) {
  std::string names;
  for (const VerbsPortName& port : ports) {
    names += (names.empty() ? "" : ", ") + port.Text();
  }
  return names;
}

Found Look(const std::string& path) {
  Found found;
  const StatusOr<const VerbsLibrary*> library = VerbsLibrary::Load(path);
  if (!library.ok()) {
    found.state = {Availability::kLibraryMissing, library.status().message(),
                   "install it (Debian: apt install ibverbs-providers)"};
    return found;
  }
  found.library = *library;
  std::string why;
  found.ports = FindVerbsPorts(*found.library, &why);
  if (found.ports.empty()) {
    found.state = {Availability::kNoDevice, "libibverbs is loaded, " + why,
                   "use a machine with an RDMA NIC that is up and its driver "
                   "(ibv_devinfo shows them), or ofi/tcp"};
    return found;
  }
  found.state.reason = "libibverbs drives " + Names(found.ports);
  return found;
}

StatusOr<std::vector<VerbsPortName>> Select(
    const std::vector<VerbsPortName>& ports,
    const std::vector<std::string>& wanted) {
  if (wanted.empty()) return ports;
  std::vector<VerbsPortName> selected;
  for (const std::string& name : wanted) {
    const size_t before = selected.size();
    for (const VerbsPortName& port : ports) {
      if (name == port.device || name == port.Text()) selected.push_back(port);
    }
    if (selected.size() == before) {
      return Status(StatusCode::kInvalidArgument,
                    "verbs has no port '" + name + "' that is up; it has " +
                        Names(ports) + " (JAXFABRIC_NICS)");
    }
  }
  return selected;
}

}  // namespace

TransportState VerbsState(const std::string& library) {
  return Look(library).state;
}

std::vector<std::string> VerbsNicNames(const std::string& library) {
  std::vector<std::string> names;
  for (const VerbsPortName& port : Look(library).ports) {
    names.push_back(port.Text());
  }
  return names;
}

StatusOr<std::unique_ptr<Transport>> OpenVerbsTransport(
    const VerbsOptions& options) {
  const Found found = Look(options.library);
  JF_RETURN_IF_ERROR(found.state.ToStatus("verbs"));
  JF_ASSIGN_OR_RETURN(std::vector<VerbsPortName> ports,
                      Select(found.ports, options.nics));
  auto transport = std::make_unique<VerbsTransport>(*found.library,
                                                    std::move(ports), options);
  JF_RETURN_IF_ERROR(transport->Start());
  return std::unique_ptr<Transport>(std::move(transport));
}

#endif  // JAXFABRIC_HAVE_LIBIBVERBS

}  // namespace jaxfabric
