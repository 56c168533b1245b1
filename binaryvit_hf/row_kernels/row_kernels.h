/*
 * Row kernels: what a training step computes between matrix products, one pass over the rows of its tensors each.
 *
 * Tensors are contiguous `(rows, channels)`. rows.inc holds the kernels. It is compiled once for each instruction set
 * and exports its functions with that name at the end, for example `signs_avx512`.
 */
#pragma once

#include <cstdint>

namespace binaryvit {

/* The rows of one thread. */
struct Share {
    int64_t first, end;
    double *sums;    // of this thread, zero at the beginning
    float *scratch;  // of this thread, arbitrary
};

/* What each thread needs besides the tensors. */
struct Needs {
    int64_t sums = 0;
    double *totals = nullptr;  // gets the sums of all threads, added in the order of their rows
    int64_t scratch = 0;       // floats
};

/*
 * Divides rows among at most `threads` threads and calls `work(context, share)` on each. How many there are depends on
 * the sizes only, so results do not depend on chance.
 *
 * Returns whether there was enough memory; without it nothing is called.
 */
bool divide_rows(int64_t rows, int64_t channels, int threads, const Needs &needs,
                 void (*work)(const void *context, const Share &share), const void *context);

/* Batch normalisation and RPReLU, `(channels,)` each: `PReLU((x - mean) * weight / sqrt(variance + eps) + bias -
 * shift_in)
 * + shift_out`. */
struct NormActivation {
    const float *mean, *variance, *weight, *bias, *shift_in, *slope, *shift_out;
    float eps;
};

/* The gradients of the parameters of `NormActivation`. */
struct NormActivationGradients {
    float *weight, *bias, *shift_in, *slope, *shift_out;
};

/* Running statistics, which a batch's statistics move by `momentum`. */
struct RunningStatistics {
    float *mean, *variance;
    float momentum;
};

/* Memory for `count` floats; `data` is null if there is none. */
struct Floats {
    explicit Floats(int64_t count);
    ~Floats();
    Floats(const Floats &) = delete;
    Floats &operator=(const Floats &) = delete;
    float *const data;
};

}  // namespace binaryvit
