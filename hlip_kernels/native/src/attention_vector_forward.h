// Forward attention on vectors: tiles of queries against blocks of keys.
#pragma once

#include <float.h>

#include "attention_vector.h"

namespace ATTENTION_ISA {
namespace {

const int TILE_QUERIES = 6;  // of a tile
const int TASK_QUERIES = 64 * TILE_QUERIES;
const int FORWARD_VECTORS = WIDTH == 16 ? 4 : 2;  // of a tile: sums and keys fill the registers
// Of weights summed up over a block of keys, one in WIDTH, as long as nothing is taken off the scores.
const float LEAST_WEIGHT = 0x1p-40f, MOST_WEIGHT = 0x1p40f;

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

template <typename T, int padded>
constexpr Kernel forward_kernel() {
    const Pass pack = {nullptr, forward_pack<T>};
    return {KEYS, TASK_QUERIES, false, ForwardTiles::bytes, forward_local_bytes, pack, {}, forward_run<T, padded>, {}};
}

}  // namespace

constexpr Kernel forward[2][HEAD_WIDTHS] = {KERNELS(forward_kernel, float), KERNELS(forward_kernel, bf16)};
static_assert(forward[0][HEAD_WIDTHS - 1].unit && forward[1][HEAD_WIDTHS - 1].unit, "a kernel for every width");

}  // namespace ATTENTION_ISA
