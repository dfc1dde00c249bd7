// Vectors of float32, as wide as what a file is compiled for, and their conversion from and to bfloat16.
//
// Like all else in these headers it has internal linkage: see attention.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
const int WIDTH = 16;
#elif defined(__AVX2__)
const int WIDTH = 8;
#else
const int WIDTH = 4;
#endif

typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
typedef uint16_t bf16;

inline vec fill(float x) { return x - vec{}; }  // x + 0 would be an addition: it is not x for x = -0
inline vec larger(vec a, vec b) { return a > b ? a : b; }  // b if any is not a number

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec load(const bf16* p) {
    const hvec half = *reinterpret_cast<const hvec*>(p);
    return (vec)(__builtin_convertvector(half, uvec) << 16);
}
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
inline void store(bf16* p, vec x) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &half, sizeof half);
#else
    const uvec bits = (uvec)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uvec kept = x == x ? rounded : (uvec{} + 0x7fc0);
    *reinterpret_cast<hvec*>(p) = __builtin_convertvector(kept, hvec);
#endif
}

// Lanes in another order: lane i is that of i ^ H.
template <int H>
inline vec swap(vec x) {
    ivec from;
    for (int i = 0; i < WIDTH; ++i) from[i] = i ^ H;
    return __builtin_shuffle(x, from);
}

inline float largest_of(vec x) {
    if (WIDTH > 8) x = larger(x, swap<8 % WIDTH>(x));
    if (WIDTH > 4) x = larger(x, swap<4 % WIDTH>(x));
    x = larger(x, swap<2>(x));
    return larger(x, swap<1>(x))[0];
}

// (WIDTH, WIDTH), transposed: at each step, two rows whose numbers differ in one bit exchange the lanes in which that
// bit is not their own.
template <int H = 1>
inline void transpose(vec* rows) {
    ivec low, high;
    for (int i = 0; i < WIDTH; ++i) {
        low[i] = i & H ? WIDTH + i - H : i;
        high[i] = i & H ? WIDTH + i : i + H;
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i)
        if (!(i & H)) {
            const vec a = rows[i], b = rows[i + H];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + H] = __builtin_shuffle(a, b, high);
        }
    if constexpr (2 * H < WIDTH) transpose<2 * H>(rows);
}

// In the order of the lanes.
inline float sum_of(vec x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; ++i) sum += x[i];
    return sum;
}

// 2^x, relative error 1.6e-7; 0 below 2^-126, at least 2^127 where it cannot be told, and not a number if x is none.
inline vec exp2(vec x) {
    const vec magic = fill(12582912 + 127);  // 1.5 * 2^23: what is added to it is rounded to an integer
#if !defined(__AVX512F__)
    x = larger(fill(-127), x);
    x = x > 127.0f ? fill(127) : x;
#endif
    const vec shifted = x + magic, n = shifted - magic, f = x - n;
    vec p = fill(1.32647273e-03f);
    p = p * f + 9.67151299e-03f;
    p = p * f + 5.55073358e-02f;
    p = p * f + 2.40222424e-01f;
    p = p * f + 6.93147004e-01f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
    return p * (vec)((ivec)shifted << 23);
#endif
}

// e^x to a unit in the last place or two, for x of at most 0; 0 below 2^-126.
inline vec exponential(vec x) {
    const vec magic = fill(12582912);  // 1.5 * 2^23: what is added to it is rounded to an integer
    const vec least = fill(-87.3365f);
    const vec bounded = larger(x, least), shifted = bounded * 1.44269504f + magic, n = shifted - magic;
    const vec f = bounded - n * 0.693359375f + n * 2.12194440e-4f;  // n ln 2 in two parts, the first without rounding
    vec p = fill(1.384365349e-03f);
    p = p * f + 8.374155547e-03f;
    p = p * f + 4.166800204e-02f;
    p = p * f + 1.666643126e-01f;
    p = p * f + 4.999999418e-01f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const vec result = (vec)((ivec)p + ((ivec)shifted << 23));
    return x < least ? vec{} : result;
}

}  // namespace
