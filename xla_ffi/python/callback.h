// Callback: a Python function that native threads call.

#ifndef JAXFABRIC_PYTHON_CALLBACK_H_
#define JAXFABRIC_PYTHON_CALLBACK_H_

#include <nanobind/nanobind.h>

#include <memory>
#include <utility>

namespace jaxfabric {

// What Python knows of a native thread, kept until the thread ends. Made anew
// for each call it would cost more than most calls: memory is mapped for it.
class KeptThreadState {
 public:
  static void Keep() {
    thread_local KeptThreadState state;
    state.KeepOnce();
  }
  KeptThreadState(const KeptThreadState&) = delete;
  KeptThreadState& operator=(const KeptThreadState&) = delete;

 private:
  KeptThreadState() = default;
  ~KeptThreadState() {
    // An interpreter that has ended has taken it along.
    if (!kept_ || Py_IsInitialized() == 0) return;
    PyGILState_Ensure();
    PyGILState_Release(PyGILState_LOCKED);
    PyGILState_Release(PyGILState_UNLOCKED);  // that of KeepOnce
  }

  void KeepOnce() {
    // A thread of Python's has its own.
    if (kept_ || PyGILState_GetThisThreadState() != nullptr) return;
    PyGILState_Ensure();
    PyEval_SaveThread();
    kept_ = true;
  }

  bool kept_ = false;
};

class Callback {
 public:
  // May be copied and destroyed by any thread.
  explicit Callback(nanobind::callable function)
      : function_(new nanobind::callable(std::move(function)),
                  [](nanobind::callable* gone) {
                    nanobind::gil_scoped_acquire acquire;
                    delete gone;
                  }) {}

  // `arguments` makes the arguments, once the GIL is held. What the function
  // raises goes to sys.unraisablehook: there is nobody to catch it.
  template <typename Arguments>
  void operator()(Arguments arguments) const {
    KeptThreadState::Keep();
    nanobind::gil_scoped_acquire acquire;
    try {
      (*function_)(*arguments());
    } catch (nanobind::python_error& error) {
      error.discard_as_unraisable(*function_);
    }
  }

 private:
  std::shared_ptr<nanobind::callable> function_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_CALLBACK_H_
