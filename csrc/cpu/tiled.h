// Ω[o, i] += Σ_n |Σ_t δ[n,t,o] x[n,t,i]| for everything that looks like a matrix product: linear layers and
// convolutions.
//
// Ω is divided among the threads, so nothing is reduced between them and the result does not depend on their number. A
// thread packs a panel of x (tile_columns wide) for some samples, and runs it against all panels of δ, packed once for
// all threads. A register tile takes a sample's sum over t and is added, as |·|, to the sums of a chunk, which go to Ω
// at its end: single samples would be lost in float32 beside a large Ω. Work: N·T·O·I multiply-adds, plus 2·N·O·I
// operations for |·|. Memory: δ of a chunk of samples, and a panel per thread; never a product of N and |θ|.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "cpu/data.h"

namespace mas_fast::cpu {

// Positions per packed panel: 1024 rows of 32 floats are 128 KiB, a fraction of the L2 of the machines of today.
constexpr int64_t kChunkRows = 1024;
// Packed δ of a chunk, unless a single sample has more.
constexpr int64_t kChunkBytes = 1 << 20;
// Tasks per thread, so that uneven ones even out.
constexpr int64_t kTasksPerThread = 16;
// Panels of outputs from which on a thread has its own: each element of x, which it packs for itself, meets 64 of them.
constexpr int64_t kPanelsPerThread = 8;

struct TiledShape {
  int64_t samples, rows;     // N, T
  int64_t groups;            // independent products
  int64_t outputs, columns;  // O and I of one group
  int64_t chunk_rows = kChunkRows;
};

// Samples that are packed and multiplied together.
template <class T>
int64_t chunk_samples(const TiledShape& shape) {
  const int64_t sample_bytes = shape.rows * shape.groups * shape.outputs * int64_t(sizeof(T));
  const int64_t most = std::min(shape.chunk_rows / shape.rows, kChunkBytes / sample_bytes);
  return std::clamp<int64_t>(most, 1, shape.samples);
}

// Where a panel of x is: packed at x, or, with a base, in place as Kernels::tile_in_place reads it.
template <class T>
struct PanelOfX {
  const T* x;
  int64_t sample_stride = 0;
  const int64_t *base = nullptr, *offset = nullptr;

  // The same panel from a row of a sample on, where a packed one has `rows` rows of `width` columns for each sample.
  PanelOfX from(int64_t sample, int64_t row, int64_t rows, int64_t width) const {
    if (base) return {x + sample * sample_stride, sample_stride, base + row, offset};
    return {x + (sample * rows + row) * width};
  }
};

// Ω of `groups` products, its rows evenly apart; within a row, columns stand at column_offset, or side by side if that
// is null.
template <class T>
struct OmegaRows {
  T* data;
  int64_t group_stride, stride;
  const int64_t* column_offset = nullptr;
  T* row(int64_t group, int64_t output) const { return data + group * group_stride + output * stride; }
};

template <class T>
void run_tile(const T* delta, const PanelOfX<T>& panel, int64_t samples, int64_t rows, Magnitude magnitude, T* tile) {
  const Kernels<T>& kernel = kernels_for<T>();
  if (!panel.base) return kernel.tile(delta, panel.x, samples, rows, magnitude, tile);
  kernel.tile_in_place(delta, panel.x, panel.sample_stride, panel.base, panel.offset, samples, rows, magnitude, tile);
}

// pack_delta(group, sample, output, dst) writes a packed panel of one sample's δ, zero beyond the group's edge.
// panel_of_x(group, sample, samples, row, rows, column, dst) says where a panel of x is, after packing it to dst if
// need be. prepare(sample, samples) is called, on one thread, before a chunk of samples; null if there is nothing to
// do.
template <class T, class PackDelta, class FindX, class Prepare>
void accumulate_tiled(const TiledShape& shape, Magnitude magnitude, const PackDelta& pack_delta,
                      const FindX& panel_of_x, const OmegaRows<T>& omega, const Prepare& prepare) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t MR = kernel.tile_rows, NR = kernel.tile_columns, tile_size = MR * NR;
  const int64_t output_panels = ceil_div(shape.outputs, MR), column_panels = ceil_div(shape.columns, NR);
  if (shape.samples * shape.rows * shape.groups * output_panels * column_panels == 0) return;

  const int64_t chunk = chunk_samples<T>(shape);
  // A panel is packed for all samples of the chunk, or for a long one's rows part by part.
  const bool packs_chunk = shape.rows <= shape.chunk_rows;
  const int64_t packed_rows = std::min(shape.rows, shape.chunk_rows);
  const int64_t block = kBlockBytes / (NR * int64_t(sizeof(T)));
  // With enough outputs, each thread has its own, and meets no δ but what it has packed itself: to read what another
  // core has just written costs as much as packing it. Else tasks are pieces of Ω, those of the same panel of x
  // together.
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const int64_t wanted = kTasksPerThread * threads;
  const bool by_outputs = shape.groups == 1 && output_panels >= kPanelsPerThread * threads;
  const int64_t output_blocks =
      by_outputs ? threads : std::clamp<int64_t>(ceil_div(wanted, shape.groups * column_panels), 1, output_panels);
  const int64_t most = ceil_div(output_panels, output_blocks);
  const auto first_panel = [&](int64_t output_block) { return output_block * output_panels / output_blocks; };

  const int64_t panel_size = chunk * shape.rows * MR;  // one packed panel of δ
  const Scratch<T> delta(shape.groups * output_panels * panel_size);
  const auto pack = [&](int64_t first, int64_t count, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i % count, panel = i / count % output_panels, group = i / count / output_panels;
      pack_delta(group, first + n, panel * MR,
                 delta.get() + (group * output_panels + panel) * panel_size + n * shape.rows * MR);
    }
  };
  const auto run = [&](int64_t first, int64_t count, int64_t begin, int64_t end) {
    const Scratch<T> x(chunk * packed_rows * NR);
    // Sums of |·| of the chunk, and for samples of several blocks their plain sums so far, unless these are what is
    // wanted.
    const bool plain = magnitude == Magnitude::kPlain;
    const Scratch<T> totals(most * tile_size), partials(shape.rows > block && !plain ? most * tile_size : 0);
    T* const partial = plain ? totals.get() : partials.get();
    PanelOfX<T> packed{};  // tasks of the same panel follow one another
    for (int64_t task = begin; task < end; ++task) {
      const int64_t output_block = by_outputs ? task / column_panels : task % output_blocks;
      const int64_t panel = by_outputs ? task % column_panels : task / output_blocks % column_panels;
      const int64_t group = task / (output_blocks * column_panels);
      const int64_t o_begin = first_panel(output_block), o_end = first_panel(output_block + 1);
      const int64_t columns = std::min(NR, shape.columns - panel * NR);
      const T* deltas = delta.get() + group * output_panels * panel_size;
      std::fill_n(totals.get(), (o_end - o_begin) * tile_size, T(0));
      const auto each_row = [&](int64_t o, auto f) {
        for (int64_t i = 0; i < std::min(MR, shape.outputs - o * MR); ++i) f(i * NR, omega.row(group, o * MR + i));
      };
      // Ω is met once a chunk, and cold by then.
      const auto prefetch = [&](int64_t o) {
        if (omega.column_offset) return;
        constexpr int64_t kLine = 64 / sizeof(T);
        each_row(o, [&](int64_t, const T* row) {
          for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(row + panel * NR + c, 1);
        });
      };
      // All panels of δ against some rows of some samples of the panel of x, which stay in L1 meanwhile.
      const auto run_block = [&](const PanelOfX<T>& own, int64_t n, int64_t samples, int64_t row, int64_t rows,
                                 Magnitude m, T* sums) {
        for (int64_t o = o_begin; o < o_end; ++o) {
          if (n == 0 && row == 0) prefetch(o);
          run_tile(deltas + o * panel_size + (n * shape.rows + row) * MR, own, samples, rows, m,
                   sums + (o - o_begin) * tile_size);
        }
      };
      if (packs_chunk && (by_outputs || task == begin || output_block == 0)) {
        packed = panel_of_x(group, first, count, 0, shape.rows, panel * NR, x.get());
      }
      if (shape.rows <= block) {
        const int64_t step = std::max<int64_t>(block / shape.rows, 1);
        for (int64_t n = 0; n < count; n += step) {
          run_block(packed.from(n, 0, shape.rows, NR), n, std::min(step, count - n), 0, shape.rows, magnitude,
                    totals.get());
        }
      } else {
        for (int64_t n = 0; n < count; ++n) {
          if (!plain) std::fill_n(partial, (o_end - o_begin) * tile_size, T(0));
          for (int64_t packed_row = 0; packed_row < shape.rows; packed_row += packed_rows) {
            const int64_t packed_end = std::min(packed_row + packed_rows, shape.rows);
            if (!packs_chunk) {
              packed = panel_of_x(group, first + n, 1, packed_row, packed_end - packed_row, panel * NR, x.get());
            }
            for (int64_t row = packed_row; row < packed_end; row += block) {
              const PanelOfX<T> own =
                  packs_chunk ? packed.from(n, row, shape.rows, NR) : packed.from(0, row - packed_row, 0, NR);
              run_block(own, n, 1, row, std::min(block, packed_end - row), Magnitude::kPlain, partial);
            }
          }
          if (!plain) kernel.fold(partial, (o_end - o_begin) * tile_size, magnitude, totals.get());
        }
      }
      for (int64_t o = o_begin; o < o_end; ++o) {
        const T* const sums = totals.get() + (o - o_begin) * tile_size;
        each_row(o, [&](int64_t i, T* row) {
          if (!omega.column_offset) return kernel.fold(sums + i, columns, Magnitude::kPlain, row + panel * NR);
          for (int64_t c = 0; c < columns; ++c) row[omega.column_offset[panel * NR + c]] += sums[i + c];
        });
      }
    }
  };

  const auto each_chunk = [&](auto f) {
    for (int64_t first = 0; first < shape.samples; first += chunk) f(first, std::min(chunk, shape.samples - first));
  };
  constexpr bool alone = std::is_null_pointer_v<Prepare>;
  if (alone && by_outputs) {
    // No thread waits for another.
    return torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      each_chunk([&](int64_t first, int64_t count) {
        pack(first, count, first_panel(begin) * count, first_panel(end) * count);
        run(first, count, begin * column_panels, end * column_panels);
      });
    });
  }
  each_chunk([&](int64_t first, int64_t count) {
    if constexpr (!alone) prepare(first, count);
    // Packing less than 32 Ki entries is not worth waking a thread.
    const int64_t grain = ceil_div(32768, shape.rows * MR);
    torch::stable::parallel_for(0, shape.groups * output_panels * count, grain,
                                [&](int64_t begin, int64_t end) { pack(first, count, begin, end); });
    torch::stable::parallel_for(0, shape.groups * column_panels * output_blocks, 1,
                                [&](int64_t begin, int64_t end) { run(first, count, begin, end); });
  });
}

}  // namespace mas_fast::cpu
