/*
 * Kernels for WebAssembly with its SIMD of 128 bits.
 *
 * Counting: one register holds 8 bits of 16 rows of a matrix (Layout::kBytes), another their lower four bits, another
 * their upper four. Four bits each of two rows of the tile select one of 256 tables of 16 bytes (DifferenceTables).
 * One swizzle looks up all 16 rows of the matrix for both rows of the tile. Counts stay bytes until they could
 * overflow.
 */
#if defined(__wasm_simd128__)

#include <wasm_simd128.h>

#include <algorithm>
#include <cassert>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace binaryvit {
namespace {

/*
 * For four bits each of two rows: in how many bits 0 to 15 differ from those of the first row, and 16 times in how
 * many from those of the second.
 */
struct DifferenceTables {
    DifferenceTables() {
        for (int bits = 0; bits < 256; ++bits)
            for (int of_matrix = 0; of_matrix < 16; ++of_matrix)
                counts[bits][of_matrix] = uint8_t(__builtin_popcount(of_matrix ^ (bits & 15)) +
                                                  16 * __builtin_popcount(of_matrix ^ bits >> 4));
        std::memset(half, 15, sizeof(half));
    }
    alignas(64) uint8_t counts[256][16];
    uint8_t half[16];  // V8 keeps in a register what is loaded; it computes constants again and again
};

const DifferenceTables kDifferences;

constexpr int kRegisterBytes = 16;

#include "vectors.inc"

struct Cpu {
    static constexpr Layout kLayout = Layout::kBytes;
    static constexpr int kFloatRows = 2;
    static constexpr int kFloatBlocks = 1;
    static constexpr int kWordsAtOnce = 7;  // 28 counts of at most 8 bits fit a byte

    /* For every pair of rows and every four bits of a word: the place of their table in kDifferences. */
    using Bits = uint16_t;
    static constexpr int kBitsOfWord = 4;
    static constexpr int kFewestRows = 2;

    struct Words {
        static const Bits *prepare(const uint32_t *bits, int words, uint16_t *prepared) {
            const v128_t half = wasm_i8x16_splat(15);
            for (int i = 0; i < 2 * words; ++i) {
                const v128_t four_rows = wasm_v128_load(bits + i * 4);
                const v128_t first = wasm_i32x4_shuffle(four_rows, four_rows, 0, 2, 0, 2);
                const v128_t second = wasm_i32x4_shuffle(four_rows, four_rows, 1, 3, 1, 3);
                const v128_t lower = wasm_v128_bitselect(first, wasm_i16x8_shl(second, 4), half);
                const v128_t upper = wasm_v128_bitselect(wasm_u16x8_shr(first, 4), second, half);
                const v128_t tables =
                    wasm_i8x16_shuffle(lower, upper, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                static_assert(sizeof(kDifferences.counts[0]) == 1 << 4, "a table's place is 16 times its number");
                wasm_v128_store(prepared + i * 16, wasm_i16x8_shl(wasm_u16x8_extend_low_u8x16(tables), 4));
                wasm_v128_store(prepared + i * 16 + 8, wasm_i16x8_shl(wasm_u16x8_extend_high_u8x16(tables), 4));
            }
            return prepared;
        }

        /* Counts of a pair of rows, in bytes. */
        struct PairCounts {
            /* Adds sums of kDifferences. */
            INLINE void add(v128_t both, v128_t half) {
                first = wasm_i8x16_add(first, wasm_v128_and(both, half));
                second = wasm_i16x8_add(second, wasm_u16x8_shr(both, 4));  // see complete()
            }

            /* The shifts brought 16 times the first row's count of each upper byte into the byte below. */
            INLINE void complete() { second = wasm_i16x8_sub(second, wasm_i16x8_shl(wasm_u16x8_shr(first, 8), 4)); }

            v128_t first, second;
        };

        /* Counts of a row, in 16 bits. */
        struct RowCounts {
            INLINE void add(v128_t bytes) {
                low = wasm_i16x8_add(low, wasm_u16x8_extend_low_u8x16(bytes));
                high = wasm_i16x8_add(high, wasm_u16x8_extend_high_u8x16(bytes));
            }

            INLINE i32x16 spread() const {
                return {{Ints(wasm_u32x4_extend_low_u16x8(low)), Ints(wasm_u32x4_extend_high_u16x8(low))},
                        {Ints(wasm_u32x4_extend_low_u16x8(high)), Ints(wasm_u32x4_extend_high_u16x8(high))}};
            }

            v128_t low, high;
        };

        template <int rows>
        static inline void count(const Bits *bits, const uint32_t *tile, int words, i32x16 *sums) {
            static_assert(rows % 2 == 0, "tables are of two rows");
            count_pairs(std::make_integer_sequence<int, rows / 2>(), bits, tile, words, sums);
        }

        /* Pairs by a fold expression: Clang stores arrays that a loop indexes after each addition. */
        template <int... pair>
        static inline void count_pairs(std::integer_sequence<int, pair...>, const Bits *bits, const uint32_t *tile,
                                       int words, i32x16 *sums) {
            const v128_t half = wasm_v128_load(kDifferences.half);
            RowCounts first[sizeof...(pair)] = {}, second[sizeof...(pair)] = {};
            for (int begin = 0; begin < words; begin += kWordsAtOnce) {
                PairCounts counts[sizeof...(pair)] = {};
                const uint32_t *end = tile + std::min(words - begin, kWordsAtOnce) * kLanes;
                for (; tile != end; tile += kLanes, bits += kRows * kBitsOfWord) {
                    auto lower = [&](int byte) { return wasm_v128_and(wasm_v128_load(tile + byte * 4), half); };
                    auto upper = [&](int byte) {
                        return wasm_v128_and(wasm_u16x8_shr(wasm_v128_load(tile + byte * 4), 4), half);
                    };
                    auto differing = [&](const Bits *table, v128_t matrix) {
                        return wasm_i8x16_swizzle(wasm_v128_load(kDifferences.counts[0] + *table), matrix);
                    };
                    auto of_two = [&](const Bits *tables, v128_t a, v128_t b) {
                        return wasm_i8x16_add(differing(tables, a), differing(tables + 1, b));
                    };
                    auto of_three = [&](const Bits *tables, v128_t a, v128_t b, v128_t c) {
                        return wasm_i8x16_add(of_two(tables, a, b), differing(tables + 2, c));
                    };
                    // Three counts of at most 4 bits fit half a byte.
                    const v128_t a = lower(0), b = upper(0), c = lower(1);
                    (counts[pair].add(of_three(bits + pair * 8, a, b, c), half), ...);
                    const v128_t d = upper(1), e = lower(2), f = upper(2);
                    (counts[pair].add(of_three(bits + pair * 8 + 3, d, e, f), half), ...);
                    const v128_t g = lower(3), h = upper(3);
                    (counts[pair].add(of_two(bits + pair * 8 + 6, g, h), half), ...);
                }
                (counts[pair].complete(), ...);
                ((first[pair].add(counts[pair].first), second[pair].add(counts[pair].second)), ...);
            }
            ((sums[2 * pair] = first[pair].spread(), sums[2 * pair + 1] = second[pair].spread()), ...);
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
