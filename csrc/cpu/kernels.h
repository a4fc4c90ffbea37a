// The inner loops of the CPU ops, compiled once per instruction set and chosen at run time (dispatch.cpp).
//
// Letters: N samples, T positions ("rows") per sample, O outputs, I inputs ("columns"), K entries of a vector
// parameter. Everything here works on raw memory: shapes, threads and dispatch are the business of the op files.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace mas_fast::cpu {

enum class Input { kFloat32, kFloat64, kBFloat16, kFloat16 };  // what data is read from
enum class Magnitude { kPlain, kAbs, kSquare };                // what is added: Σ v, Σ |v| or Σ v²

constexpr int64_t kPoints = 16;  // of Winograd's sums
// Of a packed panel, what stays in L1 while all that it is multiplied with meets it.
constexpr int64_t kBlockBytes = 24 << 10;

// A matrix in memory, element (r, c) at data[r * row_stride + c * column_stride] (strides in elements).
struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
};

// [R, K, S] of one sample, strides in elements; 0 repeats.
struct Volume {
  const void* data;
  int64_t stride_r, stride_k, stride_s;
};

template <class T>
struct Kernels {
  int64_t tile_rows;     // outputs per register tile, and width of a packed δ panel
  int64_t tile_columns;  // inputs per register tile, and width of a packed x panel
  int64_t lanes;         // entries of a vector; divides tile_columns

  // dst[r, c] = magnitude(src[r, c]) for c < columns, 0 for columns <= c < width. dst is dense, [rows, width].
  void (*pack)(Input type, Matrix src, int64_t rows, int64_t columns, int64_t width, Magnitude magnitude, T* dst);

  // dst[r, c] = x[base[r] + offset[c]] for c < columns, 0 for columns <= c < tile_columns. dst is [rows, tile_columns].
  void (*pick)(const T* x, const int64_t* base, int64_t rows, const int64_t* offset, int64_t columns, T* dst);

  // tile[o, i] += Σ_n magnitude(Σ_t delta[n, t, o] x[n, t, i]); panels are packed, tile is [tile_rows, tile_columns].
  void (*tile)(const T* delta, const T* x, int64_t samples, int64_t rows, Magnitude magnitude, T* tile);

  // The same with x[n * sample_stride + base[t] + offset[i]]; every vector of `lanes` columns must have consecutive
  // offsets.
  void (*tile_in_place)(const T* delta, const T* x, int64_t sample_stride, const int64_t* base, const int64_t* offset,
                        int64_t samples, int64_t rows, Magnitude magnitude, T* tile);

  // into[i] += magnitude(from[i])
  void (*fold)(const T* from, int64_t count, Magnitude magnitude, T* into);

  // dst[s, c] = src[c, s]: channels-first to channels-last; dst rows are dst_stride apart.
  void (*transpose)(Input type, Matrix src, int64_t channels, int64_t positions, T* dst, int64_t dst_stride);

  // sums[k, c] = Σ_p delta[p, c] x[base[p] + offset[k] + c] for c < channels; delta rows are delta_stride apart.
  void (*depthwise)(const T* delta, int64_t delta_stride, const T* x, const int64_t* base, int64_t positions,
                    const int64_t* offset, int64_t kernel, int64_t channels, T* sums);

  // Winograd's points (winograd.h), entry `point` of tile t at dst[point * point_stride + t * width], of a row of
  // tiles: of δ from two rows of 2·tiles positions, [tile_rows] each, where up to 4 entries beyond the last may be
  // read, and written beyond the last tile of a point; of x from four rows of 2·tiles + 2, [tile_columns] each.
  void (*winograd_delta)(const T* delta, int64_t tiles, T* dst, int64_t point_stride);
  void (*winograd_x)(const T* const* rows, int64_t tiles, T* dst, int64_t point_stride);

  // sums[point, o, i] = Σ_t delta[point, t, o] x[point, t, i], added to what is there if `adds`.
  void (*winograd_sum)(const T* delta, int64_t delta_stride, const T* x, int64_t x_stride, int64_t tiles, bool adds,
                       T* sums);

  // into[tap, o, i] += magnitude of the gradient at the tap, made of the sums.
  void (*winograd_fold)(const T* sums, Magnitude magnitude, T* into);

  // weight[k] += magnitude(Σ_rs δ (x − mean) rstd), bias[k] += magnitude(Σ_rs δ) for k_begin <= k < k_end, one sample.
  // weight, bias, mean.data and rstd.data may be null; x.data may be null without weight.
  void (*affine)(Input type, Volume delta, Volume x, Volume mean, Volume rstd, int64_t R, int64_t S, int64_t k_begin,
                 int64_t k_end, Magnitude magnitude, T* weight, T* bias);

  // out[r, c] = start[c] + Σ_k a[r, k] w[k, c] for rows r, or out[r, c] += the sum if start is null; w [K, C] is packed
  // in panels of tile_columns, [K, tile_columns] each, zero beyond the edge; rows of a and out are a_stride and
  // out_stride apart.
  void (*multiply)(const T* a, int64_t a_stride, const T* w, int64_t rows, int64_t K, int64_t C, const T* start, T* out,
                   int64_t out_stride);

  // One sample's step through an LSTM of H cells, z = gates + recurrent of i, f, g, o: next = σ(f) ⊙ c + σ(i) ⊙
  // tanh(g), u = σ(o) ⊙ tanh(next), kept = σ(f), to_c = ∂u/∂next; gates become ∂next/∂z of i, f, g and ∂u/∂z of o.
  void (*lstm_ahead)(T* gates, const T* recurrent, const T* c, int64_t H, T* next, T* u, T* to_c, T* kept);

  // One sample's step back through an LSTM of H cells, with u all that arrives at o ⊙ tanh c: c += u ⊙ to_c; delta of
  // i, f, g is c ⊙ to_gates, that of o is u ⊙ to_gates; c *= kept. delta and to_gates are [4, H].
  void (*lstm_back)(const T* u, const T* to_gates, const T* to_c, const T* kept, int64_t H, T* c, T* delta);

  // omega[c] += magnitude(Σ_j rows[index[j], c]) for c < columns: the positions of one sample that share an embedding
  // row.
  void (*gather)(Input type, Matrix rows, const int64_t* index, int64_t count, int64_t columns, Magnitude magnitude,
                 T* omega);
};

// Entries that the loops of the training step take at once: whole blocks of codes, and few enough for all arrays to
// stay in the first-level cache.
constexpr int64_t kStepBlock = 1024;

struct StepSum {
  double value;
  int64_t lost;  // entries of the gradient that were finite before and are not now
};

// Ω and θ* of a block: nothing, numbers, or codes with bfloat16, the common small state, which is decoded on the way.
enum class Kept { kNothing, kNumbers, kCodes };

template <class T>
struct Holds {
  Kept kept = Kept::kNothing;
  const T *omega = nullptr, *anchor = nullptr;
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  const uint16_t* anchor_bits = nullptr;
};

// At most kStepBlock entries at a time. Where memory keeps T itself, arrays are the memory; elsewhere buffers of T.
template <class T>
struct StepKernels {
  // Returns the entries as T: where they are, or in the buffer. `scales` are those of codes, from the first entry on.
  const T* (*decode)(Storage storage, const void* from, int64_t count, const float* scales, T* buffer);

  // Writes entries back, rounded; nothing is done if `from` is where they belong.
  void (*encode)(Storage storage, const T* from, int64_t count, void* to);

  // grad[i] = before[i] + twice_factor λ Ω (θ − θ*); without `before` it starts from 0, without `grad` only the value
  // is wanted. What reaches `limit` will be inf in memory. Something must hold the entries.
  StepSum (*penalty)(T lam, T twice_factor, const T* theta, const Holds<T>& holds, int64_t count, T limit,
                     const T* before, T* grad);

  // Steps, returning the penalty before; next may be theta.
  double (*sgd)(const Sgd<T>& rule, T lam, const T* theta, const T* grad, const Holds<T>& holds, int64_t count,
                T* buffer, T* next);
  double (*adamw)(const AdamW<T>& rule, T lam, const T* theta, const T* grad, const Holds<T>& holds, int64_t count,
                  T* mean, T* square, T* largest, T* next);
};

struct KernelTable {
  const char* instruction_set;
  Kernels<float> f32;
  Kernels<double> f64;
  StepKernels<float> steps_f32;
  StepKernels<double> steps_f64;
};

const KernelTable& baseline_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();

// The widest that this machine runs; MAS_FAST_CPU_ISA=baseline|avx2|avx512 in the environment chooses a narrower one.
const KernelTable& kernels();

template <class T>
const Kernels<T>& kernels_for();
template <>
inline const Kernels<float>& kernels_for<float>() {
  return kernels().f32;
}
template <>
inline const Kernels<double>& kernels_for<double>() {
  return kernels().f64;
}

template <class T>
const StepKernels<T>& step_kernels_for();
template <>
inline const StepKernels<float>& step_kernels_for<float>() {
  return kernels().steps_f32;
}
template <>
inline const StepKernels<double>& step_kernels_for<double>() {
  return kernels().steps_f64;
}

}  // namespace mas_fast::cpu
