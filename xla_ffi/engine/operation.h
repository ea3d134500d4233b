// Operation: one call of a program that is under way on one rank.
//
// Whoever may still touch the call's buffers holds a reference. The last one to
// let go completes it, so buffers are never handed back while they are in use,
// also when the operation failed long before.

#ifndef JAXFABRIC_ENGINE_OPERATION_H_
#define JAXFABRIC_ENGINE_OPERATION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "base/deadline.h"
#include "base/status.h"

namespace jaxfabric {

class Operation {
 public:
  using Done = std::function<void(Status)>;

  // `label` says what it is, as in "dispatch (jit_step, call 3)".
  Operation(std::string label, double timeout_s, Done done);
  ~Operation();
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  // The first failure counts; later ones are dropped.
  void Fail(Status status);
  bool failed() const { return !status().ok(); }
  Status status() const;

  // Says what it waits for, when asked; for error texts.
  void SetWaitingFor(std::function<std::string()> describe);
  // "dispatch (jit_step, call 3): 1.2 s into a time limit of 30 s, waiting for
  // rank 2"
  std::string Describe() const;

  const std::string& label() const { return label_; }
  Deadline deadline() const { return deadline_; }

  // While one lives on a thread, operations that end on this thread complete
  // here at once; elsewhere they go to the ElasticPool, because completing one
  // runs the rest of the XLA program.
  class CompleteHere {
   public:
    CompleteHere();
    ~CompleteHere();

   private:
    bool before_;
  };

 private:
  const std::string label_;
  const double timeout_s_;
  const int64_t begin_ns_;
  const Deadline deadline_;
  Done done_;
  mutable std::mutex mutex_;
  Status status_;                             // guarded by mutex_
  std::function<std::string()> waiting_for_;  // guarded by mutex_
};

using OperationPtr = std::shared_ptr<Operation>;

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_OPERATION_H_
