// Callback: a Python function that native threads call.

#ifndef JAXFABRIC_PYTHON_CALLBACK_H_
#define JAXFABRIC_PYTHON_CALLBACK_H_

#include <nanobind/nanobind.h>

#include <memory>
#include <utility>

namespace jaxfabric {

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
