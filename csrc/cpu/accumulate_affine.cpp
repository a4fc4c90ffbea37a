// Ω_w[k] += Σ_n |Σ_rs δ (x − mean) rstd| and Ω_b[k] += Σ_n |Σ_rs δ|, in one reading of δ.
//
// Threads share out the entries k. Bound by memory: δ is read once, and x once if there is a weight.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cpu/data.h"

namespace mas_fast::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;
using MaybeView = std::optional<View>;

MaybeView view_of(const MaybeTensor& data) { return data ? MaybeView(View(*data)) : std::nullopt; }

Volume sample_of(const MaybeView& view, int64_t n) {
  if (!view) return {nullptr, 0, 0, 0};
  return {view->at(n * view->stride[0]), view->stride[1], view->stride[2], view->stride[3]};
}

template <class T>
void run(MaybeTensor& weight, MaybeTensor& bias, const Tensor& delta, const MaybeTensor& x, const MaybeTensor& mean,
         const MaybeTensor& rstd, bool square) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t samples = delta.size(0), R = delta.size(1), K = delta.size(2), S = delta.size(3);
  const MaybeView deltas = view_of(delta), inputs = view_of(x), means = view_of(mean), rstds = view_of(rstd);
  T* const w = weight ? static_cast<T*>(weight->mutable_data_ptr()) : nullptr;
  T* const b = bias ? static_cast<T*>(bias->mutable_data_ptr()) : nullptr;
  // Entries per task: whole groups of vectors where they lie side by side.
  const int64_t step = S == 1 ? std::min<int64_t>(256 / int64_t(sizeof(T)), std::max<int64_t>(K, 1)) : 1;
  // Less than 32 Ki entries are not worth waking a thread.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, samples * R * S * step));
  torch::stable::parallel_for(0, ceil_div(K, step), grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < samples; ++n) {
      kernel.affine(deltas->type, sample_of(deltas, n), sample_of(inputs, n), sample_of(means, n), sample_of(rstds, n),
                    R, S, begin * step, std::min(end * step, K), magnitude_of_statistic(square), w, b);
    }
  });
}

void accumulate_affine_(MaybeTensor omega_weight, MaybeTensor omega_bias, const Tensor grad_output,
                        const MaybeTensor input, const MaybeTensor mean, const MaybeTensor rstd, bool square) {
  STD_TORCH_CHECK(omega_weight || omega_bias, "omega_weight or omega_bias must be a tensor");
  const Tensor& omega = omega_weight ? *omega_weight : *omega_bias;
  STD_TORCH_CHECK(grad_output.dim() == 4, "grad_output must have 4 axes, got ", grad_output.dim());
  const int64_t N = grad_output.size(0), R = grad_output.size(1), S = grad_output.size(3);
  check_data("grad_output", grad_output, omega, grad_output.scalar_type());
  check_shape("grad_output", grad_output, {N, R, omega.size(0), S});
  for (const MaybeTensor* given : {&omega_weight, &omega_bias}) {
    if (!*given) continue;
    check_omega("omega", **given, 1);
    STD_TORCH_CHECK((*given)->size(0) == omega.size(0) && (*given)->scalar_type() == omega.scalar_type(),
                    "omega_weight and omega_bias must agree in shape and dtype");
  }
  STD_TORCH_CHECK(!omega_weight || input, "input must be a tensor where omega_weight is given");
  if (input) {
    check_data("input", *input, omega, grad_output.scalar_type());
    check_shape("input", *input, {N, R, omega.size(0), S});
  }
  for (const MaybeTensor* given : {&mean, &rstd}) {
    if (!*given) continue;
    check_shape("mean and rstd", **given, {N, R, omega.size(0), S});
    STD_TORCH_CHECK((*given)->is_cpu() && (*given)->scalar_type() == omega.scalar_type(),
                    "mean and rstd must be on the CPU, in the dtype of omega");
  }
  with_omega_type(omega, [&]<class T>() { run<T>(omega_weight, omega_bias, grad_output, input, mean, rstd, square); });
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) {
  m.impl("accumulate_affine_", TORCH_BOX(&mas_fast::cpu::accumulate_affine_));
}
