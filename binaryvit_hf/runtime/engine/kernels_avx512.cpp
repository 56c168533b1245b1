/*
 * Kernels for x86 with AVX-512 VPOPCNTDQ (Intel since Ice Lake, AMD since Zen 4).
 *
 * Counting: one register holds a 32-bit word of 16 rows of a matrix (Layout::kWords), another holds 16 copies of a
 * word of the tile's row. Exclusive or, a population count and an addition give 16 sums. The word of the matrix stays
 * in its register for all rows of a tile. Long rows of weights need half as many population counts (Chains).
 */
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cassert>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,fma"))), \
                             apply_to = function)
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
    static constexpr int kFloatRows = kRows;
    static constexpr int kFloatBlocks = 2;
    static constexpr int kFewestRows = 1;

    using Bits = uint32_t;
    static constexpr int kBitsOfWord = 1;

    struct Words {
        static const Bits *prepare(const uint32_t *bits, int, uint16_t *) { return bits; }

        template <int rows>
        static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
            __m512i counts[rows];
            auto differing = [&](int word, int row) {
                return _mm512_popcnt_epi32(_mm512_xor_si512(_mm512_load_si512(tile + word * kLanes),
                                                            _mm512_set1_epi32(int(bits[word * kRows + row]))));
            };
            for (int row = 0; row < rows; ++row) counts[row] = differing(0, row);
            for (int word = 1; word < words; ++word)
                for (int row = 0; row < rows; ++row) counts[row] = _mm512_add_epi32(counts[row], differing(word, row));
            for (int row = 0; row < rows; ++row) sums[row] = reinterpret_cast<i32x16>(counts[row]);
        }
    };

    /*
     * Counts chained weights (SignMatrix::chain) by full adders, which saves 8 % of a forward. An adder takes `odd`,
     * whether the words so far differ an odd number of times, and the differences in two more words. Chained weights
     * give their sum, the next `odd`, by one exclusive or. Their carry is `odd == first ? odd : ~sum`: ternary logic
     * 0xd4. A carry counts twice, so one population count serves two words.
     */
    struct Chains {
        static const Bits *prepare(const uint32_t *bits, int words, uint16_t *prepared) {
            static_assert(kRows * sizeof(uint32_t) == sizeof(__m256i), "a word of all rows");
            const auto *words_of_tile = reinterpret_cast<const __m256i *>(bits);
            auto *chained = reinterpret_cast<__m256i *>(prepared);
            __m256i odd = words_of_tile[0];
            chained[0] = odd;
            for (int word = 1; word < words; ++word) {
                odd = _mm256_xor_si256(odd, words_of_tile[word]);
                chained[word] = word % 2 == 0 ? odd : words_of_tile[word];
            }
            return reinterpret_cast<const Bits *>(prepared);
        }

        template <int rows>
        INLINE static void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
            count_rows(std::make_integer_sequence<int, rows>(), bits, tile, words, sums);
        }

        /* Rows by a fold expression: GCC keeps arrays in memory that a loop indexes. */
        template <int... row>
        INLINE static void count_rows(std::integer_sequence<int, row...>, const uint32_t *bits, const uint32_t *tile,
                                      int words, i32x16 *sums) {
            __m512i odd[sizeof...(row)], carries[sizeof...(row)];
            auto word = [&tile](int i) { return _mm512_load_si512(tile + i * kLanes); };
            (begin(odd[row], carries[row], word(0), word(1), word(2), bits + row), ...);
            const uint32_t *last = tile + (words - 1) * kLanes;
            for (tile += 3 * kLanes, bits += 3 * kRows; tile != last; tile += 4 * kLanes, bits += 4 * kRows)
                (add_four(odd[row], carries[row], word(0), word(1), word(2), word(3), bits + row), ...);
            ((sums[row] = end(odd[row], carries[row], word(0), bits[row])), ...);
        }

        INLINE static __m512i differing(__m512i word, uint32_t bits) {
            return _mm512_xor_si512(word, _mm512_set1_epi32(int(bits)));
        }

        INLINE static void begin(__m512i &odd, __m512i &carries, __m512i first, __m512i second, __m512i third,
                                 const uint32_t *bits) {
            odd = differing(third, bits[2 * kRows]);
            carries = _mm512_popcnt_epi32(
                _mm512_ternarylogic_epi32(differing(first, bits[0]), differing(second, bits[kRows]), odd, 0xd4));
        }

        INLINE static void add_four(__m512i &odd, __m512i &carries, __m512i first, __m512i second, __m512i third,
                                    __m512i fourth, const uint32_t *bits) {
            add_two(odd, carries, first, second, bits);
            add_two(odd, carries, third, fourth, bits + 2 * kRows);
        }

        /* In assembly: from intrinsics GCC spills some of a tile's 16 accumulators, which costs 2 % of a forward. */
        INLINE static void add_two(__m512i &odd, __m512i &carries, __m512i first, __m512i second,
                                   const uint32_t *bits) {
            __m512i differing, carry = odd;
            asm("vpxord %[first_bits]%{1to16%}, %[first], %[differing]\n\t"
                "vpxord %[second_bits]%{1to16%}, %[second], %[odd]\n\t"
                "vpternlogd $0xd4, %[odd], %[differing], %[carry]\n\t"
                "vpopcntd %[carry], %[carry]\n\t"
                "vpaddd %[carry], %[carries], %[carries]"
                : [odd] "=&v"(odd), [carry] "+v"(carry), [carries] "+v"(carries), [differing] "=&v"(differing)
                : [first] "v"(first), [second] "v"(second), [first_bits] "m"(bits[0]), [second_bits] "m"(bits[kRows]));
        }

        INLINE static i32x16 end(__m512i odd, __m512i carries, __m512i last, uint32_t bits) {
            __m512i ones = _mm512_add_epi32(_mm512_popcnt_epi32(odd), _mm512_popcnt_epi32(differing(last, bits)));
            return reinterpret_cast<i32x16>(_mm512_add_epi32(ones, _mm512_add_epi32(carries, carries)));
        }
    };

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

    static inline void gather_shortcuts(const Layer &layer, const float *const *tokens, int rows, int block_stride,
                                        float *gathered) {
        int blocks = layer.channels % kLanes == 0 ? layer.channels / kLanes : 0;
        if (layer.expansion == 8 && blocks == 4) return gather_runs<8, 4>(layer, tokens, rows, block_stride, gathered);
        if (layer.expansion == 8 && blocks >= 8) return gather_runs<8, 8>(layer, tokens, rows, block_stride, gathered);
        if (layer.expansion == 4 && blocks >= 4) return gather_runs<4, 4>(layer, tokens, rows, block_stride, gathered);
        gather_one_by_one(layer, tokens, rows, block_stride, gathered);
    }

    /*
     * gather_shortcuts for an expansion of `runs`, `runs` shortcuts at a time: shortcut i takes every runs-th channel
     * from channel i of a block on, so all of them together take `runs` blocks side by side. Only `distinct` of these
     * blocks differ: after a token's last block comes its first.
     */
    template <int runs, int distinct>
    static void gather_runs(const Layer &layer, const float *const *tokens, int rows, ptrdiff_t block_stride,
                            float *gathered) {
        const int blocks = layer.channels / kLanes;
        for (size_t i = 0; i < layer.shortcut_channels.size(); i += runs, gathered += runs * kRows * kLanes) {
            ptrdiff_t places[distinct];
            for (int n = 0; n < distinct; ++n)
                places[n] = (layer.shortcut_channels[i][0] / kLanes + n) % blocks * block_stride;
            for (int row = 0; row < rows; ++row) {
                __m512 channels[runs];
                for (int n = 0; n < distinct; ++n) channels[n] = _mm512_loadu_ps(tokens[row] + places[n]);
                deinterleave<runs, distinct>(channels);
                for (int run = 0; run < runs; ++run)
                    _mm512_store_ps(gathered + (run * kRows + row) * kLanes, channels[run]);
            }
        }
    }

    /*
     * Register i takes every parts-th number of `count` registers, beginning at number i. It begins again until it is
     * full. Splits even from odd numbers, then each half in turn.
     */
    template <int parts, int count>
    INLINE static void deinterleave(__m512 *numbers) {
        if constexpr (parts > 1) {
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            constexpr int half = (count + 1) / 2;
            __m512 evens[parts / 2], odds[parts / 2];
            for (int i = 0; i < half; ++i) {
                __m512 first = numbers[2 * i % count], second = numbers[(2 * i + 1) % count];
                evens[i] = _mm512_permutex2var_ps(first, even, second);
                odds[i] = _mm512_permutex2var_ps(first, odd, second);
            }
            deinterleave<parts / 2, half>(evens);
            deinterleave<parts / 2, half>(odds);
            for (int i = 0; i < parts / 2; ++i) {
                numbers[2 * i] = evens[i];
                numbers[2 * i + 1] = odds[i];
            }
        }
    }

    struct Exponentials {
        explicit Exponentials(const Layer &layer)
            : fine(_mm512_load_ps(layer.exponentials_fine.data())),
              coarse(_mm512_load_ps(layer.exponentials_coarse.data())),
              table(layer.head_dim < kLanes * kLanes ? nullptr : layer.exponentials.data()) {}
        f32x16 operator()(i32x16 i) const {
            auto index = reinterpret_cast<__m512i>(i);
            if (table != nullptr) return reinterpret_cast<f32x16>(_mm512_i32gather_ps(index, table, sizeof(float)));
            // Two tables that each fill a register; permutexvar takes the index modulo 16.
            __m512 factor = _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), coarse);
            return reinterpret_cast<f32x16>(_mm512_mul_ps(_mm512_permutexvar_ps(index, fine), factor));
        }
        __m512 fine, coarse;
        const float *table;
    };
};

#include "forward.inc"

bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma");
}

}  // namespace

const Kernels kAvx512Kernels = {"avx512", Cpu::kLayout, kChains, runs_here, run, linear, count};

}  // namespace binaryvit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
