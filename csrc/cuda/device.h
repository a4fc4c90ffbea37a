// The device and the stream that an op runs on.
#pragma once

#include <cuda_runtime.h>

#include "checks.h"

namespace mas_fast::cuda {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

// PyTorch's current stream of a device.
cudaStream_t current_stream(int32_t device);

// Makes the device of a tensor the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like) : device(like.get_device_index()) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    stream = current_stream(device);
  }
  ~OnDevice() {
    if (device != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const int32_t device;
  cudaStream_t stream;

 private:
  int before_ = 0;
};

}  // namespace mas_fast::cuda
