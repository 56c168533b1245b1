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

/*
 * A model for the kernels of that name; null if there is none, with a sentence that says why in `error`.
 * To be freed by binaryvit_free.
 */
binaryvit_model *binaryvit_create(const char *kernels, const binaryvit_config *config, const binaryvit_tensor *tensors,
                                  int32_t num_tensors, char *error, int32_t error_bytes);

void binaryvit_free(binaryvit_model *model);

/* Tokens and channels of the last stage, and floats of all hidden states of one image. */
int64_t binaryvit_last_tokens(const binaryvit_model *model);
int64_t binaryvit_last_channels(const binaryvit_model *model);

/*
 * Args:
 *   images: (batch, num_channels, image_height, image_width).
 *   threads: how many work on it, this one among them.
 *   last_hidden_state: (batch, tokens, channels) of the last stage.
 *   pooled: (batch, channels).
 *   hidden_states: null, or for every layer its input, then the output of the last: (batch, tokens, channels) each.
 *
 * Returns 0, or 1 where memory is short.
 */
int32_t binaryvit_forward(binaryvit_model *model, const float *images, int64_t batch, int32_t threads,
                          float *last_hidden_state, float *pooled, float *const *hidden_states);

#ifdef __cplusplus
}
#endif

#endif
