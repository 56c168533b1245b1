/*
 * Kernels for ARM with NEON, which all of 64 bits have.
 *
 * Counting: a register holds 8 bits of 16 rows of a matrix (Layout::kBytes); the byte of the other row is spread over another;
 * exclusive or, a count of each byte's bits, an addition. Bytes are added up for as long as none can overflow.
 */
#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace binaryvit {
namespace {

struct Cpu {
    static constexpr Layout kLayout = Layout::kBytes;
    static constexpr int kBytesAtOnce = 28;  // 28 times at most 8 bits fit a byte; whole words

    template <int rows>
    static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
        const auto *matrix = reinterpret_cast<const uint8_t *>(tile), *rows_bytes = reinterpret_cast<const uint8_t *>(bits);
        for (int row = 0; row < rows; ++row) {
            sums[row] = i32x16{};
        }
        for (int begin = 0; begin < 4 * words; begin += kBytesAtOnce) {
            int end = std::min(begin + kBytesAtOnce, 4 * words);
            uint8x16_t counts[rows];
            for (int row = 0; row < rows; ++row) counts[row] = vdupq_n_u8(0);
            for (int byte = begin; byte < end; ++byte) {
                uint8x16_t column = vld1q_u8(matrix + byte * kLanes);
                for (int row = 0; row < rows; ++row)
                    counts[row] = vaddq_u8(counts[row], vcntq_u8(veorq_u8(column, vdupq_n_u8(rows_bytes[(byte / 4 * kRows + row) * 4 + byte % 4]))));
            }
            for (int row = 0; row < rows; ++row) {
                uint16x8_t lower = vmovl_u8(vget_low_u8(counts[row])), upper = vmovl_u8(vget_high_u8(counts[row]));
                uint32x4_t parts[4] = {vmovl_u16(vget_low_u16(lower)), vmovl_u16(vget_high_u16(lower)),
                                       vmovl_u16(vget_low_u16(upper)), vmovl_u16(vget_high_u16(upper))};
                i32x16 sum;
                std::memcpy(&sum, parts, sizeof(sum));
                sums[row] += sum;
            }
        }
    }

    /* A bit for every lane of all ones. */
    static inline uint32_t gather_bits(i32x16 mask) {
        static const uint16_t weights[8] = {1, 2, 4, 8, 16, 32, 64, 128};
        uint32x4_t parts[4];
        std::memcpy(parts, &mask, sizeof(mask));
        uint16x8_t weight = vld1q_u16(weights);
        uint16x8_t low = vcombine_u16(vmovn_u32(parts[0]), vmovn_u32(parts[1]));
        uint16x8_t high = vcombine_u16(vmovn_u32(parts[2]), vmovn_u32(parts[3]));
        return uint32_t(vaddvq_u16(vandq_u16(low, weight))) | uint32_t(vaddvq_u16(vandq_u16(high, weight))) << 8;
    }

    static inline uint32_t at_least(f32x16 a, f32x16 b) { return gather_bits(a >= b); }
    static inline uint32_t above(f32x16 a, f32x16 b) { return gather_bits(a > b); }
    static inline f32x16 negative_part(f32x16 x) { return x < 0 ? x : f32x16{}; }

    static inline f32x16 exponential(const Layer &layer, i32x16 index) {
        f32x16 values;
        for (int lane = 0; lane < kLanes; ++lane) values[lane] = layer.exponentials[index[lane]];
        return values;
    }
};

#include "forward.inc"

bool runs_here() { return true; }

}  // namespace

const Kernels kNeonKernels = {"neon", Cpu::kLayout, runs_here, run, count};

}  // namespace binaryvit

#endif
