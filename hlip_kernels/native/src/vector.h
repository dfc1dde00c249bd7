// Attention in float32 on vectors of whatever width this file is compiled for; bfloat16 tensors are widened in tiles.
//
// All products are one template, `Product`: it reads its left matrix one element at a time, so that a transposed left
// matrix costs nothing, and its right matrix by vectors.
#include "kernels.h"
#include "simd.h"

namespace VECTOR_KERNELS {
namespace {

const int ROWS = WIDTH == 16 ? 8 : 4;
const int KEYS = 64;  // of a block
const int QUERIES = 64;  // of a block

// Lanes in another order: lane i is that of i ^ H.
template <int H>
inline vec swap(vec x) {
    ivec from;
    for (int i = 0; i < WIDTH; ++i) from[i] = i ^ H;
    return __builtin_shuffle(x, from);
}

inline float max_of(const float* row, int columns) {
    vec most = load(row);
    for (int j = WIDTH; j < columns; j += WIDTH) most = larger(most, load(row + j));
    if (WIDTH > 8) most = larger(most, swap<8 % WIDTH>(most));
    if (WIDTH > 4) most = larger(most, swap<4 % WIDTH>(most));
    most = larger(most, swap<2>(most));
    return larger(most, swap<1>(most))[0];
}

// A product of matrices whose rows and steps (along the dimension that is summed over) are so many floats apart: known
// when compiling, or the addresses would take more instructions than the sums.
template <int A_ROW, int A_STEP, int B_STEP, int C_ROW>
struct Product {
    // A block of ROWS x (N * WIDTH) of c = a b, or c += a b.
    template <int N>
    static inline void block(const float* a, const float* b, int64_t steps, float* c, bool add) {
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
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) {
                float* to = c + i * C_ROW + j * WIDTH;
                store(to, add ? load(to) + sum[i][j] : sum[i][j]);
            }
    }

    // Rows are rounded up to ROWS and columns to WIDTH: both c and a must have room.
    static void run(const float* a, const float* b, int64_t steps, float* c, int64_t rows, int64_t columns, bool add) {
        for (int64_t j = 0; j < columns; j += 2 * WIDTH)
            for (int64_t i = 0; i < rows; i += ROWS)
                if (columns - j > WIDTH)
                    block<2>(a + i * A_ROW, b + j, steps, c + i * C_ROW + j, add);
                else
                    block<1>(a + i * A_ROW, b + j, steps, c + i * C_ROW + j, add);
    }
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// A row of D elements, a multiple of 16, to one of padded D.
template <typename T>
inline void pack_row(const T* from, int64_t head_dim, int64_t padded, float* to) {
    for (int64_t d = 0; d < head_dim; d += WIDTH) store(to + d, load(from + d));
    for (int64_t d = head_dim; d < padded; d += WIDTH) store(to + d, vec{});
}

// The same to a column of a block.
template <typename T>
inline void pack_column(const T* from, int64_t head_dim, int64_t padded, float* to) {
    for (int64_t d = 0; d < head_dim; ++d) to[d * KEYS] = widen(from[d]);
    for (int64_t d = head_dim; d < padded; ++d) to[d * KEYS] = 0;
}

// f(head, row), head after head for a few rows: a line of a transposed block is filled while it is at hand, and rows, which
// lie pages apart, are few at a time.
template <typename F>
inline void for_each_row(Heads heads, int64_t first, int64_t last, F f) {
    for (int64_t at = first; at < last; at += 16)
        for (int head = heads.first; head < heads.last; ++head)
            for (int64_t i = at; i < at + 16 && i < last; ++i) f(head, i);
}

void clear_columns(float* block, int64_t first, int64_t padded) {
    for (int64_t d = 0; d < padded; ++d)
        for (int64_t r = first; r < KEYS; ++r) block[d * KEYS + r] = 0;
}

// Matrices of a head, each (length rounded up to QUERIES, padded D), transposed ones in blocks (padded D, KEYS).
struct Matrices {
    int64_t matrix, rows, padded;

    Matrices(const Attention& a, int64_t length)
        : matrix(round_up(length, QUERIES) * padded_head_dim(a)), rows(round_up(length, QUERIES)),
          padded(padded_head_dim(a)) {}
};

const int FORWARD_MATRICES = 3;  // q, k^T, v
const int BACKWARD_MATRICES = 6;  // q, grad_out, k, k^T, v^T, grad_q; then lse and delta

struct ForwardTiles {
    float *q, *kt, *v;

    ForwardTiles(const Attention& a, int64_t length, int head, char* tiles) {
        const Matrices m(a, length);
        q = reinterpret_cast<float*>(tiles) + head * FORWARD_MATRICES * m.matrix;
        kt = q + m.matrix;
        v = kt + m.matrix;
    }
};

size_t forward_tile_bytes(const Attention& a, int64_t length) {
    return FORWARD_MATRICES * Matrices(a, length).matrix * sizeof(float);
}

size_t forward_local_bytes(const Attention& a) {
    return QUERIES * (KEYS + padded_head_dim(a) + 1 + WIDTH) * sizeof(float);
}

template <typename T>
void forward_pack(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim, padded = padded_head_dim(a);
    for_each_row(heads, first, last, [&](int head, int64_t i) {
        const T* row = static_cast<const T*>(a.qkv) + group.row(i) * 3 * a.heads * D;
        const ForwardTiles to(a, group.length, head - heads.first, tiles);
        pack_row(row + head * D, D, padded, to.q + i * padded);
        pack_column(row + (a.heads + head) * D, D, padded, to.kt + i / KEYS * KEYS * padded + i % KEYS);
        pack_row(row + (2 * a.heads + head) * D, D, padded, to.v + i * padded);
    });
    if (last % KEYS == 0) return;
    const int64_t rest = round_up(last, QUERIES) - last;
    for (int head = heads.first; head < heads.last; ++head) {
        const ForwardTiles to(a, group.length, head - heads.first, tiles);
        clear_columns(to.kt + last / KEYS * KEYS * padded, last % KEYS, padded);
        memset(to.q + last * padded, 0, rest * padded * sizeof(float));
    }
}

// Scores of a row to weights, in place. Returns by which factor what was summed before shrinks.
inline float softmax_row(float* row, int64_t keys, float scale, float* most, vec* sum) {
    const int64_t columns = round_up(keys, WIDTH);
    for (int64_t j = keys; j < columns; ++j) row[j] = -INFINITY;
    const float found = max_of(row, columns);
    float shrink = 1;
    if (found > *most) {
        shrink = exponential(fill((*most - found) * scale))[0];
        *most = found;
    }
    vec total = *sum * shrink;
    for (int64_t j = 0; j < columns; j += WIDTH) {
        const vec weights = exponential((load(row + j) - *most) * scale);
        store(row + j, weights);
        total += weights;
    }
    *sum = total;
    return shrink;
}

template <typename T, int padded>
void forward_run(
    const Attention& a, const Group& group, int head, int64_t first, int64_t last, char* tiles, char* local, Turns
) {
    using Scores = Product<padded, 1, KEYS, KEYS>;  // of rows with columns
    using Rows = Product<KEYS, 1, padded, padded>;  // of rows of a block with rows
    const int64_t D = a.head_dim, rows = last - first;
    const ForwardTiles from(a, group.length, 0, tiles);
    float* scores = reinterpret_cast<float*>(local);  // (QUERIES, KEYS)
    float* out = scores + QUERIES * KEYS;  // (QUERIES, padded)
    float* most = out + QUERIES * padded;  // (QUERIES)
    vec* sum = reinterpret_cast<vec*>(most + QUERIES);  // (QUERIES)
    for (int64_t i = 0; i < rows; ++i) {
        most[i] = -INFINITY;
        sum[i] = vec{};
    }
    for (int64_t key = 0; key < group.length; key += KEYS) {
        const int64_t keys = smaller(KEYS, group.length - key);
        Scores::run(from.q + first * padded, from.kt + key * padded, padded, scores, rows, keys, false);
        for (int64_t i = 0; i < rows; ++i) {
            const float shrink = softmax_row(scores + i * KEYS, keys, a.softmax_scale, most + i, sum + i);
            if (shrink != 1 && key != 0)
                for (int64_t d = 0; d < padded; d += WIDTH)
                    store(out + i * padded + d, load(out + i * padded + d) * shrink);
        }
        Rows::run(scores, from.v + key * padded, keys, out, rows, padded, key != 0);
    }
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = group.row(first + i);
        const float total = sum_of(sum[i]), inverse = 1 / total;
        T* to = static_cast<T*>(a.out) + (row * a.heads + head) * D;
        for (int64_t d = 0; d < D; d += WIDTH) store(to + d, load(out + i * padded + d) * inverse);
        a.lse[head * a.rows + row] = most[i] * a.softmax_scale + logf(total);
    }
}

struct BackwardTiles {
    float *q, *g, *k, *kt, *vt, *grad_q, *lse, *delta;

    BackwardTiles(const Attention& a, int64_t length, int head, char* tiles) {
        const Matrices m(a, length);
        q = reinterpret_cast<float*>(tiles) + head * (BACKWARD_MATRICES * m.matrix + 2 * m.rows);
        g = q + m.matrix;
        k = g + m.matrix;
        kt = k + m.matrix;
        vt = kt + m.matrix;
        grad_q = vt + m.matrix;
        lse = grad_q + m.matrix;
        delta = lse + m.rows;
    }
};

size_t backward_tile_bytes(const Attention& a, int64_t length) {
    const Matrices m(a, length);
    return (BACKWARD_MATRICES * m.matrix + 2 * m.rows) * sizeof(float);
}

size_t backward_local_bytes(const Attention& a) {
    return (2 * QUERIES * KEYS + 2 * KEYS * padded_head_dim(a)) * sizeof(float);
}

template <typename T>
void backward_pack(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim, padded = padded_head_dim(a);
    for_each_row(heads, first, last, [&](int head, int64_t i) {
        const int64_t r = group.row(i);
        const BackwardTiles to(a, group.length, head - heads.first, tiles);
        const T* q = static_cast<const T*>(a.qkv) + (r * 3 * a.heads + head) * D;
        const T *k = q + a.heads * D, *v = k + a.heads * D;
        const T* g = static_cast<const T*>(a.grad_out) + (r * a.heads + head) * D;
        const T* out = static_cast<const T*>(a.out) + (r * a.heads + head) * D;
        pack_row(q, D, padded, to.q + i * padded);
        pack_row(g, D, padded, to.g + i * padded);
        pack_row(k, D, padded, to.k + i * padded);
        pack_column(k, D, padded, to.kt + i / KEYS * KEYS * padded + i % KEYS);
        pack_column(v, D, padded, to.vt + i / KEYS * KEYS * padded + i % KEYS);
        to.lse[i] = a.lse[head * a.rows + r];
        float delta = 0;
        for (int64_t d = 0; d < D; ++d) delta += widen(g[d]) * widen(out[d]);
        to.delta[i] = delta;
    });
    if (last % KEYS == 0) return;
    const int64_t rest = round_up(last, QUERIES) - last;
    for (int head = heads.first; head < heads.last; ++head) {
        const BackwardTiles to(a, group.length, head - heads.first, tiles);
        clear_columns(to.kt + last / KEYS * KEYS * padded, last % KEYS, padded);
        clear_columns(to.vt + last / KEYS * KEYS * padded, last % KEYS, padded);
        memset(to.q + last * padded, 0, rest * padded * sizeof(float));
        memset(to.g + last * padded, 0, rest * padded * sizeof(float));
    }
}

// scores to weights, and grad_weights to the gradient of the scores without its factor softmax_scale; both in place.
inline void softmax_gradient(
    float* scores, float* grads, const float* lse, const float* delta, float scale, int64_t queries, int64_t keys
) {
    for (int64_t i = 0; i < queries; ++i)
        for (int64_t j = 0; j < keys; j += WIDTH) {
            const vec weights = exponential(load(scores + i * KEYS + j) * scale - lse[i]);
            store(scores + i * KEYS + j, weights);
            store(grads + i * KEYS + j, weights * (load(grads + i * KEYS + j) - delta[i]));
        }
}

template <typename T, int padded>
void backward_run(
    const Attention& a, const Group& group, int head, int64_t first, int64_t last, char* tiles, char* local, Turns turns
) {
    using Scores = Product<padded, 1, KEYS, KEYS>;  // of rows with columns
    using Rows = Product<KEYS, 1, padded, padded>;  // of rows of a block with rows
    using Columns = Product<1, KEYS, padded, padded>;  // of columns of a block with rows
    const int64_t D = a.head_dim, keys = last - first;
    const BackwardTiles from(a, group.length, 0, tiles);
    float* weights = reinterpret_cast<float*>(local);  // (QUERIES, KEYS)
    float* grads = weights + QUERIES * KEYS;  // (QUERIES, KEYS)
    float* grad_k = grads + QUERIES * KEYS;  // (KEYS, padded)
    float* grad_v = grad_k + KEYS * padded;  // (KEYS, padded)
    const float *kt = from.kt + first * padded, *vt = from.vt + first * padded, *k = from.k + first * padded;
    for (int64_t query = 0; query < group.length; query += QUERIES) {
        const int64_t queries = smaller(QUERIES, group.length - query);
        const float *q = from.q + query * padded, *g = from.g + query * padded;
        Scores::run(q, kt, padded, weights, queries, keys, false);
        Scores::run(g, vt, padded, grads, queries, keys, false);
        softmax_gradient(weights, grads, from.lse + query, from.delta + query, a.softmax_scale, queries, keys);
        Columns::run(weights, g, queries, grad_v, keys, padded, query != 0);
        Columns::run(grads, q, queries, grad_k, keys, padded, query != 0);
        turns.wait(query / QUERIES, first / KEYS);
        Rows::run(grads, k, keys, from.grad_q + query * padded, queries, padded, first != 0);
        turns.pass(query / QUERIES, first / KEYS);
    }
    for (int64_t j = 0; j < keys; ++j) {
        T* to = static_cast<T*>(a.grad_qkv) + ((group.row(first + j) * 3 + 1) * a.heads + head) * D;
        for (int64_t d = 0; d < D; d += WIDTH) store(to + d, load(grad_k + j * padded + d) * a.softmax_scale);
        to += a.heads * D;
        for (int64_t d = 0; d < D; d += WIDTH) store(to + d, load(grad_v + j * padded + d));
    }
}

template <typename T>
void backward_finish(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim, padded = padded_head_dim(a);
    for (int64_t i = first; i < last; ++i)
        for (int head = heads.first; head < heads.last; ++head) {
            const float* from = BackwardTiles(a, group.length, head - heads.first, tiles).grad_q + i * padded;
            T* to = static_cast<T*>(a.grad_qkv) + (group.row(i) * 3 * a.heads + head) * D;
            for (int64_t d = 0; d < D; d += WIDTH) store(to + d, load(from + d) * a.softmax_scale);
        }
}

template <typename T, int padded>
constexpr Kernel forward_kernel() {
    return {KEYS, QUERIES, forward_tile_bytes, forward_local_bytes, forward_pack<T>, forward_run<T, padded>, nullptr};
}

template <typename T, int padded>
constexpr Kernel backward_kernel() {
    return {KEYS, KEYS, backward_tile_bytes, backward_local_bytes, backward_pack<T>, backward_run<T, padded>,
            backward_finish<T>};
}

#define KERNELS(direction, T) \
    {direction<T, 32>(), direction<T, 64>(), direction<T, 96>(), direction<T, 128>()}

}  // namespace

const Kernel forward[2][4] = {KERNELS(forward_kernel, float), KERNELS(forward_kernel, bf16)};
const Kernel backward[2][4] = {KERNELS(backward_kernel, float), KERNELS(backward_kernel, bf16)};

}  // namespace VECTOR_KERNELS
