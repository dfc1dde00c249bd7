// The instructions of AVX-512, AVX512-BF16 and AMX that the native library uses, in plain C++: so that code for them runs
// on any x86-64 processor, and sanitizers see what it reads and writes. It stands for the compiler's header of this name.
//
// Where a processor has the instructions, tests/test_emulated.py holds these functions against them.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EMULATED inline __attribute__((always_inline, unused))
#define BY_LANES static __attribute__((noinline, unused))  // inlined, they would take long to compile

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef int64_t __m512i __attribute__((vector_size(64), may_alias));
typedef int64_t __m256i __attribute__((vector_size(32), may_alias));
typedef uint16_t __m512bh __attribute__((vector_size(64), may_alias));
typedef uint16_t __m256bh __attribute__((vector_size(32), may_alias));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

namespace emulated {
namespace {

typedef int32_t Words __attribute__((vector_size(64), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64), may_alias));
typedef uint16_t Halves __attribute__((vector_size(64), may_alias));

[[noreturn, gnu::unused, gnu::noinline]] void fail(const char* what) {
    fprintf(stderr, "emulated processor: %s\n", what);
    abort();
}

// f(lane) of every lane.
template <typename F>
EMULATED __m512 lanes(F f) {
    __m512 x;
    for (int i = 0; i < 16; ++i) x[i] = f(i);
    return x;
}

EMULATED const void* aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 64) fail("an operand is not aligned to 64 bytes");
    return p;
}

EMULATED float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
EMULATED uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// To nearest, ties to even; denormals are zeros.
EMULATED uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return bits >> 16 | 0x40;
    if ((bits & 0x7f800000) == 0) return bits >> 16 & 0x8000;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// While this lives, denormals are zeros, read or made, and results are rounded to nearest, whatever the program has set.
// What is computed must stand in a function that is not inlined: a compiler might move it out of here.
struct NoDenormals {
    const uint32_t before = __builtin_ia32_stmxcsr();
    NoDenormals() { __builtin_ia32_ldmxcsr(0x9fc0); }
    ~NoDenormals() { __builtin_ia32_ldmxcsr(before); }
};


// f(), compiled for processors with FMA where there is one: each product is added before it is rounded.
template <typename F>
[[gnu::target("fma"), gnu::noinline]] void with_fma(F f) {
    f();
}
template <typename F>
[[gnu::noinline]] void without_fma(F f) {
    f();
}
template <typename F>
EMULATED void fused(F f) {
    const NoDenormals mode;
    __builtin_cpu_supports("fma") ? with_fma(f) : without_fma(f);
}

EMULATED float widen(uint16_t x) { return float_of(uint32_t(x) << 16); }

// The eight tiles of a thread.
struct Tiles {
    bool configured;
    alignas(64) char at[8][1024];
};
thread_local Tiles tiles __attribute__((unused));

EMULATED char* tile(int t) {
    if (!tiles.configured) fail("a tile is used without a configuration");
    return tiles.at[t];
}

}  // namespace
}  // namespace emulated

// What tiles_amx.h has of AMX.
namespace amx {
namespace {

template <int T>
EMULATED void tile_load(const void* from) {
    memcpy(emulated::tile(T), from, 1024);
}
template <int T>
EMULATED void tile_stream(const void* from) {
    tile_load<T>(from);
}
template <int T>
EMULATED void tile_store(void* to) {
    memcpy(to, emulated::tile(T), 1024);
}
template <int T>
EMULATED void tile_zero() {
    memset(emulated::tile(T), 0, 1024);
}
template <int C, int A, int B>
EMULATED void tile_multiply() {
    float* c = reinterpret_cast<float*>(emulated::tile(C));
    const uint16_t* a = reinterpret_cast<const uint16_t*>(emulated::tile(A));
    const uint16_t* b = reinterpret_cast<const uint16_t*>(emulated::tile(B));
    // Products of even and of odd places are summed apart, and then together.
    emulated::fused([=]() __attribute__((always_inline)) {
        for (int row = 0; row < 16; ++row) {
            float sums[2][16] = {};
            for (int k = 0; k < 16; ++k)
                for (int half = 0; half < 2; ++half)
                    for (int i = 0; i < 16; ++i)
                        sums[half][i] = fmaf(
                            emulated::widen(a[32 * row + 2 * k + half]), emulated::widen(b[32 * k + 2 * i + half]),
                            sums[half][i]
                        );
            for (int i = 0; i < 16; ++i) c[16 * row + i] += sums[0][i] + sums[1][i];
        }
    });
}

struct TilesInUse {
    TilesInUse() {
        emulated::tiles.configured = true;
        memset(emulated::tiles.at, 0, sizeof emulated::tiles.at);
    }
    ~TilesInUse() { emulated::tiles.configured = false; }
};

}  // namespace
}  // namespace amx

// Casts
EMULATED __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
EMULATED __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
EMULATED __m256i _mm512_extracti64x4_epi64(__m512i x, int half) {
    __m256i part;
    memcpy(&part, reinterpret_cast<const char*>(&x) + 32 * half, sizeof part);
    return part;
}
EMULATED __m256i _mm512_castsi512_si256(__m512i x) { return _mm512_extracti64x4_epi64(x, 0); }

// Constants
EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
EMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }
EMULATED __m512 _mm512_set1_ps(float x) { return x - __m512{}; }
EMULATED __m512i _mm512_set1_epi16(int16_t x) { return (__m512i)(uint16_t(x) + emulated::Halves{}); }

// Memory
enum { _MM_HINT_T0 = 3, _MM_HINT_T1 = 2 };
EMULATED void _mm_prefetch(const void* p, int) { __builtin_prefetch(p); }
EMULATED void _mm_sfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
EMULATED __m512i _mm512_loadu_si512(const void* from) {
    __m512i x;
    memcpy(&x, from, sizeof x);
    return x;
}
EMULATED void _mm512_storeu_si512(void* to, __m512i x) { memcpy(to, &x, sizeof x); }
EMULATED __m512i _mm512_load_si512(const void* from) { return _mm512_loadu_si512(emulated::aligned(from)); }
EMULATED void _mm512_store_si512(void* to, __m512i x) {
    emulated::aligned(to);
    _mm512_storeu_si512(to, x);
}
EMULATED void _mm512_stream_si512(__m512i* to, __m512i x) { _mm512_store_si512(to, x); }
EMULATED __m512 _mm512_load_ps(const void* from) { return (__m512)_mm512_load_si512(from); }
EMULATED void _mm512_store_ps(void* to, __m512 x) { _mm512_store_si512(to, (__m512i)x); }
BY_LANES __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
    return emulated::lanes([=](int i) { return mask >> i & 1 ? static_cast<const float*>(from)[i] : 0; });
}
BY_LANES void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 x) {
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) static_cast<float*>(to)[i] = x[i];
}
BY_LANES __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
    emulated::Halves x = {};
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) x[i] = static_cast<const uint16_t*>(from)[i];
    return (__m512i)x;
}
BY_LANES void _mm512_mask_storeu_epi16(void* to, __mmask32 mask, __m512i x) {
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) static_cast<uint16_t*>(to)[i] = ((emulated::Halves)x)[i];
}

// Arithmetic
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATED __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }  // b if any is not a number
EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }  // likewise
BY_LANES __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated::lanes([=](int i) { return fmaf(a[i], b[i], c[i]); });
}
EMULATED __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, -c); }
BY_LANES __m512 _mm512_mask_mul_ps(__m512 rest, __mmask16 mask, __m512 a, __m512 b) {
    return emulated::lanes([=](int i) { return mask >> i & 1 ? a[i] * b[i] : rest[i]; });
}
BY_LANES float _mm512_reduce_max_ps(__m512 x) {
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) x[i] = x[i + step] > x[i] ? x[i + step] : x[i];
    return x[0];
}
EMULATED __m512 _mm512_rcp14_ps(__m512 x) { return 1 / x; }  // more exact than the processors, which differ
BY_LANES __m512 _mm512_maskz_rcp14_ps(__mmask16 mask, __m512 x) {
    return emulated::lanes([=](int i) { return mask >> i & 1 ? 1 / x[i] : 0; });
}

// Comparison: only what the library asks for
enum { _CMP_GT_OQ = 30, _CMP_LT_OQ = 17 };
BY_LANES __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int how) {
    __mmask16 result = 0;
    for (int i = 0; i < 16; ++i) result |= (how == _CMP_GT_OQ ? a[i] > b[i] : a[i] < b[i]) << i;
    return result & mask;
}
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) { return _mm512_mask_cmp_ps_mask(0xffff, a, b, how); }

// Parts of numbers
enum { _MM_FROUND_TO_NEG_INF = 1, _MM_FROUND_NO_EXC = 8, _MM_MANT_NORM_p75_1p5 = 3, _MM_MANT_SIGN_zero = 1 };
BY_LANES __m512 _mm512_reduce_ps(__m512 x, int) {  // less its floor, rounded down
    return emulated::lanes([=](int i) {
        const float whole = floorf(x[i]), rest = x[i] - whole;
        if (isinf(x[i])) return 0.0f;
        if (x[i] == whole) return -0.0f;
        return double(rest) + whole > x[i] ? nextafterf(rest, 0) : rest;
    });
}
BY_LANES __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {  // a 2^floor(b)
    return emulated::lanes([=](int i) {
        if (!(mask >> i & 1)) return 0.0f;
        const bool quiet = emulated::bits_of(a[i]) & 0x400000;
        if (isinf(b[i]) && a[i] != a[i] && quiet) return b[i] > 0 ? INFINITY : 0;
        if (isinf(b[i])) return a[i] * (b[i] > 0 ? INFINITY : 0);
        if (b[i] != b[i]) return b[i];
        return scalbnf(a[i], int(fmaxf(-500, fminf(500, floorf(b[i])))));
    });
}
BY_LANES __m512 _mm512_getmant_ps(__m512 x, int, int) {  // 0.75 to 1.5, without the sign
    return emulated::lanes([=](int i) {
        if (x[i] != x[i]) return x[i];
        if (x[i] == 0 || isinf(x[i])) return 1.0f;
        int exponent;
        const float half = frexpf(fabsf(x[i]), &exponent);  // 0.5 to 1
        return half < 0.75f ? 2 * half : half;
    });
}
BY_LANES __m512 _mm512_getexp_ps(__m512 x) {  // floor(log2 |x|)
    return emulated::lanes([=](int i) { return logbf(x[i]); });
}

// Lanes in another order
EMULATED __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
    const emulated::Words order = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    return (__m512i)__builtin_shuffle((emulated::Words)a, (emulated::Words)b, order);
}
EMULATED __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
    const emulated::Words order = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
    return (__m512i)__builtin_shuffle((emulated::Words)a, (emulated::Words)b, order);
}
EMULATED __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
    return __builtin_shuffle(a, b, __m512i{0, 8, 2, 10, 4, 12, 6, 14});
}
EMULATED __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
    return __builtin_shuffle(a, b, __m512i{1, 9, 3, 11, 5, 13, 7, 15});
}
BY_LANES __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {  // by 128 bits: two of a, two of b
    const __m512i from[] = {a, b};
    __m512i result;
    for (int i = 0; i < 8; ++i) result[i] = from[i / 4][(order >> i / 2 * 2 & 3) * 2 + i % 2];
    return result;
}
EMULATED __m512i _mm512_permutex2var_epi16(__m512i a, __m512i order, __m512i b) {
    return (__m512i)__builtin_shuffle((emulated::Halves)a, (emulated::Halves)b, (emulated::Halves)order);
}
EMULATED __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((emulated::Halves)a + (emulated::Halves)b); }

// bfloat16
BY_LANES __m256bh _mm512_cvtneps_pbh(__m512 x) {
    __m256bh result;
    for (int i = 0; i < 16; ++i) result[i] = emulated::to_bfloat16(x[i]);
    return result;
}
BY_LANES __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    __m512bh result;
    for (int i = 0; i < 32; ++i) result[i] = emulated::to_bfloat16(i < 16 ? low[i] : high[i - 16]);
    return result;
}
BY_LANES __m512 _mm512_cvtpbh_ps(__m256bh x) {
    return emulated::lanes([=](int i) { return emulated::float_of(uint32_t(x[i]) << 16); });
}
BY_LANES __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {  // the upper of each pair first
    __m512* c = &sum;
    emulated::fused([=]() __attribute__((always_inline)) {
        for (int i = 0; i < 16; ++i)
            for (int half = 1; half >= 0; --half)
                (*c)[i] = fmaf(emulated::widen(a[2 * i + half]), emulated::widen(b[2 * i + half]), (*c)[i]);
    });
    return sum;
}
