// The arithmetic of the training step, entry by entry, for hosts and devices alike. What it means: reference_steps.py.
//
// Nothing of the standard library with a body may be used here: CPU files compile this for several instruction sets.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MAS_FAST_BOTH __host__ __device__ __forceinline__
#else
#define MAS_FAST_BOTH inline __attribute__((always_inline))
#endif

namespace mas_fast {

// How numbers are kept in memory; arithmetic is in float, or in double for a parameter with a double.
enum class Storage : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kCode };

// Entries of an encoded Ω that share a scale.
constexpr int64_t kCodeBlock = 128;

MAS_FAST_BOTH int64_t bytes_of(Storage storage) {
  switch (storage) {
    case Storage::kFloat64:
      return 8;
    case Storage::kFloat32:
      return 4;
    case Storage::kCode:
      return 1;
    default:
      return 2;
  }
}

// The least number that memory rounds to inf.
template <class T>
MAS_FAST_BOTH T limit_of(Storage storage) {
  if (storage == Storage::kFloat16) return T(65520);
  if (storage == Storage::kBFloat16) return T(0x1.ffp127);
  if (sizeof(T) == 8 && storage == Storage::kFloat32) return T(0x1.ffffffp127);
  return T(__builtin_huge_val());
}

MAS_FAST_BOTH int64_t ceil_div(int64_t count, int64_t part) { return (count + part - 1) / part; }

template <class T>
MAS_FAST_BOTH T root(T value) {
  if constexpr (sizeof(T) == sizeof(double)) return T(__builtin_sqrt(double(value)));
  return T(__builtin_sqrtf(float(value)));
}

// ab + c, rounded once where that is as fast. Compilers may do so on their own, but where two products are added, which
// of them is rounded would be up to them, and could differ between two versions of one loop.
template <class T>
MAS_FAST_BOTH T fused(T a, T b, T c) {
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMAF)
  if constexpr (sizeof(T) == sizeof(double)) return T(__builtin_fma(double(a), double(b), double(c)));
  return T(__builtin_fmaf(float(a), float(b), float(c)));
#else
  return a * b + c;
#endif
}

// Conversions between numbers and bits, without branches, so that compilers can vectorise them.

template <class To, class From>
MAS_FAST_BOTH To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

MAS_FAST_BOTH float from_bfloat16(uint16_t bits) { return bits_of<float>(uint32_t(bits) << 16); }

// To the nearest, ties to even; nan stays nan.
MAS_FAST_BOTH uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(value != value ? 0x7fc0u : rounded);
}

MAS_FAST_BOTH float from_float16(uint16_t bits) {
  // The exponent is moved by a multiplication, which gets denormals right as well; inf and nan keep a full exponent.
  const float magnitude = bits_of<float>(uint32_t(bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t full = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return bits_of<float>(bits_of<uint32_t>(magnitude) | full | uint32_t(bits & 0x8000) << 16);
}

// To the nearest, ties to even; nan stays nan, and what is too large becomes inf.
MAS_FAST_BOTH uint16_t to_float16(float value) {
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const float magnitude = bits_of<float>(bits & 0x7fffffffu);
  // Adding a power of two whose last bit is the last bit of the result makes the addition round there.
  const uint32_t exponent = bits & 0x7f800000u;
  const uint32_t least = exponent < 0x38800000u ? 0x38800000u : exponent;  // 2^-14, the smallest normal number
  const float shift = bits_of<float>(least + (13u << 23));
  const float rounded = (magnitude + shift) - shift;
  // Now exact in half precision: a normal number, or a denormal one, which is a count of 2^-24.
  const uint32_t normal = (bits_of<uint32_t>(rounded) >> 13) - (112u << 10);
  const uint32_t denormal = uint32_t(int32_t((magnitude < 1.0f ? rounded : 0.0f) * 0x1p24f));
  uint32_t half = rounded < 0x1p-14f ? denormal : normal;
  half = magnitude >= 65520.0f ? 0x7c00u : half;
  half = value != value ? 0x7e00u : half;
  return uint16_t(sign | half);
}

// Ω in 8 bits: s (c / 255)².
MAS_FAST_BOTH float from_code(uint8_t code, float scale) {
  const float root = float(code) * (1.0f / 255.0f);  // exactly 1 for 255
  return root * root * scale;
}

// The inverse of from_code. Divided by the scale itself: its inverse overflows where it is denormal.
MAS_FAST_BOTH uint8_t to_code(float value, float scale) {
  return scale > 0.0f ? uint8_t(__builtin_rintf(root(value / scale) * 255.0f)) : uint8_t(0);
}

// λ Ω (θ − θ*): half of the penalty's gradient; times θ − θ* it is the penalty itself. λΩ alone may overflow, and what
// has not moved must not become inf · 0.
template <class T>
MAS_FAST_BOTH T pull(T lam, T omega, T difference) {
  return lam * (omega * difference);
}

// The rate of the proximal step, 2ηλ: kept finite, so that it is 0 times Ω = 0.
template <class T>
MAS_FAST_BOTH T twice_rate(T lr, T lam) {
  constexpr T kLargest = sizeof(T) == 8 ? T(0x1.fffffffffffffp1023) : T(0x1.fffffep127);
  const T rate = T(2) * lr * lam;
  return rate < kLargest ? rate : kLargest;
}

// (θ + cθ*) / (1 + c) with c = 2ηλΩ, in the form that keeps θ where nothing holds it, and θ* where all does.
template <class T>
MAS_FAST_BOTH T proximal(T theta, T anchor, T rate, T omega) {
  const T c = rate * omega;
  const T part = T(1) / (T(1) + c);
  const T difference = theta - anchor;
  return c < T(1) ? theta - difference * (c * part) : anchor + difference * part;
}

// What a parameter is held by, and how: entries without Ω have lam = 0, omega = 0 and anchor = θ.
template <class T>
struct Hold {
  T omega, anchor;
};

template <class T>
struct Sgd {
  T lr, momentum, dampening, weight_decay, sign;  // sign: −1 to maximise
  bool nesterov, first, implicit;

  // One entry; `buffer` is read and written where there is momentum.
  MAS_FAST_BOTH T step(T theta, T grad, T& buffer, Hold<T> hold, T lam) const {
    T g = sign * grad;
    if (!implicit) g += T(2) * pull(lam, hold.omega, theta - hold.anchor);
    g = fused(weight_decay, theta, g);
    if (momentum != T(0)) {
      buffer = first ? g : fused(momentum, buffer, (T(1) - dampening) * g);
      g = nesterov ? fused(momentum, buffer, g) : buffer;
    }
    const T next = theta - lr * g;
    return implicit ? proximal(next, hold.anchor, twice_rate(lr, lam), hold.omega) : next;
  }
};

// Of one parameter: its bias corrections depend on its number of steps.
template <class T>
struct AdamW {
  T keep;  // 1 − η·weight_decay
  T beta2, one_minus_beta1, one_minus_beta2, eps, sign;
  T rate;             // η / (1 − β1^t)
  T root_correction;  // 1 / √(1 − β2^t)
  T lr;               // η
  bool amsgrad, implicit;

  MAS_FAST_BOTH T step(T theta, T grad, T& mean, T& square, T& largest, Hold<T> hold, T lam) const {
    T g = sign * grad;
    if (!implicit) g += T(2) * pull(lam, hold.omega, theta - hold.anchor);
    mean += one_minus_beta1 * (g - mean);
    square = fused(beta2, square, one_minus_beta2 * g * g);
    T second = square;
    if (amsgrad) {
      largest = largest > square || largest != largest ? largest : square;
      second = largest;
    }
    const T next = fused(keep, theta, -rate * (mean / fused(root(second), root_correction, eps)));
    return implicit ? proximal(next, hold.anchor, twice_rate(lr, lam), hold.omega) : next;
  }
};

}  // namespace mas_fast
