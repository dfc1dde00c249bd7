// Attention in float32 on vectors of whatever width this file is compiled for; bfloat16 tensors are widened in tiles.
//
// All products are one template, `Product`: it reads its left matrix one element at a time, so that a transposed left
// matrix costs nothing, and its right matrix by vectors.
#include "kernels.h"
#include "simd.h"

namespace VECTOR_KERNELS {
namespace {

const int KEYS = 64;  // of a block
const int QUERIES = 64;  // of a block in backward
const int TILE_QUERIES = 6;  // of a tile in forward
const int TASK_QUERIES = 64 * TILE_QUERIES;
const float LOG2E = 1.44269504f;
const float MOST_WEIGHT = 0x1p40f;  // of a key, before the maximum that is taken off is raised

// A product of matrices whose rows and steps (along the dimension that is summed over) are so many floats apart: known
// when compiling, or the addresses would take more instructions than the sums. It is made in tiles of ROWS rows and up
// to VECTORS vectors, which registers hold.
template <int ROWS, int VECTORS, int A_ROW, int A_STEP, int B_STEP, int C_ROW>
struct Product {
    // A tile of ROWS x (N * WIDTH) of c = a b, or c += a b.
    template <int N>
    static inline void tile(const float* a, const float* b, int64_t steps, float* c, bool add) {
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

    template <int N = VECTORS>
    static inline void tile_of(int64_t vectors, const float* a, const float* b, int64_t steps, float* c, bool add) {
        if (vectors >= N)
            tile<N>(a, b, steps, c, add);
        else if constexpr (N > 1)
            tile_of<N - 1>(vectors, a, b, steps, c, add);
    }

    // Rows are rounded up to ROWS and columns to WIDTH: both c and a must have room.
    static void run(const float* a, const float* b, int64_t steps, float* c, int64_t rows, int64_t columns, bool add) {
        for (int64_t j = 0; j < columns; j += VECTORS * WIDTH)
            for (int64_t i = 0; i < rows; i += ROWS)
                tile_of((columns - j + WIDTH - 1) / WIDTH, a + i * A_ROW, b + j, steps, c + i * C_ROW + j, add);
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

    Rows(const void* tensor, const Group& group, int64_t first, int64_t last, int64_t stride) {
        for (int i = 0; i < COUNT; ++i)
            at[i] = first + i < last ? static_cast<const T*>(tensor) + group.row(first + i) * stride : nullptr;
    }

    // WIDTH elements of row i.
    vec part(int i, int64_t column) const { return at[i] ? load(at[i] + column) : vec{}; }

    // D elements of each, a multiple of 16, to rows of padded D.
    void pack(int64_t column, int64_t head_dim, int64_t padded, float* to) const {
        for (int i = 0; i < COUNT; ++i, to += padded) {
            for (int64_t d = 0; d < head_dim; d += WIDTH) store(to + d, part(i, column + d));
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

// Matrices of a head, each (rows for whole blocks and tiles, padded D), transposed ones in blocks (padded D, KEYS).
struct Matrices {
    int64_t matrix, rows, padded;

    Matrices(const Attention& a, int64_t length)
        : rows(round_up(round_up(length, TILE_QUERIES), KEYS)), padded(padded_head_dim(a)) {
        matrix = rows * padded;
    }
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
    return (2 * TILE_QUERIES * KEYS + TASK_QUERIES * (padded_head_dim(a) + 1 + WIDTH)) * sizeof(float);
}

template <typename T>
void forward_pack(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim, slot = a.heads * D, padded = padded_head_dim(a);
    const int64_t end = last == group.length ? round_up(last, TILE_QUERIES) : last;
    for (int64_t i = first; i < end; i += Rows<T>::COUNT) {
        const Rows<T> rows(a.qkv, group, i, last, 3 * slot);
        for (int head = heads.first; head < heads.last; ++head) {
            const ForwardTiles to(a, group.length, head - heads.first, tiles);
            rows.pack(head * D, D, padded, to.q + i * padded);
            rows.pack_columns(slot + head * D, D, padded, to.kt + i / KEYS * KEYS * padded + i % KEYS);
            rows.pack(2 * slot + head * D, D, padded, to.v + i * padded);
        }
    }
}

// The softmax of a tile of queries, block by block of keys. What is taken off the scores of a row is near their
// maximum, and changes only where a score exceeds it by far.
struct Softmax {
    float scale;
    float* most;  // (TILE_QUERIES), what is taken off
    vec* sum;  // (TILE_QUERIES)

    // The scores of a row in its last vector, at j; those of keys that do not exist are `rest`.
    static vec last(const float* row, int64_t j, int64_t keys, float rest) {
        ivec lane;
        for (int i = 0; i < WIDTH; ++i) lane[i] = i;
        return lane < int32_t(keys - j) ? load(row + j) : fill(rest);
    }

    // Weights in place of scores (TILE_QUERIES, KEYS), unless any is too large: then false.
    bool weigh(float* scores, int64_t keys) const {
        const int64_t j = round_up(keys, WIDTH) - WIDTH;
        const float factor = scale * LOG2E;
        vec total[TILE_QUERIES], highest = {};
        for (int i = 0; i < TILE_QUERIES; ++i) {
            float* row = scores + i * KEYS;
            total[i] = exp2((last(row, j, keys, factor < 0 ? INFINITY : -INFINITY) - most[i]) * factor);
            store(row + j, total[i]);
            for (int64_t at = 0; at < j; at += WIDTH) {
                const vec weights = exp2((load(row + at) - most[i]) * factor);
                store(row + at, weights);
                total[i] += weights;
            }
            highest = larger(total[i], highest);
        }
        if (largest_of(highest) > MOST_WEIGHT) return false;
        for (int i = 0; i < TILE_QUERIES; ++i) sum[i] += total[i];
        return true;
    }

    // Takes off the maximum; `out`, what was summed before, is null if nothing was.
    void rise(const float* scores, int64_t keys, float* out, int64_t padded) const {
        const int64_t j = round_up(keys, WIDTH) - WIDTH;
        const float factor = scale * LOG2E, sign = scale < 0 ? -1 : 1;
        for (int i = 0; i < TILE_QUERIES; ++i) {
            const float* row = scores + i * KEYS;
            vec found = last(row, j, keys, -sign * INFINITY) * sign;
            for (int64_t at = 0; at < j; at += WIDTH) found = larger(found, load(row + at) * sign);
            const float largest = largest_of(found) * sign;
            if (out) {
                if (!((largest - most[i]) * factor > 0)) continue;
                const vec shrink = exp2(fill((most[i] - largest) * factor));
                sum[i] *= shrink;
                for (int64_t d = 0; d < padded; d += WIDTH)
                    store(out + i * padded + d, load(out + i * padded + d) * shrink);
            }
            most[i] = largest;
        }
    }
};

template <typename T, int padded>
void forward_run(
    const Attention& a, const Group& group, int head, int64_t first, int64_t last, char* tiles, char* local, Turns
) {
    const int ROWS = TILE_QUERIES, VECTORS = WIDTH == 16 ? 4 : 2;
    using Scores = Product<ROWS, VECTORS, padded, 1, KEYS, KEYS>;  // of rows with columns
    using Sums = Product<ROWS, VECTORS, KEYS, 1, padded, padded>;  // of rows of a block with rows
    const int64_t D = a.head_dim, rows = last - first, count = (rows + ROWS - 1) / ROWS;
    const ForwardTiles from(a, group.length, 0, tiles);
    vec* sum = reinterpret_cast<vec*>(local);  // (TASK_QUERIES)
    float* scores = reinterpret_cast<float*>(sum + TASK_QUERIES);  // (2, TILE_QUERIES, KEYS)
    float* out = scores + 2 * ROWS * KEYS;  // (TASK_QUERIES, padded)
    float* most = out + TASK_QUERIES * padded;  // (TASK_QUERIES)
    for (int64_t i = 0; i < count * ROWS; ++i) sum[i] = vec{};
    for (int64_t key = 0; key < group.length; key += KEYS) {
        const int64_t keys = smaller(KEYS, group.length - key);
        const float *kt = from.kt + key * padded, *v = from.v + key * padded;
        // A tile is summed up after the next one's scores, which do not wait for its weights.
        for (int64_t t = 0; t <= count; ++t) {
            float* now = scores + t % 2 * ROWS * KEYS;
            if (t < count) {
                const float* q = from.q + (first + t * ROWS) * padded;
                const Softmax softmax = {a.softmax_scale, most + t * ROWS, sum + t * ROWS};
                float* sums = key == 0 ? nullptr : out + t * ROWS * padded;
                Scores::run(q, kt, padded, now, ROWS, keys, false);
                if (key == 0) softmax.rise(now, keys, sums, padded);
                if (!softmax.weigh(now, keys)) {
                    Scores::run(q, kt, padded, now, ROWS, keys, false);
                    softmax.rise(now, keys, sums, padded);
                    softmax.weigh(now, keys);
                }
            }
            // The next tile into the first cache, and its share of the next block of keys into the second.
            for (int i = 0; i < ROWS * padded; i += 16) {
                __builtin_prefetch(from.q + (first + (t + 1) * ROWS) * padded + i);
                __builtin_prefetch(out + t * ROWS * padded + i);
            }
            for (int64_t i = t * KEYS * padded / count; i < (t + 1) * KEYS * padded / count; i += 16) {
                __builtin_prefetch(kt + KEYS * padded + i, 0, 2);
                __builtin_prefetch(v + KEYS * padded + i, 0, 2);
            }
            if (t > 0) {
                const float* weights = scores + (t - 1) % 2 * ROWS * KEYS;
                Sums::run(weights, v, keys, out + (t - 1) * ROWS * padded, ROWS, padded, key != 0);
            }
        }
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
    const int64_t D = a.head_dim, slot = a.heads * D, padded = padded_head_dim(a);
    for (int64_t i = first; i < last; i += Rows<T>::COUNT) {
        const Rows<T> rows(a.qkv, group, i, last, 3 * slot);
        const Rows<T> grads(a.grad_out, group, i, last, slot), out(a.out, group, i, last, slot);
        for (int head = heads.first; head < heads.last; ++head) {
            const BackwardTiles to(a, group.length, head - heads.first, tiles);
            const int64_t column = i / KEYS * KEYS * padded + i % KEYS;
            rows.pack(head * D, D, padded, to.q + i * padded);
            grads.pack(head * D, D, padded, to.g + i * padded);
            rows.pack(slot + head * D, D, padded, to.k + i * padded);
            rows.pack_columns(slot + head * D, D, padded, to.kt + column);
            rows.pack_columns(2 * slot + head * D, D, padded, to.vt + column);
            for (int r = 0; r < Rows<T>::COUNT && i + r < last; ++r) {
                float delta = 0;  // rounded as the products are, or a softmax of one key would have a gradient
                for (int64_t d = 0; d < D; ++d)
                    delta = add_product(to.g[(i + r) * padded + d], widen(out.at[r][head * D + d]), delta);
                to.delta[i + r] = delta;
                to.lse[i + r] = a.lse[head * a.rows + group.row(i + r)];
            }
        }
    }
}

// scores to weights, and grad_weights to the gradient of the scores without its factor softmax_scale; both in place.
inline void softmax_gradient(
    float* scores, float* grads, const float* lse, const float* delta, float scale, int64_t queries, int64_t keys
) {
    for (int64_t i = 0; i < queries; ++i)
        for (int64_t j = 0; j < keys; j += WIDTH) {
            const vec weights = exp2((load(scores + i * KEYS + j) * scale - lse[i]) * LOG2E);
            store(scores + i * KEYS + j, weights);
            store(grads + i * KEYS + j, weights * (load(grads + i * KEYS + j) - delta[i]));
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
        ColumnSums::run(weights, g, queries, grad_v, keys, padded, query != 0);
        ColumnSums::run(grads, q, queries, grad_k, keys, padded, query != 0);
        turns.wait(query / QUERIES, first / KEYS);
        RowSums::run(grads, k, keys, from.grad_q + query * padded, queries, padded, first != 0);
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
    return {KEYS, TASK_QUERIES, forward_tile_bytes, forward_local_bytes, forward_pack<T>, forward_run<T, padded>,
            nullptr};
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
