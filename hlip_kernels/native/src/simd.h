// Vectors of float32, as wide as what a file is compiled for, and their conversion from and to bfloat16.
//
// Like all else in these headers it has internal linkage: see attention.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline)) inline
#define LAMBDA __attribute__((always_inline))

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
inline vec smaller(vec a, vec b) { return a < b ? a : b; }  // likewise
// The first `count` lanes; zero in the others.
inline vec present(vec x, int64_t count) {
    ivec lane;
    for (int i = 0; i < WIDTH; ++i) lane[i] = i;
    return lane < int32_t(count) ? x : vec{};
}

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

inline bool any_above(vec x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)fill(limit), _CMP_GT_OQ) != 0;
#else
    return largest_of(x) > limit;
#endif
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

// The sums of WIDTH vectors, each likewise.
inline vec totals(const vec* rows) {
    vec columns[WIDTH];
    for (int i = 0; i < WIDTH; ++i) columns[i] = rows[i];
    transpose(columns);
    vec sum = columns[0];
    for (int i = 1; i < WIDTH; ++i) sum += columns[i];
    return sum;
}

// 2^x, relative error 1.9e-7 for x of -126 to 127, none at 0; below that 0, or a denormal with AVX-512, and above it 2^127,
// or more with AVX-512; not a number if x is none.
inline vec exp2(vec x) {
#if defined(__AVX512F__)
    const vec f = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x less its floor
#else
    const vec magic = fill(12582912 + 127);  // 1.5 * 2^23: what is added to it is rounded to an integer
    x = larger(fill(-127), x);
    x = x > 127.0f ? fill(127) : x;
    const vec shifted = (x - 0.49999997f) + magic, f = x - (shifted - magic);  // 0 to 1
#endif
    vec p = fill(1.86713017e-03f);
    p = p * f + 9.01702978e-03f;
    p = p * f + 5.57999127e-02f;
    p = p * f + 2.40164444e-01f;
    p = p * f + 6.93151295e-01f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
#else
    return p * (vec)((ivec)shifted << 23);
#endif
}

// ln x to about 1e-7, for positive normal numbers; not a number if x is none.
inline vec log(vec x) {
    const ivec e = ((ivec)x - 0x3f400000) >> 23;  // x = 2^e m, m of 0.75 to 1.5
    const vec m = (vec)((ivec)x - (e << 23)), s = (m - 1) / (m + 1), square = s * s;  // ln m = 2 artanh s
    vec p = fill(2.0f / 9);
    p = p * square + 2.0f / 7;
    p = p * square + 2.0f / 5;
    p = p * square + 2.0f / 3;
    p = p * square + 2.0f;
    return __builtin_convertvector(e, vec) * 0.693147181f + p * s + (x - x);
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
