#include "transport/ofi_address.h"

#include <gtest/gtest.h>
#include <netinet/in.h>

#include <cstring>
#include <functional>
#include <set>
#include <string>

namespace jaxfabric {
namespace {

constexpr uint64_t kJob = 77;

OfiAddress Loopback() {
  OfiAddress address;
  address.provider = OfiProvider::kTcp;
  address.nonce = 5;
  address.job = kJob;
  sockaddr_in in = {};
  in.sin_family = AF_INET;
  in.sin_port = htons(4711);
  in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::memcpy(address.endpoint.data(), &in, sizeof(in));
  address.endpoint_bytes = sizeof(in);
  return address;
}

TEST(OfiAddressTest, SurvivesItsBytes) {
  const OfiAddress address = Loopback();
  const StatusOr<OfiAddress> parsed =
      ParseOfiAddress(ToNetAddr(address), OfiProvider::kTcp, kJob);
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(*parsed, address);
  EXPECT_EQ(DescribeEndpoint(address), "127.0.0.1:4711");
}

TEST(OfiAddressTest, EachFaultIsRefused) {
  const std::function<void(OfiAddress&)> faults[] = {
      [](OfiAddress& a) { a.magic ^= 1; },
      [](OfiAddress& a) { ++a.version; },
      [](OfiAddress& a) { a.provider = OfiProvider::kEfa; },
      [](OfiAddress& a) { a.provider = OfiProvider{99}; },
      [](OfiAddress& a) { ++a.job; },
      [](OfiAddress& a) { a.endpoint_bytes = 0; },
      [](OfiAddress& a) { --a.endpoint_bytes; },
      [](OfiAddress& a) { a.endpoint_bytes = kOfiEndpointBytesMax + 1; },
      [](OfiAddress& a) { a.endpoint_bytes = ~uint32_t{0}; },
      [](OfiAddress& a) { a.endpoint[0] = std::byte{AF_UNIX}; },
      [](OfiAddress& a) { a.endpoint[63] = std::byte{1}; },
  };
  std::set<std::string> sentences;
  for (const auto& fault : faults) {
    OfiAddress address = Loopback();
    fault(address);
    const StatusOr<OfiAddress> parsed =
        ParseOfiAddress(ToNetAddr(address), OfiProvider::kTcp, kJob);
    ASSERT_FALSE(parsed.ok());
    sentences.insert(parsed.status().message());
  }
  EXPECT_GE(sentences.size(), 5u);
}

TEST(OfiAddressTest, TruncatedOrExtendedBytesAreRefused) {
  const std::string good = ToNetAddr(Loopback()).bytes;
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(
        ParseOfiAddress({good.substr(0, size)}, OfiProvider::kTcp, kJob).ok());
  }
  EXPECT_FALSE(ParseOfiAddress({good + "x"}, OfiProvider::kTcp, kJob).ok());
}

TEST(OfiAddressTest, NamesOfProvidersAreThoseThatUsersWrite) {
  for (const char* name : {"tcp", "efa", "efa-direct", "shm"}) {
    const StatusOr<OfiProvider> provider = ParseOfiProvider(name);
    ASSERT_TRUE(provider.ok());
    EXPECT_STREQ(OfiProviderName(*provider), name);
  }
  const Status unknown = ParseOfiProvider("pigeon").status();
  EXPECT_NE(unknown.message().find("ofi/tcp"), std::string::npos);
}

}  // namespace
}  // namespace jaxfabric
