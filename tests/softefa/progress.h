// What the hardware does on its own: sends what was posted, receives what came.
//
// Mostly it happens inside the provider's calls (posts and polls) of any queue,
// which costs no context switch. While work is left and nobody calls, a thread
// does it: a program that forgets to poll must not make the device stand still.

#ifndef JAXFABRIC_TESTS_SOFTEFA_PROGRESS_H_
#define JAXFABRIC_TESTS_SOFTEFA_PROGRESS_H_

#include <cstdint>

#include "tests/softefa/queue_pair.h"

namespace jaxfabric::softefa {

// All of these need the host's mutex.

// Moves every queue pair of this process forward.
void Progress();

// Tells the thread, which the first call starts, that there may be work left.
void WakeEngine();

// The two halves of Progress, for one queue pair.
void Transmit(QueuePair& pair, int64_t now_ns);
void Receive(QueuePair& pair);

}  // namespace jaxfabric::softefa

#endif  // JAXFABRIC_TESTS_SOFTEFA_PROGRESS_H_
