// Products of rows with a packed weight, in bfloat16 on AMX.
//
// A block of rows is packed into tiles that stay in the second cache, and meets the weight panel by panel of 32
// columns. A job is 32 rows x 32 columns x CHUNK tiles of the inner width: the panel's part stays in the first cache
// while all rows of the block pass. Sums go to memory between the first products of the next job. While one panel is
// multiplied, the one before is finished (bias, GELU, rounding), some rows in each step, by vector units that would
// wait otherwise.
//
// The hidden rows of two layers are written as tiles, and never leave the second cache.
#include <omp.h>

#include "linear.h"
#include "linear_results_amx.h"
#include "tiles_amx.h"

namespace amx {
namespace {

const int CHUNK = 12;  // steps: 24 KiB of a panel
const int64_t SUMS = 4 * TILE;  // bytes of a job's sums
const int64_t CACHED = 1 << 20;  // bytes of a block's rows, beside which weights pass through the second cache
const int64_t MOST_ROWS = 512, MOST_HIDDEN = 320;  // of a block; fewer where each touches pages of three tensors
const int64_t SECTION = 2048, MOST_COLUMNS = 192;  // rows of tensors, and of the gradient of a weight, in a block of it

// At least one: a width of nothing is one of zeros, whose products are zeros.
int64_t steps_of(int64_t width) { return width ? round_up(width, PANEL) / PANEL : 1; }

// A panel of which all sums are there: its rows are finished one after the other.
template <typename To>
struct Panel {
    const To to;
    const float* sums = nullptr;
    __m512 low = _mm512_setzero_ps(), high = low;  // the bias
    int64_t panel = 0, row = 0, rows = 0;

    INLINE void finish_until(int64_t last) {
        for (; row < last; ++row) {
            const float* from = sums + row / UNIT * (SUMS / 4) + row % UNIT / ROWS * 512 + row % ROWS * 16;
            const __m512 x = _mm512_add_ps(_mm512_load_ps(from), low);
            to.put(row, panel, x, _mm512_add_ps(_mm512_load_ps(from + 256), high));
        }
    }
};

// What is multiplied: `steps` of 32 rows by 32 columns. `sums` is where they go, after those of the job before.
struct Job {
    const char *a, *b;
    int64_t steps;
    float *before, *sums;
    bool first;  // of its sums
    const char* ahead;  // what will be read later, so many lines of it in a step
    int64_t lines;
};

template <int T>
INLINE void begin(const Job& job) {
    tile_store<T>(job.before + T * 256);
    if (job.first)
        tile_zero<T>();
    else
        tile_load<T>(job.sums + T * 256);
}

// A job, while its panel's predecessor is finished up to a row.
template <typename P>
INLINE void run(const Job& job, P& panel, int64_t last) {
    const int64_t row = panel.row;
    for (int64_t s = 0; s < job.steps; ++s) {
        const char *a = job.a + s * STEP, *b = job.b + s * STEP;
        tile_stream<4>(a);
        tile_load<6>(b);
        if (s == 0) begin<0>(job);
        tile_multiply<0, 4, 6>();
        tile_load<7>(b + TILE);
        if (s == 0) begin<1>(job);
        tile_multiply<1, 4, 7>();
        tile_stream<5>(a + TILE);
        if (s == 0) begin<2>(job);
        tile_multiply<2, 5, 6>();
        if (s == 0) begin<3>(job);
        tile_multiply<3, 5, 7>();
        for (int64_t i = 0; i < job.lines; ++i) _mm_prefetch(job.ahead + (s * job.lines + i) * 64, _MM_HINT_T1);
        panel.finish_until(row + (last - row) * (s + 1) / job.steps);
    }
}

// What rows are multiplied with: of each 32 columns, so many steps in tiles.
struct Weight {
    const char* tiles;
    const float* bias;
    int64_t columns, steps, stride;  // the latter: bytes from 32 columns to the next

    explicit Weight(const Layer& layer)
        : tiles(static_cast<const char*>(layer.tiles)), bias(layer.bias), columns(layer.columns),
          steps(steps_of(layer.inner)), stride(steps * STEP) {}
    Weight(const char* tiles, int64_t columns, int64_t steps, int64_t stride)
        : tiles(tiles), bias(nullptr), columns(columns), steps(steps), stride(stride) {}
};

// All columns of so many rows, which are given in tiles.
template <typename To>
void multiply(const Weight& weight, int64_t rows, const char* a, float* memory, To to) {
    const int64_t steps = weight.steps, units = round_up(rows, UNIT) / UNIT, unit = steps * STEP;
    const int64_t jobs = round_up(steps, CHUNK) / CHUNK * units, lines = round_up(PANEL, units) / units;
    float *sums = memory, *other = memory + units * (SUMS / 4), *before = sums;
    Panel<To> done = {to};
    for (int64_t p = 0; p < steps_of(weight.columns); ++p) {
        const char *b = weight.tiles + p * weight.stride, *ahead = b + weight.stride;
        int64_t job = 0;
        for (int64_t s = 0; s < steps; s += CHUNK)
            for (int64_t u = 0; u < units; ++u) {
                const int64_t count = smaller(CHUNK, steps - s);
                float* own = sums + u * (SUMS / 4);
                ++job;
                run(Job{a + u * unit + s * STEP, b + s * STEP, count, before, own, s == 0, ahead, lines}, done,
                    done.rows * job / jobs);
                before = own;
                ahead += count * lines * 64;
            }
        const int64_t left = weight.columns - p * PANEL;
        done.sums = sums;
        done.panel = p;
        done.row = 0;
        done.rows = rows;
        if (weight.bias) {
            done.low = _mm512_maskz_loadu_ps(first_lanes(left), weight.bias + p * PANEL);
            done.high = _mm512_maskz_loadu_ps(first_lanes(left - 16), weight.bias + p * PANEL + 16);
        }
        sums = other;
        other = const_cast<float*>(done.sums);
    }
    repeat<4>([&](auto i) { tile_store<i.value>(before + i.value * 256); });
    done.finish_until(rows);
}

void pack_rows(const uint16_t* x, int64_t rows, int64_t width, char* to) {
    const int64_t steps = steps_of(width), TOGETHER = 8;
    for (int64_t first = 0; first < rows; first += UNIT, to += steps * STEP)
        for (int64_t s = 0; s < steps; s += TOGETHER)
            for (int64_t r = 0; r < UNIT; ++r)
                for (int64_t i = s; i < smaller(s + TOGETHER, steps); ++i)
                    _mm512_store_si512(
                        to + i * STEP + r * 64,
                        first + r < rows ? load_part(x + (first + r) * width + i * 32, width - i * 32)
                                         : _mm512_setzero_si512()
                    );
}

// 32 x 32 of a matrix, of which rows and columns beyond its last are zero.
INLINE void load_square(
    const uint16_t* matrix, int64_t height, int64_t width, int64_t row, int64_t column, __m512i* rows
) {
    for (int64_t i = 0; i < 32; ++i)
        rows[i] = row + i < height ? load_part(matrix + (row + i) * width + column, width - column)
                                   : _mm512_setzero_si512();
}

// Columns first to last of gradients (R, D), in `steps` of 32 rows from the first one on, as rows in tiles; and their
// sums over the rows, to `sums` or added to them. Row by row through all columns: rows lie pages apart.
void pack_columns(
    const uint16_t* grad, int64_t height, int64_t width, int64_t row, int64_t steps, int64_t first, int64_t last,
    char* to, float* sums, bool add
) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    const int64_t panels = round_up(last - first, PANEL) / PANEL;
    __m512 total[MOST_COLUMNS / 16];
    for (int64_t i = 0; i < 2 * panels; ++i)
        total[i] = add ? _mm512_maskz_loadu_ps(first_lanes(last - first - 16 * i), sums + first + 16 * i)
                       : _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s)
        for (int64_t p = 0; p < panels; ++p) {
            __m512i rows[32];
            load_square(grad, height, width, row + s * 32, first + p * PANEL, rows);
            char* tiles = to + (p * steps + s) * STEP;
            pack_pairs(rows, tiles);
            for (int64_t i = 0; i < 2; ++i) {
                __m512 parts[4] = {};  // each sum waits for the one before it
                for (int64_t r = 0; r < ROWS; ++r)
                    parts[r % 4] = _mm512_dpbf16_ps(
                        parts[r % 4], (__m512bh)_mm512_load_si512(tiles + i * TILE + r * 64), ones
                    );
                const __m512 sum = _mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3]));
                total[2 * p + i] = _mm512_add_ps(total[2 * p + i], sum);
            }
            transpose_tile(tiles);
            transpose_tile(tiles + TILE);
        }
    for (int64_t i = 0; i < 2 * panels; ++i)
        _mm512_mask_storeu_ps(sums + first + 16 * i, first_lanes(last - first - 16 * i), total[i]);
}

// How the gradient of a weight is divided, and a thread's memory in bytes: a block is some of its rows, and SECTION rows of
// the tensors.
struct GradientBlocks {
    int64_t size, count, shared, tiles, total;

    explicit GradientBlocks(const WeightGradient& g) {
        count = round_up((g.columns + MOST_COLUMNS - 1) / MOST_COLUMNS, g.threads);
        size = count ? round_up((g.columns + count - 1) / count, UNIT) : 0;
        shared = steps_of(g.rows) * steps_of(g.inner) * STEP;
        tiles = size * smaller(SECTION, steps_of(g.rows) * UNIT) * 2;
        total = tiles + size / UNIT * 2 * SUMS;
    }
};

// How rows are divided, and a thread's memory in bytes: tiles of its rows, of the hidden ones, and sums.
struct Blocks {
    int64_t size, count, tiles, hidden, total;

    explicit Blocks(const Product& p) {
        const int64_t wide = steps_of(p.first.inner) * 64, inner = p.second.tiles ? steps_of(p.first.columns) * 64 : 0;
        const int64_t most = CACHED / (wide > inner ? wide : inner) / UNIT * UNIT;
        const int64_t rows = most < UNIT ? UNIT : smaller(most, p.active ? MOST_HIDDEN : MOST_ROWS);
        count = round_up(p.rows / rows + 1, p.threads);
        size = round_up((p.rows + count - 1) / count, UNIT);
        tiles = size * wide;
        hidden = size * inner;
        total = tiles + hidden + size / UNIT * 2 * SUMS;
    }
};

}  // namespace

void pack_weight(const void* weight, void* tiles, int64_t inner, int64_t columns, bool transposed, int32_t threads) {
    const uint16_t* w = static_cast<const uint16_t*>(weight);
    const int64_t steps = steps_of(inner);
    const int64_t height = transposed ? inner : columns, width = transposed ? columns : inner;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < steps_of(height) * 32; row += 32)
        for (int64_t column = 0; column < steps_of(width) * 32; column += 32) {
            const int64_t panel = (transposed ? column : row) / 32, step = (transposed ? row : column) / 32;
            char* to = static_cast<char*>(tiles) + (panel * steps + step) * STEP;
            __m512i rows[32];
            load_square(w, height, width, row, column, rows);
            if (transposed) {
                pack_pairs(rows, to);
            } else {
                pack_transposed(rows, to);
                pack_transposed(rows + 16, to + TILE);
            }
        }
}

int64_t product_scratch(const Product& p) { return Blocks(p).total * p.threads; }

void product(const Product& p) {
    const Blocks blocks(p);
    const Layer& last = p.second.tiles ? p.second : p.first;
    const Matrix y(p.y, p.rows, last.columns), hidden(p.hidden, p.rows, p.first.columns);
    const Matrix active(p.active, p.rows, p.first.columns);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t first = b * blocks.size, rows = smaller(blocks.size, p.rows - first);
        if (rows <= 0) continue;
        char* tiles = static_cast<char*>(p.scratch) + omp_get_thread_num() * blocks.total;
        char* inside = tiles + blocks.tiles;
        float* sums = reinterpret_cast<float*>(inside + blocks.hidden);
        const TilesInUse in_use;
        pack_rows(static_cast<const uint16_t*>(p.x) + first * p.first.inner, rows, p.first.inner, tiles);
        if (p.second.tiles) {
            const ToTiles to = {inside, steps_of(p.first.columns) * STEP, hidden, first};
            multiply(Weight(p.first), rows, tiles, sums, to);
            tiles = inside;
        }
        if (p.active)
            multiply(Weight(last), rows, tiles, sums, ToHidden{y, active, hidden, first});
        else if (p.gelu)
            multiply(Weight(last), rows, tiles, sums, ToRows<true>{y, first});
        else
            multiply(Weight(last), rows, tiles, sums, ToRows<false>{y, first});
        _mm_sfence();  // after what is written around the caches
    }
}

int64_t weight_gradient_scratch(const WeightGradient& g) {
    const GradientBlocks blocks(g);
    return blocks.shared + blocks.total * g.threads;
}

void weight_gradient(const WeightGradient& g) {
    const GradientBlocks blocks(g);
    char* memory = static_cast<char*>(g.scratch);
    const int64_t steps = steps_of(g.rows), stride = steps * STEP;
    pack_weight(g.x, memory, g.rows, g.inner, true, g.threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(g.threads)
    for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t first = b * blocks.size, last = smaller(first + blocks.size, g.columns);
        if (first >= last) continue;
        char* tiles = memory + blocks.shared + omp_get_thread_num() * blocks.total;
        float* sums = reinterpret_cast<float*>(tiles + blocks.tiles);
        const TilesInUse in_use;
        for (int64_t s = 0; s < steps; s += SECTION / 32) {
            const int64_t count = smaller(SECTION / 32, steps - s);
            const bool add = g.add || s > 0;
            pack_columns(
                static_cast<const uint16_t*>(g.grad), g.rows, g.columns, s * 32, count, first, last, tiles, g.bias, add
            );
            const ToSums to = {g.weight + first * g.inner, g.inner, add};
            multiply(Weight(memory + s * STEP, g.inner, count, stride), last - first, tiles, sums, to);
        }
    }
}

}  // namespace amx
