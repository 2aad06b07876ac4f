#include "cpu_capability.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace leaf_cuda::cpu {
namespace {

#if defined(__x86_64__)
// Asks CPUID itself: in some versions of Clang, __builtin_cpu_supports does not accept "f16c".
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

CpuCapability of_processor() {
#if defined(__x86_64__)
  // The features that leaf_loops_avx2.cpp and leaf_loops_avx512.cpp are compiled for.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return CpuCapability::avx512;
  if (avx2) return CpuCapability::avx2;
#endif
  return CpuCapability::baseline;
}

CpuCapability allowed() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view name = value ? value : "";
  if (name == "default") return CpuCapability::baseline;
  if (name == "avx2") return CpuCapability::avx2;
  return CpuCapability::avx512;
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = std::min(of_processor(), allowed());
  return capability;
}

const char* to_string(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::avx512:
      return "AVX512";
    case CpuCapability::avx2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

}  // namespace leaf_cuda::cpu
