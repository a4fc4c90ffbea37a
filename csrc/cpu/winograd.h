// Ω of convolutions of 3 × 3 with steps of 1, by Winograd's minimal filtering: F(3×3, 2×2) of Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", 2015.
//
// δ is cut into tiles of 2 × 2 positions, and with each goes the 4 × 4 of x that it meets. Both are turned into 4 × 4
// points, by sums and differences; at each point, the products of δ and x are summed over the tiles, as a matrix
// product; and the 16 sums of a sample make its 3 × 3 gradients, of which |·| is added. That is 16 multiply-adds for
// every tile, output and channel, where the convolution itself has 36, and all that is read or written between is in a
// cache, but for large layers. As of the direct sum, the error is some eps of ‖δ‖‖x‖ of a sample, output and channel:
// but here of all nine entries alike, so that one that is 0, or small beside the others, may come out as their
// rounding.
//
// Ω is divided among the threads, so nothing is reduced between them and the result does not depend on their number. A
// thread turns a panel of channels of x for some samples, and runs it against all panels of δ, turned once for all.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/conv.h"
#include "cpu/tiled.h"

namespace mas_fast::cpu {

constexpr int64_t kTaps = 9;
// Points of δ of a chunk of samples, or of a band of rows of a large image.
constexpr int64_t kWinogradBytes = 1 << 20;
// Fewest tiles of a band, however many outputs there are: what is summed so far is read and written once for each.
constexpr int64_t kLeastTiles = 128;
// What is summed so far of a sample in several bands: of more outputs than that, some are done after the others.
constexpr int64_t kPartialBytes = 8 << 20;

template <class T>
class Winograd {
 public:
  explicit Winograd(const Geometry& geometry)
      : g_(geometry),
        kernel_(kernels_for<T>()),
        tile_rows_((g_.out[1] + 1) / 2),
        row_tiles_((g_.out[2] + 1) / 2),
        image_rows_(g_.out[0] * tile_rows_),
        group_outputs_(g_.outputs / g_.groups),
        group_channels_(g_.channels / g_.groups),
        output_panels_(ceil_div(group_outputs_, kernel_.tile_rows)),
        column_panels_(ceil_div(group_channels_, kernel_.tile_columns)) {}

  // Whether this is such a convolution, and the sums of products outweigh what is done beside them.
  bool pays() const {
    const Axes ones{1, 1, 1};
    if (g_.kernel != Axes{1, 3, 3} || g_.stride != ones || g_.dilation != ones || g_.padding[0] != 0) return false;
    // Vector instructions per sample and group, from what the parts were measured to take. Narrower vectors
    // come with 16 registers on x86, which hold neither the 16 points of an entry nor a tile that hides latencies.
    const int64_t MR = kernel_.tile_rows, NV = kernel_.tile_columns / kernel_.lanes;
    const int64_t pairs = output_panels_ * column_panels_, tiles = image_rows_ * row_tiles_;
    const bool wide = kernel_.lanes * int64_t(sizeof(T)) == 64;
    const int64_t point = wide ? 16 : 22, turn_delta = wide ? 16 : 32, fold = wide ? 120 : 180;
    const int64_t turns = 128 * NV * column_panels_ + turn_delta * MR * output_panels_;
    const int64_t own = tiles * (point * MR * NV * pairs + turns) + fold * MR * NV * pairs;
    const int64_t direct_panels = output_panels_ * ceil_div(kTaps * group_channels_, kernel_.tile_columns);
    const int64_t direct = MR * NV * direct_panels * (g_.positions() + 6);
    return 10 * own < 9 * direct;
  }

  void accumulate(const Deltas& delta, const Images& x, int64_t samples, Magnitude magnitude, T* omega) const {
    const int64_t row_bytes =
        kPoints * row_tiles_ * g_.groups * output_panels_ * kernel_.tile_rows * int64_t(sizeof(T));
    const int64_t band = std::max(kWinogradBytes / row_bytes, ceil_div(kLeastTiles, row_tiles_));
    if (band < image_rows_) return accumulate_bands(delta, x, samples, band, magnitude, omega);
    const int64_t chunk = std::clamp<int64_t>(kWinogradBytes / (row_bytes * image_rows_), 1, samples);
    accumulate_chunks(delta, x, samples, chunk, magnitude, omega);
  }

 private:
  // What is turned at once: rows of tiles of some samples, and panels of outputs of every group.
  struct Part {
    int64_t sample, samples, row, rows, panel, panels;
  };

  // Of images in one band, some samples at a time. The magnitudes of all chunks are kept: Ω itself, whose entries are
  // scattered, is met once.
  void accumulate_chunks(const Deltas& delta, const Images& x, int64_t samples, int64_t chunk, Magnitude magnitude,
                         T* omega) const {
    const int64_t size = kTaps * kernel_.tile_rows * kernel_.tile_columns, panels = g_.groups * output_panels_;
    const Scratch<T> points(chunk * panels * points_size(image_rows_ * row_tiles_, kernel_.tile_rows));
    const Scratch<T> kept(panels * column_panels_ * size);
    std::fill_n(kept.get(), panels * column_panels_ * size, T(0));
    for (int64_t first = 0; first < samples; first += chunk) {
      const Part part{first, std::min(chunk, samples - first), 0, image_rows_, 0, output_panels_};
      turn_deltas(delta, part, points.get());
      for_pairs(x, part, points.get(), [&](int64_t columns, int64_t o, const auto& sum, T* sums) {
        for (int64_t n = 0; n < part.samples; ++n) {
          sum(n, sums);
          kernel_.winograd_fold(sums, magnitude, kept.get() + (columns * output_panels_ + o) * size);
        }
      });
    }
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t c = 0; c < column_panels_; ++c) {
          const int64_t columns = i / output_panels_ * column_panels_ + c, o = i % output_panels_;
          add(kept.get() + (columns * output_panels_ + o) * size, columns, o, omega);
        }
      }
    });
  }

  // Of images in several bands, one sample at a time, whose sums so far are kept: of a slice of the outputs.
  void accumulate_bands(const Deltas& delta, const Images& x, int64_t samples, int64_t band, Magnitude magnitude,
                        T* omega) const {
    const int64_t tile = kernel_.tile_rows * kernel_.tile_columns;
    const int64_t panel_bytes = g_.groups * column_panels_ * kPoints * tile * int64_t(sizeof(T));
    const int64_t slice = std::clamp<int64_t>(kPartialBytes / panel_bytes, 1, output_panels_);
    const Scratch<T> points(g_.groups * slice * points_size(band * row_tiles_, kernel_.tile_rows));
    const Scratch<T> kept(g_.groups * column_panels_ * slice * kPoints * tile);
    const auto run = [&](const Part& part) {
      turn_deltas(delta, part, points.get());
      for_pairs(x, part, points.get(), [&](int64_t columns, int64_t o, const auto& sum, T* magnitudes) {
        T* const so_far = kept.get() + (columns * slice + o) * kPoints * tile;
        sum(0, so_far);
        if (part.row + part.rows < image_rows_) return;
        std::fill_n(magnitudes, kTaps * tile, T(0));
        kernel_.winograd_fold(so_far, magnitude, magnitudes);
        add(magnitudes, columns, part.panel + o, omega);
      });
    };
    for (int64_t panel = 0; panel < output_panels_; panel += slice) {
      for (int64_t n = 0; n < samples; ++n) {
        for (int64_t row = 0; row < image_rows_; row += band) {
          run({n, 1, row, std::min(band, image_rows_ - row), panel, std::min(slice, output_panels_ - panel)});
        }
      }
    }
  }

  // The points of all δ of a part, as [group, panel, sample, point, tile].
  void turn_deltas(const Deltas& delta, const Part& part, T* points) const {
    const int64_t size = points_size(part.rows * row_tiles_, kernel_.tile_rows);
    torch::stable::parallel_for(0, g_.groups * part.panels * part.samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = part.sample + i % part.samples, panel = i / part.samples;
        turn_delta(delta, n, panel / part.panels, part.panel + panel % part.panels, part.row, part.rows,
                   points + i * size);
      }
    });
  }

  // Calls then(columns, o, sum, scratch) for every panel of channels, of all groups, with every panel of outputs of its
  // group in the part: sum(n, to) makes the 16 sums of sample n, beginning from those in `to` below the first row. The
  // scratch, of 16 sums, is the thread's.
  template <class Then>
  void for_pairs(const Images& x, const Part& part, const T* points, const Then& then) const {
    const int64_t MR = kernel_.tile_rows, NR = kernel_.tile_columns, tiles = part.rows * row_tiles_;
    const int64_t delta_size = points_size(tiles, MR), x_size = points_size(tiles, NR);
    const int64_t all_columns = g_.groups * column_panels_;
    const int64_t wanted = kTasksPerThread * int64_t(torch::stable::get_num_threads());
    const int64_t blocks = std::clamp<int64_t>(ceil_div(wanted, all_columns), 1, part.panels);
    torch::stable::parallel_for(0, all_columns * blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> turned(part.samples * x_size), scratch(kPoints * MR * NR);
      int64_t held = -1;  // the panel of channels that is turned
      for (int64_t task = begin; task < end; ++task) {
        const int64_t columns = task / blocks, group = columns / column_panels_, block = task % blocks;
        if (columns != held) {
          for (int64_t n = 0; n < part.samples; ++n) {
            turn_x(x, part.sample + n, group, columns % column_panels_, part.row, part.rows, turned.get() + n * x_size);
          }
          held = columns;
        }
        for (int64_t o = block * part.panels / blocks; o < (block + 1) * part.panels / blocks; ++o) {
          const T* const deltas = points + (group * part.panels + o) * part.samples * delta_size;
          const auto sum = [&](int64_t n, T* to) {
            kernel_.winograd_sum(deltas + n * delta_size, point_stride(tiles, MR), turned.get() + n * x_size,
                                 point_stride(tiles, NR), tiles, part.row > 0, to);
          };
          then(columns, o, sum, scratch.get());
        }
      }
    });
  }

  // A point's tiles, one after the other, and a gap of one more: Kernels::winograd_delta may write into it. Without it,
  // points would also stand whole pages apart, all in one set of the first-level cache.
  static int64_t point_stride(int64_t tiles, int64_t width) { return (tiles + 1) * width; }
  static int64_t points_size(int64_t tiles, int64_t width) { return kPoints * point_stride(tiles, width); }

  // Entries that Kernels::winograd_delta may read beyond two rows of δ.
  static constexpr int64_t kSpare = 8;

  // The points of some rows of tiles of a panel of δ.
  void turn_delta(const Deltas& delta, int64_t n, int64_t group, int64_t panel, int64_t row, int64_t rows,
                  T* dst) const {
    const int64_t MR = kernel_.tile_rows, W = g_.out[2], width = 2 * row_tiles_;
    const int64_t first = panel * MR, output = group * group_outputs_ + first;
    const int64_t outputs = std::min(MR, group_outputs_ - first);
    const int64_t size = 2 * width * MR;  // two rows of δ, of even length
    const Scratch<T> packed(size + kSpare);
    std::fill_n(packed.get(), size + kSpare, T(0));
    for (int64_t r = row; r < row + rows; ++r) {
      const int64_t depth = r / tile_rows_, h = r % tile_rows_ * 2, count = std::min<int64_t>(2, g_.out[1] - h);
      if (count < 2) std::fill_n(packed.get() + width * MR, width * MR, T(0));
      const auto pack = [&](int64_t from, int64_t positions, T* to) {
        kernel_.pack(delta.type, delta.sample(n, output, from), positions, outputs, MR, Magnitude::kPlain, to);
      };
      const int64_t position = (depth * g_.out[1] + h) * W;
      if (W == width) {
        pack(position, count * W, packed.get());
      } else {
        for (int64_t i = 0; i < count; ++i) pack(position + i * W, W, packed.get() + i * width * MR);
      }
      kernel_.winograd_delta(packed.get(), row_tiles_, dst + (r - row) * row_tiles_ * MR,
                             point_stride(rows * row_tiles_, MR));
    }
  }

  // The points of some rows of tiles of a panel of channels of x.
  void turn_x(const Images& x, int64_t n, int64_t group, int64_t panel, int64_t row, int64_t rows, T* dst) const {
    const int64_t NR = kernel_.tile_columns, W = g_.in[2], row_size = (2 * row_tiles_ + 2) * NR;
    const int64_t first = panel * NR, channels = std::min(NR, group_channels_ - first);
    // The last four rows of the padded image that were read, row r at r % 4; margins and spare channels stay 0. They
    // come by way of rows without margins, which can be turned together: a short one is no vector.
    const Scratch<T> ring(4 * row_size), dense(4 * W * NR);
    std::fill_n(ring.get(), 4 * row_size, T(0));
    std::fill_n(dense.get(), 4 * W * NR, T(0));
    const bool rows_joined = x.along(1) == W * x.along(2);
    const auto read = [&](int64_t depth, int64_t padded_begin, int64_t padded_end) {
      const int64_t begin = std::max(padded_begin - g_.padding[1], int64_t(0));
      const int64_t end = std::min(padded_end - g_.padding[1], g_.in[1]);
      const int64_t at = n * x.stride[0] + (group * group_channels_ + first) * x.stride[1] + depth * x.along(0);
      for (int64_t h = begin; h < end; h += rows_joined ? end - begin : 1) {
        kernel_.transpose(x.type, {x.at(at + h * x.along(1)), x.stride[1], x.along(2)}, channels,
                          rows_joined ? (end - begin) * W : W, dense.get() + (h - begin) * W * NR, NR);
      }
      for (int64_t r = padded_begin; r < padded_end; ++r) {
        const int64_t h = r - g_.padding[1];
        T* const to = ring.get() + r % 4 * row_size + g_.padding[2] * NR;
        const bool inside = begin <= h && h < end;
        inside ? std::copy_n(dense.get() + (h - begin) * W * NR, W * NR, to) : std::fill_n(to, W * NR, T(0));
      }
    };
    for (int64_t r = row; r < row + rows; ++r) {
      const int64_t depth = r / tile_rows_, h = r % tile_rows_ * 2;
      read(depth, r == row || h == 0 ? h : h + 2, h + 4);
      const T* four[4];
      for (int64_t i = 0; i < 4; ++i) four[i] = ring.get() + (h + i) % 4 * row_size;
      kernel_.winograd_x(four, row_tiles_, dst + (r - row) * row_tiles_ * NR, point_stride(rows * row_tiles_, NR));
    }
  }

  // Adds [tap, o, c] of a panel of outputs and one of channels, counted through all groups, to Ω.
  void add(const T* own, int64_t columns, int64_t o, T* omega) const {
    const int64_t MR = kernel_.tile_rows, NR = kernel_.tile_columns, tile = MR * NR;
    const int64_t output = columns / column_panels_ * group_outputs_ + o * MR, first = columns % column_panels_ * NR;
    for (int64_t m = 0; m < std::min(MR, group_outputs_ - o * MR); ++m) {
      T* const row = omega + ((output + m) * group_channels_ + first) * kTaps;
      for (int64_t c = 0; c < std::min(NR, group_channels_ - first); ++c) {
        for (int64_t k = 0; k < kTaps; ++k) row[c * kTaps + k] += own[k * tile + m * NR + c];
      }
    }
  }

  const Geometry& g_;
  const Kernels<T>& kernel_;
  int64_t tile_rows_, row_tiles_;  // of one depth; tiles in each
  int64_t image_rows_;             // rows of tiles of all depths
  int64_t group_outputs_, group_channels_, output_panels_, column_panels_;
};

}  // namespace mas_fast::cpu
