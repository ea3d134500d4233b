// The XLA FFI handlers, by symbol. Their attributes and buffers are listed
// where they are bound.

#ifndef JAXFABRIC_HANDLERS_HANDLERS_H_
#define JAXFABRIC_HANDLERS_HANDLERS_H_

#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jaxfabric {

// Major and minor version of the FFI API that the handlers were built for.
inline std::pair<int, int> FfiApiVersion() {
  return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
}

XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricPut);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricPutPages);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricScatter);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricSendLayer);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricSignal);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricWait);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricBarrier);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricExchange);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricRoute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricRouteStart);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricRouteDone);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricReplay);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricReduce);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricReduceStart);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxfabricReduceDone);

}  // namespace jaxfabric

#endif  // JAXFABRIC_HANDLERS_HANDLERS_H_
