// What the trace tells of an operation of a TransferEngine.

#ifndef JAXFABRIC_ENGINE_SUBMISSION_TRACE_H_
#define JAXFABRIC_ENGINE_SUBMISSION_TRACE_H_

#include "base/status.h"
#include "engine/trace.h"
#include "engine/transfer_submission.h"

namespace jaxfabric {

TraceEvent TraceOf(const Submission& submission, const Status& status);

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_SUBMISSION_TRACE_H_
