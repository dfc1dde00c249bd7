// Attention in float32 on vectors of whatever width this file is compiled for; bfloat16 tensors are widened in tiles.
//
// All products are one template, `Product`: it reads its left matrix one element at a time, so that a transposed left
// matrix costs nothing, and its right matrix by vectors.
#pragma once

#include "attention_kernels.h"
#include "simd.h"

// The kernels of a direction for every padded head dim.
#define KERNELS(direction, T) \
    {direction<T, 32>(), direction<T, 64>(), direction<T, 96>(), direction<T, 128>()}

namespace ATTENTION_ISA {
namespace {

const int KEYS = 64;  // of a block
const float LOG2E = 1.44269504f;
const float LN2 = 0.693147181f;

// A product of matrices whose rows and steps (along the dimension that is summed over) are so many floats apart: known
// when compiling, or the addresses would take more instructions than the sums. It is made in tiles of ROWS rows and up
// to VECTORS vectors, which registers hold.
template <int ROWS, int VECTORS, int A_ROW, int A_STEP, int B_STEP, int C_ROW>
struct Product {
    // A tile of ROWS x (N * WIDTH) of a b, whose row i is given to end(i, its N vectors).
    template <int N, typename End>
    static INLINE void tile(const float* a, const float* b, int64_t steps, End end) {
        vec sum[ROWS][N] = {};
        for (int64_t k = 0; k < steps; ++k) {
            vec right[N];
            for (int j = 0; j < N; ++j) right[j] = load(b + k * B_STEP + j * WIDTH);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) {
                const float left = a[i * A_ROW + k * A_STEP];
                for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) end(i, sum[i]);
    }

    // f(N, at) for every tile of columns, which begins at `at` and has N vectors. Columns are rounded up to WIDTH.
    template <typename F>
    static INLINE void for_columns(int64_t columns, F f) {
        for (int64_t at = 0; at < columns; at += VECTORS * WIDTH)
            with_vectors<VECTORS>((columns - at + WIDTH - 1) / WIDTH, [&](auto n) LAMBDA { f(n, at); });
    }

    // c = a b, or c += a b. Rows are rounded up to ROWS and columns to WIDTH: all must have room.
    static void run(const float* a, const float* b, int64_t steps, float* c, int64_t rows, int64_t columns, bool add) {
        if (add)
            run_as<true>(a, b, steps, c, rows, columns);
        else
            run_as<false>(a, b, steps, c, rows, columns);
    }

private:
    template <int N, typename F>
    static INLINE void with_vectors(int64_t vectors, F f) {
        if (vectors >= N)
            f(std::integral_constant<int, N>());
        else if constexpr (N > 1)
            with_vectors<N - 1>(vectors, f);
    }

    template <bool add>
    static void run_as(const float* a, const float* b, int64_t steps, float* c, int64_t rows, int64_t columns) {
        for_columns(columns, [&](auto n, int64_t at) LAMBDA {
            constexpr int N = n.value;
            for (int64_t row = 0; row < rows; row += ROWS) {
                float* to = c + row * C_ROW + at;
                tile<N>(a + row * A_ROW, b + at, steps, [=](int i, const vec* sums) LAMBDA {
                    float* at = to + i * C_ROW;
                    for (int j = 0; j < N; ++j, at += WIDTH) store(at, add ? load(at) + sums[j] : sums[j]);
                });
            }
        });
    }
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// sum + a b as `Product` rounds it. Left to itself, a compiler may round a product of its own here.
inline float add_product(float a, float b, float sum) {
#if defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}

// Rows of a group that are packed together: they lie pages apart, so there are few of them.
template <typename T>
struct Rows {
    static const int COUNT = 16;
    const T* at[COUNT];  // null where there is none

    Rows(const void* tensor, Span rows, int64_t first, int64_t last, int64_t stride) {
        first += rows.begin, last += rows.begin;
        for (int i = 0; i < COUNT; ++i)
            at[i] = first + i < last ? static_cast<const T*>(tensor) + (first + i) * stride : nullptr;
    }

    // WIDTH elements of row i.
    vec vector(int i, int64_t column) const { return at[i] ? load(at[i] + column) : vec{}; }

    // D elements of each, a multiple of 16, times a factor, to rows of padded D.
    void pack(int64_t column, int64_t head_dim, int64_t padded, float* to, float factor = 1) const {
        for (int i = 0; i < COUNT; ++i, to += padded) {
            for (int64_t d = 0; d < head_dim; d += WIDTH) store(to + d, vector(i, column + d) * factor);
            for (int64_t d = head_dim; d < padded; d += WIDTH) store(to + d, vec{});
        }
    }

    // The same to columns of a block.
    void pack_columns(int64_t column, int64_t head_dim, int64_t padded, float* to) const {
        for (int i = 0; i < COUNT; i += WIDTH)
            for (int64_t d = 0; d < padded; d += WIDTH) {
                vec square[WIDTH] = {};
                if (d < head_dim)
                    for (int r = 0; r < WIDTH; ++r) square[r] = vector(i + r, column + d);
                transpose(square);
                for (int r = 0; r < WIDTH; ++r) store(to + (d + r) * KEYS + i, square[r]);
            }
    }
};

// Matrices of a head, each (rows for whole blocks, padded D), transposed ones in blocks (padded D, KEYS).
struct Matrices {
    int64_t matrix, rows, padded;

    Matrices(const Attention& a, Span of) : rows(round_up(of.length, KEYS)), padded(padded_head_dim(a)) {
        matrix = rows * padded;
    }
};

}  // namespace
}  // namespace ATTENTION_ISA
