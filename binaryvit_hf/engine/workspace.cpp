#include "workspace.h"

#include <algorithm>

namespace binaryvit {
namespace {

/* The largest of what `measure` says of every stage. */
template <class Measure>
int widest(const Model &model, Measure measure) {
    int most = 0;
    for (const Stage &stage : model.stages) most = std::max(most, measure(stage));
    return most;
}

template <class Measure>
int widest_layer(const Model &model, Measure measure) {
    int most = 0;
    for (const Layer &layer : model.layers) most = std::max(most, measure(layer));
    return most;
}

int head_words(const Layer &layer) { return round_up(layer.head_dim, 32) / 32; }

}  // namespace

Scratch::Scratch(const Model &model) {
    stride = widest(model, [](const Stage &stage) { return (stage.blocks() + 1) * kLanes; });
    int words = widest_layer(model, [](const Layer &layer) { return std::max(layer.fc1.weight.words, layer.fc2.weight.words); });
    int patch = model.image_channels * model.patch_height * model.patch_width;
    for (const PatchEmbeddings &embeddings : model.patch_embeddings) {
        words = std::max(words, embeddings.projection.weight.words);
        if (!embeddings.binary) patch = std::max(patch, 4 * model.stages[embeddings.stage - 1].channels);
    }
    int split_words = widest_layer(model, [](const Layer &layer) { return layer.heads * head_words(layer); });
    int keys = widest(model, [](const Stage &stage) { return round_up(stage.keys, 32); });
    int repeated = widest_layer(model, [](const Layer &layer) { return int(layer.repeated.size()) * kLanes; });
    if (model.patch_embeddings.size() > 0) repeated = std::max(repeated, stride);
    inputs = Array<float>(size_t(kRows) * stride);
    outputs = Array<float>(size_t(kRows) * stride + kLanes);
    inner = Array<float>(size_t(kRows) * stride);
    shortcuts = Array<float>(size_t(kRows) * repeated);
    bits = Array<uint32_t>(size_t(kRows) * words);
    more_bits = Array<uint32_t>(size_t(kRows) * words);
    head_bits = Array<uint32_t>(size_t(kRows) * words);
    prepared = Array<uint16_t>(size_t(kRows) * 4 * std::max({words, split_words, keys / 32}));
    split_bits = Array<uint32_t>(size_t(kRows) * split_words);
    of_keys = Array<int32_t>(size_t(stride));
    attended = Array<uint32_t>(size_t(kRows) * keys / 32);
    exponentials = Array<float>(size_t(kRows) * keys);
    context_base = Array<float>(size_t(stride) + kLanes);
    patches = Array<float>(size_t(kRows) * patch);
    zeros = Array<uint32_t>(size_t(kRows) * keys / 32);
}

Workspace::Workspace(const Model &model, int size) : team(size), size(size), tiles(size_t(size)) {
    size_t tokens_size = 0, shortcuts_size = 0, keys_size = 0, values_size = 0;
    for (const Stage &stage : model.stages) {
        tokens_size = std::max(tokens_size, size_t(stage.blocks()) * stage.token_block());
        shortcuts_size = std::max(shortcuts_size, size_t(stage.blocks()) * stage.key_block());
        // Kernels read two blocks at once.
        maps.emplace_back(size_t(round_up(stage.blocks(), 2)) * stage.map_block());
    }
    for (const Layer &layer : model.layers) {
        const Stage &stage = model.stages[layer.stage];
        keys_size = std::max(keys_size, size_t(layer.heads) * head_words(layer) * round_up(stage.keys, kLanes));
        values_size = std::max(values_size, size_t(layer.heads) * round_up(layer.head_dim, kLanes) * stage.key_words());
    }
    tokens = Array<float>(tokens_size);
    next_tokens = Array<float>(model.stages.size() > 1 ? tokens_size : 0);
    shortcuts = Array<float>(shortcuts_size);
    last_hidden_state = Array<float>(size_t(model.stages.back().tokens) * model.stages.back().channels);
    keys = Array<uint32_t>(keys_size);
    values = Array<uint32_t>(values_size);
    for (int member = 0; member < size; ++member) scratch.emplace_back(model);
}

void copy_token(const Stage &stage, const Array<float> &tokens, int token, float *to) {
    for (int c = 0; c < stage.channels; ++c)
        to[c] = tokens[size_t(c / kLanes) * stage.token_block() + size_t(token) * kLanes + c % kLanes];
}

void place_token(const Stage &stage, const float *from, int token, Array<float> &tokens) {
    for (int c = 0; c < stage.channels; ++c)
        tokens[size_t(c / kLanes) * stage.token_block() + size_t(token) * kLanes + c % kLanes] = from[c];
}

}  // namespace binaryvit
