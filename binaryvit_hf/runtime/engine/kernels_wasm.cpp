/*
 * Kernels for WebAssembly with its SIMD of 128 bits.
 *
 * Counting: one register holds a word of 4 rows of a matrix (Layout::kWords), another holds 4 copies of a word of the
 * tile's row. Exclusive or, a population count of each byte and an addition give 4 times 4 sums of bytes. Counts stay
 * bytes until they could overflow.
 */
#if defined(__wasm_simd128__)

#include <wasm_simd128.h>

#include <algorithm>
#include <cassert>
#include <type_traits>

#include "kernels.h"

namespace binaryvit {
namespace {

constexpr int kRegisterBytes = 16;

#include "vectors.inc"

struct Cpu {
    static constexpr Layout kLayout = Layout::kWords;
    static constexpr int kFloatBlocks = 1;
    static constexpr int kWordsAtOnce = 31;  // 31 counts of at most 8 bits fit a byte

    using Bits = uint32_t;
    static constexpr int kBitsOfWord = 1;

    struct Words {
        static const Bits *prepare(const uint32_t *bits, int, uint16_t *) { return bits; }

        template <int rows>
        static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
            constexpr int kRowsAtOnce = std::min(rows, 2);  // their sums, and what the JIT needs, fit 16 registers
            for (int row = 0; row < rows; row += kRowsAtOnce)
                count_rows<kRowsAtOnce>(bits + row, tile, words, sums + row);
        }

        template <int rows>
        static INLINE void count_rows(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
            v128_t totals[rows][4] = {};
            for (int begin = 0; begin < words; begin += kWordsAtOnce) {
                const int end = std::min(begin + kWordsAtOnce, words);
                v128_t counts[rows][4] = {};
                for (int word = begin; word < end; ++word) {
                    v128_t inputs[rows];
                    for (int row = 0; row < rows; ++row)
                        inputs[row] = wasm_v128_load32_splat(bits + word * kRows + row);
                    for (int part = 0; part < 4; ++part) {
                        v128_t matrix = wasm_v128_load(tile + word * kLanes + part * 4);
                        for (int row = 0; row < rows; ++row)
                            counts[row][part] = wasm_i8x16_add(counts[row][part],
                                                               wasm_i8x16_popcnt(wasm_v128_xor(matrix, inputs[row])));
                    }
                }
                for (int row = 0; row < rows; ++row)
                    for (int part = 0; part < 4; ++part)
                        totals[row][part] = wasm_i32x4_add(
                            totals[row][part],
                            wasm_u32x4_extadd_pairwise_u16x8(wasm_u16x8_extadd_pairwise_u8x16(counts[row][part])));
            }
            for (int row = 0; row < rows; ++row)
                sums[row] = {{Ints(totals[row][0]), Ints(totals[row][1])},
                             {Ints(totals[row][2]), Ints(totals[row][3])}};
        }
    };
    using Chains = Words;

    /* One bit for each of 16 lanes, which are all ones or all zeros. */
    static inline uint32_t gather_bits(v128_t first, v128_t second, v128_t third, v128_t fourth) {
        return wasm_i8x16_bitmask(
            wasm_i8x16_narrow_i16x8(wasm_i16x8_narrow_i32x4(first, second), wasm_i16x8_narrow_i32x4(third, fourth)));
    }

    static inline uint32_t at_least(f32x16 a, f32x16 b) {
        return gather_bits(v128_t(a.low.low >= b.low.low), v128_t(a.low.high >= b.low.high),
                           v128_t(a.high.low >= b.high.low), v128_t(a.high.high >= b.high.high));
    }

    static inline uint32_t above(f32x16 a, f32x16 b) {
        return gather_bits(v128_t(a.low.low > b.low.low), v128_t(a.low.high > b.low.high),
                           v128_t(a.high.low > b.high.low), v128_t(a.high.high > b.high.high));
    }

    static inline Floats lesser(Floats a, Floats b) { return Floats(wasm_f32x4_pmin(v128_t(b), v128_t(a))); }

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

const Kernels kWasmKernels = {"wasm", Cpu::kLayout, kChains, runs_here, run, linear, count};

}  // namespace binaryvit

#endif
