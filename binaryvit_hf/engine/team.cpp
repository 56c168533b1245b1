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

// Time, not turns: a pause takes one kind of CPU three times as long as another.
constexpr std::chrono::microseconds kSpinning{50};  // longer than the members of a team usually are apart
constexpr std::chrono::microseconds kAwake{1000};   // what a caller takes between two images

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

/* Waits until it is done or the time is over; whether it is done. */
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

/* Spin while it is likely to be short, then leave the core to whoever is waited for. */
template <class Done>
void wait_until(Done done) {
    if (spin_until(done, kSpinning)) return;
    while (!done()) std::this_thread::yield();
}

/* `work` on the threads of an OpenMP runtime; it may give fewer than it was asked for, which must not begin. */
bool run_on(const OpenMp &runtime, int size, const std::function<void(int)> &work) {
    struct Team {
        const OpenMp &runtime;
        const int size;
        const std::function<void(int)> &work;
        std::atomic<bool> whole;
    } team{runtime, size, work, {true}};
    auto join = [](void *data) {
        Team &team = *static_cast<Team *>(data);
        if (team.runtime.count() == team.size) {
            team.work(team.runtime.which());
        } else {
            team.whole = false;
        }
    };
    runtime.parallel(join, &team, unsigned(size), 0);
    return team.whole;
}

/* Threads that wait for work, one caller's at a time. */
class Pool {
public:
    OpenMp shared{};

    bool run(int size, const std::function<void(int)> &work) {
        std::unique_lock<std::mutex> mine(caller_, std::try_to_lock);
        if (!mine.owns_lock()) return false;
        if (shared.parallel != nullptr) return run_on(shared, size, work);
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
                // Detached: they wait until the process ends, and end with it.
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
            // The caller waits for those it counts on alone, and may be gone before the others look.
            if (member < int(seen & ((1 << kSizeBits) - 1))) {
                (*work_)(member);
                pending_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    std::mutex caller_, sleep_;
    std::condition_variable wake_;
    int threads_ = 0;
    std::atomic<uint64_t> call_{0};  // which one it is, and above how many members
    std::atomic<int> pending_{0};
    const std::function<void(int)> *work_ = nullptr;
};

/* Never destroyed: its threads outlive whatever ends first when a process does. */
Pool *&pool() {
    static Pool *instance = [] {
#if defined(__unix__) || defined(__APPLE__)
        // A forked process has none of the threads, and of an OpenMP runtime's neither.
        pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
#endif
        return new Pool;
    }();
    return instance;
}

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

void share_threads(const OpenMp &runtime) { pool()->shared = runtime; }

bool run_team(int size, const std::function<void(int)> &work) { return pool()->run(size, work); }

}  // namespace binaryvit
