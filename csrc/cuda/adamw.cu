// The step of AdamW with the penalty inside, of all parameters in one launch.
//
// Bytes an entry in float32: 36, 8 of which are Ω and θ*, or 3.03 as codes and bfloat16; 44 with amsgrad.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cuda/steps.cuh"

namespace mas_fast::cuda {
namespace {

Tensor adamw_step_(Tensors thetas, const Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                   const Tensors omegas, const Tensors scales, const Tensors anchors, const std::vector<double> lams,
                   const std::vector<double> steps, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool amsgrad, bool maximize, bool implicit, const std::vector<int64_t> places) {
  Rows rows(thetas, omegas, scales, anchors, lams, places);
  check_lists({thetas.size(), grads.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size()});
  STD_TORCH_CHECK(!amsgrad || !max_exp_avg_sqs.empty(), "max_exp_avg_sqs must have an entry for each parameter");
  rows.put(kGrad, "grads", grads);
  rows.put(kState0, "exp_avgs", exp_avgs);
  rows.put(kState1, "exp_avg_sqs", exp_avg_sqs);
  if (amsgrad) rows.put(kState2, "max_exp_avg_sqs", max_exp_avg_sqs);

  const auto rate = [&](double step) { return lr / (1 - std::pow(beta1, step)); };
  const auto root_correction = [&](double step) { return 1 / std::sqrt(1 - std::pow(beta2, step)); };
  // As arguments of the kernel where they can be: what is in the table has to be written to the device again.
  const bool same_step = std::all_of(steps.begin(), steps.end(), [&](double step) { return step == steps[0]; });
  for (size_t i = 0; i < steps.size() && !same_step; ++i) {
    rows.numbers[i].rate = rate(steps[i]);
    rows.numbers[i].root_correction = root_correction(steps[i]);
  }
  return run_steps<AdamWRule>(rows, [&]<class T>(T) {
    return AdamWRule<T>(
        AdamW<T>{T(1 - lr * weight_decay), T(beta2), T(1 - beta1), T(1 - beta2), T(eps), T(maximize ? -1 : 1),
                 T(rate(steps[0])), T(root_correction(steps[0])), T(lr), amsgrad, implicit},
        same_step);
  });
}

}  // namespace
}  // namespace mas_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CUDA, m) { m.impl("adamw_step_", TORCH_BOX(&mas_fast::cuda::adamw_step_)); }
