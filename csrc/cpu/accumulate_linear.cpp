// Ω[o, i] += Σ_n |Σ_t δ[n,t,o] x[n,t,i]|
#include <torch/csrc/stable/library.h>

#include "cpu/tiled.h"

namespace mas_fast::cpu {
namespace {

template <class T>
void run(Tensor& omega, const Tensor& delta, const Tensor& x, bool square) {
  const Kernels<T>& kernel = kernels_for<T>();
  const View deltas(delta), inputs(x);
  const int64_t outputs = omega.size(0), columns = omega.size(1);
  const bool single = delta.size(1) == 1;
  // With one position, |δ xᵀ| = |δ| |x|ᵀ: the magnitudes are taken while packing, and samples are summed as positions
  // are.
  const Magnitude of_operands = single ? magnitude_of_statistic(square) : Magnitude::kPlain;
  const Magnitude of_products = single ? Magnitude::kPlain : magnitude_of_statistic(square);
  TiledShape shape{delta.size(0), delta.size(1), 1, outputs, columns};
  if (single) std::swap(shape.samples, shape.rows);
  const int64_t sample_axis = single ? 1 : 0, row_axis = single ? 0 : 1;

  const auto pack = [&](const View& data, int64_t n, int64_t row, int64_t rows, int64_t first, int64_t size,
                        int64_t width, T* dst) {
    const int64_t row_stride = data.stride[row_axis], column_stride = data.stride[2];
    const int64_t offset = n * data.stride[sample_axis] + row * row_stride + first * column_stride;
    kernel.pack(data.type, {data.at(offset), row_stride, column_stride}, rows, std::min(width, size - first), width,
                of_operands, dst);
  };
  const auto pack_delta = [&](int64_t, int64_t n, int64_t first, T* dst) {
    pack(deltas, n, 0, shape.rows, first, outputs, kernel.tile_rows, dst);
  };
  const auto panel_of_x = [&](int64_t, int64_t first_sample, int64_t count, int64_t row, int64_t rows, int64_t first,
                              T* dst) {
    for (int64_t n = 0; n < count; ++n) {
      pack(inputs, first_sample + n, row, rows, first, columns, kernel.tile_columns,
           dst + n * rows * kernel.tile_columns);
    }
    return PanelOfX<T>{dst};
  };
  const OmegaRows<T> rows_of_omega{static_cast<T*>(omega.mutable_data_ptr()), 0, columns};
  accumulate_tiled<T>(shape, of_products, pack_delta, panel_of_x, rows_of_omega, nullptr);
}

void accumulate_linear_(Tensor omega, const Tensor grad_output, const Tensor input, bool square) {
  check_omega("omega", omega, 2);
  check_data("grad_output", grad_output, omega, grad_output.scalar_type());
  check_data("input", input, omega, grad_output.scalar_type());
  STD_TORCH_CHECK(grad_output.dim() == 3, "grad_output must have 3 axes, got ", grad_output.dim());
  const int64_t samples = grad_output.size(0), positions = grad_output.size(1);
  check_shape("grad_output", grad_output, {samples, positions, omega.size(0)});
  check_shape("input", input, {samples, positions, omega.size(1)});
  with_omega_type(omega, [&]<class T>() { run<T>(omega, grad_output, input, square); });
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) {
  m.impl("accumulate_linear_", TORCH_BOX(&mas_fast::cpu::accumulate_linear_));
}
