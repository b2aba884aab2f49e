// The only header that talks to the operating system or asks what the processor is. Everything here has a harmless
// answer where a system has no such call, so that a new platform needs changes in this file alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <set>
#include <thread>
#include <utility>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#endif

namespace hybridlm::os {

// One breath of a spinning thread.
inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    asm volatile("yield");
#endif
}

inline void yield() { std::this_thread::yield(); }

// Physical cores that this process may use: its affinity mask, hyper-threads counted once, cut to a container's quota.
inline int usable_cores() {
    int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0) {
        std::set<std::pair<int, int>> distinct;
        bool known = true;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &mask)) continue;
            int ids[2] = {0, 0};
            const char* names[2] = {"physical_package_id", "core_id"};
            for (int i = 0; i < 2; ++i) {
                char path[96];
                std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/%s", cpu, names[i]);
                std::FILE* file = std::fopen(path, "r");
                if (!file || std::fscanf(file, "%d", &ids[i]) != 1) known = false;
                if (file) std::fclose(file);
            }
            distinct.insert({ids[0], ids[1]});
        }
        cores = known && !distinct.empty() ? static_cast<int>(distinct.size()) : CPU_COUNT(&mask);
    }
    if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
        long long quota = 0, period = 0;
        if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
            int allowed = static_cast<int>((quota + period - 1) / period);
            if (allowed >= 1 && allowed < cores) cores = allowed;
        }
        std::fclose(file);
    }
#endif
    return cores < 1 ? 1 : cores;
}

// Calls `child` in the child of every fork.
inline void on_fork(void (*child)()) {
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, child);
#else
    (void)child;
#endif
}

// Large pages for a buffer that kernels stream over.
inline void advise_huge(void* data, size_t bytes) {
#if defined(__linux__)
    uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// Asks the system for the tile registers, for all threads of the process; false where it has no such thing or refuses.
inline bool allow_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}

struct Features {
    bool avx2 = false;    // with FMA and F16C
    bool avx512 = false;  // F, BW, VL, DQ and VNNI
    bool amx = false;     // tiles of bfloat16
    bool dotprod = false; // Arm, with half precision
};

inline Features features() {
    Features f;
#if defined(__x86_64__) || defined(_M_X64)
    unsigned leaf1[4] = {}, leaf7[4] = {};
#if defined(_MSC_VER)
    __cpuidex(reinterpret_cast<int*>(leaf1), 1, 0);
    __cpuidex(reinterpret_cast<int*>(leaf7), 7, 0);
    unsigned long long enabled = (leaf1[2] >> 27 & 1) ? _xgetbv(0) : 0;
#else
    __get_cpuid(1, &leaf1[0], &leaf1[1], &leaf1[2], &leaf1[3]);
    __get_cpuid_count(7, 0, &leaf7[0], &leaf7[1], &leaf7[2], &leaf7[3]);
    unsigned low = 0, high = 0;
    if (leaf1[2] >> 27 & 1) asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    unsigned long long enabled = low;
#endif
    bool ymm = (enabled & 0x6) == 0x6, zmm = (enabled & 0xe6) == 0xe6;
    f.avx2 = ymm && (leaf1[2] >> 28 & 1) && (leaf1[2] >> 12 & 1) && (leaf1[2] >> 29 & 1) && (leaf7[1] >> 5 & 1);
    f.avx512 = f.avx2 && zmm && (leaf7[1] >> 16 & 1) && (leaf7[1] >> 17 & 1) && (leaf7[1] >> 30 & 1) &&
               (leaf7[1] >> 31 & 1) && (leaf7[2] >> 11 & 1);
    f.amx = (enabled & 0x60000) == 0x60000 && (leaf7[3] >> 22 & 1) && (leaf7[3] >> 24 & 1);
#elif defined(__aarch64__) && defined(__linux__)
    unsigned long caps = getauxval(AT_HWCAP);
    f.dotprod = (caps >> 20 & 1) && (caps >> 10 & 1);  // HWCAP_ASIMDDP, HWCAP_ASIMDHP
#elif defined(__aarch64__)
    f.dotprod = true;  // every Apple and Windows machine of this architecture
#endif
    return f;
}

}  // namespace hybridlm::os
