/*
 * Kernels for x86 with AVX2.
 *
 * Counting: one register holds 8 bits of 16 rows of a matrix (Layout::kBytes): the lower four bits of each row in its
 * first half, the upper four in its second. The same byte of the tile's row selects one of 256 tables of 2 x 16 bytes:
 * in how many bits 0 to 15 differ from its lower four bits, and from its upper four. One shuffle looks up all 16 rows.
 * Counts stay bytes until they could overflow.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cassert>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace binaryvit {
namespace {

/* For every byte: in how many bits 0 to 15 differ from its lower four bits, then from its upper four. */
struct DifferenceTables {
    DifferenceTables() {
        for (int byte = 0; byte < 256; ++byte) {
            for (int nibble = 0; nibble < 16; ++nibble) {
                counts[byte][nibble] = uint8_t(__builtin_popcount(nibble ^ (byte & 15)));
                counts[byte][16 + nibble] = uint8_t(__builtin_popcount(nibble ^ byte >> 4));
            }
        }
    }
    alignas(64) uint8_t counts[256][32];
};

const DifferenceTables kDifferences;

}  // namespace
}  // namespace binaryvit

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace binaryvit {
namespace {

constexpr int kRegisterBytes = 32;

#include "vectors.inc"

struct Cpu {
    static constexpr Layout kLayout = Layout::kBytes;
    static constexpr int kFloatRows = kRows;
    static constexpr int kFloatBlocks = 1;
    static constexpr int kFewestRows = 1;
    static constexpr int kWordsAtOnce = 15;  // 60 counts of at most 4 bits fit a byte
    static constexpr int kWordsInByte = 7;   // so do 2 * 28 of them: both halves' sums

    /* The place of each byte's table in kDifferences. */
    using Bits = uint16_t;
    static constexpr int kBitsOfWord = 4;

    struct Words {
        static const Bits *prepare(const uint32_t *bits, int words, uint16_t *prepared) {
            for (int half = 0; half < 2 * words; ++half) {
                __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i *>(bits) + half);
                _mm256_store_si256(reinterpret_cast<__m256i *>(prepared) + half,
                                   _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 5));
            }
            return prepared;
        }

        template <int rows>
        static inline void count(const Bits *bits, const uint32_t *tile, int words, i32x16 *sums) {
            count_rows(std::make_integer_sequence<int, rows>(), bits, tile, words, sums);
        }

        /* Rows by a fold expression: GCC keeps arrays in memory that a loop indexes. */
        template <int... row>
        static inline void count_rows(std::integer_sequence<int, row...>, const Bits *bits, const uint32_t *tile,
                                      int words, i32x16 *sums) {
            const __m256i upper_half = _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0);
            for (int begin = 0; begin < words; begin += kWordsAtOnce) {
                __m256i counts[] = {((void)row, _mm256_setzero_si256())...};
                for (int word = begin; word < std::min(begin + kWordsAtOnce, words); ++word) {
                    const auto *matrix = reinterpret_cast<const __m128i *>(tile + word * kLanes);
                    const Bits *of_word = bits + word * kRows * kBitsOfWord;
                    auto nibbles = [&](int byte) {
                        __m256i twice = _mm256_broadcastsi128_si256(_mm_load_si128(matrix + byte));
                        return _mm256_and_si256(_mm256_srlv_epi32(twice, upper_half), _mm256_set1_epi8(15));
                    };
                    __m256i first = nibbles(0), second = nibbles(1), third = nibbles(2), fourth = nibbles(3);
                    auto differing = [&](const Bits *byte, __m256i matrix_nibbles) {
                        const auto *table = reinterpret_cast<const __m256i *>(kDifferences.counts[0] + *byte);
                        return _mm256_shuffle_epi8(_mm256_load_si256(table), matrix_nibbles);
                    };
                    auto of_row = [&](const Bits *bytes) {
                        return _mm256_add_epi8(
                            _mm256_add_epi8(differing(bytes, first), differing(bytes + 1, second)),
                            _mm256_add_epi8(differing(bytes + 2, third), differing(bytes + 3, fourth)));
                    };
                    ((counts[row] = _mm256_add_epi8(counts[row], of_row(of_word + row * kBitsOfWord))), ...);
                }
                auto add = [&](i32x16 &sum, __m256i of_row) {
                    i32x16 counted = words <= kWordsInByte ? spread_sums_of_bytes(of_row) : spread_sums(of_row);
                    sum = begin == 0 ? counted : sum + counted;
                };
                (add(sums[row], counts[row]), ...);
            }
        }

        static inline i32x16 spread_sums_of_bytes(__m256i counts) {
            __m128i both = _mm_add_epi8(_mm256_castsi256_si128(counts), _mm256_extracti128_si256(counts, 1));
            return {reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(both)),
                    reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_srli_si128(both, 8)))};
        }

        static inline i32x16 spread_sums(__m256i counts) {
            __m256i lower = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(counts));
            __m256i upper = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(counts, 1));
            __m256i both = _mm256_add_epi16(lower, upper);
            return {reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(both))),
                    reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(both, 1)))};
        }
    };
    using Chains = Words;

    template <int comparison>
    static inline uint32_t compare(f32x16 a, f32x16 b) {
        auto bits = [](Floats x, Floats y) {
            return uint32_t(_mm256_movemask_ps(
                _mm256_cmp_ps(reinterpret_cast<__m256>(x), reinterpret_cast<__m256>(y), comparison)));
        };
        return bits(a.low, b.low) | bits(a.high, b.high) << 8;
    }

    static inline uint32_t at_least(f32x16 a, f32x16 b) { return compare<_CMP_GE_OQ>(a, b); }
    static inline uint32_t above(f32x16 a, f32x16 b) { return compare<_CMP_GT_OQ>(a, b); }

    static inline Floats lesser(Floats a, Floats b) {
        return reinterpret_cast<Floats>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
    }

    static inline float sum(Floats x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

    static inline void gather_shortcuts(const Layer &layer, const float *const *tokens, int rows, int block_stride,
                                        float *gathered) {
        gather_one_by_one(layer, tokens, rows, block_stride, gathered);
    }

    struct Exponentials {
        explicit Exponentials(const Layer &layer)
            : lower(_mm256_load_ps(layer.exponentials_fine.data())),
              upper(_mm256_load_ps(layer.exponentials_fine.data() + 8)),
              coarse(_mm256_load_ps(layer.exponentials_coarse.data())),
              table(layer.head_dim < 8 * kLanes ? nullptr : layer.exponentials.data()) {}
        f32x16 operator()(i32x16 i) const { return {look_up(i.low), look_up(i.high)}; }
        Floats look_up(Ints i) const {
            auto index = reinterpret_cast<__m256i>(i);
            if (table != nullptr) return reinterpret_cast<Floats>(_mm256_i32gather_ps(table, index, sizeof(float)));
            // Tables that each fill a register: permutevar takes the index modulo 8, its fourth bit selects `lower` or
            // `upper`.
            __m256 first = _mm256_permutevar8x32_ps(lower, index), second = _mm256_permutevar8x32_ps(upper, index);
            __m256 fine = _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
            __m256 factor = _mm256_permutevar8x32_ps(coarse, _mm256_srli_epi32(index, 4));
            return reinterpret_cast<Floats>(_mm256_mul_ps(fine, factor));
        }
        __m256 lower, upper, coarse;
        const float *table;
    };
};

#include "forward.inc"

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const Kernels kAvx2Kernels = {"avx2", Cpu::kLayout, kChains, runs_here, run, linear, count};

}  // namespace binaryvit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
