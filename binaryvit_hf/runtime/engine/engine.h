/*
 * The engine's interface, in plain C: any language can call it.
 *
 * A model holds its own copy of the backbone of a packed checkpoint with 1-bit weights and 1-bit inputs. Several
 * threads may run one model at once. Floats are float32, images are normalised.
 *
 * In WebAssembly a call runs on one thread, whatever `threads` is. Running out of memory is a trap there: drop the
 * instance then, with all its models.
 */
#ifndef BINARYVIT_ENGINE_H
#define BINARYVIT_ENGINE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t image_height, image_width, patch_height, patch_width, num_channels;
    int32_t num_stages; /* length of the next five arrays */
    const int32_t *hidden_sizes, *depths, *num_attention_heads, *intermediate_sizes, *sequence_reduction_ratios;
    int32_t num_avg_pool_kernels;
    const int32_t *avg_pool_kernel_sizes;
    int32_t use_class_token, use_stem_norm, use_layer_scale, binarize_patch_embeddings;
    float batch_norm_eps;
} binaryvit_config;

typedef struct {
    const char *name; /* as in the checkpoint, without the prefix "binaryvit." */
    const void *data; /* floats; bits if the name ends in "packed_weight" */
    int64_t bytes;    /* size of the data */
} binaryvit_tensor;

typedef struct binaryvit_model binaryvit_model;

/* The names of the built kernels that this CPU runs, best first, separated by spaces. */
const char *binaryvit_kernels(void);

/* The names of all built kernels, best first, separated by spaces. */
const char *binaryvit_built_kernels(void);

/* The instruction sets of this CPU that kernels use, separated by spaces. */
const char *binaryvit_cpu_features(void);

/*
 * Makes all models run on the threads of an OpenMP runtime that the process already uses. A runtime's threads spin
 * while they wait, so other threads beside them would lack cores. Call it before any model runs.
 *
 * Args:
 *   parallel, count, which: the runtime's GOMP_parallel, omp_get_num_threads and omp_get_thread_num.
 */
void binaryvit_share_threads(void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags),
                             int (*count)(void), int (*which)(void));

/*
 * Returns a model that the kernels of this name compute. Free it by binaryvit_free. Copies the tensors. The final
 * normalisation ("norm.batch_norm.weight" and so on) may be left out; then nothing is normalised at the end. On
 * failure returns null and writes the reason to `error`, which has `error_bytes` bytes.
 */
binaryvit_model *binaryvit_create(const char *kernels, const binaryvit_config *config, const binaryvit_tensor *tensors,
                                  int32_t num_tensors, char *error, int32_t error_bytes);

/*
 * Limits how many threads compute one image at once, for as many as there are by default. They wait for each other, which
 * is slow with more threads than CPUs, and in a small network. Call it before the model runs.
 */
void binaryvit_limit_team(binaryvit_model *model, int32_t largest);

void binaryvit_free(binaryvit_model *model);

/*
 * Computes the backbone.
 *
 * Args:
 *   images: (batch, num_channels, image_height, image_width).
 *   threads: number of threads to use, including the calling one.
 *   last_hidden_state: null, or written: (batch, tokens, channels) of the last stage.
 *   pooled: written: (batch, channels).
 *   hidden_states: null, or written: the input of every layer and the output of the last. Each is (batch, tokens,
 *     channels).
 *
 * Returns 0, or 1 if memory runs out.
 */
int32_t binaryvit_forward(binaryvit_model *model, const float *images, int64_t batch, int32_t threads,
                          float *last_hidden_state, float *pooled, float *const *hidden_states);

/*
 * Computes the feature maps of the backbone, up to the last one that is wanted.
 *
 * Args:
 *   images, batch, threads: see binaryvit_forward.
 *   feature_maps: 1 + num_stages pointers, of the stem and of each stage. Each is null, or written: the output of the
 *     stem or of the stage's last layer, (batch, tokens, channels).
 *
 * Returns 0, or 1 if memory runs out.
 */
int32_t binaryvit_feature_maps(binaryvit_model *model, const float *images, int64_t batch, int32_t threads,
                               float *const *feature_maps);

/*
 * Computes the backbone and a linear classifier.
 *
 * Args:
 *   images, batch, threads: see binaryvit_forward.
 *   weight: (num_labels, channels of the last stage).
 *   bias: null, or (num_labels).
 *   logits: written: (batch, num_labels).
 *
 * Returns 0, or 1 if memory runs out.
 */
int32_t binaryvit_classify(binaryvit_model *model, const float *images, int64_t batch, int32_t threads,
                           const float *weight, const float *bias, int32_t num_labels, float *logits);

/* The size of the attention of a layer. Tokens are a grid, row by row; before it comes the class token, if any. */
typedef struct {
    int32_t heads, queries, keys; /* keys are fewer than queries if the layer reduces its tokens */
    int32_t query_height, query_width, key_height, key_width;
} binaryvit_attention_size;

/* Writes the size of the attention of a layer. Returns 0, or 2 if there is no such layer; the first one is 0. */
int32_t binaryvit_find_attention_size(const binaryvit_model *model, int32_t layer, binaryvit_attention_size *size);

/*
 * Computes the attention probabilities of a layer, as the network uses them: 0, or the layer's `probability_clip`.
 * Runs on the calling thread, and no further than this layer.
 *
 * Args:
 *   image: (num_channels, image_height, image_width).
 *   layer: counts through all stages.
 *   probabilities: written: (heads, queries, keys) of binaryvit_find_attention_size.
 *
 * Returns 0, 1 if memory runs out, or 2 if there is no such layer.
 */
int32_t binaryvit_attention(binaryvit_model *model, const float *image, int32_t layer, float *probabilities);

/*
 * Computes a single step, for tests.
 *
 * Args:
 *   step: 0 is the stem. The next steps are the patch embeddings (not in the first stage) and the layers of each
 *     stage. The last step is the final normalisation.
 *   input: images for the stem, otherwise the (batch, tokens, channels) of the previous step.
 *   output: written: (batch, tokens, channels).
 *
 * Returns 0, or 1 if memory runs out or the threads are not available.
 */
int32_t binaryvit_run_step(binaryvit_model *model, int32_t step, const float *input, int64_t batch, int32_t threads,
                           float *output);

/*
 * Counts the bits in which each row of `bits` differs from each row of `matrix`, for tests. All binary products of a
 * model are such counts.
 *
 * Args:
 *   bits: (rows, ceil(inputs / 8)), the first input in the lowest bit, the last byte padded with zeros.
 *   matrix: (outputs, ceil(inputs / 8)), in the same format.
 *   counts: written: (rows, outputs).
 *
 * Returns 0, or 1 if memory runs out or this CPU does not run these kernels.
 */
int32_t binaryvit_count(const char *kernels, const uint8_t *bits, int32_t rows, const uint8_t *matrix, int32_t outputs,
                        int32_t inputs, int32_t *counts);

/* An 8-bit RGB picture. */
typedef struct {
    const uint8_t *pixels; /* red, green and blue of the first pixel, side by side */
    int64_t row_bytes;     /* from one row to the next */
    int32_t height, width;
    int32_t pixel_bytes; /* from one pixel to the next, 3 or 4 */
} binaryvit_picture;

/*
 * The steps from a picture to the input of a network, by the names of preprocessor_config.json. A number of pixels
 * that does not apply is 0.
 *
 * The picture is resized to one of:
 *   - a shortest edge of `shortest_edge`, or less, so that the longest one is at most `longest_edge`, which may be 0;
 *   - the largest size within `max_height` and `max_width`;
 *   - `height` and `width`.
 * Then its centre is cropped, and zeros fill up what is too small. Then `(x * rescale_factor - mean) / std`.
 */
typedef struct {
    int32_t resample; /* 0: no resizing; 2: bilinear, 3: bicubic, as in Pillow */
    int32_t shortest_edge, longest_edge, max_height, max_width, height, width;
    int32_t crop_height, crop_width; /* both or none */
    int32_t rescale, normalize;      /* whether to do these steps */
    double rescale_factor, mean[3], std[3];
} binaryvit_image_processor;

/*
 * The size of the output of binaryvit_pixel_values for a picture of this size. Returns 0, or 2 if there is none: the
 * processor has numbers that it cannot have, the picture is empty, or it would be empty after resizing.
 */
int32_t binaryvit_preprocessed_size(const binaryvit_image_processor *processor, int32_t picture_height,
                                    int32_t picture_width, int32_t *height, int32_t *width);

/*
 * Computes the input of a network from a picture, on the calling thread. Equals AutoImageProcessor of transformers
 * with torchvision on the CPU bit for bit.
 *
 * Args:
 *   pixel_values: written: (3, height, width), of the size that binaryvit_preprocessed_size returns.
 *
 * Returns 0, 1 if memory runs out, or 2 as binaryvit_preprocessed_size or for other `pixel_bytes`.
 */
int32_t binaryvit_pixel_values(const binaryvit_image_processor *processor, const binaryvit_picture *picture,
                               float *pixel_values);

#ifdef __cplusplus
}
#endif

#endif
