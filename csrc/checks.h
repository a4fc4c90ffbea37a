// Checks that keep the kernels inside their memory. The Python wrappers (mas_fast/kernels/ops.py) have the friendly
// ones.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "arithmetic.h"

namespace mas_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How a tensor of the training step keeps its numbers; codes of Ω are the business of whoever takes them.
inline Storage storage_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::Double:
      return Storage::kFloat64;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// Where the Ω and θ* of parameter i lie: in which entry of their lists, from which number on, and from which scale on.
// Without places each parameter has an entry of its own. A negative entry holds nothing.
struct HoldPlace {
  HoldPlace(const std::vector<int64_t>& places, size_t i)
      : whole(places.empty()),
        entry(whole ? int64_t(i) : places[3 * i]),
        first(whole ? 0 : places[3 * i + 1]),
        block(whole ? 0 : places[3 * i + 2]) {}
  // Whether numbers from `begin` on fit into as many as there are; all of them, if the entry is the parameter's own.
  bool fits(int64_t begin, int64_t count, int64_t size) const {
    return whole ? count == size : begin >= 0 && count <= size - begin;
  }

  bool whole;
  int64_t entry, first, block;
};

inline void check_holds(size_t thetas, size_t omegas, size_t scales, size_t anchors, size_t lams, size_t places) {
  STD_TORCH_CHECK(
      omegas == scales && omegas == anchors && thetas == lams && (places ? places == 3 * thetas : omegas == thetas),
      "what holds ", thetas,
      " parameters must have as many lams, and as many omegas, scales and anchors or "
      "three places for each, got ",
      lams, " lams, ", omegas, " omegas, ", scales, " scales, ", anchors, " anchors and ", places, " places");
}

inline void check_lists(std::initializer_list<size_t> sizes) {
  for (const size_t size : sizes) {
    STD_TORCH_CHECK(size == *sizes.begin(), "lists must have an entry for each parameter, got ", size, " and ",
                    *sizes.begin());
  }
}

inline void check_omega(const char* name, const Tensor& omega, int64_t dims) {
  STD_TORCH_CHECK(omega.dim() == dims, name, " must have ", dims, " axes, got ", omega.dim());
  STD_TORCH_CHECK(omega.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(omega.scalar_type() == ScalarType::Float || omega.scalar_type() == ScalarType::Double, name,
                  " must be float32 or float64");
}

// Ω in float64 takes data in float64; Ω in float32 takes float32, bfloat16 and float16.
inline void check_data(const char* name, const Tensor& data, const Tensor& omega, ScalarType type) {
  STD_TORCH_CHECK(data.is_cpu(), name, " must be on the CPU");
  const ScalarType own = data.scalar_type();
  const bool wide = omega.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      own == type && (wide ? own == ScalarType::Double
                           : own == ScalarType::Float || own == ScalarType::BFloat16 || own == ScalarType::Half),
      name, " must have the common dtype of the data, float64 exactly where omega is float64");
}

inline void check_shape(const char* name, const Tensor& data, std::initializer_list<int64_t> shape) {
  bool fits = data.dim() == int64_t(shape.size());
  int64_t axis = 0;
  for (int64_t size : shape) {
    fits = fits && data.size(axis) == size;
    ++axis;
  }
  STD_TORCH_CHECK(fits, name, " must fit the shapes of omega and the other data");
}

}  // namespace mas_fast
