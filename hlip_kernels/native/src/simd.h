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
inline vec larger(vec a, vec b) { return a > b ? a : b; }

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

// In the order of the lanes.
inline float sum_of(vec x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; ++i) sum += x[i];
    return sum;
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
