#include "workspace.h"

#include <algorithm>

namespace binaryvit {
namespace {

/* The largest `measure(item)`, of stages or layers. */
template <class Item, class Measure>
int largest(const std::vector<Item> &items, Measure measure) {
    int result = 0;
    for (const Item &item : items) result = std::max(result, measure(item));
    return result;
}

}  // namespace

Scratch::Scratch(const Model &model) {
    stride = largest(model.stages, [](const Stage &stage) { return (stage.blocks() + 1) * kLanes; });
    int words = largest(model.layers,
                        [](const Layer &layer) { return std::max(layer.fc1.weight.words, layer.fc2.weight.words); });
    int patch = model.image_channels * model.patch_height * model.patch_width;
    for (const PatchEmbeddings &embeddings : model.patch_embeddings) {
        words = std::max(words, embeddings.projection.weight.words);
        if (!embeddings.binary) patch = std::max(patch, 4 * model.stages[embeddings.stage - 1].channels);
    }
    int all_head_words = largest(model.layers, [](const Layer &layer) { return layer.heads * layer.head_words(); });
    int keys = largest(model.stages, [](const Stage &stage) { return round_up(stage.keys, 32); });
    int shortcuts_size =
        largest(model.layers, [](const Layer &layer) { return int(layer.shortcut_channels.size()) * kLanes; });
    if (!model.patch_embeddings.empty()) shortcuts_size = std::max(shortcuts_size, stride);
    inputs = Array<float>(size_t(kRows) * stride);
    context = Array<float>(size_t(kRows) * stride + kLanes);
    inner_sums = Array<float>(size_t(kRows) * stride);
    shortcuts = Array<float>(size_t(kRows) * shortcuts_size);
    bits = Array<uint32_t>(size_t(kRows) * words);
    value_bits = Array<uint32_t>(size_t(kRows) * words);
    signs = Array<uint32_t>(size_t(kRows) * words);
    head_bits = Array<uint32_t>(size_t(kRows) * all_head_words);
    prepared = Array<uint16_t>(size_t(kRows) * 4 * std::max({words, all_head_words, keys / 32}));
    value_signs = Array<int32_t>(size_t(stride));
    attended = Array<uint32_t>(size_t(kRows) * keys / 32);
    exponentials = Array<float>(size_t(kRows) * keys);
    context_base = Array<float>(size_t(stride) + kLanes);
    patches = Array<float>(size_t(kRows) * patch);
    zeros = Array<uint32_t>(size_t(kRows) * keys / 32);
}

Workspace::Workspace(const Model &model, int size) : team(size), size(size), tiles(size_t(size)) {
    size_t tokens_size = 0, key_shortcuts_size = 0, keys_size = 0, values_size = 0;
    for (const Stage &stage : model.stages) {
        tokens_size = std::max(tokens_size, size_t(stage.blocks()) * stage.token_block());
        key_shortcuts_size = std::max(key_shortcuts_size, size_t(stage.blocks()) * stage.key_block());
        maps.emplace_back(size_t(stage.blocks()) * stage.map_block());
    }
    for (const Layer &layer : model.layers) {
        const Stage &stage = model.stages[layer.stage];
        keys_size = std::max(keys_size, size_t(layer.heads) * layer.head_words() * round_up(stage.keys, kLanes));
        values_size =
            std::max(values_size, size_t(layer.heads) * round_up(layer.head_dim, kLanes) * stage.key_words());
    }
    tokens = Array<float>(tokens_size);
    next_tokens = Array<float>(model.stages.size() > 1 ? tokens_size : 0);
    key_shortcuts = Array<float>(key_shortcuts_size);
    last_hidden_state = Array<float>(size_t(model.stages.back().tokens) * model.stages.back().channels);
    keys = Array<uint32_t>(keys_size);
    values = Array<uint32_t>(values_size);
    for (int member = 0; member < size; ++member) scratch.emplace_back(model);
}

void copy_token(const Stage &stage, const Array<float> &tokens, int token, float *to) {
    for (int c = 0; c < stage.channels; ++c) to[c] = tokens[stage.place(c / kLanes, token) + c % kLanes];
}

void place_token(const Stage &stage, const float *from, int token, Array<float> &tokens) {
    for (int c = 0; c < stage.channels; ++c) tokens[stage.place(c / kLanes, token) + c % kLanes] = from[c];
}

}  // namespace binaryvit
