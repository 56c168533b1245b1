/*
 * The engine's interface: plain C, pointers and sizes, so that anything can drive it.
 *
 * A model is made of the tensors of a packed checkpoint (weights of 1 bit, inputs of 1 bit) by their names there, without
 * the prefix "binaryvit."; it computes everything but the classifier. Nothing of the tensors is needed afterwards.
 * A model may be run by several threads at once. Floats are float32, images normalised.
 */
#ifndef BINARYVIT_ENGINE_H
#define BINARYVIT_ENGINE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t image_height, image_width, patch_height, patch_width, num_channels;
    int32_t num_stages; /* length of the five arrays that follow */
    const int32_t *hidden_sizes, *depths, *num_attention_heads, *intermediate_sizes, *sequence_reduction_ratios;
    int32_t num_avg_pool_kernels;
    const int32_t *avg_pool_kernel_sizes;
    int32_t use_class_token, use_stem_norm, use_layer_scale, binarize_patch_embeddings;
    float batch_norm_eps;
} binaryvit_config;

typedef struct {
    const char *name;
    const void *data; /* float, or bytes of bits where the name ends in "packed_weight" */
    int64_t bytes;
} binaryvit_tensor;

typedef struct binaryvit_model binaryvit_model;

/* Names of the kernels that are built and that this CPU runs, best first, separated by spaces. */
const char *binaryvit_kernels(void);

/* Names of all kernels that are built, as above. */
const char *binaryvit_built_kernels(void);

/* Names of those features of this CPU that kernels are made for, as above. */
const char *binaryvit_cpu_features(void);

/*
 * Before any model runs: from now on they run on the threads of an OpenMP runtime that the process has anyway, by its
 * functions GOMP_parallel, omp_get_num_threads and omp_get_thread_num. Its threads spin while they wait, so that others beside
 * them would wait for their cores.
 */
void binaryvit_share_threads(void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags),
                             int (*count)(void), int (*which)(void));

/*
 * A model for the kernels of that name; null if there is none, with a sentence that says why in `error`.
 * To be freed by binaryvit_free.
 */
binaryvit_model *binaryvit_create(const char *kernels, const binaryvit_config *config, const binaryvit_tensor *tensors,
                                  int32_t num_tensors, char *error, int32_t error_bytes);

void binaryvit_free(binaryvit_model *model);

/*
 * Args:
 *   images: (batch, num_channels, image_height, image_width).
 *   threads: how many work on it, this one among them.
 *   last_hidden_state: null, or (batch, tokens, channels) of the last stage.
 *   pooled: (batch, channels).
 *   hidden_states: null, or for every layer its input, then the output of the last: (batch, tokens, channels) each.
 *
 * Returns 0, or 1 where memory is short.
 */
int32_t binaryvit_forward(binaryvit_model *model, const float *images, int64_t batch, int32_t threads,
                          float *last_hidden_state, float *pooled, float *const *hidden_states);

/*
 * The same for a classifier, a linear layer of floats, which is all that is wanted.
 *
 * Args:
 *   images, batch, threads: as above.
 *   weight: (num_labels, channels of the last stage).
 *   bias: (num_labels), or null.
 *   logits: (batch, num_labels).
 *
 * Returns 0, or 1 where memory is short.
 */
int32_t binaryvit_classify(binaryvit_model *model, const float *images, int64_t batch, int32_t threads, const float *weight,
                           const float *bias, int32_t num_labels, float *logits);

/*
 * One step alone, for tests: the stem, then for every stage its patch embeddings (but for the first) and its layers, then the
 * last normalisation.
 *
 * Args:
 *   input: images for the stem, else (batch, tokens, channels) of the step before.
 *   output: (batch, tokens, channels).
 */
int32_t binaryvit_run_step(binaryvit_model *model, int32_t step, const float *input, int64_t batch, int32_t threads,
                           float *output);

/*
 * The product that all others are made of, for tests: in how many bits each row of `bits` differs from each row of `matrix`.
 *
 * Args:
 *   bits: (rows, ceil(inputs / 8)), the first input in the lowest bit, the last byte filled up with zeros.
 *   matrix: (outputs, ceil(inputs / 8)), the same.
 *   counts: (rows, outputs).
 *
 * Returns 0, or 1 where memory is short or there are no such kernels.
 */
int32_t binaryvit_count(const char *kernels, const uint8_t *bits, int32_t rows, const uint8_t *matrix, int32_t outputs,
                        int32_t inputs, int32_t *counts);

#ifdef __cplusplus
}
#endif

#endif
