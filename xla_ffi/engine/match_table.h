// MatchTable: brings messages and the calls that wait for them together.
// Not thread-safe.

#ifndef JAXFABRIC_ENGINE_MATCH_TABLE_H_
#define JAXFABRIC_ENGINE_MATCH_TABLE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/mailbox.h"
#include "engine/operation.h"

namespace jaxfabric {

class MatchTable {
 public:
  // Gets one arrival per expected source, in the order of `sources`.
  using Ready = std::function<void(std::vector<Arrival>)>;

  // A message has come. Returns what to run if it was the last that a call
  // waits for, else an empty function.
  std::function<void()> Add(const Arrival& arrival, std::string label);

  // Waits for one message of `key` from each of `sources`. If they are all
  // here, returns true and fills `arrivals`; `ready` is then dropped.
  bool Expect(MatchKey key, std::vector<uint32_t> sources,
              const OperationPtr& operation, Ready ready,
              std::vector<Arrival>* arrivals);

  // Whether anything waits for a message from `source`.
  bool Awaits(uint32_t source) const;
  // The sources that the call under `key` still waits for.
  std::vector<uint32_t> Missing(MatchKey key) const;

  // What has come and matches no call here: "dispatch (jit_f, call 0) from
  // rank 2". Empty if there is nothing.
  std::string DescribeUnmatched() const;

  // Forgets all expectations, and those to come: who calls Expect later has
  // failed meanwhile. Returns them for the caller to destroy outside its locks.
  // Arrivals stay.
  std::vector<Ready> TakeExpectations();

 private:
  struct Entry {
    std::map<uint32_t, Arrival> arrivals;  // by source
    std::string label;                     // of the first arrival
    std::vector<uint32_t> sources;         // empty: nobody waits yet
    OperationPtr operation;
    Ready ready;
  };

  static bool Complete(const Entry& entry);
  static std::vector<Arrival> TakeArrivals(Entry& entry);

  std::map<MatchKey, Entry> entries_;
  bool over_ = false;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_MATCH_TABLE_H_
