// The attributes of the MoE calls, and the Layout that they describe.

#ifndef JAXFABRIC_HANDLERS_MOE_LAYOUT_H_
#define JAXFABRIC_HANDLERS_MOE_LAYOUT_H_

#include <cstdint>
#include <span>

#include "base/status.h"
#include "handlers/call.h"
#include "moe/layout.h"
#include "moe/sum_rows.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfabric {

struct MoeAttributes : CallAttributes {
  int64_t num_experts;
  int64_t capacity;  // -1: dropless
  int64_t expert_alignment;
  bool expand;
  bool zero_tail;
  bool e4m3;  // rows travel scaled; dispatch only
};

// `rows` is any buffer of rows of this call, `ids` is int32[T, K].
StatusOr<moe::Layout> LayoutOf(const MoeAttributes& attributes, size_t ranks,
                               const xla::ffi::AnyBuffer& rows,
                               const xla::ffi::AnyBuffer& ids);

StatusOr<moe::RowType> RowTypeOf(const xla::ffi::AnyBuffer& rows);

template <typename T>
std::span<T> SpanOf(const xla::ffi::AnyBuffer& buffer) {
  return {static_cast<T*>(buffer.untyped_data()),
          buffer.size_bytes() / sizeof(T)};
}

}  // namespace jaxfabric

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jaxfabric::MoeAttributes, JF_CALL_ATTRIBUTES,
    ::xla::ffi::StructMember<int64_t>("num_experts"),
    ::xla::ffi::StructMember<int64_t>("capacity"),
    ::xla::ffi::StructMember<int64_t>("expert_alignment"),
    ::xla::ffi::StructMember<bool>("expand"),
    ::xla::ffi::StructMember<bool>("zero_tail"),
    ::xla::ffi::StructMember<bool>("e4m3"));

#endif  // JAXFABRIC_HANDLERS_MOE_LAYOUT_H_
