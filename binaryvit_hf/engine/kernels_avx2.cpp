/*
 * Kernels for x86 with AVX2.
 *
 * Counting: a register holds 8 bits of 16 rows of a matrix, the lower four of each in its first half and the upper four in
 * its second (from the bytes of Layout::kBytes). The byte of the other row chooses one of 256 tables of 2 x 16 bytes, in how
 * many bits each number of four differs from its lower and its upper four; one shuffle looks all up. Bytes are added up for as
 * long as none can overflow.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace binaryvit {
namespace {

/* For every byte: in how many bits 0 to 15 differ from its lower four, then from its upper four. */
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

struct Cpu {
    static constexpr Layout kLayout = Layout::kBytes;
    static constexpr int kBytesAtOnce = 60;  // 60 times at most 4 bits fit a byte; whole words

    template <int rows>
    static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
        if constexpr (rows > 4) {
            // More than four rows' sums do not stay in registers.
            count<4>(bits, tile, words, sums);
            count<rows - 4>(bits + 4, tile, words, sums + 4);
        } else {
            const auto *matrix = reinterpret_cast<const uint8_t *>(tile), *rows_bytes = reinterpret_cast<const uint8_t *>(bits);
            __m256i low[rows], high[rows];
            for (int row = 0; row < rows; ++row) {
                low[row] = high[row] = _mm256_setzero_si256();
            }
            for (int begin = 0; begin < 4 * words; begin += kBytesAtOnce) {
                int end = std::min(begin + kBytesAtOnce, 4 * words);
                __m256i counts[rows];
                for (int row = 0; row < rows; ++row) counts[row] = _mm256_setzero_si256();
                for (int byte = begin; byte < end; ++byte) {
                    __m128i packed = _mm_load_si128(reinterpret_cast<const __m128i *>(matrix + byte * kLanes));
                    __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), _mm256_set1_epi8(15));
                    for (int row = 0; row < rows; ++row) {
                        const auto *table = reinterpret_cast<const __m256i *>(kDifferences.counts[rows_bytes[(byte / 4 * kRows + row) * 4 + byte % 4]]);
                        counts[row] = _mm256_add_epi8(counts[row], _mm256_shuffle_epi8(_mm256_load_si256(table), nibbles));
                    }
                }
                for (int row = 0; row < rows; ++row) {
                    __m256i lower = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(counts[row]));
                    __m256i upper = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(counts[row], 1));
                    __m256i sum = _mm256_add_epi16(lower, upper);
                    low[row] = _mm256_add_epi32(low[row], _mm256_cvtepu16_epi32(_mm256_castsi256_si128(sum)));
                    high[row] = _mm256_add_epi32(high[row], _mm256_cvtepu16_epi32(_mm256_extracti128_si256(sum, 1)));
                }
            }
            for (int row = 0; row < rows; ++row) {
                std::memcpy(&sums[row], &low[row], sizeof(__m256i));
                std::memcpy(reinterpret_cast<__m256i *>(&sums[row]) + 1, &high[row], sizeof(__m256i));
            }
        }
    }

    struct Halves {
        __m256 low, high;
    };

    static inline Halves halves(f32x16 x) {
        Halves split;
        std::memcpy(&split, &x, sizeof(x));
        return split;
    }

    static inline uint32_t at_least(f32x16 a, f32x16 b) {
        Halves x = halves(a), y = halves(b);
        return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, _CMP_GE_OQ))) |
               uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, _CMP_GE_OQ))) << 8;
    }

    static inline uint32_t above(f32x16 a, f32x16 b) {
        Halves x = halves(a), y = halves(b);
        return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, _CMP_GT_OQ))) |
               uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, _CMP_GT_OQ))) << 8;
    }

    static inline f32x16 negative_part(f32x16 x) {
        Halves split = halves(x);
        split = {_mm256_min_ps(split.low, _mm256_setzero_ps()), _mm256_min_ps(split.high, _mm256_setzero_ps())};
        std::memcpy(&x, &split, sizeof(x));
        return x;
    }

    static inline f32x16 exponential(const Layer &layer, i32x16 index) {
        __m256i places[2];
        std::memcpy(places, &index, sizeof(index));
        Halves split = {_mm256_i32gather_ps(layer.exponentials.data(), places[0], sizeof(float)),
                        _mm256_i32gather_ps(layer.exponentials.data(), places[1], sizeof(float))};
        f32x16 values;
        std::memcpy(&values, &split, sizeof(values));
        return values;
    }
};

#include "forward.inc"

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const Kernels kAvx2Kernels = {"avx2", Cpu::kLayout, runs_here, run, count};

}  // namespace binaryvit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
