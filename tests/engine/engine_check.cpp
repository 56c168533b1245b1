/*
 * Runs the engine through its C interface alone, for sanitisers: networks of random tensors on all kernels, on one
 * thread and on several, called from several threads at once; tensors that are missing or too short; and pictures that
 * are preprocessed, also in several threads at once.
 *
 * Usage: engine_check ROUNDS, the number of times to run each network.
 */
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../../binaryvit_hf/runtime/engine/engine.h"

namespace {

/* A network's config and tensors, as a packed checkpoint holds them. */
class Network {
public:
    struct Shape {
        std::vector<int32_t> hidden_sizes, depths, heads, inner, ratios, kernels;
        int32_t height, width, patch, channels;
        bool class_token, stem_norm, layer_scale, binary_embeddings;
    };

    explicit Network(const Shape &shape) : shape_(shape), random_(7) {
        int inputs = shape.channels * shape.patch * shape.patch, first = shape.hidden_sizes[0];
        int tokens = shape.height / shape.patch * (shape.width / shape.patch);
        floats("embeddings.projection.weight", first * inputs);
        floats("embeddings.projection.bias", first);
        if (shape.stem_norm) norm("embeddings.norm", first);
        if (shape.class_token) floats("embeddings.class_token", first);
        floats("embeddings.position_embeddings", (tokens + shape.class_token) * first);
        for (size_t stage = 0; stage < shape.hidden_sizes.size(); ++stage) add_stage(stage, tokens >> 2 * stage);
        norm("norm", shape.hidden_sizes.back());
        for (size_t map = 0; map <= shape.hidden_sizes.size(); ++map) {
            size_t stage = map == 0 ? 0 : map - 1;
            map_floats.push_back(size_t((tokens >> 2 * stage) + shape.class_token) * shape.hidden_sizes[stage]);
        }
        last_tokens = (tokens >> 2 * (shape.hidden_sizes.size() - 1)) + shape.class_token;
        last_channels = shape.hidden_sizes.back();
    }

    binaryvit_config config() const {
        return {shape_.height,
                shape_.width,
                shape_.patch,
                shape_.patch,
                shape_.channels,
                int32_t(shape_.hidden_sizes.size()),
                shape_.hidden_sizes.data(),
                shape_.depths.data(),
                shape_.heads.data(),
                shape_.inner.data(),
                shape_.ratios.data(),
                int32_t(shape_.kernels.size()),
                shape_.kernels.data(),
                shape_.class_token,
                shape_.stem_norm,
                shape_.layer_scale,
                shape_.binary_embeddings,
                1e-5f};
    }

    std::vector<binaryvit_tensor> tensors() const {
        std::vector<binaryvit_tensor> listed;
        for (const auto &tensor : floats_)
            listed.push_back({tensor.name.c_str(), tensor.items.data(), int64_t(4 * tensor.items.size())});
        for (const auto &tensor : bits_)
            listed.push_back({tensor.name.c_str(), tensor.items.data(), int64_t(tensor.items.size())});
        return listed;
    }

    size_t pixels() const { return size_t(shape_.channels) * shape_.height * shape_.width; }

    int last_tokens, last_channels;
    std::vector<size_t> map_floats;  // of one image: of the stem, and of each stage

private:
    template <class Item>
    struct Named {
        std::string name;
        std::vector<Item> items;
    };

    void floats(const std::string &name, int count, float around = 0) {
        std::normal_distribution<float> normal(around, 0.3f);
        std::vector<float> items(static_cast<size_t>(count));
        for (float &item : items) item = around > 0 ? std::abs(normal(random_)) + 0.05f : normal(random_);
        floats_.push_back({name, std::move(items)});
    }

    void bits(const std::string &name, int rows, int columns) {
        int row_bytes = (columns + 7) / 8;
        std::vector<uint8_t> items(size_t(rows) * row_bytes);
        for (size_t i = 0; i < items.size(); ++i) {
            bool last = int(i % row_bytes) == row_bytes - 1 && columns % 8 != 0;
            items[i] = uint8_t(random_() & (last ? (1u << columns % 8) - 1 : 255u));
        }
        bits_.push_back({name, std::move(items)});
    }

    void norm(const std::string &name, int channels) {
        floats(name + ".batch_norm.weight", channels, 1);
        floats(name + ".batch_norm.bias", channels);
        floats(name + ".batch_norm.running_mean", channels);
        floats(name + ".batch_norm.running_var", channels, 1);
    }

    void activation(const std::string &name, int channels) {
        norm(name + ".norm", channels);
        floats(name + ".activation.shift_in", channels);
        floats(name + ".activation.slope", channels);
        floats(name + ".activation.shift_out", channels);
    }

    void linear(const std::string &name, int inputs, int outputs, int shifts) {
        floats(name + ".shift", shifts);
        bits(name + ".packed_weight", outputs, inputs);
        floats(name + ".weight_scale", outputs, 1);
    }

    void projection(const std::string &name, int inputs, int outputs) {
        linear(name + ".linear", inputs, outputs, inputs);
        activation(name + ".norm_activation", outputs);
    }

    void layer_scale(const std::string &name, int channels) {
        floats(name + ".scale", channels);
        floats(name + ".shift", channels);
    }

    void add_stage(size_t stage, int tokens) {
        int channels = shape_.hidden_sizes[stage];
        std::string name = "stages." + std::to_string(stage);
        if (stage > 0) {
            int before = shape_.hidden_sizes[stage - 1];
            std::string embeddings = name + ".patch_embeddings";
            norm(embeddings + ".norm1", before);
            floats(embeddings + ".position_embeddings", tokens * channels);
            if (shape_.binary_embeddings) {
                linear(embeddings + ".projection", 4 * before, channels, before);
                activation(embeddings + ".norm_activation", channels);
            } else {
                floats(embeddings + ".projection.weight", 4 * before * channels);
                norm(embeddings + ".norm2", channels);
            }
        }
        for (int layer = 0; layer < shape_.depths[stage]; ++layer)
            add_layer(name + ".layers." + std::to_string(layer), stage);
    }

    void add_layer(const std::string &name, size_t stage) {
        int channels = shape_.hidden_sizes[stage], inner = shape_.inner[stage];
        norm(name + ".norm1", channels);
        norm(name + ".norm2", channels);
        if (shape_.ratios[stage] > 1) projection(name + ".attention.reduction", channels, channels);
        for (const char *part : {"query", "key", "value"}) {
            projection(name + ".attention." + part, channels, channels);
            floats(name + ".attention." + part + "_shift", channels);
        }
        floats(name + ".attention.probability_clip", 1, 0.2f);
        activation(name + ".attention.norm_activation", channels);
        projection(name + ".attention.output", channels, channels);
        projection(name + ".mlp.fc1", channels, inner);
        projection(name + ".mlp.fc2", inner, channels);
        if (shape_.layer_scale) {
            layer_scale(name + ".layer_scale1", channels);
            layer_scale(name + ".layer_scale2", channels);
        }
        for (size_t branch = 0; branch < 2 * shape_.kernels.size(); ++branch)
            layer_scale(name + ".avg_pool_branches." + std::to_string(branch) + ".layer_scale", channels);
    }

    Shape shape_;
    std::mt19937 random_;
    std::deque<Named<float>> floats_;
    std::deque<Named<uint8_t>> bits_;
};

int failures = 0;

void expect(bool holds, const std::string &what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what.c_str());
    ++failures;
}

/* Reports the first number that differs. */
void expect_equal(const std::vector<float> &actual, const std::vector<float> &expected, const std::string &what) {
    for (size_t i = 0; i < expected.size(); ++i) {
        if (actual[i] == expected[i]) continue;
        return expect(false, what + ": [" + std::to_string(i) + "] expected " + std::to_string(expected[i]) +
                                 ", actual " + std::to_string(actual[i]));
    }
}

std::vector<float> random_images(const Network &network, int batch) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> images(network.pixels() * size_t(batch));
    for (float &pixel : images) pixel = normal(random);
    return images;
}

/* Last hidden state, pooled output, logits and feature maps of all images. Sanitisers find writes beyond their sizes.
 */
std::vector<float> run(const Network &network, binaryvit_model *model, const std::vector<float> &images, int batch,
                       int threads) {
    size_t channels = size_t(network.last_channels);
    std::vector<float> last(size_t(batch) * network.last_tokens * channels), pooled(size_t(batch) * channels);
    expect(binaryvit_forward(model, images.data(), batch, threads, last.data(), pooled.data(), nullptr) == 0,
           "a forward");
    constexpr int kLabels = 7;
    std::vector<float> weight(kLabels * channels, 0.5f), bias(kLabels, 1.0f), logits(size_t(batch) * kLabels);
    expect(binaryvit_classify(model, images.data(), batch, threads, weight.data(), bias.data(), kLabels,
                              logits.data()) == 0,
           "logits");
    std::vector<std::vector<float>> maps;
    std::vector<float *> pointers;
    for (size_t floats : network.map_floats) maps.emplace_back(floats * size_t(batch));
    for (std::vector<float> &map : maps) pointers.push_back(map.data());
    expect(binaryvit_feature_maps(model, images.data(), batch, threads, pointers.data()) == 0, "feature maps");
    for (int32_t layer = 0;; ++layer) {
        binaryvit_attention_size size;
        if (binaryvit_find_attention_size(model, layer, &size) != 0) break;
        std::vector<float> probabilities(size_t(size.heads) * size.queries * size.keys);
        expect(binaryvit_attention(model, images.data(), layer, probabilities.data()) == 0, "attention");
        last.insert(last.end(), probabilities.begin(), probabilities.end());
    }
    for (const auto &more : {pooled, logits}) last.insert(last.end(), more.begin(), more.end());
    for (const auto &more : maps) last.insert(last.end(), more.begin(), more.end());
    return last;
}

void check_network(const Network &network, const std::string &name, int rounds) {
    constexpr int kBatch = 3;
    binaryvit_config config = network.config();
    std::vector<binaryvit_tensor> tensors = network.tensors();
    std::vector<float> images = random_images(network, kBatch);
    char error[200] = "";
    std::istringstream kernels(binaryvit_kernels());
    for (std::string kind; kernels >> kind;) {
        binaryvit_model *model =
            binaryvit_create(kind.c_str(), &config, tensors.data(), int32_t(tensors.size()), error, sizeof(error));
        expect(model != nullptr, name + ": " + error);
        if (model == nullptr) return;
        std::vector<float> alone = run(network, model, images, kBatch, 1);
        for (float value : alone) expect(std::isfinite(value), name + ": a finite number on " + kind);
        for (int round = 0; round < rounds; ++round)
            for (int threads : {2, 3, 4})
                expect_equal(run(network, model, images, kBatch, threads), alone,
                             name + ": " + std::to_string(threads) + " threads on " + kind);
        std::vector<std::thread> callers;
        std::vector<std::vector<float>> results(3);
        for (std::vector<float> &result : results)
            callers.emplace_back([&] {
                for (int round = 0; round < rounds && (round == 0 || result == alone); ++round)
                    result = run(network, model, images, kBatch, 2);
            });
        for (std::thread &caller : callers) caller.join();
        for (const auto &result : results) expect_equal(result, alone, name + ": callers at once on " + kind);
        binaryvit_free(model);

        std::vector<binaryvit_tensor> fewer(tensors.begin(), tensors.end() - 1);
        expect(binaryvit_create(kind.c_str(), &config, fewer.data(), int32_t(fewer.size()), error, sizeof(error)) ==
                       nullptr &&
                   std::strstr(error, "is missing") != nullptr,
               name + ": a tensor that is missing");
        fewer = tensors;
        fewer.back().bytes -= 1;
        expect(binaryvit_create(kind.c_str(), &config, fewer.data(), int32_t(fewer.size()), error, sizeof(error)) ==
                       nullptr &&
                   std::strstr(error, "bytes") != nullptr,
               name + ": a tensor that is too short");
    }
    expect(
        binaryvit_create("abacus", &config, tensors.data(), int32_t(tensors.size()), error, sizeof(error)) == nullptr,
        "kernels that do not exist");
}

/* Resizes a picture, and crops or fills it up. A picture of one colour keeps it. */
void check_picture(int32_t height, int32_t width, int32_t pixel_bytes, const binaryvit_image_processor &processor) {
    std::string name = "a picture of " + std::to_string(width) + " x " + std::to_string(height);
    constexpr int kGap = 5;  // bytes between rows; there are none behind the last one
    const int row_bytes = pixel_bytes * (width - 1) + 3;
    std::vector<uint8_t> pixels(size_t(height) * (row_bytes + kGap) - kGap, 200);
    binaryvit_picture picture = {pixels.data(), row_bytes + kGap, height, width, pixel_bytes};
    int32_t new_height = 0, new_width = 0;
    expect(binaryvit_preprocessed_size(&processor, height, width, &new_height, &new_width) == 0, name + ": a size");
    std::vector<float> output(3 * size_t(new_height) * new_width, -1);
    auto run = [&](std::vector<float> &to) {
        expect(binaryvit_pixel_values(&processor, &picture, to.data()) == 0, name + " is preprocessed");
    };
    run(output);
    for (float value : output)
        expect(value == 200 || (processor.crop_height > 0 && value == 0), name + " keeps its colour");
    std::mt19937 random(5);
    for (uint8_t &pixel : pixels) pixel = uint8_t(random());
    run(output);
    for (float value : output) expect(value >= 0 && value <= 255, name + ": 8 bits");
    std::vector<std::vector<float>> results(3, std::vector<float>(output.size()));
    std::vector<std::thread> callers;
    for (std::vector<float> &result : results) callers.emplace_back([&] { run(result); });
    for (std::thread &caller : callers) caller.join();
    for (const auto &result : results) expect_equal(result, output, name + ": callers at once");
}

void check_preprocessing() {
    binaryvit_image_processor processor = {3, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1.0, {}, {}};
    for (int32_t resample : {0, 2, 3}) {
        processor.resample = resample;
        for (int32_t crop : {0, 16, 33}) {
            processor.crop_height = processor.crop_width = crop;
            for (int32_t pixel_bytes : {3, 4}) {
                check_picture(30, 47, pixel_bytes, processor);
                check_picture(7, 5, pixel_bytes, processor);
                check_picture(20, 1, pixel_bytes, processor);
            }
        }
    }
    int32_t height, width;
    auto size = [&](int32_t picture_height, int32_t picture_width) {
        return binaryvit_preprocessed_size(&processor, picture_height, picture_width, &height, &width);
    };
    expect(size(0, 5) == 2, "an empty picture");
    processor.longest_edge = 20;
    expect(size(1, 1000) == 2, "a picture that would become empty");
    expect(size(20, 30) == 0, "a picture with another aspect ratio");
    processor.resample = 1;
    expect(size(20, 30) == 2, "a filter that does not exist");
}

}  // namespace

int main(int, char **arguments) {
    int rounds = std::atoi(arguments[1]);
    check_network(Network({{12, 24}, {1, 2}, {2, 3}, {24, 72}, {2, 1}, {3, 5}, 16, 24, 2, 3, false, true, true, true}),
                  "pyramid", rounds);
    check_network(
        Network({{64, 128}, {1, 1}, {1, 2}, {512, 512}, {4, 1}, {3}, 32, 32, 4, 3, false, true, true, false}),
        "whole words", rounds);
    check_network(Network({{20}, {2}, {4}, {40}, {1}, {}, 8, 8, 4, 1, true, false, false, true}), "class token",
                  rounds);
    // Where the second stage has no keys, there are still signs of the first one's, 32 for each head instead of 8.
    check_network(Network({{32, 64}, {1, 1}, {1, 8}, {64, 128}, {1, 1}, {}, 12, 12, 2, 3, false, true, true, true}),
                  "narrow heads after a wide one", rounds);
    check_preprocessing();
    std::printf("%s: %s\n", binaryvit_kernels(), failures == 0 ? "all equal" : "failed");
    return failures != 0;
}
