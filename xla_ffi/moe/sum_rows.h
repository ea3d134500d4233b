// SumRows: the weighted sum of a few rows, the arithmetic of combine.
//
// The same bits on every processor (payloads of NaNs aside): sums are float32
// (double for kF64) in the order of the rows, products are rounded before they
// are added (no fused multiply-add), the first term starts the sum (it is not
// added to zero, so -0.0 stays), and the end is rounded to nearest even.

#ifndef JAXFABRIC_MOE_SUM_ROWS_H_
#define JAXFABRIC_MOE_SUM_ROWS_H_

#include <cfenv>
#include <cstddef>
#include <cstdint>
#include <span>

namespace jaxfabric::moe {

enum class RowType { kF32, kF64, kBf16, kF16 };

int64_t ElementBytes(RowType type);

// Rounding to nearest even, subnormal numbers kept, for as long as it lives.
// XLA's threads flush subnormals and ours do not; results must not tell.
class ScopedFloatEnvironment {
 public:
  ScopedFloatEnvironment();
  ~ScopedFloatEnvironment();
  ScopedFloatEnvironment(const ScopedFloatEnvironment&) = delete;
  ScopedFloatEnvironment& operator=(const ScopedFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

// out = weights[0] * rows[0] + weights[1] * rows[1] + ..., or the plain sum if
// `weights` is null. No rows give zeros; one row without weight is copied as it
// is. `out` is written once, in ascending order, and never read: it may be
// memory of a peer. `row_bytes` is a multiple of ElementBytes(type); no
// alignment is assumed. Call within a ScopedFloatEnvironment.
void SumRows(RowType type, std::span<const std::byte* const> rows,
             const float* weights, int64_t row_bytes, std::byte* out);

// The variants that SumRows chooses from; for tests.
enum class Isa { kBaseline, kAvx2, kAvx512 };
bool IsaSupported(Isa isa);
Isa FastestIsa();
void SumRowsWith(Isa isa, RowType type, std::span<const std::byte* const> rows,
                 const float* weights, int64_t row_bytes, std::byte* out);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_SUM_ROWS_H_
