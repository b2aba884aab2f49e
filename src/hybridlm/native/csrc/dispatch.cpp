#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "os.h"

namespace hybridlm {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

#ifdef HYBRIDLM_HAVE_AMX
const Kernels& with_tiles() {
    static const Kernels table = [] {
        Kernels k = avx512::table;
        k.name = "amx";
        k.matmul.tiles = &amx::tiles;
        return k;
    }();
    return table;
}
#endif

}  // namespace

int available(const Kernels** out) {
    int count = 0;
    [[maybe_unused]] static const os::Features has = os::features();
    out[count++] = &scalar::table;
#ifdef HYBRIDLM_HAVE_AVX2
    if (has.avx2) out[count++] = &avx2::table;
#endif
#ifdef HYBRIDLM_HAVE_AVX512
    if (has.avx512) out[count++] = &avx512::table;
#endif
#ifdef HYBRIDLM_HAVE_AMX
    [[maybe_unused]] static const bool allowed = has.avx512 && has.amx && os::allow_tiles();
    if (allowed) out[count++] = &with_tiles();
#endif
#ifdef HYBRIDLM_HAVE_NEON
    if (has.dotprod) out[count++] = &neon::table;
#endif
    return count;
}

bool choose(const char* name) {
    const Kernels* tables[8];
    int count = available(tables);
    for (int i = 0; i < count; ++i) {
        if (std::strcmp(tables[i]->name, name) == 0) {
            chosen = tables[i];
            return true;
        }
    }
    return false;
}

const Kernels& kernels() {
    const Kernels* now = chosen.load(std::memory_order_acquire);
    if (!now) {
        const Kernels* tables[8];
        int count = available(tables);
        chosen = tables[count - 1];
        if (const char* name = std::getenv("HYBRIDLM_ISA")) choose(name);  // module.cpp refuses an unknown one
        now = chosen.load();
    }
    return *now;
}

}  // namespace hybridlm
