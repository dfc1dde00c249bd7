// Tiles of AMX: 16 rows of 64 bytes, and how rows of bfloat16 become tiles.
//
// A product c += a b takes a as 16 rows of 32 bfloat16, b as 16 rows of 16 pairs (b[2i][n], b[2i + 1][n]), and c as 16
// rows of 16 float32. "Paired" below is the form of b.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attention.h"

#define INLINE inline __attribute__((always_inline))

namespace amx {
namespace {

const int ROWS = 16;  // of a tile
const int64_t TILE = 1024;  // bytes
const int UNIT = 32;  // rows that are packed together
const float LOG2E = 1.44269504f, LN2 = 0.693147181f;

inline int64_t units_of(Span rows) { return round_up(rows.length, UNIT) / UNIT; }

#ifndef HLIP_EMULATED  // by the tests, which have these in plain C++
// The memory clobbers keep what the vector units do to the same memory, and do meanwhile, in its place.
template <int T>
INLINE void tile_load(const void* from) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(64)), "i"(T) : "memory");
}
template <int T>
INLINE void tile_stream(const void* from) {  // for what is not soon used again
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(64)), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* to) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t(64)), "i"(T) : "memory");
}
template <int T>
INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
}
template <int C, int A, int B>
INLINE void tile_multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}

// All eight tiles of full size, as long as this lives.
struct TilesInUse {
    TilesInUse() {
        alignas(64) uint8_t config[64] = {1};  // the palette; then, from byte 16, bytes of a row, and from 48, rows
        for (int t = 0; t < 8; ++t) {
            config[16 + 2 * t] = 64;
            config[48 + t] = ROWS;
        }
        __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~TilesInUse() { __asm__ volatile("tilerelease" ::: "memory"); }
};
#endif

template <int I>
struct Constant {
    static constexpr int value = I;
};

// f(Constant<0>) to f(Constant<N - 1>), written out: tiles are named, not numbered.
template <int N, int I = 0, typename F>
INLINE void repeat(F f) {
    if constexpr (I < N) {
        f(Constant<I>{});
        repeat<N, I + 1>(f);
    }
}

// 2^x, relative error 7.5e-5. Zero where the mask is not set.
INLINE __m512 exp2(__m512 x, __mmask16 mask) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802451f), f, _mm512_set1_ps(0.22606718f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583353f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992522f));
    return _mm512_maskz_scalef_ps(mask, p, x);
}

INLINE __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline __mmask16 first_lanes(int64_t n) { return n <= 0 ? 0 : n >= 16 ? 0xffff : (1u << n) - 1; }

// 32 elements of a row, of which `present` exist.
INLINE __m512i load_part(const uint16_t* from, int64_t present) {
    if (present >= 32) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16(present <= 0 ? 0 : (1u << present) - 1, from);
}

INLINE void store_part(uint16_t* to, __m512i x, int64_t present) {
    if (present >= 32) return _mm512_storeu_si512(to, x);
    _mm512_mask_storeu_epi16(to, present <= 0 ? 0 : (1u << present) - 1, x);
}

// ln x to about 1e-7, for positive normal numbers.
INLINE __m512 log(__m512 x) {
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    const __m512 e = _mm512_getexp_ps(_mm512_div_ps(x, m));
    // ln m = 2 artanh s
    const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, _mm512_set1_ps(1)), _mm512_add_ps(m, _mm512_set1_ps(1)));
    const __m512 square = _mm512_mul_ps(s, s);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(2.0f / 9), square, _mm512_set1_ps(2.0f / 7));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 5));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 3));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2));
    return _mm512_fmadd_ps(e, _mm512_set1_ps(LN2), _mm512_mul_ps(p, s));
}

// N rows of a group, and 32 of their columns at a time; rows beyond `last` are zero.
template <int N>
struct Rows {
    const uint16_t* at[N];
    alignas(64) mutable __m512i loaded[N];

    Rows(const void* tensor, Span rows, int64_t first, int64_t last, int64_t stride) {
        first += rows.begin, last += rows.begin;
        for (int i = 0; i < N; ++i)
            at[i] = first + i < last ? static_cast<const uint16_t*>(tensor) + (first + i) * stride : nullptr;
    }
    INLINE void load(int64_t column, int64_t present) const {
        const int64_t AHEAD = 64;  // elements, of which the hardware would not know with so many rows
        for (int i = 0; i < N; ++i) {
            loaded[i] = at[i] ? load_part(at[i] + column, present) : _mm512_setzero_si512();
            if (at[i]) _mm_prefetch(at[i] + column + AHEAD, _MM_HINT_T0);
        }
    }
};

// (16, 16) of 32-bit words, transposed.
INLINE void transpose(const __m512i* in, __m512i* out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {  // b[4 i + j] holds column j + 4 l of rows 4 i to 4 i + 3 in lane l
        const __m512i x = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), y = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i z = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd), w = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        out[j] = _mm512_shuffle_i32x4(x, y, 0x88);
        out[8 + j] = _mm512_shuffle_i32x4(x, y, 0xdd);
        out[4 + j] = _mm512_shuffle_i32x4(z, w, 0x88);
        out[12 + j] = _mm512_shuffle_i32x4(z, w, 0xdd);
    }
}

// A tile of 32-bit words, in place.
INLINE void transpose_tile(char* tile) {
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(tile + 64 * i);
    transpose(rows, rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 64 * i, rows[i]);
}

// Sums of 16 rows over their lanes.
INLINE __m512 totals(const float* sums) {
    __m512i lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = _mm512_load_si512(sums + 16 * i);
    transpose(lanes, lanes);
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; ++i)
            lanes[i] = _mm512_castps_si512(
                _mm512_add_ps(_mm512_castsi512_ps(lanes[i]), _mm512_castsi512_ps(lanes[i + step]))
            );
    return _mm512_castsi512_ps(lanes[0]);
}

// 32 elements of each of 16 rows: the rows as they are, and transposed, which is the paired form of their transpose.
INLINE void pack_transposed(const __m512i* rows, char* to) {
    __m512i columns[16];
    transpose(rows, columns);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 64 * i, columns[i]);
}

INLINE void pack_plain(const __m512i* rows, char* to) {
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 64 * i, rows[i]);
}

// 32 elements of two rows to a row of each of two paired tiles, which lie side by side.
INLINE void pack_pair(__m512i even, __m512i odd, char* to) {
    alignas(64) static const uint16_t low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_store_si512(to, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_store_si512(to + TILE, _mm512_permutex2var_epi16(even, second, odd));
}

// 32 elements of each of 32 rows to two paired tiles.
INLINE void pack_pairs(const __m512i* rows, char* to) {
    for (int i = 0; i < ROWS; ++i) pack_pair(rows[2 * i], rows[2 * i + 1], to + 64 * i);
}

}  // namespace
}  // namespace amx
