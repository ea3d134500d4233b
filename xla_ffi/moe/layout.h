// Layout: the static shape of one mixture-of-experts dispatch, equal on every
// rank of the axis, and the sizes that follow from it.
//
// Words used by all of xla_ffi/moe (T, K, E, N, S, R as in jaxfabric.moe):
//   unique row   a token's row as it travels: once to every rank that owns at
//                least one of the token's experts, tokens ascending.
//   slot         one (unique row, local expert) pair. A row's slots are
//                numbered q = 0, 1, ... in ascending k.
//   expert row   a row of the output that is grouped by local expert.
//   kept         an assignment that the receiver's capacity let through.

#ifndef JAXFABRIC_MOE_LAYOUT_H_
#define JAXFABRIC_MOE_LAYOUT_H_

#include <cstdint>

#include "base/status.h"

namespace jaxfabric::moe {

inline constexpr int32_t kDropless = -1;

struct Layout {
  int32_t num_ranks = 0;         // N
  int32_t tokens = 0;            // T, per rank; 0 is allowed
  int32_t k = 0;                 // K, experts per token
  int32_t num_experts = 0;       // E, in all; rank d owns [d*E/N, (d+1)*E/N)
  int64_t row_bytes = 0;         // as it travels
  int32_t capacity = kDropless;  // assignments that a rank keeps
  int32_t expert_alignment = 1;  // group sizes are multiples of it
  bool expand = true;            // output per expert row, else per unique row
  bool zero_tail = true;         // zero the output rows that nothing was put in
  bool scaled = false;           // rows travel as in block_scaled.h
  // The caller's code of the rows' element type. Only compared between ranks.
  int32_t element_type = 0;

  int32_t experts_local() const { return num_experts / num_ranks; }
  // S: most slots that a unique row can have.
  int32_t slots() const;
  // Most unique rows that a rank can receive.
  int64_t unique_rows_max() const { return int64_t{num_ranks} * tokens; }
  // Most assignments that a rank can keep.
  int64_t kept_max() const;
  // R: expert rows of the output. Every group with its padding fits.
  int64_t rows() const;
  // Rows of dispatch's `tokens`: R, or N*T if !expand.
  int64_t output_rows() const { return expand ? rows() : unique_rows_max(); }

  bool operator==(const Layout&) const = default;
};

// InvalidArgument if a size is out of range, the experts do not divide by the
// ranks, or a row index would not fit an int32. Everything else in xla_ffi/moe
// takes a Layout that passed.
Status CheckLayout(const Layout& layout);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_LAYOUT_H_
