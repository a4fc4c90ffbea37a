// The kernel of all multi-tensor ops: a block of threads applies a rule to a chunk of a row.
//
// Bound by memory. Nothing is added atomically: every chunk has its own sum, and the chunks of a row are added in their
// order, so that results do not depend on which block comes first.
#pragma once

#include "cuda/multi_tensor.h"
#include "cuda/rules.h"

namespace mas_fast::cuda {
namespace {

// Thread 0 gets the sum of the block.
__device__ __forceinline__ Sum sum_of_block(Sum own) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double values[kWarps];
  __shared__ int32_t lost[kWarps];
  for (int distance = 16; distance > 0; distance /= 2) {
    own.value += __shfl_down_sync(0xffffffffu, own.value, distance);
    own.lost += __shfl_down_sync(0xffffffffu, own.lost, distance);
  }
  if (threadIdx.x % 32 == 0) {
    values[threadIdx.x / 32] = own.value;
    lost[threadIdx.x / 32] = own.lost;
  }
  __syncthreads();
  Sum total;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) {
      total.value += values[warp];
      total.lost += lost[warp];
    }
  }
  return total;
}

// Rows in double and in float are the business of a launch each, so that the common one needs few registers.
template <class T, template <class> class Rule>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? Rule<T>::kBlocks : 2)
    step_kernel(const Row* __restrict__ rows, const Numbers* __restrict__ numbers, int64_t count,
                ChunkSum* __restrict__ sums, Rule<T> rule) {
  const int64_t chunk = blockIdx.x;
  const int64_t index = row_of(rows, count, chunk);
  // In shared memory: a row of pointers would take a third of the registers.
  static_assert(sizeof(Row) <= kThreads);
  alignas(Row) __shared__ char bytes[sizeof(Row)];
  if (threadIdx.x < sizeof(Row)) bytes[threadIdx.x] = reinterpret_cast<const char*>(rows + index)[threadIdx.x];
  const Row& row = *reinterpret_cast<const Row*>(bytes);
  __syncthreads();
  if (row.wide != uint8_t(sizeof(T) == 8)) return;
  rule.enter(row, index, numbers[index]);
  const Sum total = sum_of_block(walk<T>(rule, row, chunk, int(threadIdx.x), kThreads));
  if (threadIdx.x == 0) sums[chunk] = {total.value, double(total.lost)};
}

// Runs the rule on all rows: make(T()) is the rule in T. Returns float64 [rows, 2], the sums by row.
template <template <class> class Rule, class Make>
Tensor run_steps(Rows& rows, const Make& make) {
  const OnDevice on(rows.like);
  const Table table = upload(rows, on);
  const Tensor memory = torch::stable::new_empty(rows.like, {table.chunks, 2}, ScalarType::Double);
  ChunkSum* const sums = static_cast<ChunkSum*>(memory.mutable_data_ptr());
  const auto launch = [&]<class T>(T zero) {
    step_kernel<T, Rule>
        <<<unsigned(table.chunks), kThreads, 0, on.stream>>>(table.rows, table.numbers, table.count, sums, make(zero));
    check(cudaGetLastError(), "the launch of a step");
  };
  if (table.any_float) launch(0.0f);
  if (table.any_double) launch(0.0);
  return sum_chunks(table, sums, rows.like, on);
}

}  // namespace
}  // namespace mas_fast::cuda
