// What a convolution over one, two or three axes is: its sizes, and where its tensors are.
#pragma once

#include <array>
#include <vector>

#include "cpu/data.h"

namespace mas_fast::cpu {

using Axes = std::array<int64_t, 3>;  // depth, height, width; axes that are not there have length 1

struct Geometry {
  Axes in, out, kernel, stride{1, 1, 1}, padding{0, 0, 0}, dilation{1, 1, 1}, padded;
  int64_t channels, outputs, groups;

  int64_t positions() const { return out[0] * out[1] * out[2]; }
  int64_t entries() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t padded_positions() const { return padded[0] * padded[1] * padded[2]; }
  // Place of a padded position in channels-last memory, in units of all channels.
  int64_t place(int64_t d, int64_t h, int64_t w) const { return (d * padded[1] + h) * padded[2] + w; }
};

inline Axes sizes_from(const Tensor& t) {
  Axes axes{1, 1, 1};
  for (int64_t a = 2; a < t.dim(); ++a) axes[a - t.dim() + 3] = t.size(a);
  return axes;
}

inline Geometry geometry_of(const Tensor& omega, const Tensor& delta, const Tensor& x,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  Geometry g;
  g.in = sizes_from(x);
  g.out = sizes_from(delta);
  g.kernel = sizes_from(omega);
  g.channels = x.size(1);
  g.outputs = delta.size(1);
  g.groups = groups;
  const int64_t first = 3 - int64_t(stride.size());
  for (size_t a = 0; a < stride.size(); ++a) {
    STD_TORCH_CHECK(stride[a] > 0 && padding[a] >= 0 && dilation[a] > 0,
                    "stride and dilation must be positive, padding not negative");
    g.stride[first + a] = stride[a];
    g.padding[first + a] = padding[a];
    g.dilation[first + a] = dilation[a];
  }
  for (int a = 0; a < 3; ++a) {
    g.padded[a] = g.in[a] + 2 * g.padding[a];
    STD_TORCH_CHECK((g.padded[a] - g.dilation[a] * (g.kernel[a] - 1) - 1) / g.stride[a] + 1 == g.out[a] &&
                        g.padded[a] >= g.dilation[a] * (g.kernel[a] - 1) + 1,
                    "grad_output must have the shape of the convolution's output");
  }
  return g;
}

// From one position to the next: the stride of the last axis that has a next one, since those of length 1 have any.
inline int64_t position_stride(const Tensor& t) {
  int64_t a = t.dim() - 1;
  while (a > 2 && t.size(a) == 1) --a;
  return t.stride(a);
}
// Whether the positions of a tensor are one run with one stride, as channels-first and channels-last memory have them.
inline bool positions_joined(const Tensor& t) {
  int64_t expected = position_stride(t);
  for (int64_t a = t.dim() - 1; a >= 2; --a) {
    if (t.size(a) != 1 && t.stride(a) != expected) return false;
    expected *= t.size(a);
  }
  return true;
}

// x, whose positions may stand anywhere.
struct Images : View {
  explicit Images(const Tensor& t) : View(t) {}

  // From one position to the next along depth, height or width; 0 along one that is not there.
  int64_t along(int axis) const { return dims - 3 + axis >= 2 ? stride[dims - 3 + axis] : 0; }
};

// δ whose positions are joined.
struct Deltas : View {
  explicit Deltas(const Tensor& t) : View(t), position(position_stride(t)) {}

  // One sample as [p, o], from a position and an output on.
  Matrix sample(int64_t n, int64_t output, int64_t first = 0) const {
    return {at(n * stride[0] + output * stride[1] + first * position), position, stride[1]};
  }

  int64_t position;
};

}  // namespace mas_fast::cpu
