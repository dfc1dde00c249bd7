// Attention in float32 on vectors of whatever width this file is compiled for; bfloat16 tensors are widened in tiles.
//
// All products are one template, `Product`: it reads its left matrix one element at a time, so that a transposed left
// matrix costs nothing, and its right matrix by vectors.
#include <float.h>

#include "kernels.h"
#include "simd.h"

namespace VECTOR_KERNELS {
namespace {

const int KEYS = 64;  // of a block
const int QUERIES = 64;  // of a block in backward
const int TILE_QUERIES = 6;  // of a tile in forward
const int TASK_QUERIES = 64 * TILE_QUERIES;
const float LOG2E = 1.44269504f;
const float LN2 = 0.693147181f;
const int FORWARD_VECTORS = WIDTH == 16 ? 4 : 2;  // of a tile: sums and keys fill the registers
// Of weights summed up over a block of keys, one in WIDTH, as long as nothing is taken off the scores.
const float LEAST_WEIGHT = 0x1p-40f, MOST_WEIGHT = 0x1p40f;

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
    vec part(int i, int64_t column) const { return at[i] ? load(at[i] + column) : vec{}; }

    // D elements of each, a multiple of 16, times a factor, to rows of padded D.
    void pack(int64_t column, int64_t head_dim, int64_t padded, float* to, float factor = 1) const {
        for (int i = 0; i < COUNT; ++i, to += padded) {
            for (int64_t d = 0; d < head_dim; d += WIDTH) store(to + d, part(i, column + d) * factor);
            for (int64_t d = head_dim; d < padded; d += WIDTH) store(to + d, vec{});
        }
    }

    // The same to columns of a block.
    void pack_columns(int64_t column, int64_t head_dim, int64_t padded, float* to) const {
        for (int i = 0; i < COUNT; i += WIDTH)
            for (int64_t d = 0; d < padded; d += WIDTH) {
                vec square[WIDTH] = {};
                if (d < head_dim)
                    for (int r = 0; r < WIDTH; ++r) square[r] = part(i + r, column + d);
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

struct ForwardTiles {
    float *kt, *v;

    ForwardTiles(const Attention& a, const Group& group, int head, char* tiles) {
        const int64_t matrix = Matrices(a, group.keys).matrix;
        kt = reinterpret_cast<float*>(tiles + head * bytes(a, group));
        v = kt + matrix;
    }
    static size_t bytes(const Attention& a, const Group& group) {
        return 2 * Matrices(a, group.keys).matrix * sizeof(float);
    }
};

size_t forward_local_bytes(const Attention& a) {
    const int64_t matrices = 2 * TASK_QUERIES * padded_head_dim(a) + 2 * TILE_QUERIES * KEYS;
    return (matrices + (TASK_QUERIES + WIDTH) * (1 + WIDTH)) * sizeof(float);
}

template <typename T>
void forward_pack(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim, padded = padded_head_dim(a);
    for (int64_t i = first; i < last; i += Rows<T>::COUNT) {
        const Rows<T> k(a.k, group.keys, i, last, a.k_stride), v(a.v, group.keys, i, last, a.k_stride);
        for (int head = heads.first; head < heads.last; ++head) {
            const ForwardTiles to(a, group, head - heads.first, tiles);
            k.pack_columns(head * D, D, padded, to.kt + i / KEYS * KEYS * padded + i % KEYS);
        }
        for (int head = heads.first; head < heads.last; ++head)
            v.pack(head * D, D, padded, ForwardTiles(a, group, head - heads.first, tiles).v + i * padded);
    }
}

// A tile of queries against blocks of keys. Scores are powers of two: queries were packed with that factor.
template <int padded>
struct QueryTile {
    using Scores = Product<TILE_QUERIES, FORWARD_VECTORS, padded, 1, KEYS, KEYS>;  // of rows with columns
    const float* q;  // (TILE_QUERIES, padded)
    float* most;  // (TILE_QUERIES), what is taken off the scores
    vec* sum;  // (TILE_QUERIES), of weights
    bool& risen;  // whether `most` may be other than 0

    // Weights (TILE_QUERIES, KEYS) of keys, unless they are too large, or too small to begin with: then false. Those of
    // keys that do not exist are undefined.
    bool weigh(const float* kt, int64_t keys, bool begun, float* weights) const {
        if (keys < KEYS) return weigh_as<false, true>(kt, keys, begun, weights);
        return risen ? weigh_as<true, true>(kt, KEYS, begun, weights) : weigh_as<true, false>(kt, KEYS, begun, weights);
    }

    // Takes off the largest score, if it is more or nothing was summed up to `out`; `scores` is memory for a block.
    void rise(const float* kt, int64_t keys, bool begun, float* scores, float* out) const {
        risen = true;
        Scores::run(q, kt, padded, scores, TILE_QUERIES, keys, false);
        for (int i = 0; i < TILE_QUERIES; ++i) {
            float largest = -FLT_MAX;  // of a block in which all are infinite, too
            for (int64_t j = 0; j < keys; ++j)
                if (scores[i * KEYS + j] > largest) largest = scores[i * KEYS + j];
            if (begun) {
                if (largest <= most[i]) continue;  // what is not a number is taken off, too
                const vec shrink = exp2(fill(most[i] - largest));
                sum[i] *= shrink;
                for (int64_t d = 0; d < padded; d += WIDTH)
                    store(out + i * padded + d, load(out + i * padded + d) * shrink);
            }
            most[i] = largest;
        }
    }

private:
    template <bool whole, bool risen>
    bool weigh_as(const float* kt, int64_t keys, bool begun, float* weights) const {
        vec total[TILE_QUERIES] = {};
        Scores::for_columns(whole ? KEYS : keys, [&](auto n, int64_t at) LAMBDA {
            constexpr int N = n.value;
            Scores::template tile<N>(q, kt + at, padded, [&](int i, const vec* scores) LAMBDA {
                for (int j = 0; j < N; ++j) {
                    const int64_t key = at + j * WIDTH;
                    const vec weight = exp2(risen ? scores[j] - most[i] : scores[j]);
                    store(weights + i * KEYS + key, weight);
                    total[i] += whole ? weight : present(weight, keys - key);
                }
            });
        });
        vec highest = {}, lowest = fill(INFINITY);
#pragma GCC unroll 16
        for (int i = 0; i < TILE_QUERIES; ++i) {
            highest = larger(total[i], highest);
            lowest = smaller(total[i], lowest);
        }
        if (any_above(highest, MOST_WEIGHT) || !(begun || any_above(lowest, LEAST_WEIGHT))) return false;
#pragma GCC unroll 16
        for (int i = 0; i < TILE_QUERIES; ++i) sum[i] += total[i];
        return true;
    }
};

// The result of a tile's queries, `first` to `last` of a group, from what was summed up.
template <typename T, int padded>
inline void conclude(
    const Attention& a, const Group& group, int head, int64_t first, int64_t last, const vec* sum, const float* most,
    const float* out
) {
    const int64_t D = a.head_dim, rows = smaller(TILE_QUERIES, last - first);
    for (int64_t at = 0; at < rows; at += WIDTH) {
        const vec total = totals(sum + at), inverse = 1 / total, lse = load(most + at) * LN2 + log(total);
        for (int64_t i = at; i < smaller(at + WIDTH, rows); ++i) {
            const int64_t row = group.queries.begin + first + i;
            T* to = static_cast<T*>(a.out) + (row * a.heads + head) * D;
            for (int64_t d = 0; d < D; d += WIDTH) store(to + d, load(out + i * padded + d) * inverse[i - at]);
            a.lse[head * a.q_rows + row] = lse[i - at];
        }
    }
}

template <typename T, int padded>
void forward_run(
    const Attention& a, const Group& group, int head, int64_t first, int64_t last, char* tiles, char* local, Turns
) {
    const int ROWS = TILE_QUERIES;
    using Sums = Product<ROWS, FORWARD_VECTORS, KEYS, 1, padded, padded>;  // of rows of a block with rows
    const int64_t count = (last - first + ROWS - 1) / ROWS;
    const int64_t length = group.keys.length;
    const ForwardTiles from(a, group, 0, tiles);
    vec* sum = reinterpret_cast<vec*>(local);  // (TASK_QUERIES + WIDTH)
    float* weights = reinterpret_cast<float*>(sum + TASK_QUERIES + WIDTH);  // (2, TILE_QUERIES, KEYS)
    float* out = weights + 2 * ROWS * KEYS;  // (TASK_QUERIES, padded)
    float* q = out + TASK_QUERIES * padded;  // (TASK_QUERIES, padded)
    float* most = q + TASK_QUERIES * padded;  // (TASK_QUERIES + WIDTH)
    for (int64_t i = 0; i < count * ROWS; i += Rows<T>::COUNT)
        Rows<T>(a.q, group.queries, first + i, last, a.q_stride)
            .pack(head * a.head_dim, a.head_dim, padded, q + i * padded, a.softmax_scale * LOG2E);
    for (int64_t i = 0; i < count * ROWS + WIDTH; ++i) {
        sum[i] = vec{};
        most[i] = 0;
    }
    bool risen = false;
    for (int64_t key = 0; key < length; key += KEYS) {
        const int64_t keys = smaller(KEYS, length - key);
        const float *kt = from.kt + key * padded, *v = from.v + key * padded;
        // A tile is summed up after the next one's scores, which do not wait for its weights.
        for (int64_t t = 0; t <= count; ++t) {
            float* now = weights + t % 2 * ROWS * KEYS;
            if (t < count) {
                const QueryTile<padded> tile = {q + t * ROWS * padded, most + t * ROWS, sum + t * ROWS, risen};
                if (length == 1 || !tile.weigh(kt, keys, key != 0, now)) {  // one key weighs 1, not nearly 1
                    tile.rise(kt, keys, key != 0, now, out + t * ROWS * padded);
                    tile.weigh(kt, keys, true, now);
                }
            }
            // The next tile into the first cache, and its share of the next block of keys into the second.
            for (int i = 0; i < ROWS * padded; i += 16) {
                __builtin_prefetch(q + (t + 1) * ROWS * padded + i);
                __builtin_prefetch(out + t * ROWS * padded + i);
            }
            for (int64_t i = t * KEYS * padded / count; i < (t + 1) * KEYS * padded / count; i += 16) {
                __builtin_prefetch(kt + KEYS * padded + i, 0, 2);
                __builtin_prefetch(v + KEYS * padded + i, 0, 2);
            }
            if (t > 0) {
                const float* before = weights + (t - 1) % 2 * ROWS * KEYS;
                const int64_t at = (t - 1) * ROWS;
                Sums::run(before, v, keys, out + at * padded, ROWS, padded, key != 0);
                if (key + KEYS >= length)
                    conclude<T, padded>(a, group, head, first + at, last, sum + at, most + at, out + at * padded);
            }
        }
    }
}

// What backward knows of a query. Its lse, in powers of two, is the sum of two numbers. Those of the float that forward
// gives lose nothing to the change of base. Where that float is too coarse, they are the largest score and the logarithm
// of the weights' sum without it.
struct Query {
    float lse, rounding, delta;
};

struct BackwardTiles {
    float *q, *g, *grad_q;  // g: the gradient of out
    float *k, *kt, *vt;
    Query* queries;

    BackwardTiles(const Attention& a, const Group& group, int head, char* tiles) {
        const Matrices of_q(a, group.queries), of_k(a, group.keys);
        q = reinterpret_cast<float*>(tiles + head * bytes(a, group));
        g = q + of_q.matrix;
        grad_q = g + of_q.matrix;
        k = grad_q + of_q.matrix;
        kt = k + of_k.matrix;
        vt = kt + of_k.matrix;
        queries = reinterpret_cast<Query*>(vt + of_k.matrix);
    }
    static size_t bytes(const Attention& a, const Group& group) {
        const Matrices of_q(a, group.queries), of_k(a, group.keys);
        return 3 * (of_q.matrix + of_k.matrix) * sizeof(float) + of_q.rows * sizeof(Query);
    }
};

size_t backward_local_bytes(const Attention& a) {
    return (2 * QUERIES * KEYS + 2 * KEYS * padded_head_dim(a)) * sizeof(float);
}

template <typename T>
void backward_pack_queries(
    const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles
) {
    const int64_t D = a.head_dim, size = a.heads * D, padded = padded_head_dim(a);
    for (int64_t i = first; i < last; i += Rows<T>::COUNT) {
        const Rows<T> q(a.q, group.queries, i, last, a.q_stride);
        const Rows<T> grads(a.grad_out, group.queries, i, last, size), out(a.out, group.queries, i, last, size);
        for (int head = heads.first; head < heads.last; ++head) {
            const BackwardTiles to(a, group, head - heads.first, tiles);
            q.pack(head * D, D, padded, to.q + i * padded, a.softmax_scale * LOG2E);
            grads.pack(head * D, D, padded, to.g + i * padded);
            for (int r = 0; r < Rows<T>::COUNT && i + r < last; ++r) {
                float delta = 0;  // rounded as the products are, or a softmax of one key would have a gradient
                for (int64_t d = 0; d < D; ++d)
                    delta = add_product(to.g[(i + r) * padded + d], widen(out.at[r][head * D + d]), delta);
                const double lse = a.lse[head * a.q_rows + group.queries.begin + i + r] * 1.4426950408889634;
                to.queries[i + r] = {float(lse), float(lse - float(lse)), delta};
            }
        }
    }
}

template <typename T>
void backward_pack_keys(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim, padded = padded_head_dim(a);
    for (int64_t i = first; i < last; i += Rows<T>::COUNT) {
        const Rows<T> k(a.k, group.keys, i, last, a.k_stride), v(a.v, group.keys, i, last, a.k_stride);
        for (int head = heads.first; head < heads.last; ++head) {
            const BackwardTiles to(a, group, head - heads.first, tiles);
            const int64_t column = i / KEYS * KEYS * padded + i % KEYS;
            k.pack(head * D, D, padded, to.k + i * padded);
            k.pack_columns(head * D, D, padded, to.kt + column);
            v.pack_columns(head * D, D, padded, to.vt + column);
        }
    }
}

template <int padded>
void backward_refine(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int ROWS = WIDTH == 16 ? 8 : 4;
    using Scores = Product<ROWS, 2, padded, 1, KEYS, KEYS>;  // as in backward_run, to the last bit
    for (int head = heads.first; head < heads.last; ++head) {
        const BackwardTiles from(a, group, head - heads.first, tiles);
        for (int64_t i = first; i < last; i += ROWS) {
            Query* rows = from.queries + i;
            const int64_t count = smaller(ROWS, last - i);
            bool coarse = false;
            for (int64_t r = 0; r < count; ++r) coarse |= fabsf(rows[r].lse) > LARGE_LSE;
            if (!coarse) continue;
            float most[ROWS], scores[ROWS * KEYS];
            vec sum[ROWS] = {};
            for (float& score : most) score = -FLT_MAX;
            for (int summing = 0; summing < 2; ++summing)
                for (int64_t key = 0; key < group.keys.length; key += KEYS) {
                    const int64_t keys = smaller(KEYS, group.keys.length - key);
                    Scores::run(from.q + i * padded, from.kt + key * padded, padded, scores, ROWS, keys, false);
                    for (int64_t r = 0; r < count; ++r) {
                        const float* row = scores + r * KEYS;
                        for (int64_t j = 0; j < keys && !summing; ++j)
                            if (row[j] > most[r]) most[r] = row[j];
                        for (int64_t j = 0; j < keys && summing; j += WIDTH)
                            sum[r] += present(exp2(load(row + j) - most[r]), keys - j);
                    }
                }
            for (int64_t r = 0; r < count; ++r) rows[r] = {most[r], log2f(sum_of(sum[r])), rows[r].delta};
        }
    }
}

// scores to weights, and grad_weights to the gradient of the scores without its factor softmax_scale; both in place.
inline void softmax_gradient(float* scores, float* grads, const Query* rows, int64_t queries, int64_t keys) {
    for (int64_t i = 0; i < queries; ++i)
        for (int64_t j = 0; j < keys; j += WIDTH) {
            const vec power = load(scores + i * KEYS + j) - rows[i].lse - rows[i].rounding;
            const vec weights = exp2(smaller(vec{}, power));  // at most 1, whatever lse was rounded to
            store(scores + i * KEYS + j, weights);
            store(grads + i * KEYS + j, weights * (load(grads + i * KEYS + j) - rows[i].delta));
        }
}

template <typename T, int padded>
void backward_run(
    const Attention& a, const Group& group, int head, int64_t first, int64_t last, char* tiles, char* local, Turns turns
) {
    const int ROWS = WIDTH == 16 ? 8 : 4, VECTORS = 2;
    using Scores = Product<ROWS, VECTORS, padded, 1, KEYS, KEYS>;  // of rows with columns
    using RowSums = Product<ROWS, VECTORS, KEYS, 1, padded, padded>;  // of rows of a block with rows
    using ColumnSums = Product<ROWS, VECTORS, 1, KEYS, padded, padded>;  // of columns of a block with rows
    const int64_t D = a.head_dim, keys = last - first;
    const BackwardTiles from(a, group, 0, tiles);
    float* weights = reinterpret_cast<float*>(local);  // (QUERIES, KEYS)
    float* grads = weights + QUERIES * KEYS;  // (QUERIES, KEYS)
    float* grad_k = grads + QUERIES * KEYS;  // (KEYS, padded)
    float* grad_v = grad_k + KEYS * padded;  // (KEYS, padded)
    const float *kt = from.kt + first * padded, *vt = from.vt + first * padded, *k = from.k + first * padded;
    for (int64_t query = 0; query < group.queries.length; query += QUERIES) {
        const int64_t queries = smaller(QUERIES, group.queries.length - query);
        const float *q = from.q + query * padded, *g = from.g + query * padded;
        Scores::run(q, kt, padded, weights, queries, keys, false);
        Scores::run(g, vt, padded, grads, queries, keys, false);
        softmax_gradient(weights, grads, from.queries + query, queries, keys);
        ColumnSums::run(weights, g, queries, grad_v, keys, padded, query != 0);
        ColumnSums::run(grads, q, queries, grad_k, keys, padded, query != 0);
        turns.wait(query / QUERIES, first / KEYS);
        RowSums::run(grads, k, keys, from.grad_q + query * padded, queries, padded, first != 0);
        turns.pass(query / QUERIES, first / KEYS);
    }
    for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = (group.keys.begin + first + j) * a.grad_k_stride + head * D;
        T *to_k = static_cast<T*>(a.grad_k) + at, *to_v = static_cast<T*>(a.grad_v) + at;
        for (int64_t d = 0; d < D; d += WIDTH) store(to_k + d, load(grad_k + j * padded + d) * LN2);
        for (int64_t d = 0; d < D; d += WIDTH) store(to_v + d, load(grad_v + j * padded + d));
    }
}

template <typename T>
void backward_finish(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim, padded = padded_head_dim(a);
    for (int64_t i = first; i < last; ++i)
        for (int head = heads.first; head < heads.last; ++head) {
            const float* from = BackwardTiles(a, group, head - heads.first, tiles).grad_q + i * padded;
            T* to = static_cast<T*>(a.grad_q) + (group.queries.begin + i) * a.grad_q_stride + head * D;
            for (int64_t d = 0; d < D; d += WIDTH) store(to + d, load(from + d) * a.softmax_scale);
        }
}

template <typename T, int padded>
constexpr Kernel forward_kernel() {
    const Pass pack = {nullptr, forward_pack<T>};
    return {KEYS, TASK_QUERIES, false, ForwardTiles::bytes, forward_local_bytes, pack, {}, forward_run<T, padded>, {}};
}

template <typename T, int padded>
constexpr Kernel backward_kernel() {
    const Pass pack = {backward_pack_queries<T>, backward_pack_keys<T>};
    const Pass refine = {backward_refine<padded>, nullptr}, finish = {backward_finish<T>, nullptr};
    return {
        KEYS, KEYS, true, BackwardTiles::bytes, backward_local_bytes, pack, refine, backward_run<T, padded>, finish,
    };
}

#define KERNELS(direction, T) \
    {direction<T, 32>(), direction<T, 64>(), direction<T, 96>(), direction<T, 128>()}

}  // namespace

constexpr Kernel forward[2][HEAD_WIDTHS] = {KERNELS(forward_kernel, float), KERNELS(forward_kernel, bf16)};
constexpr Kernel backward[2][HEAD_WIDTHS] = {KERNELS(backward_kernel, float), KERNELS(backward_kernel, bf16)};
static_assert(forward[0][HEAD_WIDTHS - 1].unit && forward[1][HEAD_WIDTHS - 1].unit, "a kernel for every width");
static_assert(backward[0][HEAD_WIDTHS - 1].unit && backward[1][HEAD_WIDTHS - 1].unit, "a kernel for every width");

}  // namespace VECTOR_KERNELS
