// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace mas_fast::cpu {
namespace {

const KernelTable& choose() {
#if defined(MAS_FAST_AVX2) || defined(MAS_FAST_AVX512)
  const char* wanted = std::getenv("MAS_FAST_CPU_ISA");
  const auto allowed = [wanted](const char* name) { return !wanted || !*wanted || std::strcmp(wanted, name) == 0; };
#endif
#ifdef MAS_FAST_AVX512
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512_kernels();
  }
#endif
#ifdef MAS_FAST_AVX2
  // f16c has no name of its own in older compilers; every processor with AVX2 has it.
  const bool narrowed = wanted && std::strcmp(wanted, "baseline") == 0;
  if (!narrowed && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
  return baseline_kernels();
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace mas_fast::cpu

extern "C" __attribute__((visibility("default"))) const char* mas_fast_cpu_instruction_set() {
  return mas_fast::cpu::kernels().instruction_set;
}
