/* The C interface (engine.h): divides images among threads. */
#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdio>
#include <exception>
#include <new>

#include "engine.h"
#include "fold.h"
#include "kernels.h"
#include "workspace.h"

namespace binaryvit {

const std::vector<const Kernels *> &built_kernels() {
    static const std::vector<const Kernels *> kernels = {
#if defined(__x86_64__)
        &kAvx512Kernels,
        &kAvx2Kernels,
#elif defined(__aarch64__)
        &kNeonKernels,
#endif
#if defined(__wasm_simd128__)
        &kWasmKernels,
#else
        &kScalarKernels,
#endif
    };
    return kernels;
}

namespace {

const Kernels *find_kernels(const char *name) {
    for (const Kernels *kernels : built_kernels())
        if (kernels->runs_here() && std::strcmp(kernels->name, name) == 0) return kernels;
    return nullptr;
}

std::string join_names(bool all) {
    std::string names;
    for (const Kernels *kernels : built_kernels())
        if (all || kernels->runs_here()) names += (names.empty() ? "" : " ") + std::string(kernels->name);
    return names;
}

std::string cpu_features() {
    std::string names;
#if defined(__x86_64__)
    auto add = [&](bool has, const char *name) {
        if (has) names += (names.empty() ? "" : " ") + std::string(name);
    };
    add(__builtin_cpu_supports("popcnt"), "popcnt");
    add(__builtin_cpu_supports("fma"), "fma");
    add(__builtin_cpu_supports("avx2"), "avx2");
    add(__builtin_cpu_supports("avx512f"), "avx512f");
    add(__builtin_cpu_supports("avx512bw"), "avx512bw");
    add(__builtin_cpu_supports("avx512vl"), "avx512vl");
    add(__builtin_cpu_supports("avx512dq"), "avx512dq");
    add(__builtin_cpu_supports("avx512vpopcntdq"), "avx512vpopcntdq");
#elif defined(__aarch64__)
    names = "neon";
#endif
    return names;
}

void write_error(char *error, int32_t error_bytes, const char *message) {
    if (error_bytes > 0) std::snprintf(error, size_t(error_bytes), "%s", message);
}

}  // namespace
}  // namespace binaryvit

using namespace binaryvit;

/* A folded network, and idle workspaces for later calls. */
struct binaryvit_model {
    std::unique_ptr<Model> network;
    int32_t largest_team = INT32_MAX;
    std::vector<std::unique_ptr<Workspace>> idle;  // guarded by ForkableLock

    /* How many threads compute a batch: each whole images, or a team one image at once. */
    int32_t count_threads(int64_t batch, int32_t allowed) const {
        return int32_t(std::min<int64_t>(std::max(allowed, 1), std::max<int64_t>(largest_team, batch)));
    }

    /* A workspace for a team of `size` members. */
    std::unique_ptr<Workspace> borrow(int size) {
        {
            ForkableLock lock;
            for (auto &workspace : idle) {
                if (workspace->size != size) continue;
                std::swap(workspace, idle.back());
                std::unique_ptr<Workspace> found = std::move(idle.back());
                idle.pop_back();
                return found;
            }
        }
        return std::make_unique<Workspace>(*network, size);
    }

    void give_back(std::unique_ptr<Workspace> workspace) {
        ForkableLock lock;
        idle.push_back(std::move(workspace));
    }
};

namespace {

/* Copies the part of a member of the team. to: (batch, tokens, channels). */
void copy_tokens(const Stage &stage, const Workspace &workspace, int member, float *to, int64_t image) {
    to += size_t(image) * stage.tokens * stage.channels;
    for (int token = stage.tokens * member / workspace.size; token < stage.tokens * (member + 1) / workspace.size;
         ++token)
        copy_token(stage, workspace.tokens, token, to + size_t(token) * stage.channels);
}

/* One call of binaryvit_forward. All members of a workspace's team call run_image at once, for the same image. */
struct Forward {
    const Model &model;
    const float *images;
    float *last_hidden_state, *pooled;
    float *const *hidden_states;

    void run_image(int64_t image, Workspace &workspace, int member) const {
        size_t pixels = size_t(model.image_channels) * model.image_height * model.image_width;
        const Stage &last = model.stages.back();
        float *last_of_image = last_hidden_state == nullptr
                                   ? workspace.last_hidden_state.data()
                                   : last_hidden_state + size_t(image) * last.tokens * last.channels;
        for (const Step &step : model.steps) {
            if (hidden_states != nullptr && (step.kind == StepKind::kLayer || step.kind == StepKind::kNorm)) {
                size_t index = step.kind == StepKind::kLayer ? size_t(step.index) : model.layers.size();
                copy_tokens(model.stage_of(step), workspace, member, hidden_states[index], image);
            }
            model.kernels->run(model, step, workspace, member, images + image * pixels, last_of_image);
        }
        if (member == 0) pool(last, last_of_image, pooled + size_t(image) * last.channels);
    }

    void pool(const Stage &last, const float *tokens, float *to) const {
        std::copy_n(tokens, last.channels, to);
        if (model.class_token) return;
        for (int token = 1; token < last.tokens; ++token)
            for (int c = 0; c < last.channels; ++c) to[c] += tokens[size_t(token) * last.channels + c];
        for (int c = 0; c < last.channels; ++c) to[c] /= float(last.tokens);
    }
};

/* One call of binaryvit_feature_maps. */
struct FeatureMaps {
    const Model &model;
    const float *images;
    float *const *feature_maps;

    void run_image(int64_t image, Workspace &workspace, int member) const {
        size_t pixels = size_t(model.image_channels) * model.image_height * model.image_width;
        int last = int(model.stages.size());
        while (last >= 0 && feature_maps[last] == nullptr) --last;
        for (const Step &step : model.steps) {
            int complete = map_before(step);
            if (complete >= 0 && feature_maps[complete] != nullptr)
                copy_tokens(model.stages[size_t(std::max(complete - 1, 0))], workspace, member, feature_maps[complete],
                            image);
            if (complete >= last) break;
            model.kernels->run(model, step, workspace, member, images + image * pixels, nullptr);
        }
        workspace.team.wait();  // the next image overwrites the tokens
    }

    /* The map that is complete before a step, or -1. */
    int map_before(const Step &step) const {
        switch (step.kind) {
            case StepKind::kLayer: return step.index == 0 ? 0 : -1;
            case StepKind::kPatchEmbeddings: return step.index;
            case StepKind::kNorm: return int(model.stages.size());
            default: return -1;
        }
    }
};

/* One call of binaryvit_attention. */
struct Attention {
    const Model &model;
    const float *image;
    int layer;
    float *probabilities;

    void run_image(int64_t, Workspace &workspace, int) const {
        for (const Step &step : model.steps) {
            const bool wanted = step.kind == StepKind::kLayer && step.index == layer;
            workspace.probabilities = wanted ? probabilities : nullptr;
            model.kernels->run(model, step, workspace, 0, image, nullptr);
            if (wanted) break;
        }
        workspace.probabilities = nullptr;
    }
};

/* Computes all images. */
template <class Call>
void run_images(binaryvit_model &model, const Call &call, int64_t batch, int32_t threads) {
    threads = model.count_threads(batch, threads);
    int32_t team = std::min(threads, model.largest_team);
    int64_t image = 0;
    // With enough images, each thread computes whole ones: threads never wait, and faster ones compute more.
    if (threads > 1 && batch >= threads) {
        std::vector<std::unique_ptr<Workspace>> workspaces;
        for (int member = 0; member < threads; ++member) workspaces.push_back(model.borrow(1));
        int64_t shared = team > 1 ? batch / threads * threads : batch;
        std::atomic<int64_t> next{0};
        bool ran = run_team(threads, [&](int member) {
            for (int64_t own; (own = next.fetch_add(1)) < shared;) call.run_image(own, *workspaces[size_t(member)], 0);
        });
        for (auto &workspace : workspaces) model.give_back(std::move(workspace));
        if (ran) image = shared;
    }
    if (image == batch) return;
    auto workspace = model.borrow(team);
    bool ran = team > 1 && run_team(team, [&](int member) {
                   for (int64_t own = image; own < batch; ++own) call.run_image(own, *workspace, member);
               });
    if (!ran) {
        if (team > 1) {
            model.give_back(std::move(workspace));
            workspace = model.borrow(1);
        }
        for (; image < batch; ++image) call.run_image(image, *workspace, 0);
    }
    model.give_back(std::move(workspace));
}

}  // namespace

extern "C" {

const char *binaryvit_kernels(void) {
    static const std::string names = join_names(false);
    return names.c_str();
}

const char *binaryvit_built_kernels(void) {
    static const std::string names = join_names(true);
    return names.c_str();
}

const char *binaryvit_cpu_features(void) {
    static const std::string names = cpu_features();
    return names.c_str();
}

void binaryvit_share_threads(void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags),
                             int (*count)(void), int (*which)(void)) {
    share_threads({parallel, count, which});
}

binaryvit_model *binaryvit_create(const char *kernels, const binaryvit_config *config, const binaryvit_tensor *tensors,
                                  int32_t num_tensors, char *error, int32_t error_bytes) {
    const Kernels *found = find_kernels(kernels);
    if (found == nullptr) {
        write_error(error, error_bytes, ("there are no kernels '" + std::string(kernels) + "' for this CPU").c_str());
        return nullptr;
    }
    try {
        auto model = std::make_unique<binaryvit_model>();
        std::string problem;
        model->network = fold(*config, tensors, num_tensors, *found, problem);
        if (model->network != nullptr) return model.release();
        write_error(error, error_bytes, problem.c_str());
        return nullptr;
    } catch (const std::exception &failure) {
        write_error(error, error_bytes, failure.what());
        return nullptr;
    }
}

void binaryvit_limit_team(binaryvit_model *model, int32_t largest) { model->largest_team = std::max(largest, 1); }

void binaryvit_free(binaryvit_model *model) { delete model; }

int32_t binaryvit_forward(binaryvit_model *model, const float *images, int64_t batch, int32_t threads,
                          float *last_hidden_state, float *pooled, float *const *hidden_states) try {
    run_images(*model, Forward{*model->network, images, last_hidden_state, pooled, hidden_states}, batch, threads);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int32_t binaryvit_feature_maps(binaryvit_model *model, const float *images, int64_t batch, int32_t threads,
                               float *const *feature_maps) try {
    run_images(*model, FeatureMaps{*model->network, images, feature_maps}, batch, threads);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int32_t binaryvit_classify(binaryvit_model *model, const float *images, int64_t batch, int32_t threads,
                           const float *weight, const float *bias, int32_t num_labels, float *logits) try {
    const Model &network = *model->network;
    const Stage &last = network.stages.back();
    Array<float> pooled(size_t(batch) * last.channels);
    if (binaryvit_forward(model, images, batch, threads, nullptr, pooled.data(), nullptr) != 0) return 1;
    auto work = [&](int member, int members) {
        int from = int(int64_t(num_labels) * member / members), to = int(int64_t(num_labels) * (member + 1) / members);
        network.kernels->linear(pooled.data(), batch, last.channels, weight, bias, num_labels, from, to, logits);
    };
    threads = model->count_threads(batch, threads);
    if (threads < 2 || !run_team(threads, [&](int member) { work(member, threads); })) work(0, 1);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int32_t binaryvit_find_attention_size(const binaryvit_model *model, int32_t index, binaryvit_attention_size *size) {
    const Model &network = *model->network;
    if (index < 0 || size_t(index) >= network.layers.size()) return 2;
    const Layer &layer = network.layers[size_t(index)];
    const Stage &stage = network.stages[size_t(layer.stage)];
    *size = {layer.heads,
             stage.tokens,
             stage.keys,
             stage.height,
             stage.width,
             stage.height / stage.ratio,
             stage.width / stage.ratio};
    return 0;
}

int32_t binaryvit_attention(binaryvit_model *model, const float *image, int32_t layer, float *probabilities) try {
    const Model &network = *model->network;
    if (layer < 0 || size_t(layer) >= network.layers.size()) return 2;
    run_images(*model, Attention{network, image, layer, probabilities}, 1, 1);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int32_t binaryvit_run_step(binaryvit_model *model, int32_t index, const float *input, int64_t batch, int32_t threads,
                           float *output) try {
    const Model &network = *model->network;
    assert(index >= 0 && size_t(index) < network.steps.size());
    const Step &step = network.steps[size_t(index)];
    const Stage &to = network.stage_of(step);
    const Stage &from = step.kind == StepKind::kPatchEmbeddings ? network.stages[size_t(step.index) - 1] : to;
    size_t pixels = size_t(network.image_channels) * network.image_height * network.image_width;
    auto workspace = std::make_unique<Workspace>(network, std::max(threads, 1));
    for (int64_t image = 0; image < batch; ++image) {
        float *result = output + size_t(image) * to.tokens * to.channels;
        if (step.kind != StepKind::kStem)
            for (int token = 0; token < from.tokens; ++token)
                place_token(from, input + (size_t(image) * from.tokens + token) * from.channels, token,
                            workspace->tokens);
        auto work = [&](int member) {
            network.kernels->run(network, step, *workspace, member, input + size_t(image) * pixels, result);
        };
        if (workspace->size == 1) {
            work(0);
        } else if (!run_team(workspace->size, work)) {
            return 1;
        }
        if (step.kind != StepKind::kNorm)
            for (int token = 0; token < to.tokens; ++token)
                copy_token(to, workspace->tokens, token, result + size_t(token) * to.channels);
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int32_t binaryvit_count(const char *name, const uint8_t *bits, int32_t rows, const uint8_t *matrix, int32_t outputs,
                        int32_t inputs, int32_t *counts) try {
    const Kernels *kernels = find_kernels(name);
    if (kernels == nullptr) return 1;
    int row_bytes = (inputs + 7) / 8;
    SignMatrix tiles(outputs, inputs);
    for (int output = 0; output < outputs; ++output)
        for (int byte = 0; byte < row_bytes; ++byte)
            tiles.byte(kernels->layout, output, byte) = matrix[size_t(output) * row_bytes + byte];
    if (kernels->chains) tiles.chain();
    Array<uint32_t> words(size_t(rows) * tiles.words);
    for (int row = 0; row < rows; ++row)
        std::memcpy(&words[size_t(row) * tiles.words], bits + size_t(row) * row_bytes, size_t(row_bytes));
    kernels->count(words.data(), rows, tiles, outputs, counts);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

}  // extern "C"
