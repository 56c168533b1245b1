/*
 * Portable kernels, in C++ with the vectors of GCC and Clang.
 *
 * Counting: the exclusive or of a 32-bit word of the tile's row and the same word of 16 rows of a matrix
 * (Layout::kWords), and its population count, one row at a time.
 */
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
    static constexpr int kFloatRows = kRows;
    static constexpr int kFloatBlocks = 1;
    static constexpr int kFewestRows = 1;

    using Bits = uint32_t;
    static constexpr int kBitsOfWord = 1;

    struct Words {
        static const Bits *prepare(const uint32_t *bits, int, uint16_t *) { return bits; }

        template <int rows>
        static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
            for (int row = 0; row < rows; ++row) {
                int32_t sum[kLanes] = {};
                for (int word = 0; word < words; ++word)
                    for (int lane = 0; lane < kLanes; ++lane)
                        sum[lane] += __builtin_popcount(bits[word * kRows + row] ^ tile[word * kLanes + lane]);
                sums[row] = load(sum);
            }
        }
    };
    using Chains = Words;

    static inline uint32_t at_least(f32x16 a, f32x16 b) {
        float left[kLanes], right[kLanes];
        store(left, a);
        store(right, b);
        uint32_t bits = 0;
        for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(left[lane] >= right[lane]) << lane;
        return bits;
    }

    static inline uint32_t above(f32x16 a, f32x16 b) {
        float left[kLanes], right[kLanes];
        store(left, a);
        store(right, b);
        uint32_t bits = 0;
        for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(left[lane] > right[lane]) << lane;
        return bits;
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

const Kernels kScalarKernels = {"scalar", Cpu::kLayout, kChains, runs_here, run, linear, count};

}  // namespace binaryvit
