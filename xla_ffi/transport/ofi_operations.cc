#include "transport/ofi_operations.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <type_traits>
#include <utility>

#include "transport/shm_address.h"

namespace jaxfabric {

// So that a context is its operation.
static_assert(std::is_standard_layout_v<OfiOperation>);
static_assert(offsetof(OfiOperation, context) == 0);

StatusOr<std::unique_ptr<OfiOperations>> OfiOperations::Open(
    OfiEndpoint& endpoint, size_t writes, size_t sends, size_t receives) {
  auto operations = std::make_unique<OfiOperations>();
  const uint64_t bytes = (sends + receives) * kOfiFrameBytesMax;
  operations->buffers_ = std::make_unique<std::byte[]>(bytes);
  std::byte* const base = operations->buffers_.get();
  JF_ASSIGN_OR_RETURN(operations->memory_,
                      endpoint.Register(base, bytes, /*remote=*/false,
                                        /*key=*/RandomU64()));
  operations->all_.resize(writes + sends + receives);
  for (size_t i = 0; i < operations->all_.size(); ++i) {
    OfiOperation* const operation = &operations->all_[i];
    if (i < sends + receives) operation->buffer = base + i * kOfiFrameBytesMax;
    if (i < sends) {
      operations->free_sends_.push_back(operation);
    } else if (i < sends + receives) {
      operation->kind = OfiOperation::Kind::kReceive;
      operations->receives_.push_back(operation);
    } else {
      operations->free_writes_.push_back(operation);
    }
  }
  return operations;
}

std::vector<OfiOperation*> OfiOperations::Posted() {
  std::vector<OfiOperation*> posted;
  for (OfiOperation& operation : all_) {
    if (operation.peer != nullptr) posted.push_back(&operation);
  }
  return posted;
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
