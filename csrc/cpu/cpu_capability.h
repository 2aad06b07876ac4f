#pragma once

namespace leaf_cuda::cpu {

enum class CpuCapability { baseline, avx2, avx512 };

// The best instruction set that this processor has and ATEN_CPU_CAPABILITY (default, avx2, avx512) allows.
CpuCapability cpu_capability();
const char* to_string(CpuCapability);

}  // namespace leaf_cuda::cpu
