/*
 * Portable kernels: nothing but the language and its compiler.
 *
 * Counting: a 32-bit word of a row against the same word of 16 rows of a matrix (Layout::kWords), one after the other.
 */
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace binaryvit {
namespace {

struct Cpu {
    static constexpr Layout kLayout = Layout::kWords;

    template <int rows>
    static inline void count(const uint32_t *bits, const uint32_t *tile, int words, i32x16 *sums) {
        for (int row = 0; row < rows; ++row) {
            int32_t sum[kLanes] = {};
            for (int word = 0; word < words; ++word)
                for (int lane = 0; lane < kLanes; ++lane)
                    sum[lane] += __builtin_popcount(bits[word * kRows + row] ^ tile[word * kLanes + lane]);
            std::memcpy(&sums[row], sum, sizeof(sum));
        }
    }

    static inline uint32_t at_least(f32x16 a, f32x16 b) {
        uint32_t bits = 0;
        for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(a[lane] >= b[lane]) << lane;
        return bits;
    }

    static inline uint32_t above(f32x16 a, f32x16 b) {
        uint32_t bits = 0;
        for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(a[lane] > b[lane]) << lane;
        return bits;
    }

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

const Kernels kScalarKernels = {"scalar", Cpu::kLayout, runs_here, run, count};

}  // namespace binaryvit
