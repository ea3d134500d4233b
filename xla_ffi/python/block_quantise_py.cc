#include "python/block_quantise_py.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "moe/block_quantise.h"

namespace jaxfabric {
namespace {

namespace nb = nanobind;

moe::RowType TypeNamed(const std::string& dtype) {
  if (dtype == "float32") return moe::RowType::kF32;
  if (dtype == "float64") return moe::RowType::kF64;
  if (dtype == "bfloat16") return moe::RowType::kBf16;
  if (dtype == "float16") return moe::RowType::kF16;
  throw nb::value_error(
      ("quantise_blocks: " + dtype +
       " is none of float32, float64, bfloat16, float16; cast it first")
          .c_str());
}

// Addresses, as for memory that is registered: NumPy knows no bfloat16 and no
// e4m3, and hands over nothing that it cannot name. jaxfabric/weights/
// _quantise.py checks the arrays, and keeps them.
void Quantise(const std::string& dtype, uint64_t values,
              const std::vector<int64_t>& shape,
              const std::vector<int64_t>& strides, uint64_t payload,
              uint64_t scales) {
  const moe::RowType type = TypeNamed(dtype);
  if (shape.size() < 2 || strides.size() != shape.size() ||
      std::ranges::min(shape) < 0) {
    throw nb::value_error(
        ("quantise_blocks: " + std::to_string(shape.size()) + " sizes and " +
         std::to_string(strides.size()) +
         " strides; it takes two or more, as many of both, sizes from 0 on")
            .c_str());
  }
  const nb::gil_scoped_release release;
  const moe::ScopedFloatEnvironment environment;
  moe::QuantiseBlocks({type, reinterpret_cast<std::byte*>(values),  // NOLINT
                       shape, strides},
                      reinterpret_cast<std::byte*>(payload),  // NOLINT
                      reinterpret_cast<std::byte*>(scales));  // NOLINT
}

}  // namespace

void RegisterBlockQuantise(nb::module_& m) {
  m.def("quantise_blocks", &Quantise, nb::arg("dtype"), nb::arg("values"),
        nb::arg("shape"), nb::arg("strides"), nb::arg("payload"),
        nb::arg("scales"));
}

}  // namespace jaxfabric
