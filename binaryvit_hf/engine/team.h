/* Threads that work on one image, or each on its own. */
#pragma once

#include <atomic>
#include <cstdint>
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
 * Tiles of one thread's share. Whoever has none left takes from the end of another's, so that a core that others slow down
 * keeps nobody waiting.
 */
class Tiles {
public:
    void open(int first, int end) { left_.store(pack(first, end), std::memory_order_release); }

    /* The first that is left, for whose share it is, or the last, for others; -1 if there is none. */
    int take(bool own) {
        uint64_t left = left_.load(std::memory_order_relaxed);
        for (;;) {
            int first = int(uint32_t(left)), end = int(left >> 32);
            if (first >= end) return -1;
            uint64_t fewer = own ? pack(first + 1, end) : pack(first, end - 1);
            if (left_.compare_exchange_weak(left, fewer, std::memory_order_acquire, std::memory_order_relaxed)) return own ? first : end - 1;
        }
    }

private:
    static uint64_t pack(int first, int end) { return uint64_t(end) << 32 | uint32_t(first); }
    alignas(64) std::atomic<uint64_t> left_{0};
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
