/* One table of functions for each kind of CPU, all compiled from forward.inc. */
#pragma once

#include "model.h"
#include "workspace.h"

namespace binaryvit {

struct Kernels {
    const char *name;
    Layout layout;
    bool chains;  // whether weights are chained (SignMatrix::chain)
    bool (*runs_here)();

    /*
     * Computes one step of one image from the workspace's tokens to the workspace's tokens. All members of its team
     * call it at once.
     *
     * Args:
     *   image: read by the first step, (channels, height, width).
     *   last_hidden_state: written by the last step, (tokens, channels).
     */
    void (*run)(const Model &model, const Step &step, Workspace &workspace, int member, const float *image,
                float *last_hidden_state);

    /*
     * Writes columns `from` to `to` of products (num_rows, outputs): rows (num_rows, inputs) times weight (outputs,
     * inputs) transposed, plus bias (outputs), which may be null.
     */
    void (*linear)(const float *rows, int64_t num_rows, int inputs, const float *weight, const float *bias,
                   int outputs, int from, int to, float *products);

    /* Counts the bits in which each of `rows` rows differs from each row of the matrix: counts (rows, outputs). */
    void (*count)(const uint32_t *bits, int rows, const SignMatrix &matrix, int outputs, int32_t *counts);
};

/* The kernels that are built, best first. */
const std::vector<const Kernels *> &built_kernels();

#if defined(__wasm_simd128__)
extern const Kernels kWasmKernels;  // the only ones: a module that is loaded has its instructions
#else
extern const Kernels kScalarKernels;
#endif
#if defined(__x86_64__)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace binaryvit
