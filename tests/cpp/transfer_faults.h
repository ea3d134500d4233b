// TransferFaultsTest: TransferEngines over a fake network of misfortunes.

#ifndef JAXFABRIC_TESTS_CPP_TRANSFER_FAULTS_H_
#define JAXFABRIC_TESTS_CPP_TRANSFER_FAULTS_H_

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

#include "engine/transfer_engine.h"
#include "tests/cpp/tampering_transport.h"
#include "tests/cpp/transfer_node.h"

namespace jaxfabric {

class TransferFaultsTest : public testing::Test {
 protected:
  std::unique_ptr<TransferNode> Open(TransferEngineOptions options = {},
                                     Tamper tamper = nullptr,
                                     FakeOptions fake = {},
                                     RefuseAdd refuse_add = nullptr,
                                     Emulation* emulation = nullptr) {
    if (options.job.empty()) options.job = "test";
    if (options.token.empty()) options.token = "secret";
    options.name = "node" + std::to_string(next_node_++);
    fake.network = "faults";
    auto transport = *OpenFakeTransport(fake);
    if (tamper == nullptr) tamper = [](std::string&) { return true; };
    transport = std::make_unique<TamperingTransport>(
        std::move(transport), std::move(tamper), std::move(refuse_add),
        emulation);
    return std::make_unique<TransferNode>(std::move(transport), options);
  }
  // The node still does its work for others.
  void ExpectAlive(TransferNode& node) {
    auto other = Open();
    other->Connect(node);
    ASSERT_TRUE(EndsWell(other->engine->SubmitSingleWrite(
        other->region, 0, node.address, 0, 10, 77)));
    ASSERT_TRUE(EndsWell(node.engine->ExpectImmCount(77, 1)));
  }
  static void Kill(TransferNode& node) {
    const auto address = EngineAddress::Decode(node.engine->address());
    for (const NetAddr& domain : address->domains) {
      EXPECT_TRUE(KillFakeDomain("faults", domain));
    }
  }
  template <typename Predicate>
  static void Until(Predicate met) {
    const Deadline deadline = Patience();
    while (!met()) ASSERT_FALSE(deadline.Expired()) << "nothing happens";
  }

  int next_node_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_TRANSFER_FAULTS_H_
