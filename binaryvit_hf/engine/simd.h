/* Vectors of 16 numbers, which the compiler maps to whatever registers there are (GCC's and Clang's vector extensions). */
#pragma once

#include <cstdint>

namespace binaryvit {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x16_anywhere __attribute__((vector_size(64), aligned(4), may_alias));

}  // namespace binaryvit
