// grad += 2 f λ Ω (θ − θ*) of all parameters in one pass, with the values λ Σ Ω (θ − θ*)².
//
// Bound by memory: 20 bytes an entry in float32 (θ, θ*, Ω and the gradient are read, and it is written), 15 with codes
// for Ω and bfloat16 for θ*.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>

#include "cpu/steps.h"

namespace mas_fast::cpu {
namespace {

struct PenaltyRow : Row {
  using Row::Row;
  Operand grad;
  double factor = 1;
  bool wide = false;
};

template <class T>
StepSum step(const PenaltyRow& row, int64_t first, int64_t count, bool add) {
  if (!row.omega) {
    // Zero is all zero bits, however it is kept.
    if (row.grad && !add) std::memset(row.grad.at(first), 0, size_t(count * bytes_of(row.grad.storage)));
    return {0, 0};
  }
  const Loaded<T> theta(row.theta, first, count);
  const HeldBlock<T> held(row, first, count);
  Loaded<T> grad(row.grad, first, add ? count : 0);
  T* const result = grad.target();
  const StepSum sum = step_kernels_for<T>().penalty(T(row.lam), T(2 * row.factor), theta.values, held.holds, count,
                                                    limit_of<T>(row.grad.storage), add ? result : nullptr, result);
  grad.store(count);
  return sum;
}

Tensor penalty_grad_(Tensors grads, const Tensors thetas, const Tensors omegas, const Tensors scales,
                     const Tensors anchors, const std::vector<double> lams, const std::optional<Tensor> factors,
                     bool add, const std::vector<int64_t> places) {
  const Holding holding(thetas, omegas, scales, anchors, lams, places);
  if (!grads.empty()) check_lists({thetas.size(), grads.size()});
  if (factors) {
    STD_TORCH_CHECK(factors->is_cpu() && factors->scalar_type() == ScalarType::Double && factors->is_contiguous() &&
                        factors->numel() == int64_t(thetas.size()),
                    "factors must be float64 on the CPU, one for each parameter");
  }
  std::vector<PenaltyRow> rows;
  rows.reserve(thetas.size());
  for (size_t i = 0; i < thetas.size(); ++i) {
    PenaltyRow& row = rows.emplace_back(thetas[i], holding, i);
    if (!grads.empty()) row.grad = Operand("grad", grads[i], row.count);
    if (factors) row.factor = static_cast<const double*>(factors->const_data_ptr())[i];
    row.wide = row.is_double() || row.grad.is_double();
  }
  return run_steps(rows, thetas[0], [add](const PenaltyRow& row, int64_t first, int64_t count) {
    return row.wide ? step<double>(row, first, count, add) : step<float>(row, first, count, add);
  });
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) { m.impl("penalty_grad_", TORCH_BOX(&mas_fast::cpu::penalty_grad_)); }
