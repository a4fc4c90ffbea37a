// Lists of tensors as a table of rows in device memory, so that one launch serves any number of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <vector>

#include "cuda/device.h"
#include "cuda/rows.h"

namespace mas_fast::cuda {

using Tensors = std::vector<Tensor>;

// The rows of an op, and the numbers that go with them.
struct Rows {
  // θ, Ω, θ* and λ. Ω, its scales and θ* may be in pinned memory of the host, which kernels can read.
  Rows(const Tensors& thetas, const Tensors& omegas, const Tensors& scales, const Tensors& anchors,
       const std::vector<double>& lams, const std::vector<int64_t>& places);

  // Adds a tensor to every row; an empty list adds none.
  void put(Place place, const char* name, const Tensors& tensors);

  Tensor like;  // a tensor on the device
  std::vector<Row> rows;
  std::vector<Numbers> numbers;
};

// Rows and numbers on the device.
struct Table {
  Tensor memory;
  const Row* rows;
  const Numbers* numbers;
  int64_t count, chunks;
  bool any_float, any_double;
};

// Brings rows to the device, except where an earlier call has brought the same ones.
Table upload(Rows& rows, const OnDevice& on);

// Sums of chunks, two numbers each.
struct ChunkSum {
  double value, lost;
};

// float64 [rows, 2]: the sums of the rows' chunks, in their order.
Tensor sum_chunks(const Table& table, const ChunkSum* sums, const Tensor& like, const OnDevice& on);

}  // namespace mas_fast::cuda
