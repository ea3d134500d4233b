#include "engine/submission_trace.h"

#include <algorithm>
#include <string>

namespace jaxfabric {
namespace {

// "paged write of 64 pages ..." is a paged write.
std::string NameOf(const Submission& submission) {
  switch (submission.kind) {
    case SubmissionKind::kWrites: {
      const std::string& label = submission.future->label();
      return label.substr(0, std::min(label.find(" of "), label.find(" to ")));
    }
    case SubmissionKind::kSend:
      return "send";
    case SubmissionKind::kBarrier:
      return "barrier";
    case SubmissionKind::kExpect:
      return "wait";
    case SubmissionKind::kConnect:
      return "connect";
    case SubmissionKind::kUnregister:
      return "unregister memory";
    case SubmissionKind::kFence:
      return "fence";
  }
  return "operation";
}

}  // namespace

TraceEvent TraceOf(const Submission& submission, const Status& status) {
  TraceEvent event;
  event.name = NameOf(submission);
  event.id = submission.id;
  event.status = status.code();
  for (const Submission::Part& part : submission.parts) {
    event.bytes += part.bytes;
  }
  return event;
}

}  // namespace jaxfabric
