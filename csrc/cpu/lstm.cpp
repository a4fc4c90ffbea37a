// What an LSTM does step by step: ahead for its cells, and back for the gradients of its gates.
//
// Samples do not meet, so each thread walks through all steps with its own. A step back is a product with W_hh for a
// few samples: W_hh stays in L2 from step to step, and a step costs no call from outside.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/data.h"

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

template <class T>
void run_cells(Tensor& cells, const Tensor& added, const Tensor& kept, const std::vector<int64_t>& sizes,
               bool reverse) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t steps = added.size(0), samples = added.size(1), H = added.size(2);
  const View adds(added), keeps(kept);
  T* const c = static_cast<T*>(cells.mutable_data_ptr());
  for_samples(samples, steps * H, [&](int64_t first, int64_t end) {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t t = reverse ? steps - 1 - step : step;
      const T* before = c + (reverse ? t + 1 : t) * samples * H;
      T* after = c + (reverse ? t : t + 1) * samples * H;
      for (int64_t n = first; n < std::min(end, sizes.empty() ? samples : sizes[t]); ++n) {
        const auto row = [&](const View& v) { return static_cast<const T*>(v.at(t * v.stride[0] + n * v.stride[1])); };
        kernel.multiply_add(row(adds), row(keeps), before + n * H, H, after + n * H);
      }
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
  const T *w = data(w_hh), *gates = data(to_gates), *cell = data(to_c), *keep = data(kept);
  const T* const projection = w_hr ? data(*w_hr) : nullptr;
  T* const d = static_cast<T*>(delta.mutable_data_ptr());
  T* const h = static_cast<T*>(of_h.mutable_data_ptr());
  T* const c = static_cast<T*>(of_c.mutable_data_ptr());
  for_samples(samples, steps * 4 * H * P, [&](int64_t first, int64_t end) {
    const Scratch<T> unprojected(projection ? (end - first) * H : 0);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t t = reverse ? step : steps - 1 - step;
      const int64_t rows = std::min(end, sizes.empty() ? samples : sizes[t]) - first;
      if (rows <= 0) continue;
      const T* arrived = h + ((reverse ? t : t + 1) * samples + first) * P;
      T* const before = h + ((reverse ? t + 1 : t) * samples + first) * P;
      if (projection) {
        std::fill_n(unprojected.get(), rows * H, T(0));
        kernel.multiply(arrived, P, projection, rows, P, H, unprojected.get());
        arrived = unprojected.get();
      }
      const int64_t row = t * samples + first;
      for (int64_t n = 0; n < rows; ++n) {
        kernel.lstm_back(arrived + n * H, gates + (row + n) * 4 * H, cell + (row + n) * H, keep + (row + n) * H, H,
                         c + (first + n) * H, d + (row + n) * 4 * H);
      }
      kernel.multiply(d + row * 4 * H, 4 * H, w, rows, 4 * H, P, before);
    }
  });
}

void lstm_cells_(Tensor cells, const Tensor added, const Tensor kept, std::vector<int64_t> sizes, bool reverse) {
  STD_TORCH_CHECK(added.dim() == 3 && kept.dim() == 3, "added and kept must have 3 axes");
  check_dense("cells", cells, cells, {added.size(0) + 1, added.size(1), added.size(2)});
  for (const Tensor* t : {&added, &kept}) {
    check_shape("added and kept", *t, {added.size(0), added.size(1), added.size(2)});
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == cells.scalar_type() && (t->size(2) <= 1 || t->stride(2) == 1),
                    "added and kept must be on the CPU, of the dtype of cells, with entries side by side");
  }
  check_sizes(sizes, added.size(0), added.size(1));
  with_omega_type(cells, [&]<class T>() { run_cells<T>(cells, added, kept, sizes, reverse); });
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
  m.impl("lstm_cells_", TORCH_BOX(&mas_fast::cpu::lstm_cells_));
  m.impl("lstm_back_", TORCH_BOX(&mas_fast::cpu::lstm_back_));
}
