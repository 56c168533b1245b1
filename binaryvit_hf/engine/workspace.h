/* Memory of one image on its way through the network, and of each thread that works on it. */
#pragma once

#include "model.h"
#include "team.h"

namespace binaryvit {

/* What one thread needs for a tile of kRows tokens, in tiles (forward.inc); sizes of the widest stage. */
struct Scratch {
    explicit Scratch(const Model &model);

    Array<float> inputs;                            // channels
    Array<float> outputs;                           // channels, row by row (Scratch::stride)
    Array<float> inner;                             // channels: sums of the MLP's inner channels
    Array<float> shortcuts;                         // Layer::repeated; channels
    Array<uint32_t> bits, more_bits, head_bits;     // inputs of a projection
    Array<uint16_t> prepared;                       // bytes of any of these bits, as kernels want them
    Array<uint32_t> split_bits;                     // of every head from a word of its own on
    Array<int32_t> of_keys;                         // channels: signs of eight keys' values, a bit for each
    Array<uint32_t> attended;                       // keys: those whose probabilities are on
    Array<float> exponentials;                      // keys
    Array<float> context_base;                      // channels, of one row: context of a query to which no key is on
    Array<float> patches;                           // inputs of a convolution
    Array<uint32_t> zeros;                          // keys
    int stride;                                     // not a power of two: the cache has few places for such rows

    static int keys_blocks(const Stage &stage) { return round_up(stage.keys, kLanes) / kLanes; }
};

struct Workspace {
    Workspace(const Model &model, int size);

    Barrier team;
    int size;                            // of the team
    std::vector<Tiles> tiles;            // of every member
    Array<float> tokens, next_tokens;    // in blocks
    std::vector<Array<float>> maps;      // of every stage (Stage::map_row), in blocks, their borders zero
    Array<float> shortcuts;              // of keys, in blocks: keys and values added up
    Array<float> last_hidden_state;      // (tokens, channels), for who needs it no longer than a call
    Array<uint32_t> keys, values;        // tiles of every head: (keys, head_dim) and (head_dim, keys)
    std::vector<Scratch> scratch;        // of every member
};

/* A token's channels, side by side, from the blocks, and into them. */
void copy_token(const Stage &stage, const Array<float> &tokens, int token, float *to);
void place_token(const Stage &stage, const float *from, int token, Array<float> &tokens);

}  // namespace binaryvit
