// Backward attention in bfloat16 on AMX.
//
// Everything is transposed: rows of tiles are keys, columns are queries. Then the weights and the gradients of scores are
// left matrices for grad_v and grad_k as they come, and what belongs to a query - its lse and delta - is a vector.
// A step is 32 keys x 32 queries. The products of steps before and after it run between the rows of its softmax.
#include <float.h>

#include "attention_backward_jobs_amx.h"
#include "attention_backward_pack_amx.h"
#include "attention_kernels.h"

namespace amx {
namespace {

const int UNITS = 4;  // of keys and of queries in a block
const int BLOCK = UNITS * UNIT;

// A thread's own memory.
template <int K>
struct Local {
    alignas(64) float scores[2][QUAD], grads[2][QUAD];  // of two steps: [tile of keys][tile of queries]
    // Weights and gradients of scores of two units of keys, plain: [unit of queries][tile of keys]
    alignas(64) char weights[2][UNITS][2 * TILE], score_grads[2][UNITS][2 * TILE];
    alignas(64) char paired[UNITS][UNITS][2 * TILE];  // gradients of scores: [unit of keys][unit of queries]
    alignas(64) float grad_k[UNITS][K][QUAD], grad_v[UNITS][K][QUAD];
};

template <int K>
size_t local_bytes(const Attention&) {
    return sizeof(Local<K>);
}

template <int K>
Job scores_of(const Packed<K>& from, int64_t keys, int64_t queries, float* to) {
    const int64_t key = keys * Packed<K>::MATRIX, query = queries * Packed<K>::MATRIX;
    return {from.k + key, K * TILE, TILE, from.q_columns + query, TILE, 2 * TILE, K, to, true};
}

template <int K>
void refine(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const __m512 scale = _mm512_set1_ps(a.softmax_scale * LOG2E);
    const __m512 sign = _mm512_set1_ps(a.softmax_scale < 0 ? -1 : 1);
    for (int head = heads.first; head < heads.last; ++head)
        for (int64_t query = first; query < last; query += UNIT) {
            const Packed<K> to(group, head - heads.first, tiles);
            bool coarse = false;
            for (int64_t i = query; i < smaller(query + UNIT, last); ++i) coarse |= fabsf(to.lse[i]) > LARGE_LSE;
            if (!coarse) continue;
            const TilesInUse in_use;
            alignas(64) float scores[QUAD];
            __m512 most[2], sum[2] = {};  // of 16 queries each
            for (__m512& largest : most) largest = _mm512_set1_ps(-FLT_MAX);
            for (int summing = 0; summing < 2; ++summing)
                for (int64_t key = 0; key < group.keys.length; key += UNIT) {
                    Machine machine;
                    machine.run(scores_of(to, key / UNIT, query / UNIT, scores));
                    machine.store();
                    for (int r = 0; r < smaller(UNIT, group.keys.length - key); ++r)
                        for (int j = 0; j < 2; ++j) {
                            const __m512 s = _mm512_load_ps(scores + r / ROWS * 2 * ROWS * 16 + r % ROWS * 16 + j * ROWS * 16);
                            if (summing)
                                sum[j] = _mm512_add_ps(
                                    sum[j], Softmax::weight(s, _mm512_mul_ps(most[j], sign), _mm512_setzero_ps(), scale)
                                );
                            else
                                most[j] = _mm512_max_ps(_mm512_mul_ps(s, sign), most[j]);
                        }
                }
            for (int j = 0; j < 2; ++j) {
                _mm512_store_ps(to.lse + query + 16 * j, _mm512_mul_ps(most[j], sign));
                _mm512_store_ps(to.rest + query + 16 * j, _mm512_mul_ps(log(sum[j]), _mm512_set1_ps(LOG2E)));
            }
            for (int64_t i = last; i < query + UNIT; ++i) to.rest[i] = 1e30f;
        }
}

// One block of keys of one head against all queries.
template <int K>
class Block {
  public:
    Block(const Attention& a, const Group& group, int64_t first, int64_t last, char* tiles, char* memory, Turns turns)
        : from_(group, 0, tiles), local_(*reinterpret_cast<Local<K>*>(memory)), turns_(turns),
          scale_(a.softmax_scale), first_(first / UNIT), keys_(round_up(last - first, UNIT) / UNIT),
          units_(units_of(group.queries)), absent_(round_up(last, UNIT) - last) {}

    void run() {
        const int64_t blocks = (units_ + UNITS - 1) / UNITS;
        score({0, 0, 0}, 0);
        int64_t t = 0;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t queries = queries_of(block);
            for (int64_t i = 0; i < keys_; ++i) {
                for (int64_t j = 0; j < queries; ++j, ++t) step({block, i, j}, t & 1, blocks);
                owed_ = {true, block, i};
            }
        }
        pay_key_sums(1, 1);
        pay_query_sums();
        machine_.store();
        write_keys();
    }

  private:
    struct Place {
        int64_t block, key, query;  // a block of queries; a unit of keys, and of queries in their blocks
    };
    struct Owed {
        bool any;
        int64_t block, key;
    };

    const Packed<K> from_;
    Local<K>& local_;
    const Turns turns_;
    const float scale_;
    const int64_t first_, keys_;  // units of keys: the first, and how many
    const int64_t units_;  // of queries
    const int64_t absent_;  // keys of the last unit that do not exist
    Machine machine_;
    Owed owed_ = {};  // products for grad_k and grad_v of a unit of keys with a block of queries,
    int64_t paid_ = 0;  // and how many of their jobs are done
    Place query_owed_ = {-1, 0, 0};  // products for grad_q of a unit of queries with all keys of the block

    int64_t queries_of(int64_t block) const { return smaller(UNITS, units_ - block * UNITS); }
    static constexpr int64_t MATRIX = Packed<K>::MATRIX;

    void score(Place p, int parity) {
        const int64_t key = (first_ + p.key) * MATRIX, query = (p.block * UNITS + p.query) * MATRIX;
        machine_.run(scores_of(from_, first_ + p.key, p.block * UNITS + p.query, local_.scores[parity]));
        machine_.run({from_.v + key, K * TILE, TILE, from_.g_columns + query, TILE, 2 * TILE, K, local_.grads[parity], true});
    }

    void step(Place p, int parity, int64_t blocks) {
        const int64_t queries = queries_of(p.block), query = (p.block * UNITS + p.query) * UNIT;
        Place next = {p.block, p.key, p.query + 1};
        if (next.query == queries) next = {p.block, p.key + 1, 0};
        if (next.key == keys_) next = {p.block + 1, 0, 0};
        if (next.block == blocks) machine_.store();
        machine_.softmax = {
            0, local_.scores[parity], local_.grads[parity], from_.lse + query, from_.delta + query,
            from_.rest[query] == FINE ? nullptr : from_.rest + query, _mm512_set1_ps(scale_ * LOG2E), local_.weights[buffer_of(p)][p.query],
            local_.score_grads[buffer_of(p)][p.query], local_.paired[p.key][p.query],
        };
        if (next.block < blocks) score(next, parity ^ 1);
        pay_key_sums(p.query + 1, queries);
        pay_query_sums();
        machine_.softmax.advance(UNIT);
        if (p.key == keys_ - 1) {
            if (absent_) clear_absent(p);
            query_owed_ = p;
        }
    }

    // Units of keys take turns with the two buffers, also from one block of queries to the next.
    int buffer_of(Place p) const { return (p.block * keys_ + p.key) & 1; }

    // The share of the jobs for grad_v and grad_k that should be done after `step` of `steps`.
    void pay_key_sums(int64_t step, int64_t steps) {
        if (!owed_.any) return;
        const int64_t key = owed_.key, queries = queries_of(owed_.block);
        const int buffer = buffer_of({owed_.block, key, 0});
        const int64_t unit = owed_.block * UNITS * MATRIX;
        for (const int64_t end = (2 * K * step + steps - 1) / steps; paid_ < end; ++paid_) {
            const int64_t m = paid_ % K;
            const bool of_v = paid_ < K;
            const char* left = of_v ? local_.weights[buffer][0] : local_.score_grads[buffer][0];
            const char* right = (of_v ? from_.g : from_.q) + unit + 2 * m * TILE;
            float* sums = of_v ? local_.grad_v[key][m] : local_.grad_k[key][m];
            machine_.run({left, TILE, 2 * TILE, right, TILE, MATRIX, queries, sums, owed_.block == 0});
        }
        if (step == steps) {
            owed_.any = false;
            paid_ = 0;
        }
    }

    void pay_query_sums() {
        if (query_owed_.block < 0) return;
        const Place p = query_owed_;
        const int64_t turn = first_ / UNITS, unit = p.block * UNITS + p.query;
        if (p.query == 0) turns_.wait(p.block, turn);
        for (int64_t m = 0; m < K; ++m) {
            const char* left = from_.k_columns + first_ * MATRIX + 2 * m * TILE;
            float* sums = from_.grad_q + (unit * K + m) * QUAD;
            machine_.run(
                {left, TILE, MATRIX, local_.paired[0][p.query], TILE, sizeof local_.paired[0], keys_, sums, turn == 0}
            );
        }
        if (p.query == queries_of(p.block) - 1) {
            machine_.store();
            turns_.pass(p.block, turn);
        }
        query_owed_.block = -1;
    }

    // Keys that do not exist have scores of 0, and any weights: they must not count for grad_q.
    void clear_absent(Place p) {
        uint16_t* paired = reinterpret_cast<uint16_t*>(local_.paired[p.key][p.query]);
        for (int64_t key = UNIT - absent_; key < UNIT; ++key)
            for (int n = 0; n < 16; ++n)
                for (int tile = 0; tile < 2; ++tile) paired[tile * TILE / 2 + key / 2 * 32 + 2 * n + key % 2] = 0;
    }

    void write_keys() {
        for (int64_t i = 0; i < keys_; ++i)
            for (int m = 0; m < K; ++m) {
                const int64_t at = (first_ + i) * MATRIX + m * TILE;
                write_unit(local_.grad_k[i][m], scale_, from_.k + at);
                write_unit(local_.grad_v[i][m], 1, from_.v + at);
            }
    }

    static void write_unit(const float* sums, float factor, char* to) {
        const __m512 f = _mm512_set1_ps(factor);
        for (int r = 0; r < UNIT; ++r) {
            const float* from = sums + r / ROWS * 2 * ROWS * 16 + r % ROWS * 16;
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(from), f);
            const __m512 high = _mm512_mul_ps(_mm512_load_ps(from + ROWS * 16), f);
            _mm512_store_si512(to + r / ROWS * K * TILE + r % ROWS * 64, narrow(low, high));
        }
    }
};

template <int K>
void run(
    const Attention& a, const Group& group, int, int64_t first, int64_t last, char* tiles, char* memory, Turns turns
) {
    const TilesInUse in_use;
    Block<K>(a, group, first, last, tiles, memory, turns).run();
}

// 32 columns of grad_q of 16 queries, from two tiles of 16 columns x 16 queries.
INLINE void write_queries(const float* columns, float scale, uint16_t* const* rows, int64_t at, int64_t present) {
    __m512i low[16], high[16];
    for (int d = 0; d < 16; ++d) {
        low[d] = _mm512_load_si512(columns + 16 * d);
        high[d] = _mm512_load_si512(columns + 2 * ROWS * 16 + 16 * d);
    }
    transpose(low, low);
    transpose(high, high);
    const __m512 f = _mm512_set1_ps(scale);
    for (int r = 0; r < ROWS; ++r)
        if (rows[r])
            store_part(
                rows[r] + at,
                narrow(_mm512_mul_ps(_mm512_castsi512_ps(low[r]), f), _mm512_mul_ps(_mm512_castsi512_ps(high[r]), f)),
                present
            );
}

template <int K>
void finish_queries(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim;
    for (int64_t at = first; at < last; at += ROWS) {
        uint16_t* rows[ROWS];
        for (int64_t r = 0, row = group.queries.begin + at; r < ROWS; ++r, ++row)
            rows[r] = at + r < last ? static_cast<uint16_t*>(a.grad_q) + row * a.grad_q_stride : nullptr;
        const int64_t unit = at / UNIT, half = at / ROWS % 2;
        for (int head = heads.first; head < heads.last; ++head) {
            const float* sums = Packed<K>(group, head - heads.first, tiles).grad_q + unit * K * QUAD + half * ROWS * 16;
            for (int c = 0; c < K; ++c)
                write_queries(sums + c * QUAD, a.softmax_scale, rows, head * D + 32 * c, D - 32 * c);
        }
    }
}

template <int K>
void finish_keys(const Attention& a, const Group& group, Heads heads, int64_t first, int64_t last, char* tiles) {
    const int64_t D = a.head_dim;
    for (int64_t i = first; i < last; ++i) {
        const int64_t from = i / ROWS * K * TILE + i % ROWS * 64, to = (group.keys.begin + i) * a.grad_k_stride;
        const auto write = [&](const char* matrix, void* grad, int64_t column) {
            for (int c = 0; c < K; ++c) {
                const __m512i values = _mm512_load_si512(matrix + from + c * TILE);
                store_part(static_cast<uint16_t*>(grad) + to + column + 32 * c, values, D - 32 * c);
            }
        };
        for (int head = heads.first; head < heads.last; ++head)
            write(Packed<K>(group, head - heads.first, tiles).k, a.grad_k, head * D);
        for (int head = heads.first; head < heads.last; ++head)
            write(Packed<K>(group, head - heads.first, tiles).v, a.grad_v, head * D);
    }
}

template <int K>
constexpr Kernel kernel() {
    const Pass pack = {pack_queries<K>, pack_keys<K>}, refined = {refine<K>, nullptr};
    const Pass finish = {finish_queries<K>, finish_keys<K>};
    return {UNIT, BLOCK, true, tile_bytes<K>, local_bytes<K>, pack, refined, run<K>, finish};
}

}  // namespace

constexpr Kernel backward[HEAD_WIDTHS] = {kernel<1>(), kernel<2>(), kernel<3>(), kernel<4>()};
static_assert(backward[HEAD_WIDTHS - 1].unit, "a kernel for every width");

}  // namespace amx
