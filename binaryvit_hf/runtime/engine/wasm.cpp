/*
 * What WebAssembly lacks, for a module without imports: threads, exceptions and files.
 *
 * A failed allocation is a trap. The caller must drop the instance then, with all its models.
 */
#if defined(__wasm__)

#include <cstddef>
#include <cstdint>

#include "team.h"

namespace binaryvit {

void Barrier::wait() {
    if (size_ != 1) __builtin_trap();  // nobody else would arrive
}

ForkableLock::ForkableLock() {}

ForkableLock::~ForkableLock() {}

void share_threads(const OpenMp &) {}

bool run_team(int, const std::function<void(int)> &) { return false; }

}  // namespace binaryvit

static constexpr int32_t kNotSupported = 58;  // ENOTSUP of WASI

extern "C" {

// The standard library throws where memory runs out.
void *__cxa_allocate_exception(size_t) { __builtin_trap(); }
void __cxa_throw(void *, void *, void *) { __builtin_trap(); }

// The C library's functions for files, which it would import. It would write the messages of aborts.
int close(int) { return -1; }
int32_t __imported_wasi_snapshot_preview1_fd_close(int32_t) { return kNotSupported; }
int32_t __imported_wasi_snapshot_preview1_fd_seek(int32_t, int64_t, int32_t, int32_t) { return kNotSupported; }
int32_t __imported_wasi_snapshot_preview1_fd_write(int32_t, int32_t, int32_t, int32_t) { return kNotSupported; }

}  // extern "C"

#endif
