// Ω[v, :] += Σ_n |Σ_{t: ids[n,t] = v} δ[n,t,:]|
//
// Threads share out the columns, so that samples which meet in a row need neither atomics nor an order between threads.
// Work: one addition per entry of δ, plus 2 per distinct (sample, id) and column: bound by reading δ once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/data.h"

namespace mas_fast::cpu {
namespace {

template <class T>
void run(Tensor& omega, const Tensor& delta, const Tensor& ids, int64_t padding_idx, bool square) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t samples = ids.size(0), positions = ids.size(1), vocabulary = omega.size(0), width = omega.size(1);
  const View deltas(delta);
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t sample_stride = ids.stride(0), position_stride = ids.stride(1);
  const auto id_at = [=](int64_t n, int64_t t) { return id[n * sample_stride + t * position_stride]; };

  // Per sample, the positions in the order of their ids: equal ids stand together.
  std::vector<int64_t> order(samples * positions);
  torch::stable::parallel_for(0, samples, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const auto first = order.begin() + n * positions;
      std::iota(first, first + positions, int64_t(0));
      std::sort(first, first + positions, [&](int64_t a, int64_t b) {
        const int64_t ia = id_at(n, a), ib = id_at(n, b);
        return ia != ib ? ia < ib : a < b;
      });
    }
  });
  for (int64_t n = 0; n < samples && positions; ++n) {
    const int64_t least = id_at(n, order[n * positions]), most = id_at(n, order[(n + 1) * positions - 1]);
    STD_TORCH_CHECK(least >= 0 && most < vocabulary, "ids must lie in [0, ", vocabulary, ")");
  }

  T* const out = static_cast<T*>(omega.mutable_data_ptr());
  const Magnitude magnitude = magnitude_of_statistic(square);
  const int64_t line = 64 / int64_t(sizeof(T));  // threads write whole cache lines of a row
  torch::stable::parallel_for(0, ceil_div(width, line), 1, [&](int64_t begin, int64_t end) {
    const int64_t column = begin * line, columns = std::min(end * line, width) - column;
    for (int64_t n = 0; n < samples; ++n) {
      const int64_t* row = order.data() + n * positions;
      const Matrix rows{deltas.at(n * deltas.stride[0] + column * deltas.stride[2]), deltas.stride[1],
                        deltas.stride[2]};
      for (int64_t t = 0; t < positions;) {
        const int64_t v = id_at(n, row[t]);
        int64_t run_end = t + 1;
        while (run_end < positions && id_at(n, row[run_end]) == v) ++run_end;
        if (v != padding_idx) {
          kernel.gather(deltas.type, rows, row + t, run_end - t, columns, magnitude, out + v * width + column);
        }
        t = run_end;
      }
    }
  });
}

void accumulate_embedding_(Tensor omega, const Tensor grad_output, const Tensor ids, int64_t padding_idx, bool square) {
  check_omega("omega", omega, 2);
  check_data("grad_output", grad_output, omega, grad_output.scalar_type());
  STD_TORCH_CHECK(ids.dim() == 2 && ids.is_cpu() && ids.scalar_type() == ScalarType::Long,
                  "ids must be int64 [N, T] on the CPU");
  check_shape("grad_output", grad_output, {ids.size(0), ids.size(1), omega.size(1)});
  with_omega_type(omega, [&]<class T>() { run<T>(omega, grad_output, ids, padding_idx, square); });
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) {
  m.impl("accumulate_embedding_", TORCH_BOX(&mas_fast::cpu::accumulate_embedding_));
}
