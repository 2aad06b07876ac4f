#if defined(__x86_64__)
#define LEAF_TARGET "avx2,fma,f16c"
#define LEAF_VECTOR_BYTES 32
#define LEAF_LOOPS_TABLE kLoopsAvx2
#include "leaf_loops_for_target.h"
#endif
