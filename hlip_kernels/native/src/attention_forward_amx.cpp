// Forward attention in bfloat16 on AMX.
//
// A step is 16 queries x 32 keys, a unit. Three steps are under way at a time: the scores of one, the softmax of the one
// before and the product with the values of the one before that; the tile unit and the vector units work side by side
// only if their instructions alternate closely. The result of 16 queries stays in tile registers for up to 64 columns.
// Keys and values pass by once for each 16 queries, past the first cache, which holds what the softmax needs.
//
// Weights are 2^score without the maximum of the row taken off: floating point does not mind, as long as nothing
// overflows or vanishes. The row sums tell, and if any is out of range, its block of queries is done again with the
// maximum.
#include <float.h>

#include "attention_kernels.h"
#include "tiles_amx.h"

namespace amx {
namespace {

const int BLOCK = 256;  // queries of a task
const int CHUNK = 32;  // steps whose keys and values stay in the second cache while the queries of a block pass
const float LEAST_SUM = 0x1p-60f, MOST_SUM = 0x1p40f;
const float SLACK = 8;  // by how many powers of two a score may exceed the maximum that is taken off

// Tiles of a head, unit after unit of 32 rows: q plain, as 2 x K tiles; k paired and transposed, as K x 2 tiles; v
// paired, as N tiles.
template <int K>
struct Packed {
    static constexpr int N = 2 * K;  // tiles of 16 columns
    static constexpr int64_t MATRIX = 2 * K * TILE;  // of a unit
    char *q, *k, *v;

    Packed(const Group& group, int head, char* tiles) {
        q = tiles + head * bytes(group);
        k = q + units_of(group.queries) * MATRIX;
        v = k + units_of(group.keys) * MATRIX;
    }
    static int64_t bytes(const Group& group) {
        return (units_of(group.queries) + 2 * units_of(group.keys)) * MATRIX;
    }
};

template <int K>
size_t tile_bytes(const Attention&, const Group& group) {
    return Packed<K>::bytes(group);
}

// Row by row through all heads: rows lie pages apart, and a head's part of them is short.
template <int K>
void pack_queries(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim;
    for (int64_t at = first; at < last; at += UNIT) {
        const Rows<UNIT> rows(a.q, group.queries, at, last, a.q_stride);
        for (int head = heads.first; head < heads.last; ++head) {
            char* to = Packed<K>(group, head - heads.first, tiles).q + at / UNIT * Packed<K>::MATRIX;
            for (int c = 0; c < K; ++c) {
                rows.load(head * D + c * 32, D - c * 32);
                pack_plain(rows.loaded, to + c * TILE);
                pack_plain(rows.loaded + ROWS, to + (K + c) * TILE);
            }
        }
    }
}

template <int K>
void pack_keys(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim;
    for (int64_t at = first; at < last; at += UNIT) {
        const Rows<UNIT> k(a.k, group.keys, at, last, a.k_stride), v(a.v, group.keys, at, last, a.k_stride);
        for (int head = heads.first; head < heads.last; ++head) {
            char* to = Packed<K>(group, head - heads.first, tiles).k + at / UNIT * Packed<K>::MATRIX;
            for (int c = 0; c < K; ++c) {
                k.load(head * D + c * 32, D - c * 32);
                pack_transposed(k.loaded, to + 2 * c * TILE);
                pack_transposed(k.loaded + ROWS, to + (2 * c + 1) * TILE);
            }
        }
        for (int head = heads.first; head < heads.last; ++head) {
            char* to = Packed<K>(group, head - heads.first, tiles).v + at / UNIT * Packed<K>::MATRIX;
            for (int c = 0; c < K; ++c) {
                v.load(head * D + c * 32, D - c * 32);
                pack_pairs(v.loaded, to + 2 * c * TILE);
            }
        }
    }
}

// A thread's own memory.
template <int K>
struct Local {
    alignas(64) float scores[2][2][ROWS * 16];  // of two steps, each two tiles of 16 keys
    alignas(64) uint16_t weights[2][ROWS * 32];
    float most[BLOCK];
    alignas(64) float sum[BLOCK][16];
    alignas(64) float out[BLOCK / ROWS][Packed<K>::N][ROWS * 16];
};

template <int K>
size_t local_bytes(const Attention&) {
    return sizeof(Local<K>);
}

// What a step works on.
struct Step {
    const char *q, *k, *v;
    float *sum, *out;
    __mmask16 low, high;  // which of its keys exist
    bool zero, load, store;  // whether the result begins, or goes into tile registers before, or out of them after it
};

template <int K>
struct Pipeline {
    static constexpr int N = Packed<K>::N;
    static constexpr bool RESIDENT = N <= 4;
    Local<K>& local;
    const __m512 scale;

    // Row r of the softmax of a step.
    INLINE void soften(const Step& s, int parity, int r) const {
        const float* scores = local.scores[parity][0] + 16 * r;
        const __m512 x = exp2(_mm512_mul_ps(_mm512_load_ps(scores), scale), s.low);
        const __m512 y = exp2(_mm512_mul_ps(_mm512_load_ps(scores + ROWS * 16), scale), s.high);
        _mm512_store_ps(s.sum + 16 * r, _mm512_add_ps(_mm512_load_ps(s.sum + 16 * r), _mm512_add_ps(x, y)));
        _mm512_store_si512(local.weights[parity] + 32 * r, narrow(x, y));
    }

    // Tile i of 2 K: a product for the scores.
    template <int I>
    INLINE void score(const Step& s) const {
        if constexpr (I == 0) {
            tile_zero<4>();
            tile_zero<5>();
        }
        if constexpr (I % 2 == 0) tile_load<6>(s.q + I / 2 * TILE);
        tile_stream<7>(s.k + I * TILE);
        tile_multiply<4 + I % 2, 6, 7>();
    }

    // Tile i of the result into its register.
    template <int I>
    INLINE void begin(const Step& s) const {
        if (s.zero)
            tile_zero<I % 4>();
        else
            tile_load<I % 4>(s.out + I * ROWS * 16);
    }

    // Tile i of N: a product for the result.
    template <int I>
    INLINE void sum_up(const Step& s, int parity) const {
        if constexpr (I == 0) tile_load<6>(local.weights[parity]);
        if constexpr (!RESIDENT) begin<I>(s);
        tile_stream<7>(s.v + I * TILE);
        tile_multiply<I % 4, 6, 7>();
        if constexpr (!RESIDENT) tile_store<I % 4>(s.out + I * ROWS * 16);
    }

    // The scores of one step, the softmax of a second and the product with the values of a third.
    template <bool SCORE, bool SOFTEN, bool SUM>
    INLINE void turn(const Step& a, const Step& b, const Step& c, int parity) const {
        constexpr int PRODUCTS = N + 2 * K;
        repeat<PRODUCTS>([&](auto i) {
            constexpr int I = i.value;
            if constexpr (I < 2 * K) {
                if constexpr (SCORE) score<I>(a);
            } else {
                if constexpr (SUM && RESIDENT && I == 2 * K)
                    if (c.zero || c.load) repeat<N>([&](auto j) { begin<j.value>(c); });
                if constexpr (SUM) sum_up<I - 2 * K>(c, parity);
                // Late enough to wait for no product, early enough that the next softmax does not wait for them.
                if constexpr (SCORE && I == PRODUCTS - 2) tile_store<4>(local.scores[parity][0]);
                if constexpr (SCORE && I == PRODUCTS - 1) tile_store<5>(local.scores[parity][1]);
            }
            if constexpr (SOFTEN)
                for (int r = ROWS * I / PRODUCTS; r < ROWS * (I + 1) / PRODUCTS; ++r) soften(b, parity ^ 1, r);
        });
        if constexpr (SUM && RESIDENT)
            if (c.store) repeat<N>([&](auto i) { tile_store<i.value>(c.out + i.value * ROWS * 16); });
    }
};

// The steps of a block of queries: chunk by chunk of keys, in each all tiles of queries.
template <int K>
struct Steps {
    const Packed<K> from;
    Local<K>& local;
    int64_t first, tiles, keys, units;  // units of keys
    int64_t chunk = 0, tile = 0, unit = 0;

    Step next() {
        const int64_t query = first / ROWS + tile, left = keys - unit * UNIT;
        const int64_t end = smaller(chunk + CHUNK, units);
        const Step s = {
            from.q + query * K * TILE, from.k + unit * Packed<K>::MATRIX, from.v + unit * Packed<K>::MATRIX,
            local.sum[tile * ROWS], local.out[tile][0], first_lanes(left), first_lanes(left - 16),
            unit == 0, unit == chunk, unit + 1 == end,
        };
        if (++unit == end) {
            if (++tile == tiles) {
                tile = 0;
                chunk = end;
            }
            unit = chunk;
        }
        return s;
    }
};

template <int K>
void run_fast(Steps<K> steps, float scale) {
    Local<K>& local = steps.local;
    const Pipeline<K> pipeline = {local, _mm512_set1_ps(scale)};
    const int64_t count = steps.tiles * steps.units;
    Step a = steps.next(), b = a, c = a;
    pipeline.template turn<true, false, false>(a, b, c, 0);
    if (count > 1) {
        b = a;
        a = steps.next();
        pipeline.template turn<true, true, false>(a, b, c, 1);
    } else {
        pipeline.template turn<false, true, false>(a, b = a, c, 1);
    }
    for (int64_t t = 2; t < count; ++t) {
        c = b;
        b = a;
        a = steps.next();
        pipeline.template turn<true, true, true>(a, b, c, t & 1);
    }
    if (count > 1) pipeline.template turn<false, true, true>(a, a, b, count & 1);
    pipeline.template turn<false, false, true>(a, a, a, (count + 1) & 1);
}

// The same one step at a time, less the running maximum of each row.
template <int K>
void run_safe(Steps<K> steps, float scale) {
    Local<K>& local = steps.local;
    const Pipeline<K> pipeline = {local, _mm512_set1_ps(scale)};
    for (int64_t t = 0; t < steps.tiles * steps.units; ++t) {
        const Step s = steps.next();
        float *most = local.most + (s.sum - local.sum[0]) / 16, *out = s.out;
        pipeline.template turn<true, false, false>(s, s, s, 0);
        for (int r = 0; r < ROWS; ++r) {
            float *low = local.scores[0][0] + 16 * r, *high = low + ROWS * 16, *sum = s.sum + 16 * r;
            const __m512 none = _mm512_set1_ps(-INFINITY);
            const __m512 x = _mm512_mask_mul_ps(none, s.low, _mm512_load_ps(low), pipeline.scale);
            const __m512 y = _mm512_mask_mul_ps(none, s.high, _mm512_load_ps(high), pipeline.scale);
            const float largest = _mm512_reduce_max_ps(_mm512_max_ps(x, y));
            if (largest > most[r] + SLACK) {
                const __m512 shrink = _mm512_set1_ps(exp2f(most[r] - largest));
                most[r] = largest;
                _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), shrink));
                for (int i = 0; i < Packed<K>::N; ++i) {
                    float* values = out + (i * ROWS + r) * 16;
                    _mm512_store_ps(values, _mm512_mul_ps(_mm512_load_ps(values), shrink));
                }
            }
            const __m512 p = exp2(_mm512_sub_ps(x, _mm512_set1_ps(most[r])), s.low);
            const __m512 q = exp2(_mm512_sub_ps(y, _mm512_set1_ps(most[r])), s.high);
            _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(p, q)));
            _mm512_store_si512(local.weights[0] + 32 * r, narrow(p, q));
        }
        Step alone = s;
        alone.zero = false;
        alone.load = alone.store = true;
        pipeline.template turn<false, false, true>(s, s, alone, 0);
    }
}

// Whether the sums of 16 rows, of which so many exist, are such that nothing overflowed and nothing that counts vanished.
INLINE bool in_range(__m512 sums, int64_t rows) {
    const __mmask16 enough = _mm512_cmp_ps_mask(sums, _mm512_set1_ps(LEAST_SUM), _CMP_GT_OQ);
    const __mmask16 right = _mm512_mask_cmp_ps_mask(enough, sums, _mm512_set1_ps(MOST_SUM), _CMP_LT_OQ);
    return (~right & first_lanes(rows)) == 0;
}

// Results of 16 rows over their sums, in the place of their queries, and the logarithms of the sums.
template <int K>
void conclude(
    const Attention& a, const Group& group, const Local<K>& local, const Packed<K>& to, int head, int64_t first,
    int64_t tile
) {
    const __m512 sums = totals(local.sum[tile * ROWS]);
    alignas(64) float inverse[ROWS], lse[ROWS];
    _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1), sums));
    _mm512_store_ps(lse, _mm512_fmadd_ps(_mm512_load_ps(local.most + tile * ROWS), _mm512_set1_ps(LN2), log(sums)));
    const int64_t query = first + tile * ROWS, rows = smaller(ROWS, group.queries.length - query);
    float* to_lse = a.lse + head * a.q_rows + group.queries.begin + query;
    for (int r = 0; r < rows; ++r) to_lse[r] = lse[r];
    for (int c = 0; c < K; ++c)
        for (int r = 0; r < ROWS; ++r) {
            const float* from = local.out[tile][2 * c] + 16 * r;
            const __m512 factor = _mm512_set1_ps(inverse[r]);
            const __m512 low = _mm512_load_ps(from), high = _mm512_load_ps(from + ROWS * 16);
            _mm512_store_si512(
                to.q + (query / ROWS * K + c) * TILE + 64 * r,
                narrow(_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor))
            );
        }
}

// Results from the place of their queries, again row by row.
template <int K>
void finish_queries(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    for (int64_t i = first; i < last; ++i) {
        uint16_t* row = static_cast<uint16_t*>(a.out) + (group.queries.begin + i) * a.heads * a.head_dim;
        for (int head = heads.first; head < heads.last; ++head) {
            const char* from = Packed<K>(group, head - heads.first, tiles).q + i / ROWS * K * TILE + i % ROWS * 64;
            for (int c = 0; c < K; ++c)
                store_part(row + head * a.head_dim + 32 * c, _mm512_load_si512(from + c * TILE), a.head_dim - 32 * c);
        }
    }
}

template <int K>
void run(
    const Attention& a, const Group& group, int head, int64_t first, int64_t last, char* tiles, char* memory, Turns
) {
    Local<K>& local = *reinterpret_cast<Local<K>*>(memory);
    const TilesInUse in_use;
    const int64_t rows = last - first, padded = round_up(rows, ROWS);
    const Steps<K> steps = {
        {group, 0, tiles}, local, first, padded / ROWS, group.keys.length, units_of(group.keys),
    };
    const int64_t tiles_used = steps.tiles;
    memset(local.most, 0, sizeof local.most);
    memset(local.sum, 0, padded * sizeof local.sum[0]);
    run_fast(steps, a.softmax_scale * LOG2E);
    bool good = true;
    for (int64_t t = 0; t < tiles_used; ++t) good &= in_range(totals(local.sum[t * ROWS]), rows - t * ROWS);
    if (!good) {
        for (float& most : local.most) most = -FLT_MAX;  // of keys whose scores are all infinite, too
        memset(local.sum, 0, padded * sizeof local.sum[0]);
        memset(local.out, 0, tiles_used * sizeof local.out[0]);
        run_safe(steps, a.softmax_scale * LOG2E);
    }
    for (int64_t t = 0; t < tiles_used; ++t) conclude(a, group, local, steps.from, head, first, t);
}

template <int K>
constexpr Kernel kernel() {
    const Pass pack = {pack_queries<K>, pack_keys<K>}, finish = {finish_queries<K>, nullptr};
    return {UNIT, BLOCK, false, tile_bytes<K>, local_bytes<K>, pack, {}, run<K>, finish};
}

}  // namespace

constexpr Kernel forward[HEAD_WIDTHS] = {kernel<1>(), kernel<2>(), kernel<3>(), kernel<4>()};
static_assert(forward[HEAD_WIDTHS - 1].unit, "a kernel for every width");

}  // namespace amx
