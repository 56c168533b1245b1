/* What the code compiled for a kind of CPU offers: one set of these functions for each kind, all made from forward.inc. */
#pragma once

#include "model.h"
#include "workspace.h"

namespace binaryvit {

struct Kernels {
    const char *name;
    Layout layout;
    bool chains;  // of weights (SignMatrix::chain)
    bool (*runs_here)();

    /*
     * One step for one image, by all members of the workspace's team at once. Reads and writes its tokens.
     *
     * Args:
     *   image: of the first step, (channels, height, width).
     *   last_hidden_state: of the last step, (tokens, channels).
     */
    void (*run)(const Model &model, const Step &step, Workspace &workspace, int member, const float *image,
                float *last_hidden_state);

    /* Floats (rows, inputs) times the lines `from` to `to` of a weight (outputs, inputs), and a bias if there is one: (rows, outputs). */
    void (*linear)(const float *rows, int64_t num_rows, int inputs, const float *weight, const float *bias, int outputs,
                   int from, int to, float *products);

    /* In how many of its bits each row of `bits` differs from each row of the matrix: (rows, outputs). */
    void (*count)(const uint32_t *bits, int rows, const SignMatrix &matrix, int outputs, int32_t *counts);
};

/* Kernels that are built, best first. */
const std::vector<const Kernels *> &built_kernels();

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace binaryvit
