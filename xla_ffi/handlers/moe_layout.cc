#include "handlers/moe_layout.h"

namespace jaxfabric {

namespace ffi = xla::ffi;

StatusOr<moe::Layout> LayoutOf(const MoeAttributes& attributes, size_t ranks,
                               const ffi::AnyBuffer& rows,
                               const ffi::AnyBuffer& ids) {
  const auto shape = ids.dimensions();
  const auto row_shape = rows.dimensions();
  if (shape.size() != 2 || row_shape.size() != 2) {
    return Status(StatusCode::kInvalidArgument,
                  "rows and ids have two dimensions");
  }
  moe::Layout layout;
  layout.num_ranks = static_cast<int32_t>(ranks);
  layout.tokens = static_cast<int32_t>(shape[0]);
  layout.k = static_cast<int32_t>(shape[1]);
  layout.num_experts = static_cast<int32_t>(attributes.num_experts);
  layout.row_bytes =
      row_shape[1] * static_cast<int64_t>(ffi::ByteWidth(rows.element_type()));
  layout.capacity = static_cast<int32_t>(attributes.capacity);
  layout.expert_alignment = static_cast<int32_t>(attributes.expert_alignment);
  layout.expand = attributes.expand;
  layout.zero_tail = attributes.zero_tail;
  layout.element_type = static_cast<int32_t>(rows.element_type());
  JF_RETURN_IF_ERROR(moe::CheckLayout(layout));
  return layout;
}

StatusOr<moe::RowType> RowTypeOf(const ffi::AnyBuffer& rows) {
  switch (rows.element_type()) {
    case ffi::DataType::F32:
      return moe::RowType::kF32;
    case ffi::DataType::F64:
      return moe::RowType::kF64;
    case ffi::DataType::BF16:
      return moe::RowType::kBf16;
    case ffi::DataType::F16:
      return moe::RowType::kF16;
    default:
      return Status(StatusCode::kInvalidArgument,
                    "rows are float32, float64, bfloat16 or float16");
  }
}

}  // namespace jaxfabric
