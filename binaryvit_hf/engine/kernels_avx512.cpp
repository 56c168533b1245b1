/*
 * Kernels for x86 with AVX-512 VPOPCNTDQ (Intel since Ice Lake, AMD since Zen 4).
 *
 * Counting: a register holds a 32-bit word of 16 rows of a matrix (Layout::kWords); the word of the other row is spread over
 * another; exclusive or, a count of each word's bits, an addition, and 16 sums need no adding up of lanes. The word of the
 * matrix stays in its register for all rows of a tile.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,fma,prefer-vector-width=512")
#endif

namespace binaryvit {
namespace {

constexpr int kRegisterBytes = 64;

#include "vectors.inc"

struct Cpu {
    static constexpr Layout kLayout = Layout::kWords;

    template <int rows>
    static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
        __m512i counts[rows];
        for (int row = 0; row < rows; ++row) counts[row] = _mm512_setzero_si512();
        for (int word = 0; word < words; ++word) {
            __m512i matrix = _mm512_load_si512(tile + word * kLanes);
            for (int row = 0; row < rows; ++row) {
                __m512i differing = _mm512_xor_si512(matrix, _mm512_set1_epi32(int(bits[word * kRows + row])));
                counts[row] = _mm512_add_epi32(counts[row], _mm512_popcnt_epi32(differing));
            }
        }
        for (int row = 0; row < rows; ++row) sums[row] = reinterpret_cast<i32x16>(counts[row]);
    }

    static inline uint32_t at_least(f32x16 a, f32x16 b) {
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
    }

    static inline uint32_t above(f32x16 a, f32x16 b) {
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
    }

    static inline Floats negative_part(Floats x) {
        return reinterpret_cast<Floats>(_mm512_min_ps(reinterpret_cast<__m512>(x), _mm512_setzero_ps()));
    }

    static inline float sum(Floats x) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x)); }

    static inline f32x16 pick(const float *from, const Choice &choice) {
        __m512i channels = _mm512_load_si512(choice.channels), groups = _mm512_srli_epi32(channels, 5);
        __m512 picked = _mm512_setzero_ps();
        for (int group = choice.first; group <= choice.last; ++group) {
            // An index is taken modulo 32: 16 of the one register, 16 of the other.
            __m512 of_group = _mm512_permutex2var_ps(_mm512_loadu_ps(from + 32 * group), channels, _mm512_loadu_ps(from + 32 * group + 16));
            picked = _mm512_mask_mov_ps(picked, _mm512_cmpeq_epi32_mask(groups, _mm512_set1_epi32(group)), of_group);
        }
        return reinterpret_cast<f32x16>(picked);
    }

    static inline f32x16 exponential(const Layer &layer, i32x16 index) {
        auto places = reinterpret_cast<__m512i>(index);
        if (layer.head_dim >= kLanes * kLanes)
            return reinterpret_cast<f32x16>(_mm512_i32gather_ps(places, layer.exponentials.data(), sizeof(float)));
        // e^(a + 16 b) by two tables that each fill a register; an index is taken modulo 16.
        __m512 fine = _mm512_permutexvar_ps(places, _mm512_load_ps(layer.exponentials_fine.data()));
        __m512 coarse = _mm512_permutexvar_ps(_mm512_srli_epi32(places, 4), _mm512_load_ps(layer.exponentials_coarse.data()));
        return reinterpret_cast<f32x16>(_mm512_mul_ps(fine, coarse));
    }
};

#include "forward.inc"

bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma");
}

}  // namespace

const Kernels kAvx512Kernels = {"avx512", Cpu::kLayout, runs_here, run, count};

}  // namespace binaryvit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
