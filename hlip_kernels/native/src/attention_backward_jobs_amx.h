// Products of two by two tiles that run between the rows of a softmax: what backward attention on AMX is made of.
#pragma once

#include "tiles_amx.h"

namespace amx {
namespace {

const int QUAD = 4 * ROWS * 16;  // floats of two by two tiles

// A product of two by two tiles, sums of so many steps: where the operands' tiles are, in bytes from one to the next.
struct Job {
    const char* a;
    int64_t a_row, a_step;
    const char* b;
    int64_t b_column, b_step;
    int64_t steps;
    float* c;
    bool zero;  // whether c begins, and is not added to
};

// The softmax of a step and its gradient, some rows at a time.
struct Softmax {
    int row;
    const float *scores, *grads, *lse, *delta;
    const float* rest;  // null where lse is fine
    __m512 scale;
    char *weights, *score_grads, *paired;

    static INLINE __m512 weight(__m512 score, __m512 largest, __m512 rest, __m512 scale) {
        return exp2(_mm512_fmsub_ps(_mm512_sub_ps(score, largest), scale, rest), 0xffff);
    }

    // Row r: 32 queries of a key.
    INLINE __m512i soften(int r) const {
        const int at = r / ROWS * 2 * ROWS * 16 + r % ROWS * 16;
        __m512 p[2], ds[2];
        for (int j = 0; j < 2; ++j) {
            const __m512 s = _mm512_load_ps(scores + at + j * ROWS * 16);
            const __m512 dp = _mm512_load_ps(grads + at + j * ROWS * 16);
            const __m512 less = _mm512_load_ps(lse + 16 * j);
            p[j] = rest ? weight(s, less, _mm512_load_ps(rest + 16 * j), scale)
                        : exp2(_mm512_fmsub_ps(s, scale, less), 0xffff);
            ds[j] = _mm512_mul_ps(p[j], _mm512_sub_ps(dp, _mm512_load_ps(delta + 16 * j)));
        }
        const __m512i narrowed = narrow(ds[0], ds[1]);
        _mm512_store_si512(weights + 64 * r, narrow(p[0], p[1]));
        _mm512_store_si512(score_grads + 64 * r, narrowed);
        return narrowed;
    }
    INLINE void advance(int rows) {
        for (int end = row + rows < UNIT ? row + rows : UNIT; row < end; row += 2) {
            const __m512i even = soften(row), odd = soften(row + 1);
            pack_pair(even, odd, paired + 32 * row);
        }
    }
};

// Runs jobs between the rows of a softmax. What a job has summed up is stored when the next one begins: the tile unit
// would have nothing to do while it waits.
class Machine {
  public:
    Softmax softmax = {UNIT, {}, {}, {}, {}, {}, {}, {}, {}, {}};

    void run(const Job& job) {
        const char *a = job.a, *b = job.b;
        tile_stream<4>(a);
        tile_stream<6>(b);
        begin<0>(job);
        tile_multiply<0, 4, 6>();
        tile_stream<7>(b + job.b_column);
        begin<1>(job);
        tile_multiply<1, 4, 7>();
        tile_stream<5>(a + job.a_row);
        begin<2>(job);
        tile_multiply<2, 5, 6>();
        begin<3>(job);
        tile_multiply<3, 5, 7>();
        softmax.advance(4);
        for (int64_t k = 1; k < job.steps; ++k) {
            a += job.a_step;
            b += job.b_step;
            tile_stream<4>(a);
            tile_stream<6>(b);
            tile_multiply<0, 4, 6>();
            tile_stream<7>(b + job.b_column);
            tile_multiply<1, 4, 7>();
            tile_stream<5>(a + job.a_row);
            tile_multiply<2, 5, 6>();
            tile_multiply<3, 5, 7>();
            softmax.advance(4);
        }
        unstored_ = job.c;
    }
    void store() {
        if (unstored_) repeat<4>([&](auto i) { tile_store<i.value>(unstored_ + i.value * ROWS * 16); });
        unstored_ = nullptr;
    }

  private:
    float* unstored_ = nullptr;

    template <int I>
    INLINE void begin(const Job& job) const {
        if (unstored_) tile_store<I>(unstored_ + I * ROWS * 16);
        if (job.zero)
            tile_zero<I>();
        else
            tile_load<I>(job.c + I * ROWS * 16);
    }
};

}  // namespace
}  // namespace amx
