#if !defined(__wasm__)  // wasm.cpp

#include "team.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace binaryvit {
namespace {

// In microseconds, not pauses: a pause of one CPU is three times as long as another's.
constexpr std::chrono::microseconds kSpinning{50};  // longer than members of a team usually wait for each other
constexpr std::chrono::microseconds kAwake{1000};   // longer than a caller usually takes between two images

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

/* Waits until `done()` or until the time is over; returns whether it is done. */
template <class Done>
bool spin_until(Done done, std::chrono::microseconds time) {
    if (done()) return true;
    auto end = std::chrono::steady_clock::now() + time;
    while (!done()) {
        if (std::chrono::steady_clock::now() >= end) return false;
        pause();
    }
    return true;
}

/* Spins at first, then yields the core, perhaps to the thread that it waits for. */
template <class Done>
void wait_until(Done done) {
    if (spin_until(done, kSpinning)) return;
    while (!done()) std::this_thread::yield();
}

/* run_team on an OpenMP runtime. It may provide fewer threads than asked for; then none calls `work`. */
bool run_on(const OpenMp &runtime, int size, const std::function<void(int)> &work) {
    struct Team {
        const OpenMp &runtime;
        const int size;
        const std::function<void(int)> &work;
        std::atomic<bool> whole;
    } team{runtime, size, work, {true}};
    auto join = [](void *data) {
        Team &joined = *static_cast<Team *>(data);
        if (joined.runtime.count() == joined.size) {
            joined.work(joined.runtime.which());
        } else {
            joined.whole = false;
        }
    };
    runtime.parallel(join, &team, unsigned(size), 0);
    return team.whole;
}

/* Threads that wait for work, of one caller at a time. */
class Pool {
public:
    void share(const OpenMp &runtime) {
        std::lock_guard<std::mutex> mine(caller_);
        shared_ = runtime;
    }

    bool run(int size, const std::function<void(int)> &work) {
        std::unique_lock<std::mutex> mine(caller_, std::try_to_lock);
        if (!mine.owns_lock()) return false;
        if (shared_.parallel != nullptr) return run_on(shared_, size, work);
        if (!grow(size - 1)) return false;
        work_ = &work;
        pending_.store(size - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            uint64_t round = (call_.load(std::memory_order_relaxed) >> kSizeBits) + 1;
            call_.store(round << kSizeBits | uint64_t(size), std::memory_order_release);
        }
        wake_.notify_all();
        work(0);
        wait_until([&] { return pending_.load(std::memory_order_acquire) == 0; });
        return true;
    }

private:
    static constexpr int kSizeBits = 16;

    bool grow(int count) {
        try {
            for (; threads_ < count; ++threads_) {
                int member = threads_ + 1;
                uint64_t seen = call_.load(std::memory_order_relaxed);
                // Detached: they wait for work until the process ends.
                std::thread([this, member, seen] { serve(member, seen); }).detach();
            }
        } catch (const std::system_error &) {
            return false;
        }
        return true;
    }

    void serve(int member, uint64_t seen) {
        for (;;) {
            auto called = [&] { return call_.load(std::memory_order_acquire) != seen; };
            if (!spin_until(called, kAwake)) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, called);
            }
            seen = call_.load(std::memory_order_acquire);
            // Only members of this call may touch it: the caller does not wait for the others.
            if (member < int(seen & ((1 << kSizeBits) - 1))) {
                (*work_)(member);
                pending_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    OpenMp shared_{};  // its `parallel` is null without a runtime
    std::mutex caller_, sleep_;
    std::condition_variable wake_;
    int threads_ = 0;
    std::atomic<uint64_t> call_{0};  // size of the team in the lower kSizeBits, number of the call above
    std::atomic<int> pending_{0};
    const std::function<void(int)> *work_ = nullptr;
};

/* Never destroyed: its threads may still use it while the process ends. */
Pool *pool = new Pool;
std::mutex forkable;

#if defined(__unix__) || defined(__APPLE__)
// Of all threads only the caller of fork() is in the forked process. It needs a pool of its own, without the OpenMP
// runtime's threads, and nobody there would unlock a mutex of the others.
[[maybe_unused]] const int kAtFork = pthread_atfork([] { forkable.lock(); }, [] { forkable.unlock(); },
                                                    [] {
                                                        forkable.unlock();
                                                        pool = new Pool;
                                                    });
#endif

}  // namespace

void Barrier::wait() {
    unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
    } else {
        wait_until([&] { return round_.load(std::memory_order_acquire) != round; });
    }
}

ForkableLock::ForkableLock() { forkable.lock(); }

ForkableLock::~ForkableLock() { forkable.unlock(); }

void share_threads(const OpenMp &runtime) { pool->share(runtime); }

bool run_team(int size, const std::function<void(int)> &work) { return pool->run(size, work); }

}  // namespace binaryvit

#if !defined(BINARYVIT_SOURCES)  // setup.py defines it
#define BINARYVIT_SOURCES ""
#endif

/* The sources that a library was compiled from, as a digest, which fingerprint.py compares. Here, because both libraries have this file. */
extern "C" const char *binaryvit_sources() { return BINARYVIT_SOURCES; }

#endif
