// Norms and GELU on vectors of whatever width this file is compiled for. All sums are of float32, in an order that the
// shapes alone decide.
#include <stdlib.h>

#include "norm_gelu.h"
#include "simd.h"

namespace NORM_GELU_ISA {
namespace {

const int MOST = 4096;  // columns of a row that a thread keeps on its stack; wider ones take the heap

// The last elements of a row, less than a vector of them; the others are `rest`.
template <typename T>
inline vec load_part(const T* p, int64_t count, float rest = 0) {
    T lanes[WIDTH];
    for (int i = 0; i < WIDTH; ++i) lanes[i] = i < count ? p[i] : T(0);
    vec x = load(lanes);
    for (int i = 0; i < WIDTH; ++i)
        if (i >= count) x[i] = rest;
    return x;
}
template <typename T>
inline void store_part(T* p, int64_t count, vec x) {
    T lanes[WIDTH];
    store(lanes, x);
    for (int i = 0; i < WIDTH; ++i)
        if (i < count) p[i] = lanes[i];
}

// A row of `columns` elements, vector by vector: f(first column, elements in it, which is WIDTH but at the end).
template <typename F>
inline __attribute__((always_inline)) void each_vector(int64_t columns, F f) {
    int64_t c = 0;
    for (; c + WIDTH <= columns; c += WIDTH) f(c, int64_t(WIDTH));
    if (c < columns) f(c, columns - c);
}
template <typename T>
inline vec get(const T* p, int64_t count, float rest = 0) {
    return count == WIDTH ? load(p) : load_part(p, count, rest);
}
template <typename T>
inline void put(T* p, int64_t count, vec x) {
    if (count == WIDTH)
        store(p, x);
    else
        store_part(p, count, x);
}

// Rows of float32 that a thread works on, rounded up to whole vectors.
struct Buffer {
    float own[MOST];
    float* row;

    explicit Buffer(int64_t columns) : row(columns <= MOST - WIDTH ? own : static_cast<float*>(malloc((columns + WIDTH) * sizeof(float)))) {}
    ~Buffer() {
        if (row != own) free(row);
    }
    Buffer(const Buffer&) = delete;
};

// The group of one level that a row lies in, of rows numbered without the `prefix` rows in front of every group.
struct Place {
    const int32_t* bounds;  // null if rows are in no groups
    int64_t groups, prefix, group = 0, end = 0;  // end: of the group

    Place(const int32_t* bounds, int64_t groups, int64_t prefix) : bounds(bounds), groups(groups), prefix(prefix) {}

    int64_t begin_of(int64_t g) const { return bounds[g] - g * prefix; }

    void find(int64_t number) {
        int64_t high = groups;
        group = 0, end = INT64_MAX;
        while (high - group > 1) {
            const int64_t middle = group + (high - group) / 2;
            (begin_of(middle) <= number ? group : high) = middle;
        }
        if (bounds) end = begin_of(group + 1);
    }
    void advance(int64_t number) {
        while (end <= number) end = begin_of(++group + 1);
    }
    int64_t row(int64_t number) const { return number + (group + 1) * prefix; }
};

// Where the rows of both levels lie, and what is done in which block.
struct Rows {
    const Norm& n;
    const bool coarser;  // whether dst is the coarser level
    const int64_t coarse;  // its groups
    const int32_t *coarse_rows, *fine_rows;  // bounds of groups
    int64_t prefix;  // rows that change level, of each group
    int64_t prefix_blocks, prefix_size, rows, row_blocks, row_size;

    // Of two levels with as many groups each is as good as the other: every mean is of one row.
    explicit Rows(const Norm& n)
        : n(n), coarser(n.dst_groups <= n.src_groups), coarse(coarser ? n.dst_groups : n.src_groups),
          coarse_rows(coarser ? n.dst : n.src), fine_rows(coarser ? n.src : n.dst) {
        prefix = n.children ? n.num_prefix : 0;
        rows = n.tokens + (n.children ? 0 : int64_t(n.src_groups) * n.num_prefix);
        prefix_blocks = n.children ? blocks_of(coarse, 1) : 0, prefix_size = block_of(coarse, 1);
        row_blocks = blocks_of(rows, 32), row_size = block_of(rows, 32);
    }

    // Rows that only move: f(block, row of src, row of dst, group of src); prefix rows that change level: g(block, coarse
    // group, prefix place). The thread that has a block does all of it, in order.
    template <typename F, typename G>
    void visit(F f, G g) const {
#pragma omp parallel num_threads(n.threads)
        {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t b = 0; b < prefix_blocks; ++b)
                for (int64_t c = b * prefix_size; c < coarse && c < (b + 1) * prefix_size; ++c)
                    for (int32_t p = 0; p < n.num_prefix; ++p) g(b, c, p);
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < row_blocks; ++b) {
                const int64_t last = (b + 1) * row_size < rows ? (b + 1) * row_size : rows;
                Place src(n.src, n.src_groups, prefix), dst(n.dst, n.dst_groups, prefix);
                int64_t r = b * row_size;
                src.find(r);
                dst.find(r);
                while (r < last) {
                    src.advance(r);
                    dst.advance(r);
                    int64_t stop = src.end < dst.end ? src.end : dst.end;
                    if (last < stop) stop = last;
                    for (int64_t from = src.row(r), to = dst.row(r); r < stop; ++r)
                        f(prefix_blocks + b, from++, to++, src.group);
                }
            }
        }
    }
};

template <typename T, typename U>
struct Forward {
    const Norm& n;
    const int64_t width;
    const T* residual;
    const U* update;

    explicit Forward(const Norm& n)
        : n(n), width(n.width), residual(static_cast<const T*>(n.residual)), update(static_cast<const U*>(n.update)) {}

    // residual + path_scale * layer_scale * update of a row of src, to `sum` or added to it.
    void add(int64_t row, int32_t group, bool first, float* sum) const {
        const T* r = residual + row * width;
        const U* u = update + (update ? row * width : 0);
        const vec path = fill(n.path_scale ? n.path_scale[group] : 1);
        each_vector(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            vec more = get(r + c, count);
            if (update) {
                vec scaled = get(u + c, count) * path;
                if (n.layer_scale) scaled *= get(n.layer_scale + c, count);
                more += scaled;
            }
            store(sum + c, first ? more : load(sum + c) + more);
        });
    }

    // Writes a row of dst: the residual, which is `sum` times `factor`, and normalised.
    void write(int64_t row, float* sum, float factor) const {
        T* x = static_cast<T*>(n.x) + (n.x ? row * width : 0);
        U* y = static_cast<U*>(n.y) + row * width;
        vec total = {}, squares = {};
        each_vector(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            vec value = load(sum + c) * factor;
            if (n.x) {
                put(x + c, count, value);
                value = get(x + c, count);  // as it was rounded
                store(sum + c, value);
            }
            total += value;
        });
        const float mean = sum_of(total) / width;
        each_vector(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            const vec centred = get(sum + c, count, mean) - mean;
            store(sum + c, centred);
            squares += centred * centred;
        });
        const float rstd = 1 / sqrtf(sum_of(squares) / width + n.eps);
        each_vector(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            put(y + c, count, load(sum + c) * rstd * get(n.weight + c, count) + get(n.bias + c, count));
        });
        if (!n.x) return;
        n.mean[row] = mean;
        n.rstd[row] = rstd;
    }

    void run() const {
        const Rows rows(n);
        rows.visit(
            [&](int64_t, int64_t src, int64_t dst, int32_t group) {
                Buffer sum(width);
                add(src, group, true, sum.row);
                write(dst, sum.row, 1);
            },
            [&](int64_t, int64_t coarse, int32_t place) {
                Buffer sum(width);
                const int32_t first = n.children[coarse], last = n.children[coarse + 1];
                const int64_t own = rows.coarse_rows[coarse] + place;
                if (!rows.coarser) add(own, coarse, true, sum.row);
                for (int32_t fine = first; fine < last; ++fine) {
                    const int64_t row = rows.fine_rows[fine] + place;
                    if (rows.coarser) {
                        add(row, fine, fine == first, sum.row);
                    } else {
                        Buffer copy(width);
                        memcpy(copy.row, sum.row, (width + WIDTH - 1) / WIDTH * WIDTH * sizeof(float));
                        write(row, copy.row, 1);
                    }
                }
                if (rows.coarser) write(own, sum.row, 1.0f / (last - first));
            }
        );
    }
};

template <typename T, typename U>
struct Backward {
    const Norm& n;
    const int64_t width;

    explicit Backward(const Norm& n) : n(n), width(n.width) {}

    float* sums(int64_t block) const { return n.partial + block * 3 * width; }

    // The gradient of a row of dst before it was normalised, to `sum` or added to it.
    void add(int64_t block, int64_t row, bool first, float* sum) const {
        const T* x = static_cast<const T*>(n.x) + row * width;
        const T* grad_x = static_cast<const T*>(n.grad_x) + (n.grad_x ? row * width : 0);
        const U* grad_y = static_cast<const U*>(n.grad_y) + row * width;
        float* weights = sums(block);
        float* biases = weights + width;
        const float mean = n.mean[row], rstd = n.rstd[row];
        vec total = {}, projected = {};
        each_vector(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            const vec grad = get(grad_y + c, count), normal = (get(x + c, count) - mean) * rstd;
            put(weights + c, count, get(weights + c, count) + grad * normal);
            put(biases + c, count, get(biases + c, count) + grad);
            const vec scaled = grad * get(n.weight + c, count);
            total += scaled;
            projected += scaled * normal;
        });
        const float shift = sum_of(total) / width, slope = sum_of(projected) / width;
        each_vector(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            const vec normal = (get(x + c, count) - mean) * rstd;
            vec grad = (get(grad_y + c, count) * get(n.weight + c, count) - shift - normal * slope) * rstd;
            if (n.grad_x) grad += get(grad_x + c, count);
            store(sum + c, first ? grad : load(sum + c) + grad);
        });
    }

    // Writes a row of src: the gradients of residual and update, from `sum` times `factor`.
    void write(int64_t block, int64_t row, int32_t group, const float* sum, float factor) const {
        T* residual = static_cast<T*>(n.grad_residual) + row * width;
        U* grad_update = static_cast<U*>(n.grad_update) + (n.grad_update ? row * width : 0);
        const U* update = static_cast<const U*>(n.update) + (n.layer_scale ? row * width : 0);
        float* scales = sums(block) + 2 * width;
        const vec path = fill(n.path_scale ? n.path_scale[group] : 1);
        each_vector(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            vec grad = load(sum + c) * factor;
            put(residual + c, count, grad);
            if (!n.grad_update) return;
            grad *= path;
            if (n.layer_scale) {
                put(scales + c, count, get(scales + c, count) + grad * get(update + c, count));
                grad *= get(n.layer_scale + c, count);
            }
            put(grad_update + c, count, grad);
        });
    }

    void run() const {
        const Rows rows(n);
        const int64_t blocks = rows.prefix_blocks + rows.row_blocks;
        memset(n.partial, 0, blocks * 3 * width * sizeof(float));
        rows.visit(
            [&](int64_t block, int64_t src, int64_t dst, int32_t group) {
                Buffer sum(width);
                add(block, dst, true, sum.row);
                write(block, src, group, sum.row, 1);
            },
            [&](int64_t block, int64_t coarse, int32_t place) {
                Buffer sum(width);
                const int32_t first = n.children[coarse], last = n.children[coarse + 1];
                const int64_t own = rows.coarse_rows[coarse] + place;
                if (rows.coarser) add(block, own, true, sum.row);
                for (int32_t fine = first; fine < last; ++fine) {
                    const int64_t row = rows.fine_rows[fine] + place;
                    if (rows.coarser)
                        write(block, row, fine, sum.row, 1.0f / (last - first));
                    else
                        add(block, row, fine == first, sum.row);
                }
                if (!rows.coarser) write(block, own, coarse, sum.row, 1);
            }
        );
        // Block by block, so that sums do not depend on who makes them.
#pragma omp parallel for schedule(static) num_threads(n.threads)
        for (int64_t c = 0; c < 3 * width; c += 64) {
            const int64_t count = c + 64 < 3 * width ? 64 : 3 * width - c;
            float total[64] = {};
            for (int64_t b = 0; b < blocks; ++b)
                for (int64_t i = 0; i < count; ++i) total[i] += n.partial[b * 3 * width + c + i];
            memcpy(n.sums + c, total, count * sizeof(float));
        }
    }
};

inline vec reciprocal(vec x) {  // to a unit in the last place or two
#if defined(__AVX512F__)
    const vec guess = (vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// Phi(x), the standard normal distribution, and e^(-x^2 / 2).
//
// With a = |x|, Phi(-a) e^(a^2 / 2) is a polynomial in 1 / (1 + 0.3 a) whose relative error is below 6e-8 up to a = 14,
// beyond which e^(-a^2 / 2) is zero in float32. Both tails are thus exact to rounding.
inline vec normal(vec x, vec* bell) {
    const vec size = (vec)((ivec)x & 0x7fffffff), a = size < 14.0f ? size : fill(14);
    const vec t = reciprocal(1.0f + 0.3f * a);
    const vec e = exponential(-0.5f * x * x);
    vec q = fill(3.83787884e-02f);
    q = q * t - 1.69168419e-01f;
    q = q * t + 2.28664585e-01f;
    q = q * t - 7.65113038e-02f;
    q = q * t + 1.42538617e-01f;
    q = q * t + 9.46823144e-02f;
    q = q * t + 1.21920622e-01f;
    q = q * t + 1.19487654e-01f;
    q = q * t + 7.17070149e-06f;
    const vec tail = q * e;
    *bell = e;
    return x > 0.0f ? 1.0f - tail : tail;
}

template <typename T>
void gelu_of(const Gelu& g) {
    const T* x = static_cast<const T*>(g.x);
    T* y = static_cast<T*>(g.y);
    T* grad = static_cast<T*>(g.grad);
    const int64_t chunk = 4096;
#pragma omp parallel for schedule(static) num_threads(g.threads)
    for (int64_t first = 0; first < g.size; first += chunk)
        each_vector(
            first + chunk < g.size ? chunk : g.size - first,
            [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                i += first;
                vec bell;
                const vec value = get(x + i, count), phi = normal(value, &bell);
                put(y + i, count, value * phi);
                put(grad + i, count, get(grad + i, count) * (phi + value * bell * 0.398942280f));
            }
        );
}

}  // namespace

void norm(const Norm& n, bool backward) {
    switch (backward * 4 + (n.bfloat16_x != 0) * 2 + (n.bfloat16_y != 0)) {
        case 0: return Forward<float, float>(n).run();
        case 1: return Forward<float, bf16>(n).run();
        case 2: return Forward<bf16, float>(n).run();
        case 3: return Forward<bf16, bf16>(n).run();
        case 4: return Backward<float, float>(n).run();
        case 5: return Backward<float, bf16>(n).run();
        case 6: return Backward<bf16, float>(n).run();
        default: return Backward<bf16, bf16>(n).run();
    }
}

void gelu(const Gelu& g) { g.bfloat16 ? gelu_of<bf16>(g) : gelu_of<float>(g); }

}  // namespace NORM_GELU_ISA
