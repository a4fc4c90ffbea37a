// y = x Wᵀ + b, and with W [I, O] in the place of Wᵀ the gradient of x, δ W.
//
// Tasks are pieces of y: a group of panels of columns for some rows. Of the panels, a slab of k is packed and kept in
// L2, and all rows of the task meet a block of a panel while it is in L1. Work: R·I·O multiply-adds; bytes: x once for
// each group, W once for each piece of rows; y is written with the sums of its first block of k, and met again for each
// other one. Σ runs over the same blocks in the same order for every number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cpu/factor.h"

namespace mas_fast::cpu {
namespace {

constexpr int64_t kBlocksPerSlab = 4;
// Packed slabs of a task: half of the L2 of the smaller machines of today.
constexpr int64_t kGroupBytes = 256 << 10;
// Rows of a task: enough to make packing a small part of it, and few enough for their part of x to stay in L2.
constexpr int64_t kRows = 256;

constexpr int64_t kTasksPerThread = 2;

// Part `i` of `count` even parts of [0, size).
struct Part {
  Part(int64_t i, int64_t count, int64_t size) : begin(i * size / count), end((i + 1) * size / count) {}
  int64_t size() const { return end - begin; }
  int64_t begin, end;
};

template <class T>
void run(Tensor& output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t R = input.size(0), I = input.size(1), O = weight.size(0), NR = kernel.tile_columns;
  const Factor<T> factor{static_cast<const T*>(weight.const_data_ptr()), weight.stride(1), weight.stride(0)};
  const T* const x = static_cast<const T*>(input.const_data_ptr());
  const T* const b = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  T* const y = static_cast<T*>(output.mutable_data_ptr());
  const int64_t row_bytes = NR * int64_t(sizeof(T));  // of a panel
  const int64_t blocks = std::max<int64_t>(1, ceil_div(I * row_bytes, kBlockBytes));
  const int64_t slabs = ceil_div(blocks, kBlocksPerSlab);
  const int64_t slab_rows = ceil_div(I, slabs);
  const int64_t panels = ceil_div(O, NR);
  const int64_t most = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, slab_rows * row_bytes));
  // A small product is cut further, so that all threads have some of it.
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const int64_t wanted = kTasksPerThread * threads;
  const int64_t fewest = ceil_div(R, kRows);
  const int64_t groups = std::clamp(ceil_div(wanted, fewest), ceil_div(panels, most), panels);
  const int64_t least_pieces = std::clamp(ceil_div(wanted, groups), fewest, ceil_div(R, kernel.tile_rows));
  // Where groups of panels do not come out even among the threads, each thread has its own rows, of all panels.
  const bool uneven = groups * least_pieces % threads != 0 || panels % groups != 0;
  const int64_t parts = uneven && R >= kRows * threads ? threads : 1;
  const int64_t own_pieces = ceil_div(least_pieces, parts), pieces = parts * own_pieces;
  torch::stable::parallel_for(0, groups * pieces, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> packed(ceil_div(panels, groups) * NR * slab_rows), zeros(NR);
    std::fill_n(zeros.get(), NR, T(0));
    int64_t held = -1;  // the group whose only slab is packed
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / own_pieces % groups, part = task / (own_pieces * groups);
      const Part own_panels(group, groups, panels), rows(part * own_pieces + task % own_pieces, pieces, R);
      const int64_t first = own_panels.begin * NR, last = std::min(own_panels.end * NR, O);
      for (int64_t slab = 0; slab < slabs; ++slab) {
        const Part k(slab, slabs, I);
        if (slabs > 1 || group != held) {
          for (int64_t c = first; c < last; c += NR) {
            factor.pack(k.begin, k.size(), c, std::min(NR, last - c), packed.get() + (c - first) * k.size());
          }
          held = group;
        }
        const int64_t blocks_here = std::max<int64_t>(1, ceil_div(k.size() * row_bytes, kBlockBytes));
        for (int64_t block = 0; block < blocks_here; ++block) {
          const Part own(block, blocks_here, k.size());
          for (int64_t c = first; c < last; c += NR) {
            const T* const start = b ? b + c : zeros.get();
            kernel.multiply(x + rows.begin * I + k.begin + own.begin, I,
                            packed.get() + (c - first) * k.size() + own.begin * NR, rows.size(), own.size(),
                            std::min(NR, last - c), slab + block == 0 ? start : nullptr, y + rows.begin * O + c, O);
          }
        }
      }
    }
  });
}

void linear_(Tensor output, const Tensor input, const Tensor weight, const std::optional<Tensor> bias) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2, "input and weight must have 2 axes");
  const int64_t R = input.size(0), I = input.size(1), O = weight.size(0);
  const ScalarType type = output.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "output must be float32 or float64");
  const auto check = [type](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type, name, " must be on the CPU and of the dtype of output");
    check_shape(name, t, shape);
  };
  check("output", output, {R, O});
  check("input", input, {R, I});
  check("weight", weight, {O, I});
  if (bias) check("bias", *bias, {O});
  STD_TORCH_CHECK(output.is_contiguous() && input.is_contiguous() && (!bias || bias->is_contiguous()),
                  "output, input and bias must be contiguous");
  if (R == 0 || O == 0) return;
  STD_TORCH_CHECK(O * I <= 1 || weight.stride(0) == 1 || weight.stride(1) == 1, "weight must have a stride of 1");
  with_omega_type(output, [&]<class T>() { run<T>(output, input, weight, bias); });
}

}  // namespace
}  // namespace mas_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(mas_fast, CPU, m) { m.impl("linear_", TORCH_BOX(&mas_fast::cpu::linear_)); }
