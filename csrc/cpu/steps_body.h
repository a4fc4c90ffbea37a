// The inner loops of the training step, on runs of entries that fit the first-level cache. Included like
// kernels_body.h, and after it.
//
// All loops are plain ones over arrays, which compilers turn into vectors: the arithmetic itself is arithmetic.h's,
// which the CUDA kernels call too.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "arithmetic.h"
#include "cpu/kernels_body.h"

#ifdef __clang__
#define MAS_FAST_VECTORISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define MAS_FAST_VECTORISE _Pragma("GCC ivdep")
#endif
// The same for a loop that adds up in `total`, lane by lane: in an order that depends on the instruction set alone.
#define MAS_FAST_VECTORISE_SUM _Pragma("omp simd reduction(+ : total)")

namespace mas_fast::cpu {
namespace {

template <class T>
const T* decode(Storage storage, const void* from, int64_t count, const float* scales, T* buffer) {
  if (storage == (sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32)) return static_cast<const T*>(from);
  if (storage == Storage::kFloat32) {
    const float* source = static_cast<const float*>(from);
    MAS_FAST_VECTORISE for (int64_t i = 0; i < count; ++i) buffer[i] = T(source[i]);
  } else if (storage == Storage::kBFloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(from);
    MAS_FAST_VECTORISE for (int64_t i = 0; i < count; ++i) buffer[i] = T(from_bfloat16(source[i]));
  } else if (storage == Storage::kFloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(from);
    MAS_FAST_VECTORISE for (int64_t i = 0; i < count; ++i) buffer[i] = T(from_float16(source[i]));
  } else {
    const uint8_t* source = static_cast<const uint8_t*>(from);
    for (int64_t begin = 0; begin < count; begin += kCodeBlock) {
      const int64_t end = begin + kCodeBlock < count ? begin + kCodeBlock : count;
      const float scale = scales[begin / kCodeBlock];
      MAS_FAST_VECTORISE for (int64_t i = begin; i < end; ++i) buffer[i] = T(from_code(source[i], scale));
    }
  }
  return buffer;
}

template <class T>
void encode(Storage storage, const T* from, int64_t count, void* to) {
  if (static_cast<const void*>(from) == to) return;
  if (storage == Storage::kFloat64) {
    double* target = static_cast<double*>(to);
    MAS_FAST_VECTORISE for (int64_t i = 0; i < count; ++i) target[i] = double(from[i]);
  } else if (storage == Storage::kFloat32) {
    float* target = static_cast<float*>(to);
    MAS_FAST_VECTORISE for (int64_t i = 0; i < count; ++i) target[i] = float(from[i]);
  } else if (storage == Storage::kBFloat16) {
    uint16_t* target = static_cast<uint16_t*>(to);
    MAS_FAST_VECTORISE for (int64_t i = 0; i < count; ++i) target[i] = to_bfloat16(float(from[i]));
  } else {
    uint16_t* target = static_cast<uint16_t*>(to);
    MAS_FAST_VECTORISE for (int64_t i = 0; i < count; ++i) target[i] = to_float16(float(from[i]));
  }
}

// Turns run-time choices into template arguments: loops that branch on them would not become vectors.
template <class F>
inline void with_flag(bool flag, F f) {
  if (flag) return f.template operator()<true>();
  f.template operator()<false>();
}
template <class T, class F>
inline void with_kept(const Holds<T>& holds, F f) {
  if (holds.kept == Kept::kCodes) return f.template operator()<Kept::kCodes>();
  if (holds.kept == Kept::kNumbers) return f.template operator()<Kept::kNumbers>();
  f.template operator()<Kept::kNothing>();
}

// As many codes, or numbers of bfloat16, as a vector has floats: from_code without its scale, and from_bfloat16. On
// their own, compilers widen bytes in twice as many instructions as the rest of a step has.
#if defined(__AVX512F__)
inline Vector<float> load_roots(const uint8_t* codes) {
  // With a mask of all lanes, as GCC 12 warns of what the plain form leaves undefined.
  const __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return __builtin_convertvector(Lanes<float>::Signed(wide), Vector<float>) * (1.0f / 255.0f);
}
inline Vector<float> load_bfloat16(const uint16_t* bits) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
  return Vector<float>(Lanes<float>::Bits(wide) << 16);
}
#elif defined(__AVX2__)
inline Vector<float> load_roots(const uint8_t* codes) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  return __builtin_convertvector(Lanes<float>::Signed(wide), Vector<float>) * (1.0f / 255.0f);
}
inline Vector<float> load_bfloat16(const uint16_t* bits) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
  return Vector<float>(Lanes<float>::Bits(wide) << 16);
}
#else
inline Vector<float> load_roots(const uint8_t* codes) {
  Vector<float> roots;
  for (int64_t l = 0; l < kWidth<float>; ++l) roots[l] = float(codes[l]) * (1.0f / 255.0f);
  return roots;
}
inline Vector<float> load_bfloat16(const uint16_t* bits) {
  Vector<float> values;
  for (int64_t l = 0; l < kWidth<float>; ++l) values[l] = from_bfloat16(bits[l]);
  return values;
}
#endif

// Calls f(i, Ω and θ* of entry i) for all entries; returns the sum of what it returns. Codes are decoded on the way, in
// registers.
template <Kept KEPT, class T, class F>
inline double for_entries(const Holds<T>& holds, int64_t count, F f) {
  const Holds<T> own = holds;
  T total = T(0);
  if constexpr (KEPT == Kept::kCodes) {
    constexpr int64_t W = kWidth<float>;
    static_assert(kCodeBlock % W == 0, "a vector must have one scale");
    float omega[W], anchor[W];
    T totals[W] = {};
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      const Vector<float> roots = load_roots(own.codes + i);
      store<float>(omega, roots * roots * own.scales[i / kCodeBlock]);
      store<float>(anchor, load_bfloat16(own.anchor_bits + i));
      MAS_FAST_VECTORISE for (int64_t l = 0; l < W; ++l) totals[l] += f(i + l, Hold<T>{T(omega[l]), T(anchor[l])});
    }
    for (int64_t l = 0; l < W; ++l) total += totals[l];
    for (; i < count; ++i) {
      const float last = from_code(own.codes[i], own.scales[i / kCodeBlock]);
      total += f(i, Hold<T>{T(last), T(from_bfloat16(own.anchor_bits[i]))});
    }
  } else if constexpr (KEPT == Kept::kNumbers) {
    MAS_FAST_VECTORISE_SUM for (int64_t i = 0; i < count; ++i) total += f(i, Hold<T>{own.omega[i], own.anchor[i]});
  } else {
    MAS_FAST_VECTORISE_SUM for (int64_t i = 0; i < count; ++i) total += f(i, Hold<T>{T(0), T(0)});
  }
  return double(total);
}

template <class T>
StepSum penalty(T lam, T twice_factor, const T* theta, const Holds<T>& holds, int64_t count, T limit, const T* before,
                T* grad) {
  double value = 0;
  int32_t lost = 0;
  with_kept(holds, [&]<Kept KEPT>() {
    if (!grad) {
      value = for_entries<KEPT>(holds, count, [&](int64_t i, Hold<T> hold) {
        const T difference = theta[i] - hold.anchor;
        return pull(lam, hold.omega, difference) * difference;
      });
      return;
    }
    with_flag(before, [&]<bool ADD>() {
      int32_t own = 0;
      value = for_entries<KEPT>(holds, count, [&](int64_t i, Hold<T> hold) {
        const T difference = theta[i] - hold.anchor;
        const T pulled = pull(lam, hold.omega, difference);
        T was = T(0);
        if constexpr (ADD) was = before[i];
        const T now = was + twice_factor * pulled;
        // Finite numbers minus themselves are 0.
        own += int32_t(was - was == T(0)) & int32_t(!((now < T(0) ? -now : now) < limit));
        grad[i] = now;
        return pulled * difference;
      });
      lost = own;
    });
  });
  return {value, lost};
}

// Where nothing holds a parameter, θ stands in for θ*.
template <class T>
double sgd(const Sgd<T>& rule, T lam, const T* theta, const T* grad, const Holds<T>& holds, int64_t count, T* buffer,
           T* next) {
  double value = 0;
  const auto run = [&]<Kept KEPT, bool IMPLICIT, bool MOMENTUM, bool NESTEROV, bool FIRST>() {
    constexpr bool HELD = KEPT != Kept::kNothing;
    Sgd<T> own = rule;
    own.implicit = IMPLICIT;
    own.nesterov = NESTEROV;
    own.first = FIRST;
    if constexpr (!MOMENTUM) own.momentum = T(0);
    value = for_entries<KEPT>(holds, count, [&](int64_t i, Hold<T> hold) {
      const T old = theta[i];
      T held = T(0);
      if constexpr (HELD) {
        held = pull(lam, hold.omega, old - hold.anchor) * (old - hold.anchor);
      } else {
        hold.anchor = old;
      }
      T kept = T(0);
      if constexpr (MOMENTUM && !FIRST) kept = buffer[i];
      next[i] = own.step(old, grad[i], kept, hold, lam);
      if constexpr (MOMENTUM) buffer[i] = kept;
      return held;
    });
  };
  with_kept(holds, [&]<Kept KEPT>() {
    with_flag(KEPT != Kept::kNothing && rule.implicit, [&]<bool IMPLICIT>() {
      if constexpr (IMPLICIT && KEPT == Kept::kNothing) return;
      if (!buffer) return run.template operator()<KEPT, IMPLICIT, false, false, false>();
      with_flag(rule.nesterov, [&]<bool NESTEROV>() {
        with_flag(rule.first, [&]<bool FIRST>() { run.template operator()<KEPT, IMPLICIT, true, NESTEROV, FIRST>(); });
      });
    });
  });
  return value;
}

template <class T>
double adamw(const AdamW<T>& rule, T lam, const T* theta, const T* grad, const Holds<T>& holds, int64_t count, T* mean,
             T* square, T* largest, T* next) {
  double value = 0;
  with_kept(holds, [&]<Kept KEPT>() {
    constexpr bool HELD = KEPT != Kept::kNothing;
    with_flag(HELD && rule.implicit, [&]<bool IMPLICIT>() {
      if constexpr (IMPLICIT && !HELD) return;
      with_flag(largest, [&]<bool AMSGRAD>() {
        AdamW<T> own = rule;
        own.implicit = IMPLICIT;
        own.amsgrad = AMSGRAD;
        value = for_entries<KEPT>(holds, count, [&](int64_t i, Hold<T> hold) {
          const T old = theta[i];
          T held = T(0);
          if constexpr (HELD) {
            held = pull(lam, hold.omega, old - hold.anchor) * (old - hold.anchor);
          } else {
            hold.anchor = old;
          }
          T m = mean[i], v = square[i], l = T(0);
          if constexpr (AMSGRAD) l = largest[i];
          next[i] = own.step(old, grad[i], m, v, l, hold, lam);
          mean[i] = m;
          square[i] = v;
          if constexpr (AMSGRAD) largest[i] = l;
          return held;
        });
      });
    });
  });
  return value;
}

template <class T>
constexpr StepKernels<T> step_kernels_of() {
  return {decode<T>, encode<T>, penalty<T>, sgd<T>, adamw<T>};
}

// MR × NV accumulators, NV columns and a broadcast must fit the registers: 16 of them, or 32 with AVX-512.
constexpr KernelTable make_table(const char* name) {
  constexpr int MR = MAS_FAST_VECTOR_BYTES == 64 ? 8 : 6;
  return {name, kernels_of<float, MR, 2>(), kernels_of<double, MR, 2>(), step_kernels_of<float>(),
          step_kernels_of<double>()};
}

}  // namespace
}  // namespace mas_fast::cpu
