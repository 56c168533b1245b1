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
    static constexpr int kFloatBlocks = 2;

    using Bits = uint32_t;
    static constexpr int kBitsOfWord = 1;
    static const Bits *prepare(const uint32_t *bits, int, uint16_t *) { return bits; }

    template <int rows>
    static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
        __m512i counts[rows];
        auto differing = [&](int word, int row) {
            return _mm512_popcnt_epi32(_mm512_xor_si512(_mm512_load_si512(tile + word * kLanes), _mm512_set1_epi32(int(bits[word * kRows + row]))));
        };
        if (words == 2) {  // heads of 64 channels and the first stage, without a loop
            for (int row = 0; row < rows; ++row)
                sums[row] = reinterpret_cast<i32x16>(_mm512_add_epi32(differing(0, row), differing(1, row)));
            return;
        }
        for (int row = 0; row < rows; ++row) counts[row] = differing(0, row);
        for (int word = 1; word < words; ++word)
            for (int row = 0; row < rows; ++row) counts[row] = _mm512_add_epi32(counts[row], differing(word, row));
        for (int row = 0; row < rows; ++row) sums[row] = reinterpret_cast<i32x16>(counts[row]);
    }

    static inline uint32_t at_least(f32x16 a, f32x16 b) {
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
    }

    static inline uint32_t above(f32x16 a, f32x16 b) {
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
    }

    static inline Floats lesser(Floats a, Floats b) {
        return reinterpret_cast<Floats>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
    }

    static inline float sum(Floats x) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x)); }

    static inline void pick(const float *const *from, int rows, int block, const Choice *choices, int count, float *to) {
        for (int begin = 0, end = 0; begin < count; begin = end) {
            while (end < count && choices[end].first == choices[begin].first && choices[end].last == choices[begin].last) ++end;
            for (int pair = choices[begin].first; pair <= choices[begin].last;) {
                int left = choices[begin].last - pair + 1, pairs = left >= 4 ? 4 : left >= 2 ? 2 : 1;
                auto pick = pairs == 4 ? pick_of_pairs<4> : pairs == 2 ? pick_of_pairs<2> : pick_of_pairs<1>;
                for (int row = 0; row < rows; ++row)
                    pick(from[row], block, pair, choices + begin, choices + end, to + begin * kRows * kLanes + row * kLanes);
                pair += pairs;
            }
        }
    }

    /* What several choices take of the same pairs of blocks of one row. */
    template <int pairs>
    static void pick_of_pairs(const float *from, ptrdiff_t block, int first, const Choice *choice, const Choice *end, float *to) {
        __m512 blocks[2 * pairs];
        for (int i = 0; i < 2 * pairs; ++i) blocks[i] = _mm512_loadu_ps(from + (2 * first + i) * block);
        for (; choice != end; ++choice, to += kRows * kLanes) {
            __m512i channels = _mm512_load_si512(choice->channels);
            // Of a pair there are those from its first channel on; an index is taken modulo 32: 16 of the one block, 16 of the other.
            __m512 picked = choice->first == first ? _mm512_setzero_ps() : _mm512_load_ps(to);
            for (int pair = 0; pair < pairs; ++pair) {
                __mmask16 from_pair = _mm512_cmpge_epi32_mask(channels, _mm512_set1_epi32(32 * (first + pair)));
                picked = _mm512_mask_mov_ps(picked, from_pair, _mm512_permutex2var_ps(blocks[2 * pair], channels, blocks[2 * pair + 1]));
            }
            _mm512_store_ps(to, picked);
        }
    }

    struct Exponentials {
        explicit Exponentials(const Layer &layer)
            : fine(_mm512_load_ps(layer.exponentials_fine.data())), coarse(_mm512_load_ps(layer.exponentials_coarse.data())),
              all(layer.head_dim < kLanes * kLanes ? nullptr : layer.exponentials.data()) {}
        f32x16 operator()(i32x16 index) const {
            auto places = reinterpret_cast<__m512i>(index);
            if (all) return reinterpret_cast<f32x16>(_mm512_i32gather_ps(places, all, sizeof(float)));
            // By two tables that each fill a register; an index is taken modulo 16.
            __m512 of_sixteens = _mm512_permutexvar_ps(_mm512_srli_epi32(places, 4), coarse);
            return reinterpret_cast<f32x16>(_mm512_mul_ps(_mm512_permutexvar_ps(places, fine), of_sixteens));
        }
        __m512 fine, coarse;
        const float *all;
    };
};

#include "forward.inc"

bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma");
}

}  // namespace

const Kernels kAvx512Kernels = {"avx512", Cpu::kLayout, runs_here, run, linear, count};

}  // namespace binaryvit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
