// Ω in 8 bits: s (c / 255)², s the largest of a block of 128. Encoded once per task; the steps decode it themselves.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/device.h"
#include "cuda/rules.h"

namespace mas_fast::cuda {
namespace {

constexpr int kPerLane = int(kCodeBlock) / 32;
constexpr int kWarps = kThreads / 32;

// A warp for each block of codes.
__global__ void __launch_bounds__(kThreads) encode_kernel(const float* __restrict__ omega, int64_t count,
                                                          uint8_t* __restrict__ codes, float* __restrict__ scales) {
  const int64_t block = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t first = block * kCodeBlock + threadIdx.x % 32;
  if (block * kCodeBlock >= count) return;
  float values[kPerLane], scale = 0.0f;
  MAS_FAST_UNROLL for (int k = 0; k < kPerLane; ++k) {
    values[k] = first + 32 * k < count ? omega[first + 32 * k] : 0.0f;
    scale = fmaxf(scale, values[k]);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    scale = fmaxf(scale, __shfl_xor_sync(0xffffffffu, scale, distance));
  }
  MAS_FAST_UNROLL for (int k = 0; k < kPerLane; ++k) {
    if (first + 32 * k < count) codes[first + 32 * k] = to_code(values[k], scale);
  }
  if (threadIdx.x % 32 == 0) scales[block] = scale;
}

__global__ void __launch_bounds__(kThreads)
    decode_kernel(const uint8_t* __restrict__ codes, const float* __restrict__ scales, int64_t count,
                  float* __restrict__ omega) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) omega[i] = from_code(codes[i], scales[i / kCodeBlock]);
}

unsigned blocks_for(int64_t count, int64_t entries_per_block) {
  const int64_t blocks = ceil_div(count, entries_per_block);
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "omega must have fewer than 2^39 entries, got ", count);
  return unsigned(blocks);
}

std::tuple<Tensor, Tensor> encode_omega(const Tensor omega) {
  STD_TORCH_CHECK(omega.is_cuda() && omega.is_contiguous() && omega.scalar_type() == ScalarType::Float,
                  "omega must be float32, contiguous and on a GPU");
  const OnDevice on(omega);
  const int64_t count = omega.numel();
  Tensor codes = torch::stable::new_empty(omega, {count}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(omega, {ceil_div(count, kCodeBlock)}, ScalarType::Float);
  if (count > 0) {
    encode_kernel<<<blocks_for(count, kWarps * kCodeBlock), kThreads, 0, on.stream>>>(
        static_cast<const float*>(omega.const_data_ptr()), count, static_cast<uint8_t*>(codes.mutable_data_ptr()),
        static_cast<float*>(scales.mutable_data_ptr()));
    check(cudaGetLastError(), "the launch of encode_omega");
  }
  return {codes, scales};
}

Tensor decode_omega(const Tensor codes, const Tensor scales) {
  const int64_t count = codes.numel();
  STD_TORCH_CHECK(codes.is_cuda() && codes.is_contiguous() && codes.scalar_type() == ScalarType::Byte,
                  "codes must be uint8, contiguous and on a GPU");
  STD_TORCH_CHECK(scales.is_cuda() && scales.get_device_index() == codes.get_device_index() && scales.is_contiguous() &&
                      scales.scalar_type() == ScalarType::Float && scales.numel() == ceil_div(count, kCodeBlock),
                  "scales must be float32, contiguous and on the GPU of the codes, one for each block of them");
  const OnDevice on(codes);
  Tensor omega = torch::stable::new_empty(codes, {count}, ScalarType::Float);
  if (count > 0) {
    decode_kernel<<<blocks_for(count, kThreads), kThreads, 0, on.stream>>>(
        static_cast<const uint8_t*>(codes.const_data_ptr()), static_cast<const float*>(scales.const_data_ptr()), count,
        static_cast<float*>(omega.mutable_data_ptr()));
    check(cudaGetLastError(), "the launch of decode_omega");
  }
  return omega;
}

}  // namespace
}  // namespace mas_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CUDA, m) {
  m.impl("encode_omega", TORCH_BOX(&mas_fast::cuda::encode_omega));
  m.impl("decode_omega", TORCH_BOX(&mas_fast::cuda::decode_omega));
}
