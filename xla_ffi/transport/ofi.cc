#include "transport/ofi.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "transport/job_key.h"
#include "transport/ofi_address.h"
#include "transport/ofi_library.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC
#include "transport/ofi_bell.h"
#include "transport/ofi_domain.h"
#include "transport/ofi_nic.h"
#endif

namespace jaxfabric {

#ifndef JAXFABRIC_HAVE_LIBFABRIC

TransportState OfiState(const std::string&, const std::string&) {
  return {Availability::kNotBuilt,
          "jaxfabric was compiled without libfabric's headers",
          "install them (Debian: apt install libfabric-dev) and build "
          "jaxfabric from source"};
}

std::vector<std::string> OfiNicNames(const std::string&, const std::string&) {
  return {};
}

StatusOr<std::unique_ptr<Transport>> OpenOfiTransport(
    const OfiOptions& options) {
  return OfiState(options.provider, options.library)
      .ToStatus("ofi/" + options.provider);
}

#else

namespace {

// EFA's queues cannot ring.
constexpr int64_t kPollIntervalNs = 50'000;

class OfiTransport final : public Transport {
 public:
  OfiTransport(const OfiLibrary& library, OfiProvider provider,
               std::vector<OfiNic> nics, const std::string& secret)
      : library_(library),
        provider_(provider),
        nics_(std::move(nics)),
        key_(secret) {}

  Status Start() {
    if (provider_ != OfiProvider::kTcp) return OkStatus();
    JF_ASSIGN_OR_RETURN(bell_, OfiBell::Open());
    return OkStatus();
  }

  StatusOr<std::unique_ptr<Domain>> OpenDomain() override {
    const OfiNic& nic = nics_[opened_++ % nics_.size()];
    JF_ASSIGN_OR_RETURN(std::unique_ptr<OfiDomain> domain,
                        OfiDomain::Open(library_, provider_, *nic.info, key_,
                                        bell_.get(), &doorbell()));
    return std::unique_ptr<Domain>(std::move(domain));
  }
  size_t nic_count() const override { return nics_.size(); }
  Doorbell& doorbell() override {
    return bell_ == nullptr ? doorbell_ : *bell_;
  }
  int64_t poll_interval_ns() const override {
    return bell_ == nullptr ? kPollIntervalNs : 0;
  }

 private:
  const OfiLibrary& library_;
  const OfiProvider provider_;
  const std::vector<OfiNic> nics_;
  const JobKey key_;
  DoorbellWords words_ = {};
  Doorbell doorbell_{&words_};
  std::unique_ptr<OfiBell> bell_;
  size_t opened_ = 0;
};

// What a user of `provider` is to do where there is no device.
std::string FixFor(OfiProvider provider, const OfiLibrary& library) {
  if (provider == OfiProvider::kTcp || provider == OfiProvider::kShm) {
    return "install a libfabric with this provider: pip install "
           "'jaxfabric[ofi]'";
  }
  if (library.Version().starts_with("1.")) {
    return "EFA needs libfabric 2 or newer: pip install 'jaxfabric[ofi]'";
  }
  return "use a machine with an EFA device and its driver, or ofi/tcp";
}

// Each once: an interface has an entry for each of its addresses.
std::vector<std::string> NamesOf(const std::vector<OfiNic>& nics) {
  std::vector<std::string> names;
  for (const OfiNic& nic : nics) {
    if (std::find(names.begin(), names.end(), nic.name) == names.end()) {
      names.push_back(nic.name);
    }
  }
  return names;
}

struct Found {
  const OfiLibrary* library = nullptr;
  std::vector<OfiNic> nics;
  TransportState state;
};

Found Look(OfiProvider provider, const std::string& path) {
  Found found;
  const StatusOr<const OfiLibrary*> library = OfiLibrary::Load(path);
  if (!library.ok()) {
    found.state = {Availability::kLibraryMissing, library.status().message(),
                   "pip install 'jaxfabric[ofi]', or set JAXFABRIC_LIBFABRIC "
                   "to a libfabric.so.1"};
    return found;
  }
  found.library = *library;
  const std::string version = "libfabric " + found.library->Version();
  std::string why;
  found.nics = FindOfiNics(*found.library, provider, &why);
  if (found.nics.empty()) {
    found.state = {Availability::kNoDevice,
                   version + " finds no device for " +
                       OfiProviderName(provider) +
                       (why.empty() ? "" : " (" + why + ")"),
                   FixFor(provider, *found.library)};
    return found;
  }
  std::string names;
  for (const std::string& name : NamesOf(found.nics)) {
    names += (names.empty() ? "" : ", ") + name;
  }
  found.state.reason = version + " drives " + names;
  return found;
}

}  // namespace

TransportState OfiState(const std::string& provider,
                        const std::string& library) {
  const StatusOr<OfiProvider> parsed = ParseOfiProvider(provider);
  if (!parsed.ok()) {
    return {Availability::kNotBuilt, parsed.status().message(),
            "name one of those"};
  }
  return Look(*parsed, library).state;
}

std::vector<std::string> OfiNicNames(const std::string& provider,
                                     const std::string& library) {
  const StatusOr<OfiProvider> parsed = ParseOfiProvider(provider);
  if (!parsed.ok()) return {};
  return NamesOf(Look(*parsed, library).nics);
}

StatusOr<std::unique_ptr<Transport>> OpenOfiTransport(
    const OfiOptions& options) {
  JF_ASSIGN_OR_RETURN(const OfiProvider provider,
                      ParseOfiProvider(options.provider));
  Found found = Look(provider, options.library);
  JF_RETURN_IF_ERROR(found.state.ToStatus("ofi/" + options.provider));
  JF_ASSIGN_OR_RETURN(
      std::vector<OfiNic> nics,
      SelectOfiNics(std::move(found.nics), provider, options.nics));
  auto transport = std::make_unique<OfiTransport>(
      *found.library, provider, std::move(nics), options.job_secret);
  JF_RETURN_IF_ERROR(transport->Start());
  return std::unique_ptr<Transport>(std::move(transport));
}

#endif  // JAXFABRIC_HAVE_LIBFABRIC

}  // namespace jaxfabric
