// What the kernels of the training step do with the entries of a row, in the arithmetic of arithmetic.h.
//
// A rule comes to a kernel as an argument, the same for all rows; `enter` makes it the rule of one. kBlocks: as many
// blocks of threads as a multiprocessor's registers are shared out to, for arithmetic in float.
#pragma once

#include "cuda/rows.h"

namespace mas_fast::cuda {

// The penalty of some entries. Few enough are added in T that it loses nothing.
template <class T, int V>
MAS_FAST_BOTH double penalty_of(const Entries<T, V>& e, T lam) {
  T value = T(0);
  MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
    const T difference = e.at[kTheta][k] - e.at[kAnchor][k];
    value += pull(lam, e.at[kOmega][k], difference) * difference;
  }
  return double(value);
}

template <class T>
struct PenaltyRule {
  static constexpr unsigned kReads = mask_of(kTheta) | mask_of(kGrad) | mask_of(kOmega) | mask_of(kAnchor);
  static constexpr unsigned kWrites = mask_of(kGrad);
  static constexpr int kBlocks = 4;

  PenaltyRule(bool add, const double* factors)
      : reads(add ? kReads : kReads & ~mask_of(kGrad)), writes(kWrites), factors(factors) {}

  MAS_FAST_BOTH void enter(const Row& row, int64_t index, const Numbers& numbers) {
    held = row.has(kOmega);
    lam = T(numbers.lam);
    twice_factor = factors ? T(2 * factors[index]) : T(2);
    limit = limit_of<T>(row.kept(kGrad));
    counts = row.has(kGrad);
  }

  template <int V>
  MAS_FAST_BOTH void step(Entries<T, V>& e, Sum& sum) const {
    if (!held) {
      // Only a gradient that is overwritten comes here: others have no chunks.
      MAS_FAST_UNROLL for (int k = 0; k < V; ++k) e.at[kGrad][k] = T(0);
      return;
    }
    sum.value += penalty_of(e, lam);
    MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
      const T was = e.at[kGrad][k];
      const T now = was + twice_factor * pull(lam, e.at[kOmega][k], e.at[kTheta][k] - e.at[kAnchor][k]);
      // Finite numbers minus themselves are 0.
      if (counts && was - was == T(0) && !((now < T(0) ? -now : now) < limit)) ++sum.lost;
      e.at[kGrad][k] = now;
    }
  }

  unsigned reads, writes;
  const double* factors;
  T lam = 0, twice_factor = 0, limit = 0;
  bool held = false, counts = false;
};

template <class T>
struct SgdRule {
  static constexpr unsigned kReads =
      mask_of(kTheta) | mask_of(kGrad) | mask_of(kOmega) | mask_of(kAnchor) | mask_of(kState0);
  static constexpr unsigned kWrites = mask_of(kTheta) | mask_of(kState0);
  static constexpr int kBlocks = 4;

  explicit SgdRule(const Sgd<T>& sgd) : reads(kReads), writes(kWrites), sgd(sgd) {
    if (sgd.first || sgd.momentum == T(0)) reads &= ~mask_of(kState0);
    if (sgd.momentum == T(0)) writes &= ~mask_of(kState0);
  }

  MAS_FAST_BOTH void enter(const Row& row, int64_t, const Numbers& numbers) {
    held = row.has(kOmega);
    lam = T(numbers.lam);
    // The proximal step of no penalty would still round.
    if (!held) sgd.implicit = false;
  }

  template <int V>
  MAS_FAST_BOTH void step(Entries<T, V>& e, Sum& sum) const {
    if (held) sum.value += penalty_of(e, lam);
    MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
      e.at[kTheta][k] =
          sgd.step(e.at[kTheta][k], e.at[kGrad][k], e.at[kState0][k], Hold<T>{e.at[kOmega][k], e.at[kAnchor][k]}, lam);
    }
  }

  unsigned reads, writes;
  Sgd<T> sgd;
  T lam = 0;
  bool held = false;
};

template <class T>
struct AdamWRule {
  static constexpr unsigned kWrites = mask_of(kTheta) | mask_of(kState0) | mask_of(kState1) | mask_of(kState2);
  static constexpr unsigned kReads = kWrites | mask_of(kGrad) | mask_of(kOmega) | mask_of(kAnchor);
  static constexpr int kBlocks = 3;

  // `same_step`: the corrections in `adamw` are those of all rows.
  AdamWRule(const AdamW<T>& adamw, bool same_step)
      : reads(kReads), writes(kWrites), adamw(adamw), same_step(same_step) {
    if (!adamw.amsgrad) {
      reads &= ~mask_of(kState2);
      writes &= ~mask_of(kState2);
    }
  }

  MAS_FAST_BOTH void enter(const Row& row, int64_t, const Numbers& numbers) {
    held = row.has(kOmega);
    lam = T(numbers.lam);
    if (!held) adamw.implicit = false;
    if (!same_step) {
      adamw.rate = T(numbers.rate);
      adamw.root_correction = T(numbers.root_correction);
    }
  }

  template <int V>
  MAS_FAST_BOTH void step(Entries<T, V>& e, Sum& sum) const {
    if (held) sum.value += penalty_of(e, lam);
    MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
      e.at[kTheta][k] = adamw.step(e.at[kTheta][k], e.at[kGrad][k], e.at[kState0][k], e.at[kState1][k],
                                   e.at[kState2][k], Hold<T>{e.at[kOmega][k], e.at[kAnchor][k]}, lam);
    }
  }

  unsigned reads, writes;
  AdamW<T> adamw;
  bool same_step;
  T lam = 0;
  bool held = false;
};

}  // namespace mas_fast::cuda
