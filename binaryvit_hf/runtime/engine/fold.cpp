/*
 * Folding: all PyTorch modules that follow a product become one multiply-add, and a shift before a sign becomes a
 * threshold. Folding computes in double precision, so it adds no rounding.
 *
 * A binary product of K inputs is `scale * (K - 2 * count)`, where count is the number of bits in which they differ
 * from the weight.
 */
#include "fold.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <unordered_map>

#include "kernels.h"

namespace binaryvit {
namespace {

/* Nothing throws: WebAssembly has no exceptions. A tensor that is missing reads as zeros, and the problem is kept. */
class Tensors {
public:
    Tensors(const binaryvit_tensor *tensors, int count) {
        for (int i = 0; i < count; ++i) by_name_.emplace(tensors[i].name, tensors[i]);
    }

    const float *floats(const std::string &name, int64_t count) const {
        return static_cast<const float *>(find(name, count * int64_t(sizeof(float))));
    }

    bool has(const std::string &name) const { return by_name_.count(name) != 0; }

    const uint8_t *bytes(const std::string &name, int64_t count) const {
        return static_cast<const uint8_t *>(find(name, count));
    }

    /* The first tensor that is missing or has another size; empty if all are right so far. */
    const std::string &problem() const { return problem_; }

private:
    const void *find(const std::string &name, int64_t bytes) const {
        auto found = by_name_.find(name);
        if (found != by_name_.end() && found->second.bytes == bytes) return found->second.data;
        if (problem_.empty())
            problem_ = "tensor '" + name + "' " +
                       (found == by_name_.end()
                            ? "is missing"
                            : "has " + std::to_string(found->second.bytes) + " bytes, not " + std::to_string(bytes));
        zeros_.emplace_back(size_t(bytes));
        return zeros_.back().data();
    }

    std::unordered_map<std::string, binaryvit_tensor> by_name_;
    mutable std::string problem_;
    mutable std::vector<Array<uint8_t>> zeros_;  // what was handed out instead of tensors
};

/* Folds one model, step by step in the order of the forward. */
class Folder {
public:
    Folder(const binaryvit_config &config, const Tensors &tensors, const Kernels &kernels)
        : config_(config), tensors_(tensors), layout_(kernels.layout), model_(std::make_unique<Model>()) {
        model_->kernels = &kernels;
        model_->image_height = config.image_height;
        model_->image_width = config.image_width;
        model_->patch_height = config.patch_height;
        model_->patch_width = config.patch_width;
        model_->image_channels = config.num_channels;
        model_->class_token = config.use_class_token != 0;
    }

    /* Null after the first step that lacks a tensor (Tensors::problem). */
    std::unique_ptr<Model> fold() {
        for (int stage = 0; stage < config_.num_stages; ++stage) model_->stages.push_back(describe_stage(stage));
        model_->stem = fold_stem();
        model_->steps.push_back({StepKind::kStem, 0});
        if (!complete()) return nullptr;
        for (int stage = 0; stage < config_.num_stages; ++stage) {
            if (stage > 0) {
                model_->patch_embeddings.push_back(fold_patch_embeddings(stage));
                model_->steps.push_back({StepKind::kPatchEmbeddings, stage});
                if (!complete()) return nullptr;
            }
            for (int layer = 0; layer < config_.depths[stage]; ++layer) {
                model_->steps.push_back({StepKind::kLayer, int(model_->layers.size())});
                model_->layers.push_back(fold_layer(stage, layer));
                if (!complete()) return nullptr;
            }
        }
        const int channels = config_.hidden_sizes[config_.num_stages - 1];
        model_->norm = tensors_.has("norm.batch_norm.weight") ? norm("norm", channels) : no_norm(channels);
        model_->steps.push_back({StepKind::kNorm, 0});
        return complete() ? std::move(model_) : nullptr;
    }

private:
    bool complete() const { return tensors_.problem().empty(); }

    Stage describe_stage(int index) const {
        assert(index >= 0 && index < config_.num_stages);
        Stage stage;
        stage.height = config_.image_height / config_.patch_height >> index;
        stage.width = config_.image_width / config_.patch_width >> index;
        stage.tokens = stage.height * stage.width + config_.use_class_token;
        stage.channels = config_.hidden_sizes[index];
        stage.ratio = config_.sequence_reduction_ratios[index];
        assert(stage.height > 0 && stage.width > 0);
        assert(stage.ratio == 1 || (stage.height % stage.ratio == 0 && stage.width % stage.ratio == 0));
        stage.keys = stage.tokens / (stage.ratio * stage.ratio);
        stage.reach = 0;
        for (int i = 0; i < config_.num_avg_pool_kernels; ++i)
            stage.reach = std::max(stage.reach, config_.avg_pool_kernel_sizes[i] / 2);
        for (int token = 0; token < stage.tokens; ++token) {
            int row = token / stage.width, column = token % stage.width;
            stage.map_row.push_back(
                config_.use_class_token ? token : (row + stage.reach) * stage.map_width() + column + stage.reach);
            stage.key_row.push_back(
                stage.ratio == 1 ? token : row / stage.ratio * (stage.width / stage.ratio) + column / stage.ratio);
        }
        return stage;
    }

    static Affine no_norm(int channels) {
        Affine affine(channels);
        std::fill_n(affine.scale.data(), channels, 1.0f);
        return affine;
    }

    /* Batch normalisation by running statistics, with `padding` zeros after the last channel. */
    Affine norm(const std::string &name, int channels, int padding = 0) const {
        const float *weight = tensors_.floats(name + ".batch_norm.weight", channels);
        const float *bias = tensors_.floats(name + ".batch_norm.bias", channels);
        const float *mean = tensors_.floats(name + ".batch_norm.running_mean", channels);
        const float *variance = tensors_.floats(name + ".batch_norm.running_var", channels);
        Affine affine(channels + padding);
        for (int c = 0; c < channels; ++c) {
            double scale = weight[c] / std::sqrt(double(variance[c]) + config_.batch_norm_eps);
            affine.scale[c] = float(scale);
            affine.shift[c] = float(bias[c] - mean[c] * scale);
        }
        return affine;
    }

    Affine layer_scale(const std::string &name, int channels) const {
        Affine affine(channels);
        if (config_.use_layer_scale) {
            std::copy_n(tensors_.floats(name + ".scale", channels), channels, affine.scale.data());
            std::copy_n(tensors_.floats(name + ".shift", channels), channels, affine.shift.data());
        } else {
            std::fill_n(affine.scale.data(), channels, 1.0f);
        }
        return affine;
    }

    /*
     * Thresholds for `x + shift >= 0`: place i has the threshold of channel order[i], or of no channel if it is -1.
     * `deferred` holds, by place, the constants that are missing from x.
     */
    Thresholds thresholds(const std::string &name, int channels, const std::vector<int> &order,
                          const std::vector<double> &deferred = {}) const {
        const float *shift = tensors_.floats(name, channels);
        Thresholds thresholds(order.size());
        for (size_t i = 0; i < order.size(); ++i) {
            bool exists = order[i] >= 0;
            thresholds[i] = exists ? float(-shift[order[i]] - (deferred.empty() ? 0.0 : deferred[i]))
                                   : std::numeric_limits<float>::infinity();
        }
        return thresholds;
    }

    Thresholds thresholds(const std::string &name, int channels, const std::vector<double> &deferred = {}) const {
        return thresholds(name, channels, in_order(channels), deferred);
    }

    /* Adds a constant to a projection's b (model.h), at one place. */
    static void add_constant(Projection &projection, size_t place, double constant) {
        projection.knee[place] -= float(constant);
        projection.deferred[place] += constant * (1.0 + projection.slope[place]);
    }

    /* Adds the constants that are missing from a projection's shortcut. */
    static void add_constants(Projection &projection, const std::vector<double> &deferred) {
        for (size_t i = 0; i < deferred.size(); ++i) add_constant(projection, i, deferred[i]);
    }

    /* Adds the constants that are missing from an affine's input. */
    static void add_constants(Affine &affine, const std::vector<double> &deferred) {
        for (size_t i = 0; i < deferred.size(); ++i) affine.shift[i] += float(affine.scale[i] * deferred[i]);
    }

    /* A packed weight with row rows[i] at place i and bit columns[j] of a row at place j; -1 gives zeros. */
    SignMatrix packed_weight(const std::string &name, int outputs, int inputs, const std::vector<int> &rows,
                             const std::vector<int> &columns) const {
        int row_bytes = (inputs + 7) / 8;
        const uint8_t *packed = tensors_.bytes(name, int64_t(outputs) * row_bytes);
        SignMatrix matrix(int(rows.size()), int(columns.size()));
        for (size_t row = 0; row < rows.size(); ++row) {
            if (rows[row] < 0) continue;
            const uint8_t *bits = packed + size_t(rows[row]) * row_bytes;
            for (size_t first = 0; first < columns.size(); first += 8) {
                // No branch on a weight's bit: the CPU would mispredict every other one.
                int eight = 0;
                for (size_t column = first; column < std::min(first + 8, columns.size()); ++column) {
                    int from = columns[column];
                    if (from >= 0) eight |= (bits[from / 8] >> from % 8 & 1) << (column - first);
                }
                matrix.byte(layout_, int(row), int(first / 8)) = uint8_t(eight);
            }
        }
        if (model_->kernels->chains) matrix.chain();
        return matrix;
    }

    static std::vector<int> in_order(int channels) {
        std::vector<int> order(round_up(channels, kLanes), -1);
        for (int c = 0; c < channels; ++c) order[c] = c;
        return order;
    }

    /* A projection with output rows[i] at place i and input columns[j] at place j; -1 gives zeros. */
    Projection projection(const std::string &linear, const std::string &norm_activation, int inputs, int outputs,
                          const std::vector<int> &rows, const std::vector<int> &columns) const {
        const float *weight_scale = tensors_.floats(linear + ".weight_scale", outputs);
        const std::string norm = norm_activation + ".norm.batch_norm", activation = norm_activation + ".activation";
        const float *weight = tensors_.floats(norm + ".weight", outputs);
        const float *bias = tensors_.floats(norm + ".bias", outputs);
        const float *mean = tensors_.floats(norm + ".running_mean", outputs);
        const float *variance = tensors_.floats(norm + ".running_var", outputs);
        const float *shift_in = tensors_.floats(activation + ".shift_in", outputs);
        const float *slope = tensors_.floats(activation + ".slope", outputs);
        const float *shift_out = tensors_.floats(activation + ".shift_out", outputs);
        size_t places = rows.size();
        Projection folded{packed_weight(linear + ".packed_weight", outputs, inputs, rows, columns),
                          Array<float>(places), Array<float>(places), Array<float>(places),
                          std::vector<double>(places)};
        for (size_t i = 0; i < places; ++i) {
            int c = rows[i];
            if (c < 0) continue;
            double scale = weight[c] / std::sqrt(double(variance[c]) + config_.batch_norm_eps);
            folded.scale[i] = float(-2.0 * weight_scale[c] * scale);
            folded.slope[i] = float(double(slope[c]) - 1.0);
            folded.deferred[i] = shift_out[c];
            add_constant(folded, i, weight_scale[c] * scale * inputs + bias[c] - mean[c] * scale - shift_in[c]);
        }
        return folded;
    }

    Projection square_projection(const std::string &name, int channels) const {
        std::vector<int> order = in_order(channels);
        return projection(name + ".linear", name + ".norm_activation", channels, channels, order, order);
    }

    static size_t place_of(const Stage &stage, int token, int channel) {
        return stage.place(channel / kLanes, token) + channel % kLanes;
    }

    Stem fold_stem() const {
        const Stage &stage = model_->stages[0];
        int channels = stage.channels, padded = round_up(channels, kLanes);
        int inputs = config_.num_channels * config_.patch_height * config_.patch_width;
        const float *weight = tensors_.floats("embeddings.projection.weight", int64_t(channels) * inputs);
        const float *bias = tensors_.floats("embeddings.projection.bias", channels);
        const float *positions = tensors_.floats("embeddings.position_embeddings", int64_t(stage.tokens) * channels);
        const Affine stem_norm = config_.use_stem_norm ? norm("embeddings.norm", channels) : no_norm(channels);
        Stem stem;
        stem.weight = Array<float>(size_t(padded) * inputs);
        stem.positions = Array<float>(size_t(stage.blocks()) * stage.token_block());
        for (int channel = 0; channel < config_.num_channels; ++channel)
            for (int row = 0; row < config_.patch_height; ++row)
                stem.lines.push_back((channel * config_.image_height + row) * config_.image_width);
        for (int c = 0; c < channels; ++c) {
            for (int i = 0; i < inputs; ++i)
                stem.weight[(size_t(c / kLanes) * inputs + i) * kLanes + c % kLanes] =
                    weight[size_t(c) * inputs + i] * stem_norm.scale[c];
            for (int token = 0; token < stage.tokens; ++token)
                stem.positions[place_of(stage, token, c)] =
                    positions[size_t(token) * channels + c] + bias[c] * stem_norm.scale[c] + stem_norm.shift[c];
            if (config_.use_class_token)
                stem.positions[place_of(stage, 0, c)] =
                    tensors_.floats("embeddings.class_token", channels)[c] + positions[c];
        }
        return stem;
    }

    PatchEmbeddings fold_patch_embeddings(int index) const {
        const std::string name = "stages." + std::to_string(index) + ".patch_embeddings";
        const Stage &stage = model_->stages[index];
        int inputs = model_->stages[index - 1].channels, outputs = stage.channels;
        int padded = round_up(outputs, kLanes);
        PatchEmbeddings embeddings;
        embeddings.stage = index;
        embeddings.binary = config_.binarize_patch_embeddings != 0;
        embeddings.norm1 = norm(name + ".norm1", inputs);
        if (embeddings.binary) {
            embeddings.input = thresholds(name + ".projection.shift", inputs);
            // The checkpoint has the four neighbours of a channel side by side.
            std::vector<int> columns(size_t(4) * round_up(inputs, 32), -1);
            for (int neighbour = 0; neighbour < 4; ++neighbour)
                for (int c = 0; c < inputs; ++c) columns[neighbour * round_up(inputs, 32) + c] = 4 * c + neighbour;
            embeddings.projection = projection(name + ".projection", name + ".norm_activation", 4 * inputs, outputs,
                                               in_order(outputs), columns);
        } else {
            Affine norm2 = norm(name + ".norm2", outputs);
            const float *weight = tensors_.floats(name + ".projection.weight", int64_t(outputs) * inputs * 4);
            embeddings.float_weight = Array<float>(size_t(padded) * inputs * 4);
            embeddings.float_bias = Array<float>(padded);
            for (int out = 0; out < outputs; ++out) {
                for (int neighbour = 0; neighbour < 4; ++neighbour)
                    for (int in = 0; in < inputs; ++in)
                        embeddings.float_weight[((size_t(out / kLanes) * 4 + neighbour) * inputs + in) * kLanes +
                                                out % kLanes] =
                            weight[(size_t(out) * inputs + in) * 4 + neighbour] * norm2.scale[out];
                embeddings.float_bias[out] = norm2.shift[out];
            }
        }
        embeddings.positions = Array<float>(size_t(stage.blocks()) * stage.token_block());
        const float *positions = tensors_.floats(name + ".position_embeddings", int64_t(stage.tokens) * outputs);
        for (int token = 0; token < stage.tokens; ++token)
            for (int out = 0; out < outputs; ++out)
                embeddings.positions[place_of(stage, token, out)] =
                    float(positions[size_t(token) * outputs + out] +
                          (embeddings.binary ? embeddings.projection.deferred[out] : 0.0));
        return embeddings;
    }

    Layer fold_layer(int stage_index, int index) const {
        const std::string name = "stages." + std::to_string(stage_index) + ".layers." + std::to_string(index);
        const Stage &stage = model_->stages[stage_index];
        Layer layer;
        layer.stage = stage_index;
        layer.channels = stage.channels;
        layer.heads = config_.num_attention_heads[stage_index];
        layer.head_dim = stage.channels / layer.heads;
        layer.ratio = stage.ratio;
        layer.norm1 = norm(name + ".norm1", stage.channels);
        fold_attention(layer, name + ".attention");
        layer.layer_scale1 = layer_scale(name + ".layer_scale1", stage.channels);
        add_constants(layer.layer_scale1, layer.output.deferred);
        layer.norm2 = norm(name + ".norm2", stage.channels);
        fold_mlp(layer, name + ".mlp", config_.intermediate_sizes[stage_index] / stage.channels);
        layer.layer_scale2 = layer_scale(name + ".layer_scale2", stage.channels);
        add_constants(layer.layer_scale2, layer.fc2.deferred);
        // PyTorch's shortcut is a mean over `expansion` channels, ours their sum. Without its constants RPReLU is
        // homogeneous, so scale and knee grow by that factor and the result shrinks by it.
        for (size_t i = 0; i < layer.fc2.scale.size(); ++i) {
            layer.fc2.scale[i] *= float(layer.expansion);
            layer.fc2.knee[i] *= float(layer.expansion);
            layer.layer_scale2.scale[i] /= float(layer.expansion);
        }
        fold_pooling_branches(layer, name + ".avg_pool_branches");
        return layer;
    }

    void fold_attention(Layer &layer, const std::string &name) const {
        int channels = layer.channels;
        layer.query = square_projection(name + ".query", channels);
        layer.key = square_projection(name + ".key", channels);
        layer.value = square_projection(name + ".value", channels);
        layer.output = square_projection(name + ".output", channels);
        if (layer.ratio > 1) {
            layer.reduction_input = thresholds(name + ".reduction.linear.shift", channels);
            layer.reduction = square_projection(name + ".reduction", channels);
            add_constants(layer.key, layer.reduction.deferred);
            add_constants(layer.value, layer.reduction.deferred);
        }
        layer.query_input = thresholds(name + ".query.linear.shift", channels);
        layer.key_input = thresholds(name + ".key.linear.shift", channels, layer.reduction.deferred);
        layer.value_input = thresholds(name + ".value.linear.shift", channels, layer.reduction.deferred);
        layer.query_sign = thresholds(name + ".query_shift", channels, layer.query.deferred);
        layer.key_sign = thresholds(name + ".key_shift", channels, layer.key.deferred);
        layer.value_sign = thresholds(name + ".value_shift", channels, layer.value.deferred);

        auto exponential = [&](int score) { return float(std::exp(score / std::sqrt(double(layer.head_dim)))); };
        // For whole words: places without a key may hold any bits of a head's words, also those after its last channel.
        // Their exponentials are multiplied by 0, so they must be finite.
        for (int i = 0; i <= 32 * layer.head_words(); ++i)
            layer.exponentials.push_back(exponential(layer.head_dim - 2 * i));
        layer.exponentials_fine = Array<float>(kLanes);
        layer.exponentials_coarse = Array<float>(kLanes);
        for (int i = 0; i < kLanes; ++i) {
            layer.exponentials_fine[i] = exponential(-2 * i);
            layer.exponentials_coarse[i] = exponential(layer.head_dim - 2 * kLanes * i);
        }
        float clip = *tensors_.floats(name + ".probability_clip", 1);
        // quantize_probability clamps round(p / clip) at 0, so a clip that is not positive makes all probabilities 0.
        layer.probability_threshold = clip > 0 ? 0.5f * clip : std::numeric_limits<float>::infinity();
        // Padded by a block: the last 16 channels of the last head may end after the last channel.
        layer.context = norm(name + ".norm_activation.norm", channels, kLanes);
        layer.context_slope = Array<float>(round_up(channels, kLanes));
        const float *shift_in = tensors_.floats(name + ".norm_activation.activation.shift_in", channels);
        const float *slope = tensors_.floats(name + ".norm_activation.activation.slope", channels);
        const float *shift_out = tensors_.floats(name + ".norm_activation.activation.shift_out", channels);
        std::vector<double> deferred(layer.context_slope.size());
        for (int c = 0; c < channels; ++c) {
            layer.context.scale[c] *= clip;
            layer.context.shift[c] +=
                float(layer.query.deferred[c] + layer.key.deferred[c] + layer.value.deferred[c] - shift_in[c]);
            layer.context_slope[c] = float(double(slope[c]) - 1.0);
            deferred[c] = shift_out[c];
        }
        layer.output_input = thresholds(name + ".output.linear.shift", channels, deferred);
        add_constants(layer.output, deferred);
    }

    /*
     * The shortcut of fc2 averages runs of inner channels. Kernels compute a run's channels in turn, for 16 channels
     * of the result at once, and add up vectors.
     */
    void fold_mlp(Layer &layer, const std::string &name, int expansion) const {
        int channels = layer.channels, inner = channels * expansion, blocks = round_up(channels, kLanes) / kLanes;
        layer.expansion = expansion;
        std::vector<int> order(size_t(blocks) * expansion * kLanes, -1);
        std::vector<int32_t> shortcut(order.size());
        for (int block = 0; block < blocks; ++block) {
            for (int run = 0; run < expansion; ++run) {
                for (int lane = 0; lane < kLanes; ++lane) {
                    int c = block * kLanes + lane, place = (block * expansion + run) * kLanes + lane;
                    if (c < channels) order[place] = c * expansion + run;
                    // After the last channel there is a zero.
                    shortcut[place] = c < channels ? order[place] % channels : channels;
                }
            }
        }
        layer.fc1_input = thresholds(name + ".fc1.linear.shift", channels);
        layer.fc1 = projection(name + ".fc1.linear", name + ".fc1.norm_activation", channels, inner, order,
                               in_order(channels));
        layer.fc2_input = thresholds(name + ".fc2.linear.shift", inner, order, layer.fc1.deferred);
        layer.fc2 = projection(name + ".fc2.linear", name + ".fc2.norm_activation", inner, channels,
                               in_order(channels), order);
        for (size_t i = 0; i < order.size(); ++i)
            if (order[i] >= 0)
                add_constant(layer.fc2, size_t(order[i] / expansion), layer.fc1.deferred[i] / expansion);

        for (size_t first = 0; first < shortcut.size(); first += kLanes) {
            ChannelIndices indices;
            std::copy_n(&shortcut[first], kLanes, indices.begin());
            auto known = std::find(layer.shortcut_channels.begin(), layer.shortcut_channels.end(), indices);
            layer.shortcut_of_block.push_back(int32_t(known - layer.shortcut_channels.begin()));
            if (known == layer.shortcut_channels.end()) layer.shortcut_channels.push_back(indices);
        }
    }

    /* Means over (K, 1) and (1, K) tokens: one weight for the token itself, one for each pair at the same distance. */
    void fold_pooling_branches(Layer &layer, const std::string &name) const {
        if (config_.num_avg_pool_kernels == 0) return;
        int per_block = 1 + 2 * model_->stages[layer.stage].reach;
        layer.pool_weights = Array<float>(size_t(per_block) * round_up(layer.channels, kLanes));
        for (int branch = 0; branch < 2 * config_.num_avg_pool_kernels; ++branch) {
            const std::string branch_name = name + "." + std::to_string(branch) + ".layer_scale";
            const float *scale = tensors_.floats(branch_name + ".scale", layer.channels);
            const float *shift = tensors_.floats(branch_name + ".shift", layer.channels);
            int size = config_.avg_pool_kernel_sizes[branch / 2];
            bool vertical = branch % 2 == 0;
            for (int c = 0; c < layer.channels; ++c) {
                float *weights = &layer.pool_weights[size_t(c / kLanes) * per_block * kLanes + c % kLanes];
                weights[0] += scale[c] / float(size);
                for (int distance = 1; distance <= size / 2; ++distance)
                    weights[(2 * distance - 1 + vertical) * kLanes] += scale[c] / float(size);
                layer.layer_scale2.shift[c] += shift[c];
            }
        }
    }

    const binaryvit_config &config_;
    const Tensors &tensors_;
    Layout layout_;
    std::unique_ptr<Model> model_;
};

}  // namespace

std::unique_ptr<Model> fold(const binaryvit_config &config, const binaryvit_tensor *tensors, int num_tensors,
                            const Kernels &kernels, std::string &problem) {
    Tensors by_name(tensors, num_tensors);
    std::unique_ptr<Model> model = Folder(config, by_name, kernels).fold();
    problem = by_name.problem();
    return model;
}

}  // namespace binaryvit
