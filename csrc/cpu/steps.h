// How the ops of the training step see lists of tensors: one row per parameter, cut into chunks for the threads.
//
// Every byte of every tensor is touched once. The sum over a chunk is kept by chunk and added up in their order, so the
// result does not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/data.h"

namespace mas_fast::cpu {

using Tensors = std::vector<Tensor>;

// Entries of a chunk: enough to be worth a task, few enough to share out a single tensor.
constexpr int64_t kChunk = 16 * kStepBlock;

// The memory of one tensor; null for one that is not there.
struct Operand {
  Operand() = default;
  Operand(const char* name, const Tensor& tensor, bool may_be_codes = false)
      : storage(may_be_codes && tensor.scalar_type() == ScalarType::Byte ? Storage::kCode : storage_of(name, tensor)) {
    STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
    STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
    data = static_cast<char*>(tensor.mutable_data_ptr());
  }
  Operand(const char* name, const Tensor& tensor, int64_t count) : Operand(name, tensor) {
    STD_TORCH_CHECK(tensor.numel() == count, name, " must have ", count, " entries, got ", tensor.numel());
  }
  explicit operator bool() const { return data; }
  bool is_double() const { return data && storage == Storage::kFloat64; }
  Operand from(int64_t entry) const {
    Operand later = *this;
    later.data = at(entry);
    return later;
  }
  char* at(int64_t entry) const { return data ? data + entry * bytes_of(storage) : nullptr; }

  Storage storage = Storage::kFloat32;
  char* data = nullptr;
};

// Entries of an operand as T, decoded if memory keeps them otherwise.
template <class T>
struct Loaded {
  Loaded(const Operand& operand, int64_t first, int64_t count, const float* scales = nullptr)
      : operand_(operand), first_(first) {
    if (operand) {
      values = step_kernels_for<T>().decode(operand.storage, operand.at(first), count,
                                            scales ? scales + first / kCodeBlock : nullptr, buffer_);
    }
  }
  // Where to write entries that `store` brings to memory.
  T* target() {
    const bool own = operand_.storage == (sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32);
    return !operand_ ? nullptr : own ? reinterpret_cast<T*>(operand_.at(first_)) : buffer_;
  }
  void store(int64_t count) {
    if (operand_) step_kernels_for<T>().encode(operand_.storage, target(), count, operand_.at(first_));
  }

  const T* values = nullptr;

 private:
  const Operand& operand_;
  int64_t first_;
  T buffer_[kStepBlock];
};

// An entry of the lists of what holds: of one parameter, or of many.
struct HoldEntry {
  HoldEntry(const Tensor& omega, const Tensor& scales, const Tensor& anchor)
      : count(omega.numel()), blocks(scales.numel()), omega("omega", omega, true), anchor("anchor", anchor, count) {
    if (this->omega.storage != Storage::kCode) return;
    STD_TORCH_CHECK(scales.is_cpu() && scales.is_contiguous() && scales.scalar_type() == ScalarType::Float,
                    "scales must be float32 on the CPU and contiguous");
    this->scales = static_cast<const float*>(scales.const_data_ptr());
  }

  int64_t count, blocks;
  Operand omega, anchor;
  const float* scales = nullptr;
};

// What holds the parameters of a call.
struct Holding {
  Holding(const Tensors& thetas, const Tensors& omegas, const Tensors& scales, const Tensors& anchors,
          const std::vector<double>& lams, const std::vector<int64_t>& places)
      : lams(lams), places(places) {
    STD_TORCH_CHECK(!thetas.empty(), "thetas must have at least one entry");
    check_holds(thetas.size(), omegas.size(), scales.size(), anchors.size(), lams.size(), places.size());
    entries.reserve(omegas.size());
    for (size_t i = 0; i < omegas.size(); ++i) entries.emplace_back(omegas[i], scales[i], anchors[i]);
  }

  std::vector<HoldEntry> entries;
  const std::vector<double>& lams;
  const std::vector<int64_t>& places;
};

// A parameter and what holds it; the op's own operands are beside it.
struct Row {
  Row(const Tensor& tensor, const Holding& holding, size_t i)
      : count(tensor.numel()), theta("theta", tensor, count), lam(holding.lams[i]) {
    const HoldPlace at(holding.places, i);
    if (at.entry < 0) return;
    STD_TORCH_CHECK(at.entry < int64_t(holding.entries.size()), "places must name an omega, got ", at.entry);
    const HoldEntry& entry = holding.entries[size_t(at.entry)];
    if (entry.count == 0) return;
    STD_TORCH_CHECK(at.fits(at.first, count, entry.count), "omega must have ", count, " entries, got ", entry.count,
                    " from ", at.first, " on");
    omega = entry.omega.from(at.first);
    anchor = entry.anchor.from(at.first);
    if (omega.storage == Storage::kCode) {
      STD_TORCH_CHECK(at.fits(at.block, ceil_div(count, kCodeBlock), entry.blocks),
                      "scales must be float32 and one for each ", kCodeBlock, " codes");
      scales = entry.scales + at.block;
    }
  }
  bool is_double() const { return theta.is_double() || omega.is_double() || anchor.is_double(); }

  int64_t count;
  Operand theta, omega, anchor;
  const float* scales = nullptr;
  double lam;
};

// Ω and θ* of a block of a row.
template <class T>
struct HeldBlock {
  HeldBlock(const Row& row, int64_t first, int64_t count)
      : omega(is_small(row) ? kNone : row.omega, first, count, row.scales),
        anchor(is_small(row) ? kNone : row.anchor, first, count) {
    if (is_small(row)) {
      holds.kept = Kept::kCodes;
      holds.codes = reinterpret_cast<const uint8_t*>(row.omega.at(first));
      holds.scales = row.scales + first / kCodeBlock;
      holds.anchor_bits = reinterpret_cast<const uint16_t*>(row.anchor.at(first));
    } else if (row.omega) {
      holds.kept = Kept::kNumbers;
      holds.omega = omega.values;
      holds.anchor = anchor.values;
    }
  }
  static bool is_small(const Row& row) {
    return row.omega && row.omega.storage == Storage::kCode && row.anchor.storage == Storage::kBFloat16;
  }

  Loaded<T> omega, anchor;
  Holds<T> holds;

 private:
  static inline const Operand kNone;
};

// Runs f(row, first, count) -> StepSum on all blocks of all rows; returns float64 [rows, 2], the sums by row.
template <class Rows, class F>
Tensor run_steps(const Rows& rows, const Tensor& like, const F& f) {
  struct Chunk {
    size_t row;
    int64_t first, count;
  };
  std::vector<Chunk> chunks;
  std::vector<int64_t> ends;  // of the work up to and with each chunk
  // A tensor costs some time by itself, as much as so many entries.
  constexpr int64_t kOverhead = 256;
  int64_t work = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int64_t count = rows[r].count;
    for (int64_t first = 0; first < count; first += kChunk) {
      chunks.push_back({r, first, std::min(kChunk, count - first)});
      ends.push_back(work += chunks.back().count + kOverhead);
    }
  }
  std::vector<StepSum> sums(chunks.size());
  // Equal shares of the work; less than 32 Ki entries are not worth waking a thread.
  const int64_t shares = work < 2 * 32768 ? 1 : int64_t(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const auto chunk_at = [&](int64_t share) {
      return std::upper_bound(ends.begin(), ends.end(), work * share / shares) - ends.begin();
    };
    const size_t last = end == shares ? chunks.size() : size_t(chunk_at(end));
    for (size_t c = size_t(chunk_at(begin)); c < last; ++c) {
      const Chunk& chunk = chunks[c];
      for (int64_t done = 0; done < chunk.count; done += kStepBlock) {
        const StepSum sum = f(rows[chunk.row], chunk.first + done, std::min(kStepBlock, chunk.count - done));
        sums[c].value += sum.value;
        sums[c].lost += sum.lost;
      }
    }
  });
  Tensor result = torch::stable::new_empty(like, {int64_t(rows.size()), 2}, ScalarType::Double);
  double* const values = static_cast<double*>(result.mutable_data_ptr());
  std::fill(values, values + 2 * rows.size(), 0.0);
  for (size_t c = 0; c < chunks.size(); ++c) {
    values[2 * chunks[c].row] += sums[c].value;
    values[2 * chunks[c].row + 1] += double(sums[c].lost);
  }
  return result;
}

}  // namespace mas_fast::cpu
