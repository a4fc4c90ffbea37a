// What an LSTM does step by step: ahead for its states, and back for the gradients of its gates.
//
// Samples do not meet, so each thread walks through all steps with its own. A step is a product with W_hh for a few
// samples: W_hh stays in L2 from step to step, and a step costs no call from outside.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/factor.h"

namespace mas_fast::cpu {
namespace {

// Multiply-adds that are worth waking a thread for.
constexpr int64_t kGrain = 1 << 16;

void check_dense(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == like.scalar_type(), name,
                  " must be contiguous, on the CPU and of the dtype of the others");
  check_shape(name, t, shape);
}

// The samples that have step t are the first sizes[t]; all, if there are no sizes.
void check_sizes(const std::vector<int64_t>& sizes, int64_t steps, int64_t samples) {
  bool fits = sizes.empty() || int64_t(sizes.size()) == steps;
  for (const int64_t size : sizes) fits = fits && size >= 0 && size <= samples;
  STD_TORCH_CHECK(fits, "sizes must be empty or a number of samples for each step");
}

// Calls walk(first, end) for ranges of samples that a thread takes.
template <class F>
void for_samples(int64_t samples, int64_t work_per_sample, const F& walk) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_sample));
  torch::stable::parallel_for(0, samples, grain, walk);
}

// w [K, C], or the transpose of w [C, K], in panels of columns as Kernels::multiply takes it: rows of w itself are
// often a power of two apart, where they drive each other out of the cache.
template <class T>
struct Packed : Scratch<T> {
  Packed(const Tensor& w, int64_t K, int64_t C, bool transposed)
      : Scratch<T>(ceil_div(C, kernels_for<T>().tile_columns) * K * kernels_for<T>().tile_columns) {
    const Factor<T> factor{static_cast<const T*>(w.const_data_ptr()), transposed ? 1 : C, transposed ? K : 1};
    for (int64_t first = 0; first < C; first += kernels_for<T>().tile_columns) {
      factor.pack(0, K, first, std::min(kernels_for<T>().tile_columns, C - first), this->get() + first * K);
    }
  }
};

template <class T>
void run_ahead(Tensor& gates, Tensor& states, Tensor& cells, Tensor& to_c, Tensor& kept,
               std::optional<Tensor>& unprojected, const Tensor& w_hh, const std::optional<Tensor>& b_hh,
               const std::optional<Tensor>& w_hr, const std::vector<int64_t>& sizes, bool reverse) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t steps = kept.size(0), samples = kept.size(1), H = kept.size(2), P = states.size(2);
  const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const auto written = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
  const Packed<T> w(w_hh, P, 4 * H, true);
  std::optional<Packed<T>> projection;
  if (w_hr) projection.emplace(*w_hr, H, P, true);
  const T* const bias = b_hh ? data(*b_hh) : nullptr;
  T *const z = written(gates), *const h = written(states), *const c = written(cells);
  T *const cell = written(to_c), *const keep = written(kept);
  T* const outputs = unprojected ? written(*unprojected) : nullptr;
  for_samples(samples, steps * 4 * H * P, [&](int64_t first, int64_t end) {
    const Scratch<T> recurrent((end - first) * 4 * H), zeros(std::max(4 * H, P));
    std::fill_n(zeros.get(), std::max(4 * H, P), T(0));
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t t = reverse ? steps - 1 - step : step;
      const int64_t rows = std::min(end, sizes.empty() ? samples : sizes[t]) - first;
      if (rows <= 0) continue;
      const int64_t before = (reverse ? t + 1 : t) * samples + first, after = (reverse ? t : t + 1) * samples + first;
      kernel.multiply(h + before * P, P, w.get(), rows, P, 4 * H, bias ? bias : zeros.get(), recurrent.get(), 4 * H);
      const int64_t own = t * samples + first;
      T* const u = outputs ? outputs + own * H : h + after * H;
      for (int64_t n = 0; n < rows; ++n) {
        kernel.lstm_ahead(z + (own + n) * 4 * H, recurrent.get() + n * 4 * H, c + (before + n) * H, H,
                          c + (after + n) * H, u + n * H, cell + (own + n) * H, keep + (own + n) * H);
      }
      if (!outputs) continue;
      kernel.multiply(u, H, projection->get(), rows, H, P, zeros.get(), h + after * P, P);
    }
  });
}

template <class T>
void run_back(Tensor& delta, Tensor& of_h, Tensor& of_c, const Tensor& w_hh, const std::optional<Tensor>& w_hr,
              const Tensor& to_gates, const Tensor& to_c, const Tensor& kept, const std::vector<int64_t>& sizes,
              bool reverse) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t steps = kept.size(0), samples = kept.size(1), H = kept.size(2), P = of_h.size(2);
  const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const T *gates = data(to_gates), *cell = data(to_c), *keep = data(kept);
  const Packed<T> w(w_hh, 4 * H, P, false);
  std::optional<Packed<T>> projection;
  if (w_hr) projection.emplace(*w_hr, P, H, false);
  T* const d = static_cast<T*>(delta.mutable_data_ptr());
  T* const h = static_cast<T*>(of_h.mutable_data_ptr());
  T* const c = static_cast<T*>(of_c.mutable_data_ptr());
  for_samples(samples, steps * 4 * H * P, [&](int64_t first, int64_t end) {
    const Scratch<T> unprojected(projection ? (end - first) * H : 0), zeros(H);
    std::fill_n(zeros.get(), H, T(0));
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t t = reverse ? step : steps - 1 - step;
      const int64_t rows = std::min(end, sizes.empty() ? samples : sizes[t]) - first;
      if (rows <= 0) continue;
      const T* arrived = h + ((reverse ? t : t + 1) * samples + first) * P;
      T* const before = h + ((reverse ? t + 1 : t) * samples + first) * P;
      if (projection) {
        kernel.multiply(arrived, P, projection->get(), rows, P, H, zeros.get(), unprojected.get(), H);
        arrived = unprojected.get();
      }
      const int64_t row = t * samples + first;
      for (int64_t n = 0; n < rows; ++n) {
        kernel.lstm_back(arrived + n * H, gates + (row + n) * 4 * H, cell + (row + n) * H, keep + (row + n) * H, H,
                         c + (first + n) * H, d + (row + n) * 4 * H);
      }
      kernel.multiply(d + row * 4 * H, 4 * H, w.get(), rows, 4 * H, P, nullptr, before, P);
    }
  });
}

void lstm_ahead_(Tensor gates, Tensor states, Tensor cells, Tensor to_c, Tensor kept, std::optional<Tensor> unprojected,
                 const Tensor w_hh, const std::optional<Tensor> b_hh, const std::optional<Tensor> w_hr,
                 std::vector<int64_t> sizes, bool reverse) {
  STD_TORCH_CHECK(kept.dim() == 3 && states.dim() == 3, "kept and states must have 3 axes");
  const int64_t T = kept.size(0), N = kept.size(1), H = kept.size(2), P = states.size(2);
  check_dense("gates", gates, kept, {T, N, 4, H});
  check_dense("states", states, kept, {T + 1, N, P});
  check_dense("cells", cells, kept, {T + 1, N, H});
  check_dense("to_c", to_c, kept, {T, N, H});
  check_dense("kept", kept, kept, {T, N, H});
  check_dense("w_hh", w_hh, kept, {4 * H, P});
  if (b_hh) check_dense("b_hh", *b_hh, kept, {4 * H});
  if (w_hr) check_dense("w_hr", *w_hr, kept, {P, H});
  if (unprojected) check_dense("unprojected", *unprojected, kept, {T, N, H});
  STD_TORCH_CHECK(w_hr.has_value() == unprojected.has_value() && (w_hr || P == H),
                  "w_hr and unprojected must be tensors where h has another width than the cells");
  check_sizes(sizes, T, N);
  with_omega_type(kept, [&]<class S>() {
    run_ahead<S>(gates, states, cells, to_c, kept, unprojected, w_hh, b_hh, w_hr, sizes, reverse);
  });
}

void lstm_back_(Tensor delta, Tensor of_h, Tensor of_c, const Tensor w_hh, const std::optional<Tensor> w_hr,
                const Tensor to_gates, const Tensor to_c, const Tensor kept, std::vector<int64_t> sizes, bool reverse) {
  STD_TORCH_CHECK(kept.dim() == 3 && of_h.dim() == 3, "kept and of_h must have 3 axes");
  const int64_t T = kept.size(0), N = kept.size(1), H = kept.size(2), P = of_h.size(2);
  check_dense("delta", delta, kept, {T, N, 4, H});
  check_dense("of_h", of_h, kept, {T + 1, N, P});
  check_dense("of_c", of_c, kept, {N, H});
  check_dense("w_hh", w_hh, kept, {4 * H, P});
  check_dense("to_gates", to_gates, kept, {T, N, 4, H});
  check_dense("to_c", to_c, kept, {T, N, H});
  check_dense("kept", kept, kept, {T, N, H});
  if (w_hr) check_dense("w_hr", *w_hr, kept, {P, H});
  STD_TORCH_CHECK(w_hr || P == H, "w_hr must be a tensor where h has another width than the cells");
  check_sizes(sizes, T, N);
  with_omega_type(kept,
                  [&]<class S>() { run_back<S>(delta, of_h, of_c, w_hh, w_hr, to_gates, to_c, kept, sizes, reverse); });
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) {
  m.impl("lstm_ahead_", TORCH_BOX(&mas_fast::cpu::lstm_ahead_));
  m.impl("lstm_back_", TORCH_BOX(&mas_fast::cpu::lstm_back_));
}
