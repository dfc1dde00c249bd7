// Runs the native library, given by its path, without Python, so that sanitizers see it alone: every tensor is memory
// of its own, of the exact size. Results are compared with the formula in double. Ends with 1 if one is wrong. A second
// argument, "small", leaves all but small attention out, for emulated processors; "last" all instruction sets but the best.
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../hlip_kernels/native/src/attention.h"
#include "../hlip_kernels/native/src/linear.h"
#include "../hlip_kernels/native/src/norm_gelu.h"

using Numbers = std::vector<double>;

static float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// A tensor in memory of its exact size.
struct Tensor {
    bool bfloat16;
    size_t count;
    void* data;

    Tensor(bool bfloat16, size_t count) : bfloat16(bfloat16), count(count), data(malloc(count * (bfloat16 ? 2 : 4))) {}
    Tensor(const Tensor&) = delete;
    float* floats() const { return static_cast<float*>(data); }
    ~Tensor() { free(data); }

    double get(size_t i) const { return bfloat16 ? widen(static_cast<uint16_t*>(data)[i]) : floats()[i]; }
    void set(size_t i, float x) {
        if (bfloat16)
            static_cast<uint16_t*>(data)[i] = narrow(x);
        else
            static_cast<float*>(data)[i] = x;
    }
    Numbers numbers() const {
        Numbers all;
        for (size_t i = 0; i < count; ++i) all.push_back(get(i));
        return all;
    }
    void draw() {
        for (size_t i = 0; i < count; ++i) {
            double sum = -6;  // of twelve uniform numbers: nearly normal
            for (int j = 0; j < 12; ++j) sum += rand() / double(RAND_MAX);
            set(i, sum);
        }
    }
};

static const float UNTOUCHED = 7;  // what results are filled with

// Groups of so many queries and so many keys. Without keys, queries attend to one another, and q, k and v are slots of
// one tensor. In front of every group lie `gap` rows that are in none, and hold NaN; the library is given the rows
// behind the first of these.
struct Case {
    std::vector<int> queries, keys;
    int gap, heads, head_dim;
    float spread = 1;  // of queries
};

// Where groups lie, as the library is told.
struct Bounds {
    std::vector<int32_t> bounds = {0}, used;

    Bounds(const std::vector<int>& lengths, int gap) {
        for (const int length : lengths) {
            bounds.push_back(bounds.back() + gap + length);
            used.push_back(length);
        }
    }
};

// A slot of the rows of a tensor, from its row `first` on.
struct Rows {
    Tensor& tensor;
    int64_t first, count, width, slot, slots;

    void* data() const { return static_cast<char*>(tensor.data) + at(0, 0) * (tensor.bfloat16 ? 2 : 4); }
    int64_t stride() const { return slots * width; }
    size_t at(int64_t row, int64_t column) const { return ((first + row) * slots + slot) * width + column; }
    Numbers numbers() const {
        Numbers all;
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; i < width; ++i) all.push_back(tensor.get(at(row, i)));
        return all;
    }
    // Random numbers, times `spread`, into the rows of groups.
    void draw(const Bounds& b, float spread) const {
        Tensor drawn(tensor.bfloat16, width);
        for (size_t g = 0; g < b.used.size(); ++g)
            for (int64_t row = b.bounds[g]; row < b.bounds[g] + b.used[g]; ++row) {
                drawn.draw();
                for (int64_t i = 0; i < width; ++i) tensor.set(at(row, i), drawn.get(i) * spread);
            }
    }
};

static void fill(Tensor& t, float x) {
    for (size_t i = 0; i < t.count; ++i) t.set(i, x);
}

// In double: out, lse (H, R), and the gradients of q, k and v. NaN in rows of no group.
struct Exact {
    Numbers out, lse, grad_q, grad_k, grad_v;

    Exact(
        const Case& c, const Bounds& queries, const Bounds& keys, const Numbers& q, const Numbers& k, const Numbers& v,
        const Numbers& grad_out, double scale
    )
        : out(q.size(), NAN), lse(q.size() / c.head_dim, NAN), grad_q(q.size(), NAN), grad_k(k.size(), NAN),
          grad_v(k.size(), NAN) {
        for (size_t g = 0; g < c.queries.size(); ++g) {
            const int64_t first = queries.bounds[g], last = first + queries.used[g];
            const int64_t first_key = keys.bounds[g], last_key = first_key + keys.used[g];
            const int64_t width = c.heads * c.head_dim;
            for (Numbers* x : {&out, &grad_q}) std::fill(x->begin() + first * width, x->begin() + last * width, 0);
            for (Numbers* x : {&grad_k, &grad_v})
                std::fill(x->begin() + first_key * width, x->begin() + last_key * width, 0);
            for (int h = 0; h < c.heads; ++h)
                for (int64_t i = first; i < last; ++i) row(c, h, i, first_key, last_key, q, k, v, grad_out, scale);
        }
    }

  private:
    void row(
        const Case& c, int h, int64_t i, int64_t first, int64_t last, const Numbers& q, const Numbers& k,
        const Numbers& v, const Numbers& grad_out, double scale
    ) {
        const int H = c.heads, D = c.head_dim;
        const int64_t o = (i * H + h) * D;
        Numbers weights, grads;
        double total = 0, delta = 0, most = -INFINITY;
        for (int64_t j = first; j < last; ++j) {
            double score = 0, dp = 0;
            for (int d = 0; d < D; ++d) {
                score += q[o + d] * k[(j * H + h) * D + d];
                dp += grad_out[o + d] * v[(j * H + h) * D + d];
            }
            weights.push_back(score * scale);
            grads.push_back(dp);
            most = fmax(most, score * scale);
        }
        for (double& weight : weights) total += weight = exp(weight - most);
        lse[h * int64_t(lse.size() / H) + i] = weights.empty() ? -INFINITY : most + log(total);
        for (size_t n = 0; n < weights.size(); ++n) {
            weights[n] /= total;
            delta += weights[n] * grads[n];
        }
        for (size_t n = 0; n < weights.size(); ++n) {
            const double ds = weights[n] * (grads[n] - delta) * scale;
            const int64_t at = ((first + n) * H + h) * D;
            for (int d = 0; d < D; ++d) {
                out[o + d] += weights[n] * v[at + d];
                grad_q[o + d] += ds * k[at + d];
                grad_k[at + d] += ds * q[o + d];
                grad_v[at + d] += weights[n] * grad_out[o + d];
            }
        }
    }
};

// The norm of the difference over that of the formula.
static double error(const Tensor& got, const Numbers& exact) {
    double off = 0, norm = 1e-30;
    for (size_t i = 0; i < got.count; ++i) {
        off += (got.get(i) - exact[i]) * (got.get(i) - exact[i]);
        norm += exact[i] * exact[i];
    }
    return sqrt(off / norm);
}

static bool wrong = false;

static void report(const char* what, int isa, bool bfloat16, double off) {
    printf("isa %d, %s, bfloat16 %d: %.1e\n", isa, what, bfloat16, off);
    wrong |= !(off < (bfloat16 ? 1e-2 : 1e-5));
}

static void* library;
template <typename F>
static F* find(const char* name) {
    return reinterpret_cast<F*>(dlsym(library, name));
}
static int32_t best() { return find<decltype(hlip_isa)>("hlip_isa")(); }
static int32_t first = 0;

// The error of rows, of which those of no group are untouched; infinite if they are not, or if an infinity is another.
static double error(const Numbers& got, const Numbers& exact) {
    double off = 0, norm = 1e-30;
    for (size_t i = 0; i < exact.size(); ++i) {
        if (isnan(exact[i]) ? got[i] != UNTOUCHED : isinf(exact[i]) && got[i] != exact[i]) return INFINITY;
        if (!isfinite(exact[i])) continue;
        off += (got[i] - exact[i]) * (got[i] - exact[i]);
        norm += exact[i] * exact[i];
    }
    return sqrt(off / norm);
}

static void attention(const Case& c, bool bfloat16) {
    const auto needs = find<decltype(hlip_attention_scratch)>("hlip_attention_scratch");
    const auto run = find<decltype(hlip_attention)>("hlip_attention");
    const bool alone = c.keys.empty();
    const Bounds queries(c.queries, c.gap), keys(alone ? c.queries : c.keys, c.gap);
    const int64_t R = queries.bounds.back(), S = keys.bounds.back(), given = R - c.gap;
    const int64_t slots = alone ? 3 : 1, width = c.heads * c.head_dim;
    Tensor q_tensor(bfloat16, R * slots * width), grad_q_tensor(bfloat16, R * slots * width);
    Tensor k_tensor(bfloat16, S * width), v_tensor(bfloat16, S * width);
    Tensor grad_k_tensor(bfloat16, S * width), grad_v_tensor(bfloat16, S * width);
    Tensor out(bfloat16, given * width), grad_out(bfloat16, given * width), lse(false, given * c.heads);
    const auto rows = [&](Tensor& own, Tensor& packed, int64_t slot) {
        return alone ? Rows{packed, c.gap, given, width, slot, 3} : Rows{own, c.gap, S - c.gap, width, 0, 1};
    };
    const Rows q = {q_tensor, c.gap, given, width, 0, slots}, grad_q = {grad_q_tensor, c.gap, given, width, 0, slots};
    const Rows k = rows(k_tensor, q_tensor, 1), grad_k = rows(grad_k_tensor, grad_q_tensor, 1);
    const Rows v = rows(v_tensor, q_tensor, 2), grad_v = rows(grad_v_tensor, grad_q_tensor, 2);
    for (Tensor* t : {&q_tensor, &k_tensor, &v_tensor, &grad_out}) fill(*t, NAN);
    q.draw(queries, c.spread);
    k.draw(keys, 1);
    v.draw(keys, 1);
    Rows{grad_out, 0, given, width, 0, 1}.draw(queries, 1);
    const float scale = 1 / sqrtf(c.head_dim);
    const Exact exact(c, queries, keys, q.numbers(), k.numbers(), v.numbers(), grad_out.numbers(), scale);
    for (int32_t i = first; i <= best(); ++i) {
        for (Tensor* t : {&out, &lse, &grad_q_tensor, &grad_k_tensor, &grad_v_tensor}) fill(*t, UNTOUCHED);
        Attention a = {};
        a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = out.data, a.lse = lse.floats();
        a.grad_out = grad_out.data, a.grad_q = grad_q.data(), a.grad_k = grad_k.data(), a.grad_v = grad_v.data();
        a.q_bounds = queries.bounds.data(), a.k_bounds = keys.bounds.data();
        if (c.gap) a.q_used = queries.used.data(), a.k_used = keys.used.data();
        a.q_rows = q.count, a.k_rows = k.count, a.q_stride = a.grad_q_stride = q.stride();
        a.k_stride = a.grad_k_stride = k.stride(), a.groups = c.queries.size(), a.heads = c.heads;
        a.head_dim = c.head_dim, a.bfloat16 = bfloat16, a.threads = 2, a.softmax_scale = scale;
        for (const int32_t backward : {0, 1}) {
            a.scratch = aligned_alloc(64, round_up(needs(&a, i, backward), 64));
            wrong |= run(&a, i, backward) != 0;
            free(a.scratch);
        }
        double most = fmax(error(out.numbers(), exact.out), error(lse.numbers(), exact.lse));
        most = fmax(most, error(grad_q.numbers(), exact.grad_q));
        most = fmax(most, error(grad_k.numbers(), exact.grad_k));
        most = fmax(most, error(grad_v.numbers(), exact.grad_v));
        // Scores are rounded in proportion to their size.
        report("attention", i, bfloat16, most / c.spread);
    }
}

// A change of level: `fine` groups of so many patches, of which each coarse group has a run. With equal numbers of
// both, the level stays.
struct Change {
    std::vector<int> fine;
    std::vector<int32_t> children;  // bounds
    bool coarser, scaled;
    int num_prefix, width;
};

// The bounds of the groups' rows at one of the two levels.
static std::vector<int32_t> bounds_of(const Change& c, bool coarse) {
    std::vector<int32_t> bounds = {0};
    const size_t groups = coarse ? c.children.size() - 1 : c.fine.size();
    for (size_t g = 0; g < groups; ++g) {
        const int first = coarse ? c.children[g] : g, last = coarse ? c.children[g + 1] : g + 1;
        bounds.push_back(std::accumulate(&c.fine[first], &c.fine[0] + last, bounds.back() + c.num_prefix));
    }
    return bounds;
}

// <weight of x, x> + <weight of y, y> of the norm in double, and its results.
static double norm_formula(
    const Change& c, const std::vector<int32_t>& src, const std::vector<int32_t>& dst, const Numbers& residual,
    const Numbers& update, const Numbers& path, const Numbers& layer, const Numbers& weight, const Numbers& bias,
    const Numbers& of_x, const Numbers& of_y, Numbers* out_x, Numbers* out_y
) {
    const int C = c.width, P = c.num_prefix;
    Numbers sum(residual.size()), x, y, patches;
    for (size_t g = 0; g + 1 < src.size(); ++g) {
        for (int64_t i = int64_t(src[g]) * C; i < int64_t(src[g + 1]) * C; ++i)
            sum[i] = residual[i] + path[g] * layer[i % C] * update[i];
        patches.insert(patches.end(), sum.begin() + (src[g] + P) * C, sum.begin() + src[g + 1] * C);
    }
    auto patch = patches.begin();
    for (size_t g = 0, coarse = 0; g + 1 < dst.size(); ++g) {
        while (!c.coarser && c.children[coarse + 1] <= int(g)) ++coarse;
        const int first = c.coarser ? c.children[g] : coarse, last = c.coarser ? c.children[g + 1] : coarse + 1;
        for (int i = 0; i < P * C; ++i) {
            double mean = 0;
            for (int f = first; f < last; ++f) mean += sum[src[f] * C + i] / (last - first);
            x.push_back(mean);
        }
        const auto next = patch + (dst[g + 1] - dst[g] - P) * C;
        x.insert(x.end(), patch, next);
        patch = next;
    }
    double total = 0;
    for (size_t row = 0; row < x.size() / C; ++row) {
        double mean = 0, variance = 0;
        for (int i = 0; i < C; ++i) mean += x[row * C + i] / C;
        for (int i = 0; i < C; ++i) variance += (x[row * C + i] - mean) * (x[row * C + i] - mean) / C;
        for (int i = 0; i < C; ++i) {
            y.push_back((x[row * C + i] - mean) / sqrt(variance + 1e-6) * weight[i] + bias[i]);
            total += of_x[y.size() - 1] * x[y.size() - 1] + of_y[y.size() - 1] * y.back();
        }
    }
    if (out_x) *out_x = x, *out_y = y;
    return total;
}

// Gradients are right if, along each of them, the formula grows by as much as it says.
static void norm(const Change& c, bool bfloat16) {
    const int C = c.width, P = c.num_prefix, coarse = c.children.size() - 1, fine = c.fine.size();
    const int src = c.coarser ? fine : coarse, dst = c.coarser ? coarse : fine;
    const std::vector<int32_t> src_rows = bounds_of(c, !c.coarser), dst_rows = bounds_of(c, c.coarser);
    const int64_t before = src_rows.back() * C, after = dst_rows.back() * C, tokens = src_rows.back() - src * P;
    Tensor residual(bfloat16, before), update(bfloat16, before), x(bfloat16, after), y(bfloat16, after);
    Tensor of_x(bfloat16, after), of_y(bfloat16, after), grad(bfloat16, before), grad_update(bfloat16, before);
    Tensor path(false, src), layer(false, C), weight(false, C), bias(false, C), sums(false, 3 * C);
    Tensor mean(false, after / C), rstd(false, after / C);
    for (Tensor* t : {&residual, &update, &of_x, &of_y, &path, &layer, &weight, &bias}) t->draw();
    for (int g = 0; !c.scaled && g < src; ++g) path.set(g, 1);
    for (int i = 0; !c.scaled && i < C; ++i) layer.set(i, 1);
    const auto value = [&](
        const Numbers& r, const Numbers& u, const Numbers& l, const Numbers& w, const Numbers& b,
        Numbers* to_x = nullptr, Numbers* to_y = nullptr
    ) {
        return norm_formula(
            c, src_rows, dst_rows, r, u, path.numbers(), l, w, b, of_x.numbers(), of_y.numbers(), to_x, to_y
        );
    };
    Numbers exact_x, exact_y;
    const Numbers at[] = {residual.numbers(), update.numbers(), layer.numbers(), weight.numbers(), bias.numbers()};
    value(at[0], at[1], at[2], at[3], at[4], &exact_x, &exact_y);
    for (int32_t isa = first; isa <= best(); ++isa) {
        Norm n = {};
        n.residual = residual.data, n.update = update.data, n.weight = weight.floats(), n.bias = bias.floats();
        n.path_scale = c.scaled ? path.floats() : nullptr, n.layer_scale = c.scaled ? layer.floats() : nullptr;
        n.src = src_rows.data(), n.dst = dst_rows.data();
        n.children = coarse == fine ? nullptr : c.children.data();
        n.x = x.data, n.y = y.data, n.mean = mean.floats(), n.rstd = rstd.floats();
        n.grad_x = of_x.data, n.grad_y = of_y.data, n.grad_residual = grad.data;
        n.grad_update = c.scaled ? grad_update.data : nullptr, n.sums = sums.floats();
        n.tokens = tokens, n.src_groups = src, n.dst_groups = dst, n.num_prefix = P, n.width = C;
        n.bfloat16_x = n.bfloat16_y = bfloat16, n.threads = 2, n.eps = 1e-6;
        const auto run = find<decltype(hlip_norm)>("hlip_norm");
        run(&n, isa, 0);
        report("norm", isa, bfloat16, fmax(error(x, exact_x), error(y, exact_y)));
        Tensor partial(false, find<decltype(hlip_norm_blocks)>("hlip_norm_blocks")(&n) * 3 * C);
        n.partial = partial.floats();
        run(&n, isa, 1);
        const Numbers all = sums.numbers();
        const Numbers grads[] = {
            grad.numbers(), (c.scaled ? grad_update : grad).numbers(), {all.begin() + 2 * C, all.end()},
            {all.begin(), all.begin() + C}, {all.begin() + C, all.begin() + 2 * C},
        };
        for (int t = 0; t < 5; ++t) {
            if (t == 2 && !c.scaled) continue;
            double squares = 0, ends[2];
            for (const double g : grads[t]) squares += g * g;
            for (const int side : {0, 1}) {
                Numbers moved[] = {at[0], at[1], at[2], at[3], at[4]};
                for (size_t i = 0; i < moved[t].size(); ++i)
                    moved[t][i] += (side ? 1e-4 : -1e-4) * grads[t][i] / sqrt(squares);
                ends[side] = value(moved[0], moved[1], moved[2], moved[3], moved[4]);
            }
            report("gradient of norm", isa, bfloat16, fabs((ends[1] - ends[0]) / 2e-4 / sqrt(squares) - 1));
        }
    }
}

static double gelu_of(double x) { return x * erfc(-x * sqrt(0.5)) / 2; }
static double gelu_slope(double x) { return erfc(-x * sqrt(0.5)) / 2 + x * exp(-x * x / 2) / sqrt(2 * M_PI); }

static void gelu(size_t size, bool bfloat16) {
    Tensor x(bfloat16, size), y(bfloat16, size), grad(bfloat16, size), kept(bfloat16, size);
    x.draw();
    kept.draw();
    Numbers exact, slope;
    for (size_t i = 0; i < size; ++i) {
        const double v = x.get(i);
        exact.push_back(gelu_of(v));
        slope.push_back(kept.get(i) * gelu_slope(v));
    }
    for (int32_t isa = first; isa <= best(); ++isa) {
        memcpy(grad.data, kept.data, size * (bfloat16 ? 2 : 4));
        const Gelu call = {x.data, y.data, grad.data, int64_t(size), bfloat16, 2};
        find<decltype(hlip_gelu)>("hlip_gelu")(&call, isa);
        report("gelu", isa, bfloat16, fmax(error(y, exact), error(grad, slope)));
    }
}

// rows (R, K) and a weight (N, K), or its transpose, to (R, N).
static Numbers product_formula(
    int R, const Numbers& x, const Numbers& w, const Numbers& bias, int K, bool transposed, bool gelu
) {
    const int N = bias.size();
    Numbers y;
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            double sum = bias[n];
            for (int k = 0; k < K; ++k) sum += x[r * K + k] * w[transposed ? k * N + n : n * K + k];
            y.push_back(gelu ? gelu_of(sum) : sum);
        }
    return y;
}

static void products(int R, int K, int N) {
    const auto needs = find<decltype(hlip_product_scratch)>("hlip_product_scratch");
    const auto run = find<decltype(hlip_product)>("hlip_product");
    const auto steps = [](int width) { return width ? int64_t(width + 31) / 32 : 1; };
    const auto squares = [=](int a, int b) { return steps(a) * steps(b) * 2048; };
    Tensor x(true, R * K), first(true, N * K), second(true, K * N), y(true, R * N), z(true, R * K);
    Tensor bias1(false, N), bias2(false, K), none(false, N);
    for (Tensor* t : {&x, &first, &second, &bias1, &bias2}) t->draw();
    memset(none.data, 0, N * sizeof(float));
    const auto pack = [&](const Tensor& weight, int inner, int columns, bool transposed) {
        void* tiles = aligned_alloc(64, squares(inner, columns));
        find<decltype(hlip_pack_weight)>("hlip_pack_weight")(weight.data, tiles, inner, columns, transposed, 2);
        return tiles;
    };
    const auto multiply = [&](Product p) {
        p.scratch = aligned_alloc(64, round_up(needs(&p), 64));
        run(&p);
        free(p.scratch);
    };
    void *tiles1 = pack(first, K, N, false), *tiles2 = pack(second, N, K, false), *turned = pack(second, K, N, true);
    const Layer one = {tiles1, bias1.floats(), K, N}, two = {tiles2, bias2.floats(), N, K};
    const Numbers in = x.numbers(), w1 = first.numbers(), w2 = second.numbers(), b1 = bias1.numbers();
    for (const bool gelu : {false, true}) {
        multiply({x.data, y.data, nullptr, R, one, {}, gelu, 2});
        report("product", HLIP_AMX, true, error(y, product_formula(R, in, w1, b1, K, false, gelu)));
    }
    multiply({x.data, y.data, nullptr, R, {turned, nullptr, K, N}, {}, 0, 2});
    report("transposed product", HLIP_AMX, true, error(y, product_formula(R, in, w2, none.numbers(), K, true, false)));
    multiply({x.data, z.data, nullptr, R, one, two, 0, 2});
    const Numbers hidden = product_formula(R, in, w1, b1, K, false, true);
    const Numbers out = product_formula(R, hidden, w2, bias2.numbers(), N, false, false);
    report("two layers", HLIP_AMX, true, error(z, out));
    Tensor kept(true, R * N), active(true, R * N);
    multiply({x.data, z.data, nullptr, R, one, two, 0, 2, kept.data, nullptr});
    const Numbers before = product_formula(R, in, w1, b1, K, false, false);
    report("two layers, kept", HLIP_AMX, true, fmax(error(z, out), error(kept, before)));
    multiply({x.data, y.data, nullptr, R, {turned, nullptr, K, N}, {}, 0, 2, kept.data, active.data});
    Numbers gradient = product_formula(R, in, w2, none.numbers(), K, true, false), again;
    for (int i = 0; i < R * N; ++i) {
        const double v = kept.get(i);
        again.push_back(gelu_of(v));
        gradient[i] *= gelu_slope(v);
    }
    report("gradient of hidden rows", HLIP_AMX, true, fmax(error(y, gradient), error(active, again)));
    for (void* tiles : {tiles1, tiles2, turned}) free(tiles);

    const auto room = find<decltype(hlip_weight_gradient_scratch)>("hlip_weight_gradient_scratch");
    Tensor weight(false, N * K), bias(false, N);
    y.draw();
    const Numbers grad = y.numbers();
    Numbers exact(N * K), sums(N);
    for (int add = 0; add < 2; ++add) {  // twice the gradient in the end
        WeightGradient g = {y.data, x.data, weight.floats(), bias.floats(), nullptr, R, K, N, add, 2};
        g.scratch = aligned_alloc(64, round_up(room(&g), 64));
        find<decltype(hlip_weight_gradient)>("hlip_weight_gradient")(&g);
        free(g.scratch);
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) {
                sums[n] += grad[r * N + n];
                for (int k = 0; k < K; ++k) exact[n * K + k] += grad[r * N + n] * in[r * K + k];
            }
    }
    report("gradient of weight", HLIP_AMX, false, fmax(error(weight, exact), error(bias, sums)));
}

int main(int count, char** arguments) {
    library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
    const bool small_only = count > 2 && !strcmp(arguments[2], "small");
    if (count > 2 && !strcmp(arguments[2], "last")) first = best();
    const Case cases[] = {
        {{198, 2, 0, 65, 34}, {}, 0, 3, 64}, {{15, 70, 2}, {}, 3, 2, 16}, {{305, 10}, {}, 0, 1, 80},
        {{63, 162}, {}, 32, 1, 128}, {{3, 1, 0, 5, 40, 2}, {70, 1, 7, 0, 130, 197}, 2, 2, 80},
        {{130, 0, 7}, {33, 0, 300}, 0, 2, 128}, {{0, 0}, {5, 0}, 1, 1, 32}, {{257, 1}, {2, 129}, 1, 1, 48},
        {{140, 9}, {}, 0, 42, 128}, {{230, 3}, {2, 230}, 1, 42, 128},  // the longest are the work of all threads
    };
    const Case small[] = {{{16, 41, 1, 3}, {}, 0, 2, 16}, {{3, 0, 17}, {40, 5, 0}, 1, 2, 16}};
    const Case large_scores = {{71, 4, 1}, {}, 0, 2, 48, 200};
    const Change changes[] = {
        {{5, 40, 3}, {0, 1, 2, 3}, true, true, 2, 40},  // the same level
        {{5, 40, 3}, {0, 2, 3}, true, true, 1, 33}, {{70, 1, 9, 3}, {0, 3, 4}, false, true, 3, 64},
        {{5, 40, 3}, {0, 2, 3}, true, false, 1, 7}, {{2, 1}, {0, 2}, false, false, 1, 4100},  // on the heap
    };
    for (const bool bfloat16 : {false, true}) {
        for (const Case& c : small) attention(c, bfloat16);
        attention(large_scores, bfloat16);
        if (!small_only)
            for (const Case& c : cases) attention(c, bfloat16);
        for (const Change& c : changes) norm(c, bfloat16);
        for (const size_t size : {1, 63, 4097, 9000}) gelu(size, bfloat16);
    }
    if (best() == HLIP_AMX) {
        products(1, 8, 24);
        products(40, 0, 24);
        products(40, 8, 0);
        products(0, 8, 24);
        products(70, 40, 100);
        products(600, 33, 520);  // several blocks
        products(2100, 416, 65);  // several chunks and sections
    }
    return wrong;
}
