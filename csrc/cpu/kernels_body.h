// The inner loops, written once with GCC/Clang vectors of MAS_FAST_VECTOR_BYTES, in an anonymous namespace.
//
// Included by one file per instruction set. Nothing of the standard library with a body may be used here: its inline
// functions would be compiled with AVX-512 and could be merged into code that runs on machines without it.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace mas_fast::cpu {
namespace {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using Vector = float __attribute__((vector_size(MAS_FAST_VECTOR_BYTES)));
  using Eight = float __attribute__((vector_size(32)));
  using Bits = uint32_t __attribute__((vector_size(MAS_FAST_VECTOR_BYTES)));
  using Signed = int32_t __attribute__((vector_size(MAS_FAST_VECTOR_BYTES)));
  static constexpr uint32_t kMagnitudeMask = 0x7fffffffu;
};
template <>
struct Lanes<double> {
  using Vector = double __attribute__((vector_size(MAS_FAST_VECTOR_BYTES)));
  using Eight = double __attribute__((vector_size(64)));
  using Bits = uint64_t __attribute__((vector_size(MAS_FAST_VECTOR_BYTES)));
  static constexpr uint64_t kMagnitudeMask = 0x7fffffffffffffffull;
};
template <class T>
using Vector = typename Lanes<T>::Vector;
template <class T>
constexpr int64_t kWidth = MAS_FAST_VECTOR_BYTES / sizeof(T);
// Vectors by which reads of many rows at once are fetched ahead.
constexpr int64_t kAhead = 4;

// Storage types of data; arithmetic is in float, or in double for double.
struct BFloat16 {
  uint16_t bits;
  operator float() const { return from_bfloat16(bits); }
};
struct Float16 {
  uint16_t bits;
  operator float() const { return from_float16(bits); }
};

template <class T, class In>
inline Vector<T> load(const In* p) {
  Vector<T> v;
  if constexpr (sizeof(In) == sizeof(T)) {
    std::memcpy(&v, p, sizeof v);
  } else {
    for (int64_t i = 0; i < kWidth<T>; ++i) v[i] = T(p[i]);
  }
  return v;
}
template <class T>
inline void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};  // x − 0 is x, and costs nothing; 0 + x is not, for x = −0
}
template <class T>
inline T lane_sum(Vector<T> v) {
  T sum = 0;
  for (int64_t i = 0; i < kWidth<T>; ++i) sum += v[i];
  return sum;
}

template <Magnitude M, class T>
inline Vector<T> magnitude(Vector<T> v) {
  if constexpr (M == Magnitude::kSquare) return v * v;
  if constexpr (M == Magnitude::kAbs) {
    return (Vector<T>)((typename Lanes<T>::Bits)v & Lanes<T>::kMagnitudeMask);
  }
  return v;
}
template <Magnitude M, class T>
inline T magnitude_of(T v) {
  if constexpr (M == Magnitude::kSquare) return v * v;
  if constexpr (M == Magnitude::kAbs) return v < 0 ? -v : v;
  return v;
}

// Turns run-time choices into template arguments.
template <class F>
inline void with_magnitude(Magnitude m, F f) {
  if (m == Magnitude::kAbs) return f.template operator()<Magnitude::kAbs>();
  if (m == Magnitude::kSquare) return f.template operator()<Magnitude::kSquare>();
  return f.template operator()<Magnitude::kPlain>();
}
template <class T, class F>
inline void with_input(Input type, F f) {
  if constexpr (sizeof(T) == 8) {
    f.template operator()<double>();
  } else {
    if (type == Input::kBFloat16) return f.template operator()<BFloat16>();
    if (type == Input::kFloat16) return f.template operator()<Float16>();
    f.template operator()<float>();
  }
}

// Interleaves the low, or the high, halves of two vectors.
template <class T, bool HIGH>
inline Vector<T> zip(Vector<T> a, Vector<T> b) {
  constexpr int W = kWidth<T>, H = HIGH ? W / 2 : 0;
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  if constexpr (W == 16) {
    return __builtin_shufflevector(a, b, H, H + W, H + 1, H + 1 + W, H + 2, H + 2 + W, H + 3, H + 3 + W, H + 4,
                                   H + 4 + W, H + 5, H + 5 + W, H + 6, H + 6 + W, H + 7, H + 7 + W);
  } else if constexpr (W == 8) {
    return __builtin_shufflevector(a, b, H, H + W, H + 1, H + 1 + W, H + 2, H + 2 + W, H + 3, H + 3 + W);
  } else if constexpr (W == 4) {
    return __builtin_shufflevector(a, b, H, H + W, H + 1, H + 1 + W);
  } else {
    return __builtin_shufflevector(a, b, H, H + W);
  }
#else
  Vector<T> zipped;
  for (int i = 0; i < W / 2; ++i) {
    zipped[2 * i] = a[H + i];
    zipped[2 * i + 1] = b[H + i];
  }
  return zipped;
#endif
}

// R ≤ W rows of W entries change rows and columns in registers, in log2(R) rounds of interleaving row i with row i +
// R/2: all rows' first entries come first, then all second ones, …
template <class T, int R>
inline void interleave(Vector<T> (&row)[R]) {
  Vector<T> next[R];
  for (int round = 1; round < R; round *= 2) {
    for (int i = 0; i < R / 2; ++i) {
      next[2 * i] = zip<T, false>(row[i], row[i + R / 2]);
      next[2 * i + 1] = zip<T, true>(row[i], row[i + R / 2]);
    }
    for (int i = 0; i < R; ++i) row[i] = next[i];
  }
}

// A full panel: the width is known to the compiler, so a row is a few vector moves. The panels to its right are packed
// next, and are fetched ahead: rows are often a page apart, where the hardware sees no stream.
template <class T, class In, Magnitude M, int64_t WIDTH>
void pack_full(const In* __restrict data, int64_t row_stride, int64_t rows, T* __restrict dst) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t r = 0; r < rows; ++r, data += row_stride, dst += WIDTH) {
    for (int64_t c = 0; c < WIDTH; c += W) __builtin_prefetch(data + 2 * WIDTH + c);
    if constexpr (WIDTH % W == 0) {
      for (int64_t c = 0; c < WIDTH; c += W) store<T>(dst + c, magnitude<M, T>(load<T>(data + c)));
    } else {
      for (int64_t c = 0; c < WIDTH; ++c) dst[c] = magnitude_of<M>(T(data[c]));
    }
  }
}

// The same where the entries of a column are contiguous. Columns are often 4 KiB apart, where few of them fit L1 at
// once: each is read by vectors, once.
template <class T, class In, Magnitude M, int64_t WIDTH>
void pack_turned(const In* __restrict data, int64_t column_stride, int64_t rows, T* __restrict dst) {
  constexpr int64_t W = kWidth<T>;
  int64_t r = 0;
  if constexpr ((WIDTH & (WIDTH - 1)) == 0 && WIDTH <= W) {
    for (; r + W <= rows; r += W, data += W, dst += W * WIDTH) {
      Vector<T> column[WIDTH];
      for (int64_t c = 0; c < WIDTH; ++c) {
        column[c] = magnitude<M, T>(load<T>(data + c * column_stride));
        __builtin_prefetch(data + c * column_stride + kAhead * W);
      }
      interleave<T, WIDTH>(column);
      for (int64_t c = 0; c < WIDTH; ++c) store<T>(dst + c * W, column[c]);
    }
  }
  for (; r < rows; ++r, ++data, dst += WIDTH) {
    for (int64_t c = 0; c < WIDTH; ++c) dst[c] = magnitude_of<M>(T(data[c * column_stride]));
  }
}

template <class T, int64_t MR, int64_t NR>
void pack(Input type, Matrix src, int64_t rows, int64_t columns, int64_t width, Magnitude m, T* dst) {
  with_input<T>(type, [&]<class In>() {
    with_magnitude(m, [&]<Magnitude M>() {
      const In* data = static_cast<const In*>(src.data);
      if (columns == MR && width == MR && src.column_stride == 1) {
        return pack_full<T, In, M, MR>(data, src.row_stride, rows, dst);
      }
      if (columns == NR && width == NR && src.column_stride == 1) {
        return pack_full<T, In, M, NR>(data, src.row_stride, rows, dst);
      }
      if (columns == MR && width == MR && src.row_stride == 1) {
        return pack_turned<T, In, M, MR>(data, src.column_stride, rows, dst);
      }
      for (int64_t r = 0; r < rows; ++r, dst += width) {
        const In* row = data + r * src.row_stride;
        int64_t c = 0;
        for (; c < columns; ++c) dst[c] = magnitude_of<M>(T(row[c * src.column_stride]));
        for (; c < width; ++c) dst[c] = 0;
      }
    });
  });
}

// dst[r, c] = x[base[r] + offset[c]], in vectors where the offsets of a vector's columns follow each other.
template <class T, int NV>
void pick(const T* __restrict x, const int64_t* base, int64_t rows, const int64_t* offset, int64_t columns,
          T* __restrict dst) {
  constexpr int64_t W = kWidth<T>;
  for (int v = 0; v < NV; ++v) {
    const int64_t* own = offset + v * W;
    const int64_t count = columns - v * W < W ? (columns - v * W < 0 ? 0 : columns - v * W) : W;
    bool run = count == W;
    for (int64_t c = 1; c < count; ++c) run = run && own[c] == own[0] + c;
    T* to = dst + v * W;
    if (run) {
      const T* from = x + own[0];
      for (int64_t r = 0; r < rows; ++r) store<T>(to + r * NV * W, load<T>(from + base[r]));
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const T* from = x + base[r];
        T* row = to + r * NV * W;
        for (int64_t c = 0; c < count; ++c) row[c] = from[own[c]];
        for (int64_t c = count; c < W; ++c) row[c] = 0;
      }
    }
  }
}

// Where a tile's columns of x are: in a packed panel, or, as the channels of an image in place, at base[t] + offset[v].
template <class T, int NV>
struct Packed {
  const T* x;
  Vector<T> at(int64_t t, int v) const { return load<T>(x + (t * NV + v) * kWidth<T>); }
  Packed sample(int64_t n, int64_t rows) const { return {x + n * rows * NV * kWidth<T>}; }
};
template <class T, int NV>
struct InPlace {
  const T* x;
  int64_t sample_stride;
  const int64_t* base;
  int64_t offset[NV];
  Vector<T> at(int64_t t, int v) const { return load<T>(x + base[t] + offset[v]); }
  InPlace sample(int64_t n, int64_t) const {
    InPlace own = *this;
    own.x += n * sample_stride;
    return own;
  }
};

// MR × NV accumulators stay in registers over a sample's rows; its |·| is added to the tile, which stays in L1.
template <class T, int MR, int NV, class Source, class Store>
inline void tile_of_sample(const T* __restrict delta, const Source x, int64_t rows, Store to) {
  Vector<T> sum[MR][NV] = {};
  for (int64_t t = 0; t < rows; ++t, delta += MR) {
    Vector<T> columns[NV];
    for (int v = 0; v < NV; ++v) columns[v] = x.at(t, v);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      for (int v = 0; v < NV; ++v) sum[m][v] += broadcast<T>(delta[m]) * columns[v];
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) to((m * NV + v) * kWidth<T>, sum[m][v]);
  }
}
template <class T, int MR, int NV, Magnitude M, class Source>
void tile_for(const T* __restrict delta, const Source source, int64_t samples, int64_t rows, T* __restrict tile) {
  for (int64_t n = 0; n < samples; ++n) {
    tile_of_sample<T, MR, NV>(delta + n * rows * MR, source.sample(n, rows), rows, [tile](int64_t i, Vector<T> sum) {
      store<T>(tile + i, load<T>(tile + i) + magnitude<M, T>(sum));
    });
  }
}

template <class T, int MR, int NV>
void tile(const T* delta, const T* x, int64_t samples, int64_t rows, Magnitude m, T* tile) {
  with_magnitude(m, [&]<Magnitude M>() { tile_for<T, MR, NV, M, Packed<T, NV>>(delta, {x}, samples, rows, tile); });
}

template <class T, int MR, int NV>
void tile_in_place(const T* delta, const T* x, int64_t sample_stride, const int64_t* base, const int64_t* offset,
                   int64_t samples, int64_t rows, Magnitude m, T* tile) {
  InPlace<T, NV> source{x, sample_stride, base, {}};
  for (int v = 0; v < NV; ++v) source.offset[v] = offset[v * kWidth<T>];
  with_magnitude(m, [&]<Magnitude M>() { tile_for<T, MR, NV, M, InPlace<T, NV>>(delta, source, samples, rows, tile); });
}

template <class T>
void fold(const T* from, int64_t count, Magnitude m, T* into) {
  with_magnitude(m, [&]<Magnitude M>() {
    int64_t i = 0;
    for (; i + kWidth<T> <= count; i += kWidth<T>) {
      store<T>(into + i, load<T>(into + i) + magnitude<M, T>(load<T>(from + i)));
    }
    for (; i < count; ++i) into[i] += magnitude_of<M>(from[i]);
  });
}

// W × W entries change rows and columns.
template <class T, class In>
inline void transpose_block(const In* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  constexpr int W = kWidth<T>;
  Vector<T> row[W];
  for (int i = 0; i < W; ++i) {
    row[i] = load<T>(src + i * src_stride);
    __builtin_prefetch(src + i * src_stride + kAhead * W);
  }
  interleave<T, W>(row);
  for (int i = 0; i < W; ++i) store<T>(dst + i * dst_stride, row[i]);
}

template <class T>
void transpose(Input type, Matrix src, int64_t channels, int64_t positions, T* dst, int64_t dst_stride) {
  constexpr int64_t W = kWidth<T>;
  with_input<T>(type, [&]<class In>() {
    const In* data = static_cast<const In*>(src.data);
    const auto copy = [&](int64_t c_begin, int64_t c_end, int64_t s_begin, int64_t s_end) {
      for (int64_t s = s_begin; s < s_end; ++s) {
        for (int64_t c = c_begin; c < c_end; ++c) {
          dst[s * dst_stride + c] = T(data[c * src.row_stride + s * src.column_stride]);
        }
      }
    };
    if (src.column_stride != 1) return copy(0, channels, 0, positions);
    const int64_t whole_c = channels / W * W, whole_s = positions / W * W;
    for (int64_t c = 0; c < whole_c; c += W) {
      for (int64_t s = 0; s < whole_s; s += W) {
        transpose_block(data + c * src.row_stride + s, src.row_stride, dst + s * dst_stride + c, dst_stride);
      }
    }
    copy(whole_c, channels, 0, whole_s);
    copy(0, channels, whole_s, positions);
  });
}

template <class T>
void depthwise(const T* delta, int64_t delta_stride, const T* x, const int64_t* base, int64_t positions,
               const int64_t* offset, int64_t kernel, int64_t channels, T* sums) {
  constexpr int64_t W = kWidth<T>;
  constexpr int KB = 4;  // kernel entries per pass: δ is loaded once for all of them
  for (int64_t k0 = 0; k0 < kernel; k0 += KB) {
    const int64_t kn = kernel - k0 < KB ? kernel - k0 : KB;
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
      Vector<T> sum[KB] = {};
      for (int64_t p = 0; p < positions; ++p) {
        const Vector<T> d = load<T>(delta + p * delta_stride + c);
        const T* at = x + base[p] + c;
        for (int64_t k = 0; k < kn; ++k) sum[k] += d * load<T>(at + offset[k0 + k]);
      }
      for (int64_t k = 0; k < kn; ++k) store<T>(sums + (k0 + k) * channels + c, sum[k]);
    }
    for (; c < channels; ++c) {
      T sum[KB] = {};
      for (int64_t p = 0; p < positions; ++p) {
        for (int64_t k = 0; k < kn; ++k) sum[k] += delta[p * delta_stride + c] * x[base[p] + offset[k0 + k] + c];
      }
      for (int64_t k = 0; k < kn; ++k) sums[(k0 + k) * channels + c] = sum[k];
    }
  }
}

// F(3, 2) of Winograd, on vectors: of δ₀ δ₁ and x₀ … x₃, the three sums y_k = δ₀ x_k + δ₁ x_{k+1} by four products. By
// reference: vectors wider than the machine's have no fixed way of being passed.
template <class V, class T>
inline void points_of_delta(const V& a, const V& b, T half, V (&to)[4]) {
  to[0] = a;
  to[1] = half * (a + b);
  to[2] = half * (a - b);
  to[3] = b;
}
template <class V>
inline void points_of_x(const V& a, const V& b, const V& c, const V& d, V (&to)[4]) {
  to[0] = a - c;
  to[1] = b + c;
  to[2] = c - b;
  to[3] = b - d;
}
template <class V>
inline void sums_at_taps(const V& a, const V& b, const V& c, const V& d, V (&to)[3]) {
  to[0] = a + (b + c);
  to[1] = b - c;
  to[2] = (b + c) - d;
}

// One axis after the other. Of the MR entries of a panel, vectors of 8 are taken: what is written beyond is written
// again by the next tile, or lies in the gap after the last one.
template <class T, int MR>
void winograd_delta(const T* delta, int64_t tiles, T* dst, int64_t point_stride) {
  static_assert(4 <= MR && MR <= 8);
  using V = typename Lanes<T>::Eight;
  const T* const below = delta + 2 * tiles * MR;
  for (int64_t t = 0; t < tiles; ++t) {
    V corner[2][2], column[2][4], point[4];
    for (int j = 0; j < 2; ++j) {
      std::memcpy(&corner[0][j], delta + (2 * t + j) * MR, sizeof(V));
      std::memcpy(&corner[1][j], below + (2 * t + j) * MR, sizeof(V));
      points_of_delta(corner[0][j], corner[1][j], T(0.5), column[j]);
    }
    for (int i = 0; i < 4; ++i) {
      points_of_delta(column[0][i], column[1][i], T(0.5), point);
      for (int j = 0; j < 4; ++j) std::memcpy(dst + (4 * i + j) * point_stride + t * MR, &point[j], sizeof(V));
    }
  }
}

template <class T, int NV>
void winograd_x(const T* const* rows, int64_t tiles, T* dst, int64_t point_stride) {
  constexpr int64_t W = kWidth<T>, NR = NV * W;
  for (int64_t t = 0; t < tiles; ++t) {
    for (int v = 0; v < NV; ++v) {
      const auto x = [&](int i, int j) { return load<T>(rows[i] + (2 * t + j) * NR + v * W); };
      Vector<T> column[4][4], point[4];
      for (int j = 0; j < 4; ++j) points_of_x(x(0, j), x(1, j), x(2, j), x(3, j), column[j]);
      for (int i = 0; i < 4; ++i) {
        points_of_x(column[0][i], column[1][i], column[2][i], column[3][i], point);
        for (int j = 0; j < 4; ++j) store<T>(dst + (4 * i + j) * point_stride + t * NR + v * W, point[j]);
      }
    }
  }
}

template <class T, int MR, int NV>
void winograd_sum(const T* delta, int64_t delta_stride, const T* x, int64_t x_stride, int64_t tiles, bool adds,
                  T* sums) {
  for (int64_t point = 0; point < kPoints; ++point, delta += delta_stride, x += x_stride, sums += MR * NV * kWidth<T>) {
    tile_of_sample<T, MR, NV>(delta, Packed<T, NV>{x}, tiles, [=](int64_t i, Vector<T> sum) {
      store<T>(sums + i, adds ? load<T>(sums + i) + sum : sum);
    });
  }
}

template <class T, int MR, int NV>
void winograd_fold(const T* sums, Magnitude m, T* into) {
  constexpr int64_t size = MR * NV * kWidth<T>;
  with_magnitude(m, [&]<Magnitude M>() {
    for (int64_t e = 0; e < size; e += kWidth<T>, sums += kWidth<T>, into += kWidth<T>) {
      const auto sum = [&](int i, int j) { return load<T>(sums + (4 * i + j) * size); };
      Vector<T> row[4][3], tap[3];
      for (int i = 0; i < 4; ++i) sums_at_taps(sum(i, 0), sum(i, 1), sum(i, 2), sum(i, 3), row[i]);
      for (int j = 0; j < 3; ++j) {
        sums_at_taps(row[0][j], row[1][j], row[2][j], row[3][j], tap);
        for (int i = 0; i < 3; ++i) {
          T* const to = into + (3 * i + j) * size;
          store<T>(to, load<T>(to) + magnitude<M, T>(tap[i]));
        }
      }
    }
  });
}

template <class T>
inline T at(Volume v, int64_t r, int64_t k, int64_t s, T otherwise) {
  if (!v.data) return otherwise;
  return static_cast<const T*>(v.data)[r * v.stride_r + k * v.stride_k + s * v.stride_s];
}

// Entries k with their positions s contiguous: vectors run along s.
template <class T, class In, Magnitude M>
void affine_along_positions(Volume delta, Volume x, Volume mean, Volume rstd, int64_t R, int64_t S, int64_t k_begin,
                            int64_t k_end, T* weight, T* bias) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t k = k_begin; k < k_end; ++k) {
    T total = 0, product = 0;
    for (int64_t r = 0; r < R; ++r) {
      const In* d = static_cast<const In*>(delta.data) + r * delta.stride_r + k * delta.stride_k;
      const In* y = weight ? static_cast<const In*>(x.data) + r * x.stride_r + k * x.stride_k : nullptr;
      const T mu = at<T>(mean, r, k, 0, T(0)), scale = at<T>(rstd, r, k, 0, T(1));
      Vector<T> t0{}, t1{}, p0{}, p1{};
      int64_t s = 0;
      for (; s + 2 * W <= S; s += 2 * W) {
        const Vector<T> d0 = load<T>(d + s), d1 = load<T>(d + s + W);
        t0 += d0;
        t1 += d1;
        if (y) {
          p0 += d0 * (load<T>(y + s) - mu);
          p1 += d1 * (load<T>(y + s + W) - mu);
        }
      }
      T tail_total = 0, tail_product = 0;
      for (; s < S; ++s) {
        tail_total += T(d[s]);
        if (y) tail_product += T(d[s]) * (T(y[s]) - mu);
      }
      total += lane_sum<T>(t0 + t1) + tail_total;
      product += (lane_sum<T>(p0 + p1) + tail_product) * scale;
    }
    if (bias) bias[k] += magnitude_of<M>(total);
    if (weight) weight[k] += magnitude_of<M>(product);
  }
}

// Entries k contiguous, S = 1: vectors run along k. mean and rstd step by 0 or 1 along k.
template <class T, class In, Magnitude M>
void affine_along_entries(Volume delta, Volume x, Volume mean, Volume rstd, int64_t R, int64_t k_begin, int64_t k_end,
                          T* weight, T* bias) {
  constexpr int64_t W = kWidth<T>;
  constexpr int NV = 4;
  const auto vector_at = [](Volume v, int64_t r, int64_t k, T otherwise) -> Vector<T> {
    if (!v.data) return broadcast<T>(otherwise);
    const T* p = static_cast<const T*>(v.data) + r * v.stride_r + k * v.stride_k;
    return v.stride_k ? load<T>(p) : broadcast<T>(*p);
  };
  int64_t k = k_begin;
  for (; k + NV * W <= k_end; k += NV * W) {
    Vector<T> total[NV] = {}, product[NV] = {};
    for (int64_t r = 0; r < R; ++r) {
      const In* d = static_cast<const In*>(delta.data) + r * delta.stride_r + k;
      const In* y = weight ? static_cast<const In*>(x.data) + r * x.stride_r + k : nullptr;
      for (int v = 0; v < NV; ++v) {
        const Vector<T> dv = load<T>(d + v * W);
        total[v] += dv;
        if (y) {
          const Vector<T> mu = vector_at(mean, r, k + v * W, T(0)), scale = vector_at(rstd, r, k + v * W, T(1));
          product[v] += dv * ((load<T>(y + v * W) - mu) * scale);
        }
      }
    }
    for (int v = 0; v < NV; ++v) {
      if (bias) store<T>(bias + k + v * W, load<T>(bias + k + v * W) + magnitude<M, T>(total[v]));
      if (weight) store<T>(weight + k + v * W, load<T>(weight + k + v * W) + magnitude<M, T>(product[v]));
    }
  }
  for (; k < k_end; ++k) {
    T total = 0, product = 0;
    for (int64_t r = 0; r < R; ++r) {
      const T d = T(static_cast<const In*>(delta.data)[r * delta.stride_r + k]);
      total += d;
      if (weight) {
        const T y = T(static_cast<const In*>(x.data)[r * x.stride_r + k]);
        product += d * ((y - at<T>(mean, r, k, 0, T(0))) * at<T>(rstd, r, k, 0, T(1)));
      }
    }
    if (bias) bias[k] += magnitude_of<M>(total);
    if (weight) weight[k] += magnitude_of<M>(product);
  }
}

// Any strides.
template <class T, class In, Magnitude M>
void affine_strided(Volume delta, Volume x, Volume mean, Volume rstd, int64_t R, int64_t S, int64_t k_begin,
                    int64_t k_end, T* weight, T* bias) {
  for (int64_t k = k_begin; k < k_end; ++k) {
    T total = 0, product = 0;
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t s = 0; s < S; ++s) {
        const int64_t i = r * delta.stride_r + k * delta.stride_k + s * delta.stride_s;
        const T d = T(static_cast<const In*>(delta.data)[i]);
        total += d;
        if (weight) {
          const T y = T(static_cast<const In*>(x.data)[r * x.stride_r + k * x.stride_k + s * x.stride_s]);
          product += d * ((y - at<T>(mean, r, k, s, T(0))) * at<T>(rstd, r, k, s, T(1)));
        }
      }
    }
    if (bias) bias[k] += magnitude_of<M>(total);
    if (weight) weight[k] += magnitude_of<M>(product);
  }
}

template <class T>
void affine(Input type, Volume delta, Volume x, Volume mean, Volume rstd, int64_t R, int64_t S, int64_t k_begin,
            int64_t k_end, Magnitude m, T* weight, T* bias) {
  const bool flat = (!mean.data || mean.stride_s == 0) && (!rstd.data || rstd.stride_s == 0);
  const bool along_positions = S > 1 && flat && delta.stride_s == 1 && (!weight || x.stride_s == 1);
  const auto steps = [](Volume v) { return !v.data || v.stride_k == 0 || v.stride_k == 1; };
  const bool along_entries =
      S == 1 && delta.stride_k == 1 && (!weight || (x.stride_k == 1 && steps(mean) && steps(rstd)));
  with_input<T>(type, [&]<class In>() {
    with_magnitude(m, [&]<Magnitude M>() {
      if (along_positions) {
        affine_along_positions<T, In, M>(delta, x, mean, rstd, R, S, k_begin, k_end, weight, bias);
      } else if (along_entries) {
        affine_along_entries<T, In, M>(delta, x, mean, rstd, R, k_begin, k_end, weight, bias);
      } else {
        affine_strided<T, In, M>(delta, x, mean, rstd, R, S, k_begin, k_end, weight, bias);
      }
    });
  });
}

template <class T>
void gather(Input type, Matrix rows, const int64_t* index, int64_t count, int64_t columns, Magnitude m, T* omega) {
  constexpr int64_t W = kWidth<T>;
  with_input<T>(type, [&]<class In>() {
    with_magnitude(m, [&]<Magnitude M>() {
      const In* data = static_cast<const In*>(rows.data);
      int64_t c = 0;
      if (rows.column_stride == 1) {
        for (; c + W <= columns; c += W) {
          Vector<T> sum{};
          for (int64_t j = 0; j < count; ++j) sum += load<T>(data + index[j] * rows.row_stride + c);
          store<T>(omega + c, load<T>(omega + c) + magnitude<M, T>(sum));
        }
      }
      for (; c < columns; ++c) {
        T sum = 0;
        for (int64_t j = 0; j < count; ++j) sum += T(data[index[j] * rows.row_stride + c * rows.column_stride]);
        omega[c] += magnitude_of<M>(sum);
      }
    });
  });
}

// R rows of NV vectors of a panel of PANEL: the sum over k is added to `start`, one row for all, or to what is in out
// if that is null. Every entry adds up k in the same order, however rows are shared out, and then the sum to what was
// there: over many blocks of k that loses less than one long sum.
template <class T, int R, int NV, int PANEL>
inline void multiply_panel(const T* a, int64_t a_stride, const T* w, int64_t K, const T* start, T* out,
                           int64_t out_stride) {
  constexpr int64_t W = kWidth<T>;
  Vector<T> sum[R][NV] = {};
  for (int64_t k = 0; k < K; ++k, w += PANEL * W) {
    Vector<T> columns[NV];
    for (int v = 0; v < NV; ++v) columns[v] = load<T>(w + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) sum[r][v] += broadcast<T>(a[r * a_stride + k]) * columns[v];
  }
  const int64_t start_stride = start ? 0 : out_stride;
  const T* const from = start ? start : out;
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < NV; ++v) {
      store<T>(out + r * out_stride + v * W, load<T>(from + r * start_stride + v * W) + sum[r][v]);
    }
  }
}

// The same for `rows` ≤ R rows and all panels. The last one may be narrower: it goes vector by vector.
template <class T, int R, int NV>
void multiply_rows(const T* a, int64_t a_stride, const T* w, int64_t rows, int64_t K, int64_t C, const T* start, T* out,
                   int64_t out_stride) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_rows<T, R - 1, NV>(a, a_stride, w, rows, K, C, start, out, out_stride);
  }
  constexpr int64_t W = kWidth<T>, width = NV * W;
  int64_t c = 0;
  for (; c + width <= C; c += width, w += K * width) {
    multiply_panel<T, R, NV, NV>(a, a_stride, w, K, start ? start + c : nullptr, out + c, out_stride);
  }
  for (; c + W <= C; c += W, w += W) {
    multiply_panel<T, R, 1, NV>(a, a_stride, w, K, start ? start + c : nullptr, out + c, out_stride);
  }
  if (c == C) return;
  T edge[R * W] = {};
  for (int r = 0; r < R; ++r)
    std::memcpy(edge + r * W, start ? start + c : out + r * out_stride + c, (C - c) * sizeof(T));
  multiply_panel<T, R, 1, NV>(a, a_stride, w, K, nullptr, edge, W);
  for (int r = 0; r < R; ++r) std::memcpy(out + r * out_stride + c, edge + r * W, (C - c) * sizeof(T));
}

// Rows are shared out evenly: a few left over would keep the multipliers waiting.
template <class T, int MR, int NV>
void multiply(const T* a, int64_t a_stride, const T* w, int64_t rows, int64_t K, int64_t C, const T* start, T* out,
              int64_t out_stride) {
  const int64_t blocks = (rows + MR - 1) / MR;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * rows / blocks, end = (block + 1) * rows / blocks;
    multiply_rows<T, MR, NV>(a + first * a_stride, a_stride, w, end - first, K, C, start, out + first * out_stride,
                             out_stride);
  }
}

// eˣ = scale + scale · part for x ≤ 0. With scale a power of two and part to its full relative precision, eˣ − 1 =
// (scale − 1) + scale · part loses nothing near 0. Below the least normal number, it stays there.
template <class T>
struct Power {
  Vector<T> scale, part;
};
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kLeast = -87.0f, kShift = 0x1.8p+23f, kPerLog2 = 0x1.715476p+0f;
  static constexpr float kLog2 = 0x1.63p-1f, kLog2Rest = -0x1.bd0106p-13f;  // ln 2, in two parts
  static constexpr uint32_t kBias = 127, kMantissaBits = 23;
  static constexpr float kTerms[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f};
};
template <>
struct Exponential<double> {
  static constexpr double kLeast = -708.0, kShift = 0x1.8p+52, kPerLog2 = 0x1.71547652b82fep+0;
  static constexpr double kLog2 = 0x1.62e42feep-1, kLog2Rest = 0x1.a39ef35793c76p-33;
  static constexpr uint64_t kBias = 1023, kMantissaBits = 52;
  static constexpr double kTerms[] = {
      1.0 / 87178291200, 1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
      1.0 / 5040,        1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5};
};
template <class T>
inline Power<T> power_of_e(Vector<T> x) {
  using E = Exponential<T>;
  using Bits = typename Lanes<T>::Bits;
  x = x < E::kLeast ? broadcast<T>(E::kLeast) : x;
  const Vector<T> shifted = x * E::kPerLog2 + E::kShift;  // x / ln 2, rounded to the integer in its last bits
  const Vector<T> count = shifted - E::kShift;
  const Vector<T> r = x - count * E::kLog2 - count * E::kLog2Rest;
  Vector<T> series{};
#pragma GCC unroll 16
  for (const T term : E::kTerms) series = series * r + term;
  return {(Vector<T>)(((Bits)shifted + E::kBias) << E::kMantissaBits), r + r * r * series};
}
template <class T>
inline Vector<T> sigmoid(Vector<T> x) {
  const auto negative = x < T(0);
  const Power<T> power = power_of_e<T>(negative ? x : -x);
  const Vector<T> e = power.scale + power.scale * power.part;
  return (negative ? e : broadcast<T>(1)) / (T(1) + e);
}
template <class T>
inline Vector<T> hyperbolic_tangent(Vector<T> x) {
  const auto negative = x < T(0);
  const Power<T> power = power_of_e<T>(T(2) * (negative ? x : -x));
  const Vector<T> less = (power.scale - T(1)) + power.scale * power.part;
  return (negative ? less : -less) / (T(2) + less);
}

// Cells from k on, as many as `count` of a vector. Written with vectors: GCC 12 leaves the loop over cells scalar for
// AVX2, which takes ten times as long.
template <class T>
inline void lstm_cells(T* __restrict gates, const T* __restrict recurrent, const T* __restrict c, int64_t H,
                       T* __restrict next, T* __restrict u, T* __restrict to_c, T* __restrict kept, int64_t k,
                       int64_t count) {
  const auto read = [count](const T* p) {
    Vector<T> v{};
    std::memcpy(&v, p, count * sizeof(T));
    return v;
  };
  const auto write = [count](T* p, Vector<T> v) { std::memcpy(p, &v, count * sizeof(T)); };
  const auto gate = [&](int64_t which) { return read(gates + which * H + k) + read(recurrent + which * H + k); };
  const Vector<T> i = sigmoid<T>(gate(0)), f = sigmoid<T>(gate(1)), g = hyperbolic_tangent<T>(gate(2));
  const Vector<T> o = sigmoid<T>(gate(3)), before = read(c + k);
  const Vector<T> cell = f * before + i * g, tanh_c = hyperbolic_tangent<T>(cell);
  write(next + k, cell);
  write(u + k, o * tanh_c);
  write(to_c + k, o * (T(1) - tanh_c * tanh_c));
  write(kept + k, f);
  write(gates + k, g * i * (T(1) - i));
  write(gates + H + k, before * f * (T(1) - f));
  write(gates + 2 * H + k, i * (T(1) - g * g));
  write(gates + 3 * H + k, tanh_c * o * (T(1) - o));
}

template <class T>
void lstm_ahead(T* gates, const T* recurrent, const T* c, int64_t H, T* next, T* u, T* to_c, T* kept) {
  int64_t k = 0;
  for (; k + kWidth<T> <= H; k += kWidth<T>) {
    lstm_cells<T>(gates, recurrent, c, H, next, u, to_c, kept, k, kWidth<T>);
  }
  if (k < H) lstm_cells<T>(gates, recurrent, c, H, next, u, to_c, kept, k, H - k);
}

template <class T>
void lstm_back(const T* __restrict u, const T* __restrict to_gates, const T* __restrict to_c, const T* __restrict kept,
               int64_t H, T* __restrict c, T* __restrict delta) {
  for (int64_t i = 0; i < H; ++i) {
    const T own = c[i] + u[i] * to_c[i];
    delta[i] = own * to_gates[i];
    delta[H + i] = own * to_gates[H + i];
    delta[2 * H + i] = own * to_gates[2 * H + i];
    delta[3 * H + i] = u[i] * to_gates[3 * H + i];
    c[i] = own * kept[i];
  }
}

template <class T, int MR, int NV>
constexpr Kernels<T> kernels_of() {
  constexpr int NR = NV * kWidth<T>;
  return {MR,
          NR,
          kWidth<T>,
          pack<T, MR, NR>,
          pick<T, NV>,
          tile<T, MR, NV>,
          tile_in_place<T, MR, NV>,
          fold<T>,
          transpose<T>,
          depthwise<T>,
          winograd_delta<T, MR>,
          winograd_x<T, NV>,
          winograd_sum<T, MR, NV>,
          winograd_fold<T, MR, NV>,
          affine<T>,
          multiply<T, MR, NV>,
          lstm_ahead<T>,
          lstm_back<T>,
          gather<T>};
}

}  // namespace
}  // namespace mas_fast::cpu
