/*
The few functions that formulas are written in, for one float. csrc/cpu/vec/vec.h has the same functions for a whole
vector register, so a formula in csrc/<concept>.h is a template over its number type and is written once for the host's
vector loops and for a device thread.
*/
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FASTPPO_HD __host__ __device__ __forceinline__
#else
#define FASTPPO_HD inline
#endif

namespace fastppo {

// Condition ? a : b. The branch not taken may be NaN: it is dropped, not multiplied by zero.
FASTPPO_HD float select(bool condition, float a, float b) { return condition ? a : b; }
FASTPPO_HD float vexp(float x) { return expf(x); }
FASTPPO_HD float vexpm1(float x) { return expm1f(x); }
FASTPPO_HD float vsqrt(float x) { return sqrtf(x); }
FASTPPO_HD float vabs(float x) { return fabsf(x); }
// NaN on either side comes through, as in torch.minimum and torch.maximum.
FASTPPO_HD float vmin(float a, float b) { return a < b || a != a ? a : b; }
FASTPPO_HD float vmax(float a, float b) { return a > b || a != a ? a : b; }
// NaN in x comes through; what NaN as a bound does is left open, which saves a vector register half its instructions.
FASTPPO_HD float vclamp(float x, float low, float high) { return vmin(vmax(x, low), high); }

} // namespace fastppo
