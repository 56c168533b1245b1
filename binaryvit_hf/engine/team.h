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
 * What an OpenMP runtime offers to compiled programs: GOMP_parallel, which calls `work(data)` on so many threads at once, and,
 * called there, how many they are and which one it is.
 */
struct OpenMp {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
    int (*count)();
    int (*which)();
};

/* From now on teams are of the runtime's threads. */
void share_threads(const OpenMp &runtime);

/*
 * Calls `work(member)` for every member below `size` at once, this thread as member 0, and returns when all are done. The
 * threads are kept for the next call; of an OpenMP runtime if there is one to share. `work` must not throw.
 *
 * Returns false, having done nothing, where they are another caller's just now or cannot be had.
 */
bool run_team(int size, const std::function<void(int)> &work);

}  // namespace binaryvit
