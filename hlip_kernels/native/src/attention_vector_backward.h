// Backward attention on vectors: a block of keys against all queries.
#pragma once

#include <float.h>

#include "attention_vector.h"

namespace ATTENTION_ISA {
namespace {

const int QUERIES = 64;  // of a block

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
constexpr Kernel backward_kernel() {
    const Pass pack = {backward_pack_queries<T>, backward_pack_keys<T>};
    const Pass refine = {backward_refine<padded>, nullptr}, finish = {backward_finish<T>, nullptr};
    return {
        KEYS, KEYS, true, BackwardTiles::bytes, backward_local_bytes, pack, refine, backward_run<T, padded>, finish,
    };
}

}  // namespace

constexpr Kernel backward[2][HEAD_WIDTHS] = {KERNELS(backward_kernel, float), KERNELS(backward_kernel, bf16)};
static_assert(backward[0][HEAD_WIDTHS - 1].unit && backward[1][HEAD_WIDTHS - 1].unit, "a kernel for every width");

}  // namespace ATTENTION_ISA
