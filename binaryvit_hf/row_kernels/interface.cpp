/* Threads and memory of the row kernels, and the choice of an instruction set. */
#include "row_kernels.h"

#include <algorithm>
#include <new>
#include <vector>

#include "../runtime/engine/team.h"

namespace binaryvit {

namespace {
constexpr int64_t kSmallestShare = 1 << 14;  // elements; starting a thread takes as long as computing them
constexpr int64_t kApart = 64;  // numbers between the memories of two threads, so that they share no cache line
}  // namespace

bool divide_rows(int64_t rows, int64_t channels, int threads, const Needs &needs,
                 void (*work)(const void *context, const Share &share), const void *context) {
    int64_t most = std::min(rows, rows * channels / kSmallestShare + 1);
    int members = int(std::max<int64_t>(1, std::min<int64_t>(threads, most)));
    int64_t sums_apart = needs.sums + kApart, scratch_apart = needs.scratch + kApart;
    std::vector<double> sums;
    std::vector<float> scratch;
    try {
        sums.resize(size_t(sums_apart * members));
        scratch.resize(size_t(scratch_apart * members));
    } catch (const std::bad_alloc &) {
        return false;
    }
    auto run = [&](int member) {
        work(context, {rows * member / members, rows * (member + 1) / members, sums.data() + sums_apart * member,
                       scratch.data() + scratch_apart * member});
    };
    if (members == 1 || !run_team(members, run))
        for (int member = 0; member < members; ++member) run(member);
    for (int member = 0; member < members; ++member)
        for (int64_t i = 0; i < needs.sums; ++i) needs.totals[i] += sums[size_t(sums_apart * member + i)];
    return true;
}

Floats::Floats(int64_t count) : data(new (std::nothrow) float[size_t(count)]) {}

Floats::~Floats() { delete[] data; }

}  // namespace binaryvit

extern "C" {

/* The instruction sets of this CPU that kernels are compiled for, best first, separated by spaces. */
const char *instruction_sets() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return "avx512 avx2 baseline";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2 baseline";
#endif
    return "baseline";
}

/* See team.h. */
void share_threads(void (*parallel)(void (*)(void *), void *, unsigned, unsigned), int (*count)(), int (*which)()) {
    binaryvit::share_threads({parallel, count, which});
}
}
