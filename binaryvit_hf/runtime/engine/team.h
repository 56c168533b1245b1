/* Threads that compute one image together, or one image each. */
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace binaryvit {

/* Lets `size` threads wait for each other: none continues before all have arrived. */
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
 * The tiles of one thread's share. A thread that has finished its own share takes tiles from the end of
 * another's, so no thread waits for a slow core.
 */
class Tiles {
public:
    void open(int first, int end) { left_.store(pack(first, end), std::memory_order_release); }

    /* Takes the first tile that is left (`own`: the thread's own share) or the last; -1 if none is left. */
    int take(bool own) {
        uint64_t left = left_.load(std::memory_order_relaxed);
        for (;;) {
            int first = int(uint32_t(left)), end = int(left >> 32);
            if (first >= end) return -1;
            uint64_t fewer = own ? pack(first + 1, end) : pack(first, end - 1);
            if (left_.compare_exchange_weak(left, fewer, std::memory_order_acquire, std::memory_order_relaxed))
                return own ? first : end - 1;
        }
    }

private:
    static uint64_t pack(int first, int end) { return uint64_t(end) << 32 | uint32_t(first); }
    alignas(64) std::atomic<uint64_t> left_{0};
};

/*
 * Functions of an OpenMP runtime. GOMP_parallel calls `work(data)` on `threads` threads at once; omp_get_num_threads
 * and omp_get_thread_num, called there, return their number and the caller's index.
 */
struct OpenMp {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
    int (*count)();
    int (*which)();
};

/*
 * Holds the process's mutex while it lives. A forked process finds the mutex unlocked. It serves the whole process:
 * hold it briefly.
 */
class ForkableLock {
public:
    ForkableLock();
    ~ForkableLock();
    ForkableLock(const ForkableLock &) = delete;
    ForkableLock &operator=(const ForkableLock &) = delete;
};

/* Makes teams of this runtime's threads from now on. */
void share_threads(const OpenMp &runtime);

/*
 * Calls `work(member)` for members 0 to `size - 1` at once, this thread as member 0, and returns when all are done.
 * The threads wait for the next call, or belong to the OpenMP runtime (share_threads). `work` must not throw.
 *
 * Returns false, without a call, if another caller uses the threads or if they cannot be started. In WebAssembly there
 * are none.
 */
bool run_team(int size, const std::function<void(int)> &work);

}  // namespace binaryvit
