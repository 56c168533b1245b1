/*
 * A network folded for inference. Every scale, normalisation, shift and slope between two products has become one
 * fused multiply-add and one comparison; weights are bits in the order in which kernels read them.
 *
 * Arrays of channels are padded to whole blocks of 16 with zeros, thresholds with infinity. So the values of padding
 * channels are zero, and their bits are 0.
 *
 * Layouts:
 *
 *   tokens: channel c of token t is tokens[c / 16 * token_block() + t * 16 + c % 16]
 *     block 0:  t0 c0..c15  | t1 c0..c15  | ... | gap        token_block() floats
 *     block 1:  t0 c16..c31 | t1 c16..c31 | ... | gap
 *
 *   tile of tokens: 8 tokens (rows) that one thread computes at once
 *     floats:   channels 0-15 of r0, r1 .. r7 (8 x 16 floats) | channels 16-31 of r0, r1 .. r7 | ...
 *     bits:     channels 0-31 of r0, r1 .. r7 (8 x uint32)    | channels 32-63 of r0, r1 .. r7 | ...
 *
 *   SignMatrix: blocks of 16 rows r0..r15, each
 *     kWords:   inputs 0-31 of r0, r1 .. r15 (16 x uint32) | inputs 32-63 of r0, r1 .. r15 | ...
 *     kBytes:   inputs 0-7  of r0, r1 .. r15 (16 x uint8)  | inputs 8-15  of r0, r1 .. r15 | ...
 *
 *   keys of a head:    SignMatrix, rows are keys, inputs are the head's channels
 *   values of a head:  SignMatrix, rows are the head's channels, inputs are keys
 *
 *   map: norm2 of all tokens, in blocks, row by row of the image, with a border of Stage::reach zeros for the pooling
 *        branches; without a border if there is a class token
 *
 * The first bit is the lowest one of its word or byte.
 */
#pragma once

#include <array>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace binaryvit {

constexpr int kLanes = 16;  // channels of a block, computed at once
constexpr int kRows = 8;    // tokens of a tile, computed at once; the bits of a byte

inline int round_up(int size, int unit) { return (size + unit - 1) / unit * unit; }

/* Floats of one block of tokens. Never a multiple of 4096 bytes: such blocks would share few cache sets. */
inline int block_floats(int tokens) { return (round_up(tokens, 64) + kRows) * kLanes; }

/* A zeroed array on a cache line's boundary. */
template <class T>
class Array {
public:
    Array() = default;
    explicit Array(size_t size) : size_(size) {
        if (size == 0) return;
        items_.reset(static_cast<T *>(::operator new(size * sizeof(T), std::align_val_t(64))));
        std::memset(static_cast<void *>(items_.get()), 0, size * sizeof(T));
    }
    T *data() { return items_.get(); }
    const T *data() const { return items_.get(); }
    T &operator[](size_t index) {
        assert(index < size_);
        return items_[index];
    }
    const T &operator[](size_t index) const {
        assert(index < size_);
        return items_[index];
    }
    size_t size() const { return size_; }

private:
    struct Free {
        void operator()(T *items) const { ::operator delete(items, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> items_;
    size_t size_ = 0;
};

/* The order of bits in a block of a SignMatrix; each kind of CPU counts one of them faster. */
enum class Layout { kWords, kBytes };

/* The byte of a block that holds bits `8 * byte` to `8 * byte + 7` of row `lane`. */
inline size_t tile_byte(Layout layout, int lane, int byte) {
    return layout == Layout::kWords ? size_t(byte / 4) * 64 + lane * 4 + byte % 4 : size_t(byte) * 16 + lane;
}

/* A matrix of bits: `blocks` times 16 rows of `words` times 32 bits. */
struct SignMatrix {
    SignMatrix() = default;
    SignMatrix(int rows, int bits)
        : blocks(round_up(rows, kLanes) / kLanes), words(round_up(bits, 32) / 32),
          tiles(size_t(blocks) * words * kLanes) {}

    /* Bits `8 * byte` to `8 * byte + 7` of a row. */
    uint8_t &byte(Layout layout, int row, int byte) {
        auto *bytes = reinterpret_cast<uint8_t *>(&tiles[size_t(row / kLanes) * words * kLanes]);
        return bytes[tile_byte(layout, row % kLanes, byte)];
    }

    /* For Cpu::Chains: replaces each word 2, 4, 6 ... by the exclusive or of all words up to it. Rows of 8, 12, 16
     * ... words only. */
    void chain() {
        chained = words >= 8 && words % 4 == 0;
        for (size_t block = 0; chained && block < size_t(blocks); ++block) {
            uint32_t *word = &tiles[block * words * kLanes];
            for (int i = 2 * kLanes; i < words * kLanes; ++i)
                if (i / kLanes % 2 == 0) word[i] ^= word[i - kLanes] ^ word[i - 2 * kLanes];
        }
    }

    int blocks = 0, words = 0;
    bool chained = false;
    Array<uint32_t> tiles;
};

/* `scale * x + shift` per channel. */
struct Affine {
    Affine() = default;
    explicit Affine(int channels) : scale(round_up(channels, kLanes)), shift(round_up(channels, kLanes)) {}
    Array<float> scale, shift;
};

/*
 * A product, its normalisation, shortcut and RPReLU, from `count`, the number of bits in which an input differs from a
 * weight:
 *
 *   v = scale * count + shortcut
 *   RPReLU(v + b) = v + slope * min(v, knee) + deferred
 *
 * RPReLU has the slope `slope + 1` below 0; b is the rest of product and normalisation, knee = -b. Kernels leave out
 * the constant `deferred = b * (1 + slope) + shift_out`: fold.cpp adds it to the thresholds, knees and shifts of
 * all steps that read the result.
 */
struct Projection {
    SignMatrix weight;
    Array<float> scale, knee, slope;
    std::vector<double> deferred;
};

/* A channel's bit is 1 where its value is at least its threshold. */
using Thresholds = Array<float>;

/* The channels that 16 lanes take. */
using ChannelIndices = std::array<int32_t, kLanes>;

struct Layer {
    int stage, channels, heads, head_dim, ratio;
    int head_words() const { return round_up(head_dim, 32) / 32; }

    Affine norm1;
    Thresholds reduction_input, query_input, key_input, value_input, output_input;  // of the inputs of each projection
    Projection reduction, query, key, value, output;
    Thresholds query_sign, key_sign, value_sign;  // of the results

    // [i]: e^(query @ key / sqrt(head_dim)) of a query and a key that differ in i bits
    std::vector<float> exponentials;
    Array<float> exponentials_fine, exponentials_coarse;  // fine[i % 16] * coarse[i / 16] is exponentials[i]; i < 256
    float probability_threshold;  // a query attends to keys whose exponentials are above this share of their sum
    Affine context;  // norm_activation.norm of attended values, with the deferred constants of the shortcut
    Array<float> context_slope;  // norm_activation.activation: `x + slope * min(x, 0)`
    Affine layer_scale1, norm2;

    int expansion;  // inner channels for each channel; they are a run
    Thresholds fc1_input, fc2_input;
    Projection fc1;  // inner channels in the order [block of channels][run][channel of the block]
    Projection fc2;  // its shortcut is the sum over a run, not the mean
    std::vector<ChannelIndices> shortcut_channels;  // the shortcuts of fc1's blocks, each kind once
    std::vector<int32_t> shortcut_of_block;         // by block of fc1: its index in shortcut_channels
    Affine layer_scale2;                            // includes the shifts of the pooling branches
    Array<float> pool_weights;  // [block][token itself, then by distance: beside it, above and below it][16]
};

struct PatchEmbeddings {
    int stage;  // the stage whose tokens they make
    bool binary;
    Affine norm1;
    Thresholds input;           // of each of the four neighbours
    Projection projection;      // inputs in the order [neighbour][channel, padded to words]
    Array<float> float_weight;  // [block of outputs][neighbour][channel][16], norm2 folded in
    Array<float> float_bias;
    Array<float> positions;  // of all tokens, in blocks; includes the projection's deferred constants
};

struct Stem {
    Array<float> weight;         // [block of outputs][channel][row][column][16], the norm folded in
    Array<float> positions;      // of all tokens, in blocks; includes bias and norm, and the class token itself
    std::vector<int32_t> lines;  // [channel][row] of a patch: where this line begins, from the patch's first pixel
};

struct Stage {
    int height, width, tokens, channels, ratio, keys;
    int reach;                     // tokens that the widest pooling branch sees to each side
    std::vector<int32_t> map_row;  // [token]: its place in the map
    std::vector<int32_t> key_row;  // [token]: the key that it takes its shortcut from
    int map_width() const { return width + 2 * reach; }
    int map_rows() const { return map_row.back() + 1 + reach * (map_width() + 1); }
    int blocks() const { return round_up(channels, kLanes) / kLanes; }
    int token_block() const { return block_floats(tokens); }
    size_t place(int block, int token) const { return size_t(block) * token_block() + size_t(token) * kLanes; }
    int key_block() const { return block_floats(keys); }
    int key_blocks() const { return round_up(keys, kLanes) / kLanes; }
    int key_words() const { return round_up(keys, 32) / 32; }
    int map_block() const { return block_floats(map_rows()); }
};

enum class StepKind { kStem, kPatchEmbeddings, kLayer, kNorm };

struct Step {
    StepKind kind;
    int index;  // of the layer, or of the patch embeddings' stage
};

struct Kernels;

struct Model {
    const Kernels *kernels;
    int image_height, image_width, patch_height, patch_width, image_channels;
    bool class_token;
    Stem stem;
    std::vector<Stage> stages;
    std::vector<PatchEmbeddings> patch_embeddings;  // [stage - 1]; the first stage has the stem
    std::vector<Layer> layers;
    Affine norm;
    std::vector<Step> steps;

    /* The stage of a step's output. */
    const Stage &stage_of(const Step &step) const {
        switch (step.kind) {
            case StepKind::kLayer: return stages[layers[step.index].stage];
            case StepKind::kPatchEmbeddings: return stages[step.index];
            case StepKind::kStem: return stages.front();
            default: return stages.back();
        }
    }
};

}  // namespace binaryvit
