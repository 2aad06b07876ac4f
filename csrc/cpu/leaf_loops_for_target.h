// leaf_loops_impl.h with its functions compiled for LEAF_TARGET. By pragma and not by a flag for the file, because
// setuptools has no flags for one file. What is not the loops' own comes before: compiled for the target, an inline
// function of it could serve the whole library.
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
