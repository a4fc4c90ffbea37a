// Ω[o, c, *k] += Σ_n |Σ_p δ[n,o,p] x[n,c,p·stride + k·dilation − padding]| over one, two or three axes.
//
// An implicit matrix product. Per chunk of samples, x is copied once to channels-last with its zero margin, so that the
// entry of x for position p and kernel entry k stands at base[p] + offset[k] + c. Panels of at most tile_columns (k, c)
// pairs are gathered from there, a thread's own at a time: the unfolded batch never exists. Depthwise convolutions sum
// directly; most of 3 × 3 go by winograd.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/conv.h"
#include "cpu/tiled.h"
#include "cpu/winograd.h"

namespace mas_fast::cpu {
namespace {

// Copies one sample to channels-last inside its zero margin.
template <class T>
void copy_padded(const Geometry& g, const Images& x, int64_t n, T* dst) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t C = g.channels;
  const bool margin = g.padded != g.in;
  if (margin) std::fill_n(dst, g.padded_positions() * C, T(0));
  const bool rows_joined = !margin && (g.in[1] == 1 || x.along(1) == g.in[2] * x.along(2)) &&
                           (g.in[0] == 1 || x.along(0) == g.in[1] * g.in[2] * x.along(2));
  if (rows_joined) {
    const Matrix src{x.at(n * x.stride[0]), x.stride[1], x.along(2)};
    kernel.transpose(x.type, src, C, g.padded_positions(), dst, C);
    return;
  }
  for (int64_t d = 0; d < g.in[0]; ++d) {
    for (int64_t h = 0; h < g.in[1]; ++h) {
      const Matrix src{x.at(n * x.stride[0] + d * x.along(0) + h * x.along(1)), x.stride[1], x.along(2)};
      T* row = dst + g.place(d + g.padding[0], h + g.padding[1], g.padding[2]) * C;
      kernel.transpose(x.type, src, C, g.in[2], row, C);
    }
  }
}

// base[p] and offset[k] of the header comment, for C channels per place.
std::vector<int64_t> position_bases(const Geometry& g) {
  std::vector<int64_t> base;
  base.reserve(g.positions());
  for (int64_t d = 0; d < g.out[0]; ++d)
    for (int64_t h = 0; h < g.out[1]; ++h)
      for (int64_t w = 0; w < g.out[2]; ++w)
        base.push_back(g.place(d * g.stride[0], h * g.stride[1], w * g.stride[2]) * g.channels);
  return base;
}
std::vector<int64_t> kernel_offsets(const Geometry& g) {
  std::vector<int64_t> offset;
  for (int64_t d = 0; d < g.kernel[0]; ++d)
    for (int64_t h = 0; h < g.kernel[1]; ++h)
      for (int64_t w = 0; w < g.kernel[2]; ++w)
        offset.push_back(g.place(d * g.dilation[0], h * g.dilation[1], w * g.dilation[2]) * g.channels);
  return offset;
}

template <class T>
void run_tiled(Tensor& omega, const Geometry& g, const Tensor& delta, const Tensor& x, bool square) {
  const Kernels<T>& kernel = kernels_for<T>();
  const Deltas deltas(delta);
  const Images inputs(x);
  const int64_t C = g.channels, group_channels = C / g.groups, group_outputs = g.outputs / g.groups;
  const int64_t K = g.entries(), columns = K * group_channels;
  // Channels in whole vectors are read where they are; the last vectors of the last panel read once more what counts
  // nowhere. Without panels to pack, a chunk can be larger: Ω, whose entries are scattered here, is met once a chunk.
  const bool in_place = group_channels % kernel.lanes == 0;
  const TiledShape shape{delta.size(0), g.positions(), g.groups,
                         group_outputs, columns,       in_place ? 4 * kChunkRows : kChunkRows};
  const std::vector<int64_t> base = position_bases(g), offset = kernel_offsets(g);
  const int64_t image = g.padded_positions() * C;
  const int64_t chunk = chunk_samples<T>(shape);
  const Scratch<T> images(chunk * image);
  int64_t chunk_first = 0;

  const auto prepare = [&](int64_t first, int64_t count) {
    chunk_first = first;
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) copy_padded(g, inputs, first + n, images.get() + n * image);
    });
  };
  const auto pack_delta = [&](int64_t group, int64_t n, int64_t first, T* dst) {
    const int64_t width = kernel.tile_rows;
    kernel.pack(deltas.type, deltas.sample(n, group * group_outputs + first), shape.rows,
                std::min(width, group_outputs - first), width, Magnitude::kPlain, dst);
  };
  // Columns are (kernel entry, channel) pairs. Channels stand together in the images, kernel entries in Ω: going
  // through the kernel for one panel's worth of channels at a time reads vectors there and stays within few cache lines
  // here.
  std::vector<int64_t> image_offset, omega_offset;
  for (int64_t first = 0; first < group_channels; first += kernel.tile_columns) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t c = first; c < std::min(first + kernel.tile_columns, group_channels); ++c) {
        image_offset.push_back(offset[k] + c);
        omega_offset.push_back(c * K + k);
      }
    }
  }
  while (in_place && int64_t(image_offset.size()) % kernel.tile_columns) image_offset.push_back(image_offset.front());
  const auto panel_of_x = [&](int64_t group, int64_t first_sample, int64_t count, int64_t row, int64_t rows,
                              int64_t first, T* dst) {
    const T* from = images.get() + (first_sample - chunk_first) * image + group * group_channels;
    if (in_place) return PanelOfX<T>{from, image, base.data() + row, image_offset.data() + first};
    for (int64_t n = 0; n < count; ++n) {
      kernel.pick(from + n * image, base.data() + row, rows, image_offset.data() + first,
                  std::min(kernel.tile_columns, columns - first), dst + n * rows * kernel.tile_columns);
    }
    return PanelOfX<T>{dst};
  };
  const OmegaRows<T> rows_of_omega{static_cast<T*>(omega.mutable_data_ptr()), group_outputs * columns, columns,
                                   K == 1 ? nullptr : omega_offset.data()};
  accumulate_tiled<T>(shape, magnitude_of_statistic(square), pack_delta, panel_of_x, rows_of_omega, prepare);
}

template <class T>
void run_depthwise(Tensor& omega, const Geometry& g, const Tensor& delta, const Tensor& x, bool square) {
  const Kernels<T>& kernel = kernels_for<T>();
  const Deltas view(delta);
  const Images inputs(x);
  const int64_t C = g.channels, P = g.positions(), K = g.entries(), image = g.padded_positions() * C;
  const std::vector<int64_t> base = position_bases(g), offset = kernel_offsets(g);
  const Scratch<T> images(image), deltas(P * C), totals(K * C), sums(K * C);
  std::fill_n(totals.get(), K * C, T(0));
  // Channels per task: whole cache lines.
  const int64_t step = std::min<int64_t>(C, 64 / int64_t(sizeof(T)));
  for (int64_t n = 0; n < delta.size(0); ++n) {
    copy_padded(g, inputs, n, images.get());
    const Matrix rows = view.sample(n, 0);
    kernel.transpose(view.type, {rows.data, rows.column_stride, rows.row_stride}, C, P, deltas.get(), C);
    torch::stable::parallel_for(0, ceil_div(C, step), 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * step; c < std::min(end * step, C); c += step) {
        const int64_t width = std::min(step, C - c);
        T* own = sums.get() + c * K;
        kernel.depthwise(deltas.get() + c, C, images.get() + c, base.data(), P, offset.data(), K, width, own);
        kernel.fold(own, K * width, magnitude_of_statistic(square), totals.get() + c * K);
      }
    });
  }
  T* const out = static_cast<T*>(omega.mutable_data_ptr());
  for (int64_t c = 0; c < C; c += step) {
    const int64_t width = std::min(step, C - c);
    for (int64_t i = 0; i < width; ++i)
      for (int64_t k = 0; k < K; ++k) out[(c + i) * K + k] += totals[c * K + k * width + i];
  }
}

template <class T>
void run_winograd(Tensor& omega, const Geometry& g, const Tensor& delta, const Tensor& x, bool square) {
  T* const out = static_cast<T*>(omega.mutable_data_ptr());
  Winograd<T>(g).accumulate(Deltas(delta), Images(x), delta.size(0), magnitude_of_statistic(square), out);
}

void accumulate_conv_(Tensor omega, const Tensor grad_output, const Tensor input, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool square) {
  const int64_t axes = omega.dim() - 2;
  STD_TORCH_CHECK(axes >= 1 && axes <= 3, "omega must have 1, 2 or 3 kernel axes, got ", axes);
  check_omega("omega", omega, axes + 2);
  check_data("grad_output", grad_output, omega, grad_output.scalar_type());
  check_data("input", input, omega, grad_output.scalar_type());
  STD_TORCH_CHECK(grad_output.dim() == axes + 2 && input.dim() == axes + 2, "grad_output and input must have ",
                  axes + 2, " axes");
  STD_TORCH_CHECK(int64_t(stride.size()) == axes && int64_t(padding.size()) == axes && int64_t(dilation.size()) == axes,
                  "stride, padding and dilation must have one number per axis");
  STD_TORCH_CHECK(groups > 0 && omega.size(0) % groups == 0 && input.size(1) == omega.size(1) * groups &&
                      grad_output.size(1) == omega.size(0) && grad_output.size(0) == input.size(0),
                  "groups, channels and samples must fit omega");
  if (omega.numel() == 0 || grad_output.numel() == 0) return;
  const Geometry g = geometry_of(omega, grad_output, input, stride, padding, dilation, groups);
  const Tensor delta = positions_joined(grad_output) ? grad_output : torch::stable::contiguous(grad_output);
  const bool depthwise = omega.size(1) == 1 && g.outputs == g.channels;
  with_omega_type(omega, [&]<class T>() {
    const auto run = Winograd<T>(g).pays() ? run_winograd<T> : depthwise ? run_depthwise<T> : run_tiled<T>;
    run(omega, g, delta, input, square);
  });
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) { m.impl("accumulate_conv_", TORCH_BOX(&mas_fast::cpu::accumulate_conv_)); }
