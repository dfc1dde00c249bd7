// What is done to the sums of products on AMX, and where they go: bias is added already; then GELU, rounding, a tensor.
#pragma once

#include "tiles_amx.h"

namespace amx {
namespace {

const int64_t PANEL = 32;  // columns
const int64_t STEP = 2 * TILE;  // bytes of 32 rows or columns x 32 of the inner width
const int64_t AROUND = 4 << 20;  // bytes of a result from which it is written around the caches

INLINE __m512 widen(__m256i x) { return _mm512_cvtpbh_ps((__m256bh)x); }

// Phi(x), the normal distribution, of a relative error below 4e-4 for x of -5 or more; smaller ones are next to
// nothing. It is 1 / (1 + 2^(x q(x^2))) with a polynomial q.
INLINE __m512 normal(__m512 x) {
    const __m512 square = _mm512_min_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(25));
    __m512 q = _mm512_set1_ps(2.91014279e-08f);
    const float rest[] = {-2.05784780e-06f, 3.94217537e-05f, 8.46938833e-04f, -1.06869400e-01f, -2.30063402f};
    for (const float c : rest) q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(c));
    const __m512 odds = exp2(_mm512_mul_ps(q, x), 0xffff);
    return _mm512_rcp14_ps(_mm512_add_ps(odds, _mm512_set1_ps(1)));
}

INLINE __m512 gelu(__m512 x) { return _mm512_mul_ps(x, normal(x)); }

// Multiplies the gradient of gelu(x) to that of x, Phi(x) + x Phi'(x), and returns gelu(x).
INLINE __m512 gelu_backward(__m512 x, __m512* grad) {
    const __m512 phi = normal(x), steep = _mm512_mul_ps(x, _mm512_set1_ps(-0.5f * LOG2E));
    const __m512 bell = _mm512_mul_ps(exp2(_mm512_mul_ps(x, steep), 0xffff), _mm512_set1_ps(0.398942280f));
    *grad = _mm512_mul_ps(*grad, _mm512_fmadd_ps(x, bell, phi));
    return _mm512_mul_ps(x, phi);
}

// A tensor (R, N) that is written by 32 columns of a row.
struct Matrix {
    uint16_t* data;
    int64_t columns;
    bool around;

    Matrix(void* data, int64_t rows, int64_t columns)
        : data(static_cast<uint16_t*>(data)), columns(columns),
          around(rows * columns * 2 >= AROUND && columns % PANEL == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0) {}

    INLINE uint16_t* at(int64_t row, int64_t panel) const { return data + row * columns + panel * PANEL; }
    INLINE void put(int64_t row, int64_t panel, __m512i values) const {
        if (around)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(at(row, panel)), values);
        else
            store_part(at(row, panel), values, columns - panel * PANEL);
    }
};

// Where results go, from which row of a tensor on, and what is done to them.
template <bool GELU>
struct ToRows {
    const Matrix y;
    const int64_t first;

    INLINE void put(int64_t row, int64_t panel, __m512 low, __m512 high) const {
        if constexpr (GELU) {
            low = gelu(low);
            high = gelu(high);
        }
        y.put(first + row, panel, narrow(low, high));
    }
};
struct ToTiles {  // of the next layer, through a GELU
    char* const tiles;
    const int64_t unit;  // bytes of 32 rows
    const Matrix hidden;
    const int64_t first;

    INLINE void put(int64_t row, int64_t panel, __m512 low, __m512 high) const {
        if (hidden.data) hidden.put(first + row, panel, narrow(low, high));
        _mm512_store_si512(
            tiles + row / UNIT * unit + panel * STEP + row % UNIT * 64, narrow(gelu(low), gelu(high))
        );
    }
};
struct ToHidden {  // back through a GELU
    const Matrix y, active, hidden;
    const int64_t first;

    INLINE void put(int64_t row, int64_t panel, __m512 low, __m512 high) const {
        row += first;
        const uint16_t* x = hidden.at(row, panel);
        _mm_prefetch(x + PANEL, _MM_HINT_T1);  // of the next panel: rows lie pages apart
        const __m512i both = load_part(x, hidden.columns - panel * PANEL);
        const __m512 first_half = gelu_backward(widen(_mm512_castsi512_si256(both)), &low);
        const __m512 second_half = gelu_backward(widen(_mm512_extracti64x4_epi64(both, 1)), &high);
        active.put(row, panel, narrow(first_half, second_half));
        y.put(row, panel, narrow(low, high));
    }
};
struct ToSums {
    float* const y;
    const int64_t columns;
    const bool add;

    INLINE void put(int64_t row, int64_t panel, __m512 low, __m512 high) const {
        float* to = y + row * columns + panel * PANEL;
        const int64_t left = columns - panel * PANEL;
        const __mmask16 first = first_lanes(left), second = first_lanes(left - 16);
        if (add) {
            low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(first, to));
            high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(second, to + 16));
        }
        _mm512_mask_storeu_ps(to, first, low);
        _mm512_mask_storeu_ps(to + 16, second, high);
    }
};

}  // namespace
}  // namespace amx
