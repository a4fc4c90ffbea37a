// The inner loops for avx2 vectors.
#define MAS_FAST_VECTOR_BYTES 32
#include "cpu/steps_body.h"

namespace mas_fast::cpu {

const KernelTable& avx2_kernels() {
  static constexpr KernelTable table = make_table("avx2");
  return table;
}

}  // namespace mas_fast::cpu
