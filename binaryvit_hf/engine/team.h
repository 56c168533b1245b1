/* Threads that work on one image, or each on its own. */
#pragma once

#include <atomic>
#include <functional>

namespace binaryvit {

/* Lets `size` threads wait for each other: none leaves before all have come. */
class Barrier {
public:
    explicit Barrier(int size) : size_(size) {}
    void wait();

private:
    const int size_;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> round_{0};
};

/*
 * Calls `work(member)` for every member below `size` at once, this thread as member 0, and returns when all are done. The
 * threads are kept for the next call. `work` must not throw.
 *
 * Returns false, having done nothing, where they are another caller's just now or cannot be had.
 */
bool run_team(int size, const std::function<void(int)> &work);

}  // namespace binaryvit
