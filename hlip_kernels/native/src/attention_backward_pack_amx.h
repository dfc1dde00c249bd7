// How backward attention on AMX lays out the tiles of a head, and packs rows into them.
#pragma once

#include "tiles_amx.h"

namespace amx {
namespace {

const float FINE = -1;  // below the logarithm of any sum of weights of which one is 1

// Tiles of a head: seven matrices in units of 32 rows, then sums for grad_q, lse and delta, and what refines lse. Later,
// grad_k and grad_v take the place of k and v.
template <int K>
struct Packed {
    static constexpr int N = 2 * K;  // tiles of 16 columns
    static constexpr int64_t MATRIX = 2 * K * TILE;  // of a unit
    char *k, *v;  // plain, for the scores and the gradients of weights
    char *k_columns;  // transposed, plain: for grad_q
    char *q_columns, *g_columns;  // transposed, paired: for the scores and the gradients of weights
    char *q, *g;  // paired: for grad_k and grad_v
    float *grad_q;  // transposed
    float *lse, *delta;
    // Where lse, one float, is too coarse for some query of a unit, `lse` holds the largest product of each with a key, and
    // this the logarithm of the sum of its weights without that, in powers of two. Elsewhere it begins with FINE.
    float* rest;

    Packed(const Group& group, int head, char* tiles) {
        const int64_t queries = units_of(group.queries), keys = units_of(group.keys) * MATRIX;
        k = tiles + head * bytes(group);
        v = k + keys;
        k_columns = v + keys;
        q_columns = k_columns + keys;
        g_columns = q_columns + queries * MATRIX;
        q = g_columns + queries * MATRIX;
        g = q + queries * MATRIX;
        grad_q = reinterpret_cast<float*>(g + queries * MATRIX);
        lse = grad_q + queries * UNIT * 32 * K;
        delta = lse + queries * UNIT;
        rest = delta + queries * UNIT;
    }
    static int64_t bytes(const Group& group) {
        const int64_t of_query = 6 * MATRIX + 3 * UNIT * sizeof(float);  // of a unit; grad_q is as much as two matrices
        return units_of(group.queries) * of_query + units_of(group.keys) * 3 * MATRIX;
    }
};

template <int K>
size_t tile_bytes(const Attention&, const Group& group) {
    return Packed<K>::bytes(group);
}

// What else belongs to a unit of queries: the gradient of out, lse, and delta, the product of out and its gradient. A
// query that does not exist has weights of 0.
template <int K>
void pack_rest(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t size = a.heads * int64_t(a.head_dim);
    const Rows<UNIT> out(a.out, group.queries, first, last, size), grad(a.grad_out, group.queries, first, last, size);
    for (int head = heads.first; head < heads.last; ++head) {
        const Packed<K> to(group, head - heads.first, tiles);
        const int64_t unit = first / UNIT * Packed<K>::MATRIX;
        alignas(64) float sums[UNIT][16] = {};
        for (int c = 0; c < K; ++c) {
            out.load(head * a.head_dim + 32 * c, a.head_dim - 32 * c);
            grad.load(head * a.head_dim + 32 * c, a.head_dim - 32 * c);
            for (int i = 0; i < UNIT; ++i) {
                const __m512 sum = _mm512_load_ps(sums[i]);
                _mm512_store_ps(sums[i], _mm512_dpbf16_ps(sum, (__m512bh)out.loaded[i], (__m512bh)grad.loaded[i]));
            }
            pack_transposed(grad.loaded, to.g_columns + unit + 2 * c * TILE);
            pack_transposed(grad.loaded + ROWS, to.g_columns + unit + (2 * c + 1) * TILE);
            pack_pairs(grad.loaded, to.g + unit + 2 * c * TILE);
        }
        _mm512_store_ps(to.delta + first, totals(sums[0]));
        _mm512_store_ps(to.delta + first + ROWS, totals(sums[ROWS]));
        const float* lse = a.lse + head * a.q_rows + group.queries.begin;
        for (int64_t i = first; i < first + UNIT; ++i) to.lse[i] = i < last ? lse[i] * LOG2E : 1e30f;
        to.rest[first] = FINE;
    }
}

template <int K>
void pack_queries(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim;
    for (int64_t at = first; at < last; at += UNIT) {
        const Rows<UNIT> rows(a.q, group.queries, at, last, a.q_stride);
        const int64_t unit = at / UNIT * Packed<K>::MATRIX;
        for (int head = heads.first; head < heads.last; ++head) {
            const Packed<K> to(group, head - heads.first, tiles);
            for (int c = 0; c < K; ++c) {
                rows.load(head * D + c * 32, D - c * 32);
                pack_transposed(rows.loaded, to.q_columns + unit + 2 * c * TILE);
                pack_transposed(rows.loaded + ROWS, to.q_columns + unit + (2 * c + 1) * TILE);
                pack_pairs(rows.loaded, to.q + unit + 2 * c * TILE);
            }
        }
        pack_rest<K>(a, group, heads, at, last, tiles);
    }
}

template <int K>
void pack_keys(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim;
    for (int64_t at = first; at < last; at += UNIT) {
        const Rows<UNIT> k(a.k, group.keys, at, last, a.k_stride), v(a.v, group.keys, at, last, a.k_stride);
        const int64_t unit = at / UNIT * Packed<K>::MATRIX;
        for (int head = heads.first; head < heads.last; ++head) {
            const Packed<K> to(group, head - heads.first, tiles);
            for (int c = 0; c < K; ++c) {
                k.load(head * D + c * 32, D - c * 32);
                pack_plain(k.loaded, to.k + unit + c * TILE);
                pack_plain(k.loaded + ROWS, to.k + unit + (K + c) * TILE);
                char* columns = to.k_columns + unit + 2 * c * TILE;
                pack_pairs(k.loaded, columns);
                transpose_tile(columns);
                transpose_tile(columns + TILE);
            }
        }
        for (int head = heads.first; head < heads.last; ++head) {
            const Packed<K> to(group, head - heads.first, tiles);
            for (int c = 0; c < K; ++c) {
                v.load(head * D + c * 32, D - c * 32);
                pack_plain(v.loaded, to.v + unit + c * TILE);
                pack_plain(v.loaded + ROWS, to.v + unit + (K + c) * TILE);
            }
        }
    }
}

}  // namespace
}  // namespace amx
