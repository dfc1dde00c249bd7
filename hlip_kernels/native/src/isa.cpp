// Which instructions this processor has.
#include "attention.h"

#if defined(HLIP_EMULATED)
static int32_t best() { return HLIP_AMX; }
#elif defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint64_t enabled_state() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
}

// Linux hands the tile registers only to processes that ask for them.
static bool tiles_granted() {
    const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static int32_t best() {
    const uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;
    uint32_t a, b, c, d, a7, b7, c7, d7;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7))
        return HLIP_GENERIC;
    const uint64_t state = enabled_state();
    if ((state & YMM) != YMM || !(b7 & bit_AVX2) || !(c & bit_FMA)) return HLIP_GENERIC;
    const uint32_t avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    if ((state & ZMM) != ZMM || (b7 & avx512) != avx512) return HLIP_AVX2;
    uint32_t a71, b71, c71, d71;
    const uint32_t amx = bit_AMX_TILE | bit_AMX_BF16;
    if ((state & TILES) != TILES || (d7 & amx) != amx || !(c7 & bit_AVX512VBMI)) return HLIP_AVX512;
    if (!__get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) || !(a71 & bit_AVX512BF16)) return HLIP_AVX512;
    return tiles_granted() ? HLIP_AMX : HLIP_AVX512;
}
#else
static int32_t best() { return HLIP_GENERIC; }
#endif

extern "C" __attribute__((visibility("default"))) int32_t hlip_isa(void) { return best(); }
