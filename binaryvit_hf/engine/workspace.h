/* Memory of one image on its way through the network, and of each thread that works on it. */
#pragma once

#include "model.h"
#include "team.h"

namespace binaryvit {

/* What one thread needs for a tile of kRows tokens; sizes of the widest stage. */
struct Scratch {
    explicit Scratch(const Model &model);

    Array<float> inputs, outputs;        // (kRows, stride)
    Array<float> inner;                  // (kRows, stride): averages of the MLP's inner channels
    Array<float> shortcuts;              // (kRows, 16 channels for each of Layer::repeated)
    Array<uint32_t> bits, more_bits;     // (kRows, words of the widest input of a projection)
    Array<uint32_t> head_bits;           // (kRows, heads, words of a head)
    Array<uint32_t> head_row;            // (heads, words of a head)
    Array<uint32_t> attended;            // (kRows, words of the keys): the probabilities that are on
    Array<int32_t> counts;               // (kRows, keys, filled up)
    Array<float> exponentials;           // (keys, filled up)
    Array<float> context_base;           // (channels): context of a query to which no key is on
    Array<float> patches;                // (kRows, inputs of the stem or of patch embeddings of full precision)
    Array<uint32_t> zeros;               // words of the keys
    int keys_stride;                     // keys, filled up

    static int keys_blocks(const Stage &stage) { return round_up(stage.keys, kLanes) / kLanes; }
};

struct Workspace {
    Workspace(const Model &model, int size);

    Barrier team;
    int size;                            // of the team
    Array<float> tokens, next_tokens;    // (tokens, stride)
    std::vector<Array<float>> maps;      // of every stage (Stage::map_rows, stride), its border zero
    Array<float> shortcuts;              // (keys, stride): keys and values added up
    Array<uint32_t> keys, values;        // tiles of every head: (keys, head_dim) and (head_dim, keys)
    std::vector<Scratch> scratch;        // of every member
};

}  // namespace binaryvit
