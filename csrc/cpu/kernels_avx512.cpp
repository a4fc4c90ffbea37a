// The inner loops for avx512 vectors.
#define MAS_FAST_VECTOR_BYTES 64
#include "cpu/steps_body.h"

namespace mas_fast::cpu {

const KernelTable& avx512_kernels() {
  static constexpr KernelTable table = make_table("avx512");
  return table;
}

}  // namespace mas_fast::cpu
