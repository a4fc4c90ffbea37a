// Ω in 8 bits: s (c / 255)², s the largest of a block of 128. Encoded once per task; the steps decode it themselves.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/steps.h"

namespace mas_fast::cpu {
namespace {

// Blocks of a task: 32 Ki entries.
constexpr int64_t kBlocksPerTask = 32768 / kCodeBlock;

std::tuple<Tensor, Tensor> encode_omega(const Tensor omega) {
  STD_TORCH_CHECK(omega.is_cpu() && omega.is_contiguous() && omega.scalar_type() == ScalarType::Float,
                  "omega must be float32, contiguous and on the CPU");
  const int64_t count = omega.numel(), blocks = ceil_div(count, kCodeBlock);
  Tensor codes = torch::stable::new_empty(omega, {count}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(omega, {blocks}, ScalarType::Float);
  const float* const from = static_cast<const float*>(omega.const_data_ptr());
  uint8_t* const to = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* const largest = static_cast<float*>(scales.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kCodeBlock, last = std::min(first + kCodeBlock, count);
      float scale = 0;
      for (int64_t i = first; i < last; ++i) scale = std::max(scale, from[i]);
      largest[b] = scale;
      for (int64_t i = first; i < last; ++i) to[i] = to_code(from[i], scale);
    }
  });
  return {codes, scales};
}

Tensor decode_omega(const Tensor codes, const Tensor scales) {
  const int64_t count = codes.numel(), blocks = ceil_div(count, kCodeBlock);
  STD_TORCH_CHECK(codes.is_cpu() && codes.is_contiguous() && codes.scalar_type() == ScalarType::Byte,
                  "codes must be uint8, contiguous and on the CPU");
  STD_TORCH_CHECK(scales.is_cpu() && scales.is_contiguous() && scales.scalar_type() == ScalarType::Float &&
                      scales.numel() == blocks,
                  "scales must be float32, contiguous and on the CPU, one for each block of codes");
  Tensor omega = torch::stable::new_empty(codes, {count}, ScalarType::Float);
  const uint8_t* const from = static_cast<const uint8_t*>(codes.const_data_ptr());
  const float* const scale = static_cast<const float*>(scales.const_data_ptr());
  float* const to = static_cast<float*>(omega.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kCodeBlock, last = std::min(end * kCodeBlock, count);
    step_kernels_for<float>().decode(Storage::kCode, from + first, last - first, scale + begin, to + first);
  });
  return omega;
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) {
  m.impl("encode_omega", TORCH_BOX(&mas_fast::cpu::encode_omega));
  m.impl("decode_omega", TORCH_BOX(&mas_fast::cpu::decode_omega));
}
