/* Memory for one image in the network, and for each thread that works on it. */
#pragma once

#include "model.h"
#include "team.h"

namespace binaryvit {

/* One thread's memory for a tile of tokens, in the tile's layout (model.h), for the widest stage. */
struct Scratch {
    explicit Scratch(const Model &model);

    Array<float> inputs;         // channels: the shortcuts of key, value and attention.output
    Array<float> context;        // [row][channel], `stride` floats a row
    Array<float> inner_sums;     // channels: sums over runs of the MLP's inner channels
    Array<float> shortcuts;      // of fc1: Layer::shortcut_channels; of binary patch embeddings: channels
    Array<uint32_t> bits;        // signs of the inputs of a projection
    Array<uint32_t> value_bits;  // signs of the inputs of attention.value
    Array<uint32_t> signs;       // signs of keys, queries and inner channels, and of the inputs of attention.reduction
    Array<uint32_t> head_bits;   // signs of keys and queries; each head begins a new word
    Array<uint16_t> prepared;    // any of these bits in the order of a counter
    Array<int32_t> value_signs;  // [channel]: bit i is the sign of the value of key i
    Array<uint32_t> attended;    // bits: keys whose quantised probability is not 0
    Array<uint32_t> zeros;       // bits: no key
    Array<float> exponentials;   // keys
    Array<float> context_base;   // [channel]: context of a query that attends to no key
    Array<float> patches;        // inputs of a convolution, [line][row][column]
    int stride;                  // no power of two: such rows would share few cache sets
};

struct Workspace {
    Workspace(const Model &model, int size);

    Barrier team;
    int size;                          // of the team
    std::vector<Tiles> tiles;          // of every member
    Array<float> tokens, next_tokens;  // hidden_states, and those of the next stage
    std::vector<Array<float>> maps;    // of every stage
    Array<float> key_shortcuts;        // key + value of every key, in blocks of key_block() floats
    Array<uint32_t> keys, values;      // signs: a SignMatrix for every head
    Array<float> last_hidden_state;    // (tokens, channels), if the caller does not want it
    float *probabilities = nullptr;    // (heads, queries, keys) of attention: written, unless null
    std::vector<Scratch> scratch;      // of every member
};

/* Copies the channels of a token out of the blocks, or into them. */
void copy_token(const Stage &stage, const Array<float> &tokens, int token, float *to);
void place_token(const Stage &stage, const float *from, int token, Array<float> &tokens);

}  // namespace binaryvit
