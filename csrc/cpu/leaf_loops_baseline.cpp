// The instruction set that every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define LEAF_VECTOR_BYTES 16
#define LEAF_LOOPS_TABLE kLoopsBaseline
#include "leaf_loops_impl.h"
