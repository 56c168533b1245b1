/*
 * Kernels for x86 with AVX-512 VPOPCNTDQ (Intel since Ice Lake, AMD since Zen 4).
 *
 * Counting: a register holds a 32-bit word of 16 rows of a matrix (Layout::kWords); the word of the other row is spread over
 * another; exclusive or, a count of each word's bits, an addition, and 16 sums need no adding up of lanes. The word of the
 * matrix stays in its register for all rows of a tile. Long rows of weights need fewer counts (Chains).
 */
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <utility>

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

    struct Words {
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
    };

    /*
     * Counting of weights in chains (SignMatrix::chain), by full adders. Of every bit there is known whether the words so far
     * that differ in it are odd in number, and one exclusive or tells the same of two more words. So the adder of these three
     * has its sum; its carry, 1 where two of them are, is, where the first two are equal, one of them, and else the opposite of
     * the sum. Bits of carries count twice: one count for two words.
     */
    struct Chains {
        static const Bits *prepare(const uint32_t *bits, int words, uint16_t *room) {
            static_assert(kRows * sizeof(uint32_t) == sizeof(__m256i), "a word of all rows");
            const auto *own = reinterpret_cast<const __m256i *>(bits);
            auto *chained = reinterpret_cast<__m256i *>(room);
            __m256i odd = own[0];
            chained[0] = odd;
            for (int word = 1; word < words; ++word) {
                odd = _mm256_xor_si256(odd, own[word]);
                chained[word] = word % 2 == 0 ? odd : own[word];
            }
            return reinterpret_cast<const Bits *>(room);
        }

        template <int rows>
        INLINE static void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
            count_rows(std::make_integer_sequence<int, rows>(), bits, tile, words, sums);
        }

        /* Rows by name: what is picked from arrays in a loop, GCC keeps in memory. */
        template <int... row>
        INLINE static void count_rows(std::integer_sequence<int, row...>, const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
            __m512i odd[sizeof...(row)], carries[sizeof...(row)];
            auto word = [&tile](int i) { return _mm512_load_si512(tile + i * kLanes); };
            (begin(odd[row], carries[row], word(0), word(1), word(2), bits + row), ...);
            const uint32_t *last = tile + (words - 1) * kLanes;
            for (tile += 3 * kLanes, bits += 3 * kRows; tile != last; tile += 4 * kLanes, bits += 4 * kRows)
                (add_four(odd[row], carries[row], word(0), word(1), word(2), word(3), bits + row), ...);
            ((sums[row] = end(odd[row], carries[row], word(0), bits[row])), ...);
        }

        INLINE static __m512i differing(__m512i word, uint32_t bits) { return _mm512_xor_si512(word, _mm512_set1_epi32(int(bits))); }

        INLINE static void begin(__m512i &odd, __m512i &carries, __m512i first, __m512i second, __m512i third, const uint32_t *bits) {
            odd = differing(third, bits[2 * kRows]);
            carries = _mm512_popcnt_epi32(_mm512_ternarylogic_epi32(differing(first, bits[0]), differing(second, bits[kRows]), odd, 0xd4));
        }

        INLINE static void add_four(__m512i &odd, __m512i &carries, __m512i first, __m512i second, __m512i third, __m512i fourth,
                                    const uint32_t *bits) {
            add_two(odd, carries, first, second, bits);
            add_two(odd, carries, third, fourth, bits + 2 * kRows);
        }

        /* Instruction by instruction: of the same in C++, GCC keeps some of a tile's 16 registers in memory. */
        INLINE static void add_two(__m512i &odd, __m512i &carries, __m512i first, __m512i second, const uint32_t *bits) {
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

    static inline void pick(const Layer &layer, const float *const *from, int rows, int block, float *to) {
        int blocks = layer.channels % kLanes == 0 ? layer.channels / kLanes : 0;
        if (layer.expansion == 8 && blocks == 4) return pick_runs<8, 4>(layer, from, rows, block, to);
        if (layer.expansion == 8 && blocks >= 8) return pick_runs<8, 8>(layer, from, rows, block, to);
        if (layer.expansion == 4 && blocks >= 4) return pick_runs<4, 4>(layer, from, rows, block, to);
        pick_one_by_one(layer, from, rows, block, to);
    }

    /*
     * As many choices at once as a run has channels: each takes one channel in so many, the first of them from the first on, and
     * all together what lies in as many blocks side by side, `apart` of which are not the same again.
     */
    template <int runs, int apart>
    static void pick_runs(const Layer &layer, const float *const *from, int rows, ptrdiff_t block, float *to) {
        const int blocks = layer.channels / kLanes;
        for (size_t choice = 0; choice < layer.repeated.size(); choice += runs, to += runs * kRows * kLanes) {
            ptrdiff_t places[apart];
            for (int i = 0; i < apart; ++i) places[i] = (layer.repeated[choice][0] / kLanes + i) % blocks * block;
            for (int row = 0; row < rows; ++row) {
                __m512 channels[runs];
                for (int i = 0; i < apart; ++i) channels[i] = _mm512_loadu_ps(from[row] + places[i]);
                deal<runs, apart>(channels);
                for (int run = 0; run < runs; ++run) _mm512_store_ps(to + (run * kRows + row) * kLanes, channels[run]);
            }
        }
    }

    /*
     * Deals what `count` registers hold to `parts` of them, in turns, and again from the first number on until they are full:
     * first what lies in even places and what lies in odd ones, then each of both.
     */
    template <int parts, int count>
    INLINE static void deal(__m512 *numbers) {
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
            deal<parts / 2, half>(evens);
            deal<parts / 2, half>(odds);
            for (int i = 0; i < parts / 2; ++i) {
                numbers[2 * i] = evens[i];
                numbers[2 * i + 1] = odds[i];
            }
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

const Kernels kAvx512Kernels = {"avx512", Cpu::kLayout, kChains, runs_here, run, linear, count};

}  // namespace binaryvit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
