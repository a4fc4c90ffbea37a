// Steps of SGD and AdamW with the penalty inside: θ, the gradient, the state, Ω and θ* are read once, and what changes
// is written once.
//
// Bound by memory: in float32, SGD moves 20 bytes an entry (28 with momentum) and AdamW 36, 8 of which are Ω and θ*;
// with codes for Ω and bfloat16 for θ* that is 3.03.
#include <torch/csrc/stable/library.h>

#include "cpu/steps.h"

namespace mas_fast::cpu {
namespace {

struct OptimizerRow : Row {
  using Row::Row;
  Operand grad;
  Operand state[3];
  double rate = 0, root_correction = 0;  // of AdamW, at this step of this parameter
  bool wide = false;
};

// Rows of all lists; state lists may be empty where there is no such state.
std::vector<OptimizerRow> rows_of(const Tensors& thetas, const Tensors& grads,
                                  std::initializer_list<const Tensors*> states, const Holding& holding) {
  check_lists({thetas.size(), grads.size()});
  std::vector<OptimizerRow> rows;
  rows.reserve(thetas.size());
  for (size_t i = 0; i < thetas.size(); ++i) {
    OptimizerRow& row = rows.emplace_back(thetas[i], holding, i);
    row.grad = Operand("grad", grads[i], row.count);
    row.wide = row.is_double() || row.grad.is_double();
    int s = 0;
    for (const Tensors* state : states) {
      if (!state->empty()) {
        check_lists({thetas.size(), state->size()});
        row.state[s] = Operand("state", (*state)[i], row.count);
      }
      ++s;
    }
  }
  return rows;
}

// One block: f(θ, gradient, Ω and θ*, state arrays, where θ goes) -> value.
template <class T, class F>
StepSum with_block(const OptimizerRow& row, int64_t first, int64_t count, const F& f) {
  Loaded<T> theta(row.theta, first, count);
  const Loaded<T> grad(row.grad, first, count);
  const HeldBlock<T> held(row, first, count);
  Loaded<T> state[3] = {{row.state[0], first, count}, {row.state[1], first, count}, {row.state[2], first, count}};
  T* const targets[3] = {state[0].target(), state[1].target(), state[2].target()};
  const double value = f(theta.values, grad.values, held.holds, targets, theta.target());
  theta.store(count);
  for (Loaded<T>& kept : state) kept.store(count);
  return {value, 0};
}

Tensor sgd_step_(Tensors thetas, const Tensors grads, Tensors momenta, const Tensors omegas, const Tensors scales,
                 const Tensors anchors, const std::vector<double> lams, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first_step, bool implicit,
                 const std::vector<int64_t> places) {
  const Holding holding(thetas, omegas, scales, anchors, lams, places);
  const std::vector<OptimizerRow> rows = rows_of(thetas, grads, {&momenta}, holding);
  STD_TORCH_CHECK(momentum == 0 || !momenta.empty(), "momenta must have an entry for each parameter with momentum");
  return run_steps(rows, thetas[0], [&](const OptimizerRow& row, int64_t first, int64_t count) {
    const auto step = [&]<class T>() {
      const Sgd<T> rule{T(lr),    T(momentum), T(dampening), T(weight_decay), T(maximize ? -1 : 1),
                        nesterov, first_step,  implicit};
      return with_block<T>(row, first, count,
                           [&](const T* theta, const T* grad, const Holds<T>& holds, T* const* state, T* next) {
                             return step_kernels_for<T>().sgd(rule, T(row.lam), theta, grad, holds, count,
                                                              momentum == 0 ? nullptr : state[0], next);
                           });
    };
    return row.wide ? step.template operator()<double>() : step.template operator()<float>();
  });
}

Tensor adamw_step_(Tensors thetas, const Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                   const Tensors omegas, const Tensors scales, const Tensors anchors, const std::vector<double> lams,
                   const std::vector<double> steps, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool amsgrad, bool maximize, bool implicit, const std::vector<int64_t> places) {
  const Holding holding(thetas, omegas, scales, anchors, lams, places);
  std::vector<OptimizerRow> rows = rows_of(thetas, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, holding);
  check_lists({thetas.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size()});
  STD_TORCH_CHECK(!amsgrad || !max_exp_avg_sqs.empty(), "max_exp_avg_sqs must have an entry for each parameter");
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].rate = lr / (1 - std::pow(beta1, steps[i]));
    rows[i].root_correction = 1 / std::sqrt(1 - std::pow(beta2, steps[i]));
  }
  return run_steps(rows, thetas[0], [&](const OptimizerRow& row, int64_t first, int64_t count) {
    const auto step = [&]<class T>() {
      const AdamW<T> rule{
          T(1 - lr * weight_decay), T(beta2), T(1 - beta1), T(1 - beta2), T(eps), T(maximize ? -1 : 1), T(row.rate),
          T(row.root_correction),   T(lr),    amsgrad,      implicit};
      return with_block<T>(row, first, count,
                           [&](const T* theta, const T* grad, const Holds<T>& holds, T* const* state, T* next) {
                             return step_kernels_for<T>().adamw(rule, T(row.lam), theta, grad, holds, count, state[0],
                                                                state[1], amsgrad ? state[2] : nullptr, next);
                           });
    };
    return row.wide ? step.template operator()<double>() : step.template operator()<float>();
  });
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) {
  m.impl("sgd_step_", TORCH_BOX(&mas_fast::cpu::sgd_step_));
  m.impl("adamw_step_", TORCH_BOX(&mas_fast::cpu::adamw_step_));
}
