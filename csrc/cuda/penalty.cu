// grad += 2 f λ Ω (θ − θ*) of all parameters in one launch, with the values λ Σ Ω (θ − θ*)².
//
// Bytes an entry: 20 in float32 (θ, θ*, Ω and the gradient are read, and it is written), 15 with codes for Ω and
// bfloat16 for θ*.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/steps.cuh"

namespace mas_fast::cuda {
namespace {

Tensor penalty_grad_(Tensors grads, const Tensors thetas, const Tensors omegas, const Tensors scales,
                     const Tensors anchors, const std::vector<double> lams, const std::optional<Tensor> factors,
                     bool add, const std::vector<int64_t> places) {
  Rows rows(thetas, omegas, scales, anchors, lams, places);
  rows.put(kGrad, "grads", grads);
  const double* factor = nullptr;
  if (factors) {
    STD_TORCH_CHECK(factors->is_cuda() && factors->get_device_index() == rows.like.get_device_index() &&
                        factors->scalar_type() == ScalarType::Double && factors->is_contiguous() &&
                        factors->numel() == int64_t(thetas.size()),
                    "factors must be float64 on the GPU of the first theta, one for each parameter");
    factor = static_cast<const double*>(factors->const_data_ptr());
  }
  for (Row& row : rows.rows) {
    // Nothing holds it: there is nothing to do, unless the gradient is to be overwritten with zeros.
    if (!row.data[kOmega] && (add || !row.data[kGrad])) row.count = 0;
  }
  return run_steps<PenaltyRule>(rows, [&]<class T>(T) { return PenaltyRule<T>(add, factor); });
}

}  // namespace
}  // namespace mas_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CUDA, m) { m.impl("penalty_grad_", TORCH_BOX(&mas_fast::cuda::penalty_grad_)); }
