/*
 * Kernels for 64-bit ARM. All such CPUs have NEON.
 *
 * Counting: one register holds 8 bits of 16 rows of a matrix (Layout::kBytes), another holds 16 copies of a byte of
 * the tile's row. Exclusive or, a population count of each byte and an addition give 16 sums. Counts stay bytes until
 * they could overflow.
 */
#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <cassert>
#include <type_traits>

#include "kernels.h"

namespace binaryvit {
namespace {

constexpr int kRegisterBytes = 16;

#include "vectors.inc"

struct Cpu {
    static constexpr Layout kLayout = Layout::kBytes;
    static constexpr int kFloatRows = kRows;
    static constexpr int kFloatBlocks = 1;
    static constexpr int kFewestRows = 1;
    static constexpr int kBytesAtOnce = 28;  // 28 counts of at most 8 bits fit a byte; a multiple of a word's 4

    using Bits = uint32_t;
    static constexpr int kBitsOfWord = 1;

    struct Words {
        static const Bits *prepare(const uint32_t *bits, int, uint16_t *) { return bits; }

        template <int rows>
        static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
            const auto *matrix = reinterpret_cast<const uint8_t *>(tile),
                       *rows_bytes = reinterpret_cast<const uint8_t *>(bits);
            for (int row = 0; row < rows; ++row) sums[row] = i32x16{};
            for (int begin = 0; begin < 4 * words; begin += kBytesAtOnce) {
                int end = std::min(begin + kBytesAtOnce, 4 * words);
                uint8x16_t counts[rows];
                for (int row = 0; row < rows; ++row) counts[row] = vdupq_n_u8(0);
                for (int byte = begin; byte < end; ++byte) {
                    uint8x16_t column = vld1q_u8(matrix + byte * kLanes);
                    for (int row = 0; row < rows; ++row)
                        counts[row] =
                            vaddq_u8(counts[row],
                                     vcntq_u8(veorq_u8(
                                         column, vdupq_n_u8(rows_bytes[(byte / 4 * kRows + row) * 4 + byte % 4]))));
                }
                for (int row = 0; row < rows; ++row) {
                    uint16x8_t lower = vmovl_u8(vget_low_u8(counts[row])), upper = vmovl_u8(vget_high_u8(counts[row]));
                    i32x16 sum = {{reinterpret_cast<Ints>(vmovl_u16(vget_low_u16(lower))),
                                   reinterpret_cast<Ints>(vmovl_u16(vget_high_u16(lower)))},
                                  {reinterpret_cast<Ints>(vmovl_u16(vget_low_u16(upper))),
                                   reinterpret_cast<Ints>(vmovl_u16(vget_high_u16(upper)))}};
                    sums[row] = sums[row] + sum;
                }
            }
        }
    };
    using Chains = Words;

    /* One bit for each of 16 lanes, which are all ones or all zeros. */
    static inline uint32_t gather_bits(uint32x4_t first, uint32x4_t second, uint32x4_t third, uint32x4_t fourth) {
        static const uint16_t weights[8] = {1, 2, 4, 8, 16, 32, 64, 128};
        uint16x8_t weight = vld1q_u16(weights);
        uint16x8_t low = vcombine_u16(vmovn_u32(first), vmovn_u32(second));
        uint16x8_t high = vcombine_u16(vmovn_u32(third), vmovn_u32(fourth));
        return uint32_t(vaddvq_u16(vandq_u16(low, weight))) | uint32_t(vaddvq_u16(vandq_u16(high, weight))) << 8;
    }

    static inline uint32x4_t mask(Ints of) { return reinterpret_cast<uint32x4_t>(of); }

    static inline uint32_t at_least(f32x16 a, f32x16 b) {
        return gather_bits(mask(a.low.low >= b.low.low), mask(a.low.high >= b.low.high),
                           mask(a.high.low >= b.high.low), mask(a.high.high >= b.high.high));
    }

    static inline uint32_t above(f32x16 a, f32x16 b) {
        return gather_bits(mask(a.low.low > b.low.low), mask(a.low.high > b.low.high), mask(a.high.low > b.high.low),
                           mask(a.high.high > b.high.high));
    }

    static inline Floats lesser(Floats a, Floats b) { return a < b ? a : b; }

    static inline float sum(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }

    static inline void gather_shortcuts(const Layer &layer, const float *const *tokens, int rows, int block_stride,
                                        float *gathered) {
        gather_one_by_one(layer, tokens, rows, block_stride, gathered);
    }

    using Exponentials = LookedUpExponentials;
};

#include "forward.inc"

bool runs_here() { return true; }

}  // namespace

const Kernels kNeonKernels = {"neon", Cpu::kLayout, kChains, runs_here, run, linear, count};

}  // namespace binaryvit

#endif
