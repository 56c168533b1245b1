/* For every CPU of an architecture: SSE2 on x86, Neon on ARM. */
#include <cmath>

#include "row_kernels.h"

#define KERNEL(name) name##_baseline
#include "rows.inc"
