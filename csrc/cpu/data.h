// How the op files see tensors: element types, element pointers, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace mas_fast::cpu {

inline Input input_type(const Tensor& data) {
  switch (data.scalar_type()) {
    case ScalarType::Double:
      return Input::kFloat64;
    case ScalarType::BFloat16:
      return Input::kBFloat16;
    case ScalarType::Half:
      return Input::kFloat16;
    default:
      return Input::kFloat32;
  }
}

// What inner loops ask of a tensor, asked once: each question to the tensor itself is a call through the stable ABI.
struct View {
  explicit View(const Tensor& tensor)
      : type(input_type(tensor)),
        dims(tensor.dim()),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        element_size(int64_t(tensor.element_size())) {
    for (int64_t axis = 0; axis < dims; ++axis) stride[axis] = tensor.stride(axis);
  }
  // Address of element `offset`.
  const void* at(int64_t offset) const { return data + offset * element_size; }

  Input type;
  int64_t dims;
  int64_t stride[5];  // no op has more axes

 private:
  const char* data;
  int64_t element_size;
};

inline Magnitude magnitude_of_statistic(bool square) { return square ? Magnitude::kSquare : Magnitude::kAbs; }

// Scratch memory that a thread keeps between calls: fresh pages from the system cost more than most small ops.
class ScratchPool {
 public:
  ~ScratchPool() {
    for (const Block& block : free_) std::free(block.address);
  }

  struct Block {
    void* address;
    size_t bytes;
  };

  Block take(size_t bytes) {
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i) {
      if (free_[i].bytes >= bytes && (best == free_.size() || free_[i].bytes < free_[best].bytes)) best = i;
    }
    if (best == free_.size()) {
      void* address = std::aligned_alloc(64, bytes);
      if (!address) throw std::bad_alloc();
      return {address, bytes};
    }
    const Block block = free_[best];
    kept_ -= block.bytes;
    free_.erase(free_.begin() + best);
    return block;
  }

  void give(Block block) noexcept {
    if (kept_ + block.bytes > kMostKept || free_.size() == free_.capacity()) return std::free(block.address);
    kept_ += block.bytes;
    free_.push_back(block);
  }

  static ScratchPool& own() {
    thread_local ScratchPool pool;
    return pool;
  }

 private:
  static constexpr size_t kMostKept = 32u << 20;  // per thread
  ScratchPool() { free_.reserve(8); }
  std::vector<Block> free_;
  size_t kept_ = 0;
};

// Uninitialised, on a cache line, for the thread that made it.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : block_(ScratchPool::own().take((size_t(count) * sizeof(T) + 64) / 64 * 64)),
        entries_(static_cast<T*>(block_.address)) {}
  ~Scratch() { ScratchPool::own().give(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return entries_; }
  T& operator[](int64_t i) const { return entries_[i]; }

 private:
  ScratchPool::Block block_;
  T* entries_;
};

// Calls f<float>() or f<double>() by the dtype of omega.
template <class F>
void with_omega_type(const Tensor& omega, F f) {
  if (omega.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  f.template operator()<float>();
}

}  // namespace mas_fast::cpu
