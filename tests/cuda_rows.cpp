// Runs the chunks of csrc/cuda one after another on the host, for tests/test_cuda_rows.py: everything of the kernels
// but the threads themselves.
#include "cuda/rules.h"

using namespace mas_fast;
using namespace mas_fast::cuda;

namespace {

// result: float64 [count, 2], of zeros.
template <class T, class Rule>
void run(const Rule& rule, const Row* rows, const Numbers* numbers, int64_t count, int64_t chunks, double* result) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t index = row_of(rows, count, chunk);
    const Row& row = rows[index];
    if (row.wide != (sizeof(T) == 8)) continue;
    Rule own = rule;
    own.enter(row, index, numbers[index]);
    for (int thread = 0; thread < kThreads; ++thread) {
      const Sum sum = walk<T>(own, row, chunk, thread, kThreads);
      result[2 * index] += sum.value;
      result[2 * index + 1] += sum.lost;
    }
  }
}

template <class Make>
void run_both(const Make& make, Row* rows, const Numbers* numbers, int64_t count, double* result) {
  const int64_t chunks = settle(rows, count);
  run<float>(make(0.0f), rows, numbers, count, chunks, result);
  run<double>(make(0.0), rows, numbers, count, chunks, result);
}

}  // namespace

extern "C" {

int64_t row_bytes() { return sizeof(Row); }
int64_t chunk_entries() { return kChunk; }

void penalty_grad(Row* rows, const Numbers* numbers, int64_t count, const double* factors, bool add, double* result) {
  run_both([&]<class T>(T) { return PenaltyRule<T>(add, factors); }, rows, numbers, count, result);
}

void sgd_step(Row* rows, const Numbers* numbers, int64_t count, double lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, bool first, bool implicit, double* result) {
  run_both(
      [&]<class T>(T) {
        return SgdRule<T>(
            Sgd<T>{T(lr), T(momentum), T(dampening), T(weight_decay), T(maximize ? -1 : 1), nesterov, first, implicit});
      },
      rows, numbers, count, result);
}

// The rates and corrections are those of the rows.
void adamw_step(Row* rows, const Numbers* numbers, int64_t count, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool amsgrad, bool maximize, bool implicit, double* result) {
  run_both(
      [&]<class T>(T) {
        return AdamWRule<T>(AdamW<T>{T(1 - lr * weight_decay), T(beta2), T(1 - beta1), T(1 - beta2), T(eps),
                                     T(maximize ? -1 : 1), T(0), T(0), T(lr), amsgrad, implicit},
                            false);
      },
      rows, numbers, count, result);
}

void encode(const float* values, int64_t count, float scale, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = to_code(values[i], scale);
}
}
