#include "pool.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "os.h"

namespace hybridlm {
namespace {

constexpr int max_threads = 256;
constexpr auto spin_time = std::chrono::microseconds(60);

// state: bits 0..15 workers inside the current call, bit 16 open to join, bits 32.. number of the call.
constexpr uint64_t open_bit = 1ull << 16, workers_mask = open_bit - 1, call_shift = 32;

thread_local bool inside = false;  // of a task
thread_local int self = 0;         // which thread of the pool this is

struct Scratch {
    void* data = nullptr;
    size_t bytes = 0;
};

struct Pool {
    std::mutex turn;  // held for a whole parallel_for, and while the number of threads changes
    std::vector<std::thread> workers;
    int count = os::usable_cores();
    std::atomic<uint64_t> state{0};
    std::atomic<uint32_t> call{0};     // what sleepers wait on
    std::atomic<uint32_t> sleepers{0};
    std::atomic<bool> stop{false};
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) int64_t tasks = 0;
    Task task = nullptr;
    void* context = nullptr;
    std::mutex failure_lock;
    std::exception_ptr failure;
    Scratch scratch[max_threads];
};

Pool* pool = nullptr;

// The child of a fork has one thread and must not touch the parent's locks: it starts over with a pool of its own.
void forget() {
    int count = pool->count;
    pool = new Pool;
    pool->count = count;
    inside = false;
}

Pool& get() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
        if (const char* text = std::getenv("HYBRIDLM_THREADS")) {
            int count = std::atoi(text);
            if (count > 0) pool->count = count < max_threads ? count : max_threads;
        }
        os::on_fork(forget);
    });
    return *pool;
}

void work(Pool& p, int thread) {
    for (;;) {
        int64_t i = p.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= p.tasks) return;
        try {
            p.task(p.context, i, thread);
        } catch (...) {
            std::lock_guard<std::mutex> guard(p.failure_lock);
            if (!p.failure) p.failure = std::current_exception();
            p.next.store(p.tasks, std::memory_order_relaxed);
        }
    }
}

void serve(Pool& p, int thread) {
    inside = true;
    self = thread;
    uint32_t seen = 0;
    for (;;) {
        auto until = std::chrono::steady_clock::now() + spin_time;
        for (int turns = 1; p.call.load(std::memory_order_acquire) == seen; ++turns) {
            os::pause();
            if (turns % 64 == 0 && std::chrono::steady_clock::now() > until) {
                p.sleepers.fetch_add(1);
                p.call.wait(seen);
                p.sleepers.fetch_sub(1);
            }
        }
        seen = p.call.load(std::memory_order_acquire);
        if (p.stop.load()) return;
        uint64_t state = p.state.load(std::memory_order_acquire);
        while (state & open_bit) {
            if (p.state.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
                work(p, thread);
                p.state.fetch_sub(1, std::memory_order_acq_rel);
                break;
            }
        }
    }
}

void announce(Pool& p) {
    p.call.fetch_add(1);
    if (p.sleepers.load()) p.call.notify_all();
}

void resize(Pool& p, int count) {
    if (static_cast<int>(p.workers.size()) == count - 1) return;
    p.stop = true;
    announce(p);
    for (auto& worker : p.workers) worker.join();
    p.workers.clear();
    p.stop = false;
    p.call = 0;
    for (int thread = 1; thread < count; ++thread) {
        try {
            p.workers.emplace_back([&p, thread] { serve(p, thread); });
        } catch (const std::system_error&) {  // no more threads to be had: go on with those there are
            break;
        }
    }
}

}  // namespace

void parallel_for(int64_t tasks, Task task, void* context) {
    if (tasks <= 0) return;
    if (inside) {  // within a task: serially, as the same worker
        for (int64_t i = 0; i < tasks; ++i) task(context, i, self);
        return;
    }
    Pool& p = get();
    std::lock_guard<std::mutex> guard(p.turn);
    struct Inside {
        Inside() { inside = true; }
        ~Inside() { inside = false; }
    } mark;
    if (tasks == 1 || p.count == 1) {
        for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
        return;
    }
    resize(p, p.count);
    p.tasks = tasks;
    p.task = task;
    p.context = context;
    p.next.store(0, std::memory_order_relaxed);
    p.state.fetch_or(open_bit, std::memory_order_acq_rel);
    announce(p);
    work(p, 0);
    p.state.fetch_and(~open_bit, std::memory_order_acq_rel);
    for (int turns = 1; p.state.load(std::memory_order_acquire) & workers_mask; ++turns) {
        os::pause();
        if (turns % 4096 == 0) os::yield();
    }
    if (p.failure) {
        std::exception_ptr failure = p.failure;
        p.failure = nullptr;
        std::rethrow_exception(failure);
    }
}

int threads() { return get().count; }

void set_threads(int count) {
    Pool& p = get();
    std::lock_guard<std::mutex> guard(p.turn);
    p.count = count < 1 ? 1 : count > max_threads ? max_threads : count;
    resize(p, p.count);
}

void* scratch(int thread, size_t bytes) {
    Scratch& s = get().scratch[thread];
    if (s.bytes < bytes) {
        if (s.data) ::operator delete(s.data, std::align_val_t(64));
        s.data = nullptr;
        s.bytes = 0;
        size_t size = (bytes + 4095) / 4096 * 4096;
        s.data = ::operator new(size, std::align_val_t(64));
        s.bytes = size;
    }
    return s.data;
}

}  // namespace hybridlm
