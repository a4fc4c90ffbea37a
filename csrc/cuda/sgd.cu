// The step of SGD with the penalty inside, of all parameters in one launch.
//
// Bytes an entry in float32: 20, 28 with momentum; 8 of them are Ω and θ*, or 3.03 as codes and bfloat16.
#include <torch/csrc/stable/library.h>

#include "cuda/steps.cuh"

namespace mas_fast::cuda {
namespace {

Tensor sgd_step_(Tensors thetas, const Tensors grads, Tensors momenta, const Tensors omegas, const Tensors scales,
                 const Tensors anchors, const std::vector<double> lams, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first, bool implicit,
                 const std::vector<int64_t> places) {
  Rows rows(thetas, omegas, scales, anchors, lams, places);
  check_lists({thetas.size(), grads.size()});
  STD_TORCH_CHECK(momentum == 0 || !momenta.empty(), "momenta must have an entry for each parameter with momentum");
  rows.put(kGrad, "grads", grads);
  if (momentum != 0) rows.put(kState0, "momenta", momenta);
  return run_steps<SgdRule>(rows, [&]<class T>(T) {
    return SgdRule<T>(
        Sgd<T>{T(lr), T(momentum), T(dampening), T(weight_decay), T(maximize ? -1 : 1), nesterov, first, implicit});
  });
}

}  // namespace
}  // namespace mas_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CUDA, m) { m.impl("sgd_step_", TORCH_BOX(&mas_fast::cuda::sgd_step_)); }
