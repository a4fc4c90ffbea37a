// How the op files see tensors: element types, element pointers, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "checks.h"
#include "cpu/kernels.h"

namespace mas_fast::cpu {

inline Input input_type(const Tensor& data) {
  switch (data.scalar_type()) {
    case ScalarType::Double:
      return Input::kFloat64;
    case ScalarType::BFloat16:
      return Input::kBFloat16;
    case ScalarType::Half:
      return Input::kFloat16;
    default:
      return Input::kFloat32;
  }
}

// Address of element `offset` of a tensor's data.
inline const void* element(const Tensor& data, int64_t offset) {
  return static_cast<const char*>(data.const_data_ptr()) + offset * int64_t(data.element_size());
}

inline Magnitude magnitude_of_statistic(bool square) { return square ? Magnitude::kSquare : Magnitude::kAbs; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

// Uninitialised, on a cache line.
template <class T>
Scratch<T> scratch(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes ? bytes : 64);
  if (!p) throw std::bad_alloc();
  return Scratch<T>(static_cast<T*>(p));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f<float>() or f<double>() by the dtype of omega.
template <class F>
void with_omega_type(const Tensor& omega, F f) {
  if (omega.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  f.template operator()<float>();
}

}  // namespace mas_fast::cpu
