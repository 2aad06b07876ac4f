// leaf_loops_impl.h with its functions compiled for LEAF_TARGET: by a pragma, because setuptools has no compiler flags
// for single files. Other headers are included before the pragma: if their inline functions were compiled for the
// target, the linker could use those copies in the whole library.
#include <immintrin.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__clang__)
#define LEAF_PRAGMA(x) _Pragma(#x)
#define LEAF_TARGET_ATTRIBUTE(t) LEAF_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
LEAF_TARGET_ATTRIBUTE(LEAF_TARGET)
#include "leaf_loops_impl.h"
#pragma clang attribute pop
#else
#define LEAF_PRAGMA(x) _Pragma(#x)
#define LEAF_TARGET_PRAGMA(t) LEAF_PRAGMA(GCC target(t))
#pragma GCC push_options
LEAF_TARGET_PRAGMA(LEAF_TARGET)
#include "leaf_loops_impl.h"
#pragma GCC pop_options
#endif
