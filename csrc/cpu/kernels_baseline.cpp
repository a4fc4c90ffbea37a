// The inner loops for baseline vectors.
#define MAS_FAST_VECTOR_BYTES 16
#include "cpu/steps_body.h"

namespace mas_fast::cpu {

const KernelTable& baseline_kernels() {
  static constexpr KernelTable table = make_table("baseline");
  return table;
}

}  // namespace mas_fast::cpu
