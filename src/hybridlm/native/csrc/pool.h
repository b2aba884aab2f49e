// The threads of the process: one pool, which every kernel call shares.
//
// parallel_for hands out tasks one by one; the calling thread works too. Threads that find no work spin for a moment
// (a decode step is a string of short calls), then sleep in the kernel and cost nothing. A worker that wakes too late
// to get a task is not waited for. Calls from several threads take turns; a call from inside a task runs serially.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace hybridlm {

using Task = void (*)(void* context, int64_t task, int thread);

// Runs task 0 .. tasks - 1, each once, in any order; `thread` < threads() names who works. The first exception that a
// task throws is rethrown here, after the others have stopped.
void parallel_for(int64_t tasks, Task task, void* context);

template <class F>
void parallel_for(int64_t tasks, F&& f) {
    using Body = std::remove_reference_t<F>;
    parallel_for(
        tasks, [](void* context, int64_t task, int thread) { (*static_cast<Body*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(std::addressof(f))));
}

int threads();
void set_threads(int count);

// A buffer of at least `bytes`, 64-byte aligned, that thread `thread` of the current call may use; it keeps its
// contents and address until that thread asks for more.
void* scratch(int thread, size_t bytes);

}  // namespace hybridlm
