#if defined(__x86_64__)
#define LEAF_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define LEAF_VECTOR_BYTES 64
#define LEAF_LOOPS_TABLE kLoopsAvx512
#include "leaf_loops_for_target.h"
#endif
