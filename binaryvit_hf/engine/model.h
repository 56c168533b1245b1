/*
 * A network folded for inference: every scale, normalisation, shift and slope that acts between two products has become one
 * fused multiply-add and one comparison, and weights are bits in the order in which the kernels read them.
 *
 * Arrays of channels are filled up with zeros (thresholds: infinity) to whole blocks of 16, so that what is computed for the
 * channels beyond the last is zero and its bits are 0.
 */
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace binaryvit {

constexpr int kLanes = 16;  // channels that are computed at once
constexpr int kRows = 8;    // tokens that are computed at once; the bits of a byte

inline int round_up(int size, int unit) { return (size + unit - 1) / unit * unit; }

/*
 * Tokens lie in blocks of 16 channels: of one block all tokens, one after the other, then the next block. So many floats are
 * from a block to the next; 8 cache lines more than a multiple of 64, so that the blocks of a tile lie in different places of
 * the cache.
 */
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
    T &operator[](size_t index) { return items_[index]; }
    const T &operator[](size_t index) const { return items_[index]; }
    size_t size() const { return size_; }

private:
    struct Free {
        void operator()(T *items) const { ::operator delete(items, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> items_;
    size_t size_ = 0;
};

/*
 * How a block of 16 rows of bits lies in memory, 32 bits of all of them, then the next 32: as 16 words (kWords), or as 4
 * times 16 bytes (kBytes), whichever the kernels count faster.
 */
enum class Layout { kWords, kBytes };

/* Byte of a block in which bits `8 * byte` to `8 * byte + 7` of row `lane` lie. */
inline size_t tile_byte(Layout layout, int lane, int byte) {
    return layout == Layout::kWords ? size_t(byte / 4) * 64 + lane * 4 + byte % 4 : size_t(byte) * 16 + lane;
}

/* Rows of bits in blocks: `blocks` times 16 rows of `words` times 32 bits. */
struct SignMatrix {
    SignMatrix() = default;
    SignMatrix(int rows, int bits)
        : blocks(round_up(rows, kLanes) / kLanes), words(round_up(bits, 32) / 32), tiles(size_t(blocks) * words * kLanes) {}

    void set(Layout layout, int row, int bit) {
        auto *bytes = reinterpret_cast<uint8_t *>(&tiles[size_t(row / kLanes) * words * kLanes]);
        bytes[tile_byte(layout, row % kLanes, bit / 8)] |= uint8_t(1 << bit % 8);
    }

    /*
     * For kernels that add up in chains: every other word, from the third on, becomes the exclusive or of all up to it. Of 3
     * words, some times 4, and one more; others stay as they are.
     */
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
 * `y + slope * min(y, knee)`, where `y = scale * count + shortcut`, of the number of bits in which an input differs from a
 * weight: a product, its normalisation and RPReLU, but for `rest`, which every channel lacks to it. Whoever takes the result
 * has it in their own thresholds and knees.
 */
struct Projection {
    SignMatrix weight;
    Array<float> scale, knee, slope;
    std::vector<double> rest;
};

/* A bit of a channel is whether its value is at least this; infinity where there is no channel. */
using Thresholds = Array<float>;

/* 16 channels of a token. */
using Choice = std::array<int32_t, kLanes>;

struct Layer {
    int stage, channels, heads, head_dim, ratio;
    Affine norm1;
    Thresholds reduction_input, query_input, key_input, value_input, output_input;
    Projection reduction, query, key, value, output;
    Thresholds query_sign, key_sign, value_sign;
    std::vector<float> exponentials;           // e^(q k^T / sqrt(head_dim)) of a query and a key that differ in i bits
    Array<float> exponentials_fine, exponentials_coarse;  // of i below 16 and of 16 i, whose products they are; 16 each
    float probability_threshold;               // a probability above it is on
    Affine context;                            // of the sum of the signs of the values that are on
    Array<float> context_slope;                // of `x + slope * min(x, 0)`
    Affine layer_scale1, norm2;

    Thresholds fc1_input, fc2_input;
    Projection fc1, fc2;                       // inner channels in the order [block of channels][run][channel of the block]
    int expansion;                             // inner channels for one channel: a run; fc2 is for their sum, not their mean
    std::vector<Choice> repeated;              // what blocks of fc1 have as their shortcut, in the order of the blocks
    std::vector<int32_t> shortcut_of_block;    // which of them, by block of fc1
    Affine layer_scale2;                       // and all that the pooling branches add to every token
    Array<float> pool_weights;                 // [block of 16 channels][own token, then by distance those beside, those above][16]
};

struct PatchEmbeddings {
    int stage;
    bool binary;
    Affine norm1;
    Thresholds input;          // of one of the four neighbours
    Projection projection;     // inputs in the order [neighbour][channel, filled up to words]
    Array<float> float_weight; // [block of 16 outputs][neighbour][channel][16], the norm folded in
    Array<float> float_bias;
    Array<float> positions;    // of all tokens, in blocks, what the projection lacks folded in
};

struct Stem {
    Array<float> weight;          // [block of 16 outputs][channel][row][column][16], the norm folded in
    Array<float> positions;       // of all tokens, in blocks, bias and norm folded in, of the class token all of it
    std::vector<int32_t> lines;   // [channel][row] of a patch, in floats of an image from its first
};

struct Stage {
    int height, width, tokens, channels, ratio, keys, reach;
    std::vector<int32_t> map_row;  // place of a token in the map with a border of `reach`
    std::vector<int32_t> key_row;  // key that a token takes its shortcut from
    int map_width() const { return width + 2 * reach; }
    int map_rows() const { return map_row.back() + 1 + reach * (map_width() + 1); }
    int blocks() const { return round_up(channels, kLanes) / kLanes; }
    int token_block() const { return block_floats(tokens); }
    int key_block() const { return block_floats(keys); }
    int key_words() const { return round_up(keys, 32) / 32; }
    int map_block() const { return block_floats(map_rows()); }
};

enum class StepKind { kStem, kPatchEmbeddings, kLayer, kNorm };

struct Step {
    StepKind kind;
    int index;  // of the layer, or of the stage
};

struct Kernels;

struct Model {
    const Kernels *kernels;
    int image_height, image_width, patch_height, patch_width, image_channels;
    bool class_token;
    Stem stem;
    std::vector<Stage> stages;
    std::vector<PatchEmbeddings> patch_embeddings;  // of all stages but the first
    std::vector<Layer> layers;
    Affine norm;
    std::vector<Step> steps;

    /* Stage whose tokens a step gives. */
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
