#include "moe/sum_rows.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "moe/float_formats.h"

namespace jaxfabric::moe {
namespace {

// The loops below are plain; the compiler vectorises them.
//
// A Word is what a loop takes from a row at a time: one element, or two of 16
// bits, which are widened where they stand, without a shuffle.

struct F32 {
  using Word = uint32_t;
  using Sum = float;
  static constexpr int kParts = 1;
  JF_KERNEL static void Widen(Word word, Sum* parts) {
    parts[0] = std::bit_cast<float>(word);
  }
  JF_KERNEL static Word Round(const Sum* parts) {
    return std::bit_cast<uint32_t>(parts[0]);
  }
};

struct F64 {
  using Word = uint64_t;
  using Sum = double;
  static constexpr int kParts = 1;
  JF_KERNEL static void Widen(Word word, Sum* parts) {
    parts[0] = std::bit_cast<double>(word);
  }
  JF_KERNEL static Word Round(const Sum* parts) {
    return std::bit_cast<uint64_t>(parts[0]);
  }
};

// The upper half of a float32.
struct Bf16 {
  using Word = uint32_t;
  using Sum = float;
  static constexpr int kParts = 2;
  JF_KERNEL static void Widen(Word word, Sum* parts) {
    parts[0] = std::bit_cast<float>(word << 16);
    parts[1] = std::bit_cast<float>(word & 0xffff0000);
  }
  JF_KERNEL static Word Round(const Sum* parts) {
    return RoundToUpperHalf(parts[0]) >> 16 |
           (RoundToUpperHalf(parts[1]) & 0xffff0000);
  }
};

struct F16 {
  using Word = uint32_t;
  using Sum = float;
  static constexpr int kParts = 2;
  JF_KERNEL static void Widen(Word word, Sum* parts) {
    parts[0] = WidenHalf(word & 0xffff);
    parts[1] = WidenHalf(word >> 16);
  }
  JF_KERNEL static Word Round(const Sum* parts) {
    return RoundToHalf(parts[0]) | RoundToHalf(parts[1]) << 16;
  }
};

// Words summed at a time where there are more than kFused rows: the sums stay
// in the first-level cache between one group of rows and the next.
constexpr int64_t kBlock = 256;
// Rows that one loop adds in registers.
constexpr int kFused = 4;

// Rows may begin anywhere.
template <typename Word>
struct [[gnu::packed, gnu::may_alias]] Unaligned {
  Word word;
};

template <typename Format>
struct Block {
  const std::byte* const* rows;
  const float* weights;
  int64_t byte_offset;  // into each row and `out`
  int64_t words;
  std::byte* out;
  typename Format::Sum* sums;  // [words * kParts]
};

// Adds kRows rows to the sums; kFirst starts them, kLast rounds them into out.
// A row without weight has the weight 1, which changes no bit of it.
template <typename Format, int kRows, bool kFirst, bool kLast>
JF_KERNEL void AddRows(const Block<Format>& block) {
  using Element = Unaligned<typename Format::Word>;
  using Sum = typename Format::Sum;
  constexpr int kParts = Format::kParts;
  const Element* rows[kRows];
  Sum weights[kRows];
  for (int q = 0; q < kRows; ++q) {
    rows[q] =
        reinterpret_cast<const Element*>(block.rows[q] + block.byte_offset);
    weights[q] = block.weights == nullptr ? 1.0f : block.weights[q];
  }
  auto* out = reinterpret_cast<Element*>(block.out + block.byte_offset);
  Sum* sums = block.sums;
#pragma GCC ivdep
  for (int64_t i = 0; i < block.words; ++i) {
    Sum sum[kParts];
    for (int p = 0; p < kParts; ++p) sum[p] = kFirst ? 0 : sums[i * kParts + p];
    for (int q = 0; q < kRows; ++q) {
      Sum term[kParts];
      Format::Widen(rows[q][i].word, term);
      for (int p = 0; p < kParts; ++p) {
        term[p] = weights[q] * term[p];
        sum[p] = kFirst && q == 0 ? term[p] : sum[p] + term[p];
      }
    }
    if (kLast) {
      out[i].word = Format::Round(sum);
    } else {
      for (int p = 0; p < kParts; ++p) sums[i * kParts + p] = sum[p];
    }
  }
}

template <typename Format, bool kFirst>
JF_KERNEL void AddLastRows(const Block<Format>& block, int64_t count) {
  switch (count) {
    case 1:
      return AddRows<Format, 1, kFirst, true>(block);
    case 2:
      return AddRows<Format, 2, kFirst, true>(block);
    case 3:
      return AddRows<Format, 3, kFirst, true>(block);
    default:
      static_assert(kFused == 4);
      return AddRows<Format, 4, kFirst, true>(block);
  }
}

template <typename Format>
JF_KERNEL void SumBlock(Block<Format> block, int64_t count) {
  if (count <= kFused) return AddLastRows<Format, true>(block, count);
  AddRows<Format, kFused, true, false>(block);
  for (;;) {
    block.rows += kFused;
    if (block.weights != nullptr) block.weights += kFused;
    count -= kFused;
    if (count <= kFused) return AddLastRows<Format, false>(block, count);
    AddRows<Format, kFused, false, false>(block);
  }
}

// The element behind the last whole word.
template <typename Format>
JF_KERNEL void SumRest(std::span<const std::byte* const> rows,
                       const float* weights, int64_t byte_offset, int64_t bytes,
                       std::byte* out) {
  using Sum = typename Format::Sum;
  Sum sum[Format::kParts] = {};
  for (size_t q = 0; q < rows.size(); ++q) {
    typename Format::Word word = 0;
    std::memcpy(&word, rows[q] + byte_offset, bytes);
    Sum term[Format::kParts];
    Format::Widen(word, term);
    for (int p = 0; p < Format::kParts; ++p) {
      if (weights != nullptr) term[p] = weights[q] * term[p];
      sum[p] = q == 0 ? term[p] : sum[p] + term[p];
    }
  }
  const typename Format::Word word = Format::Round(sum);
  std::memcpy(out + byte_offset, &word, bytes);
}

template <typename Format>
JF_KERNEL void SumFormat(std::span<const std::byte* const> rows,
                         const float* weights, int64_t row_bytes,
                         std::byte* out) {
  constexpr int64_t kWordBytes = sizeof(typename Format::Word);
  typename Format::Sum sums[kBlock * Format::kParts];
  const int64_t words = row_bytes / kWordBytes;
  for (int64_t begin = 0; begin < words; begin += kBlock) {
    SumBlock<Format>({.rows = rows.data(),
                      .weights = weights,
                      .byte_offset = begin * kWordBytes,
                      .words = std::min(kBlock, words - begin),
                      .out = out,
                      .sums = sums},
                     static_cast<int64_t>(rows.size()));
  }
  const int64_t rest = row_bytes % kWordBytes;
  if (rest > 0) {
    SumRest<Format>(rows, weights, row_bytes - rest, rest, out);
  }
}

JF_KERNEL void SumType(RowType type, std::span<const std::byte* const> rows,
                       const float* weights, int64_t row_bytes,
                       std::byte* out) {
  switch (type) {
    case RowType::kF32:
      return SumFormat<F32>(rows, weights, row_bytes, out);
    case RowType::kF64:
      return SumFormat<F64>(rows, weights, row_bytes, out);
    case RowType::kBf16:
      return SumFormat<Bf16>(rows, weights, row_bytes, out);
    case RowType::kF16:
      return SumFormat<F16>(rows, weights, row_bytes, out);
  }
}

void SumBaseline(RowType type, std::span<const std::byte* const> rows,
                 const float* weights, int64_t row_bytes, std::byte* out) {
  SumType(type, rows, weights, row_bytes, out);
}

// Not target_clones: its ifunc resolvers run before the sanitizers are up.
#if defined(__x86_64__)
[[gnu::target("avx2")]] void SumAvx2(RowType type,
                                     std::span<const std::byte* const> rows,
                                     const float* weights, int64_t row_bytes,
                                     std::byte* out) {
  SumType(type, rows, weights, row_bytes, out);
}

[[gnu::target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")]] void
SumAvx512(RowType type, std::span<const std::byte* const> rows,
          const float* weights, int64_t row_bytes, std::byte* out) {
  SumType(type, rows, weights, row_bytes, out);
}
#endif

}  // namespace

int64_t ElementBytes(RowType type) {
  switch (type) {
    case RowType::kF64:
      return 8;
    case RowType::kF32:
      return 4;
    case RowType::kBf16:
    case RowType::kF16:
      return 2;
  }
  JF_CHECK(false);
}

ScopedFloatEnvironment::ScopedFloatEnvironment() {
  std::fegetenv(&saved_);
  std::fesetenv(FE_DFL_ENV);
}

ScopedFloatEnvironment::~ScopedFloatEnvironment() { std::fesetenv(&saved_); }

bool IsaSupported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa FastestIsa() {
  if (IsaSupported(Isa::kAvx512)) return Isa::kAvx512;
  return IsaSupported(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
}

void SumRowsWith([[maybe_unused]] Isa isa, RowType type,
                 std::span<const std::byte* const> rows, const float* weights,
                 int64_t row_bytes, std::byte* out) {
  if (rows.empty()) {
    std::memset(out, 0, row_bytes);
    return;
  }
  if (rows.size() == 1 && weights == nullptr) {
    std::memcpy(out, rows[0], row_bytes);
    return;
  }
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) {
    return SumAvx512(type, rows, weights, row_bytes, out);
  }
  if (isa == Isa::kAvx2) return SumAvx2(type, rows, weights, row_bytes, out);
#endif
  SumBaseline(type, rows, weights, row_bytes, out);
}

void SumRows(RowType type, std::span<const std::byte* const> rows,
             const float* weights, int64_t row_bytes, std::byte* out) {
  static const Isa fastest = FastestIsa();
  SumRowsWith(fastest, type, rows, weights, row_bytes, out);
}

}  // namespace jaxfabric::moe
