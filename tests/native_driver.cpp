// Runs the native library, given by its path, without Python, so that sanitizers see it alone: every tensor is memory
// of its own, of the exact size. Results are compared with the formula in double. Ends with 1 if one is wrong. A second
// argument, "small", leaves all but small attention out, for emulated processors; "last" all instruction sets but the best.
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "../hlip_kernels/native/src/attention.h"
#include "../hlip_kernels/native/src/product.h"
#include "../hlip_kernels/native/src/rows.h"

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

struct Case {
    std::vector<int> lengths;  // patches of each group
    int num_prefix, heads, head_dim;
    float spread = 1;  // of queries
};

static std::vector<std::vector<int64_t>> rows_of(const Case& c) {
    std::vector<std::vector<int64_t>> groups;
    int64_t row = int64_t(c.lengths.size()) * c.num_prefix;
    for (size_t g = 0; g < c.lengths.size(); ++g) {
        groups.emplace_back();
        for (int i = 0; i < c.num_prefix; ++i) groups[g].push_back(g * c.num_prefix + i);
        for (int i = 0; i < c.lengths[g]; ++i) groups[g].push_back(row++);
    }
    return groups;
}

// out and the gradient of qkv in double.
static void formula(
    const Case& c, const Numbers& qkv, const Numbers& grad_out, double scale, Numbers& out, Numbers& grad
) {
    const int H = c.heads, D = c.head_dim;
    const auto at = [&](int64_t row, int slot, int h) { return ((row * 3 + slot) * H + h) * D; };
    for (const auto& rows : rows_of(c))
        for (int h = 0; h < H; ++h)
            for (const int64_t i : rows) {
                const int64_t o = (i * H + h) * D;
                Numbers weights, grads;
                double total = 0, delta = 0;
                for (const int64_t j : rows) {
                    double score = 0, dp = 0;
                    for (int d = 0; d < D; ++d) {
                        score += qkv[at(i, 0, h) + d] * qkv[at(j, 1, h) + d];
                        dp += grad_out[o + d] * qkv[at(j, 2, h) + d];
                    }
                    weights.push_back(score * scale);
                    grads.push_back(dp);
                }
                const double most = *std::max_element(weights.begin(), weights.end());
                for (double& weight : weights) total += weight = exp(weight - most);
                for (size_t n = 0; n < rows.size(); ++n) {
                    weights[n] /= total;
                    delta += weights[n] * grads[n];
                }
                for (size_t n = 0; n < rows.size(); ++n) {
                    const double ds = weights[n] * (grads[n] - delta) * scale;
                    for (int d = 0; d < D; ++d) {
                        out[o + d] += weights[n] * qkv[at(rows[n], 2, h) + d];
                        grad[at(i, 0, h) + d] += ds * qkv[at(rows[n], 1, h) + d];
                        grad[at(rows[n], 1, h) + d] += ds * qkv[at(i, 0, h) + d];
                        grad[at(rows[n], 2, h) + d] += weights[n] * grad_out[o + d];
                    }
                }
            }
}

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

static void attention(const Case& c, bool bfloat16) {
    const auto needs = find<decltype(hlip_attention_scratch)>("hlip_attention_scratch");
    const auto run = find<decltype(hlip_attention)>("hlip_attention");
    std::vector<int32_t> bounds = {0};
    for (const int length : c.lengths) bounds.push_back(bounds.back() + length);
    const size_t rows = c.lengths.size() * c.num_prefix + bounds.back(), size = rows * c.heads * c.head_dim;
    Tensor qkv(bfloat16, 3 * size), grad_out(bfloat16, size), out(bfloat16, size), grad(bfloat16, 3 * size);
    Tensor lse(false, rows * c.heads);
    qkv.draw();
    grad_out.draw();
    for (size_t row = 0; row < rows; ++row)
        for (int i = 0; i < c.heads * c.head_dim; ++i) {
            const size_t at = row * 3 * c.heads * c.head_dim + i;
            qkv.set(at, qkv.get(at) * c.spread);
        }
    const float scale = 1 / sqrtf(c.head_dim);
    Numbers exact_out(size), exact_grad(3 * size);
    formula(c, qkv.numbers(), grad_out.numbers(), scale, exact_out, exact_grad);
    for (int32_t i = first; i <= best(); ++i) {
        Attention a = {
            qkv.data, bounds.data(), out.data, lse.floats(), grad_out.data, grad.data, nullptr,
            int64_t(rows), int32_t(c.lengths.size()), c.num_prefix, c.heads, c.head_dim, bfloat16, 2, scale,
        };
        for (const int32_t backward : {0, 1}) {
            a.scratch = aligned_alloc(64, round_up(needs(&a, i, backward), 64));
            run(&a, i, backward);
            free(a.scratch);
        }
        // Scores are rounded in proportion to their size.
        report("attention", i, bfloat16, fmax(error(out, exact_out), error(grad, exact_grad)) / c.spread);
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

// <weight of x, x> + <weight of y, y> of the norm in double, and its results.
static double norm_formula(
    const Change& c, const std::vector<int>& group, const Numbers& residual, const Numbers& update, const Numbers& path,
    const Numbers& layer, const Numbers& weight, const Numbers& bias, const Numbers& of_x, const Numbers& of_y,
    Numbers* out_x, Numbers* out_y
) {
    const int C = c.width, P = c.num_prefix, src = path.size();
    Numbers sum(residual.size()), x, y;
    for (size_t i = 0; i < sum.size(); ++i) {
        const size_t row = i / C, g = row < size_t(src * P) ? row / P : group[row - src * P];
        sum[i] = residual[i] + path[g] * layer[i % C] * update[i];
    }
    for (size_t coarse = 0; coarse + 1 < c.children.size(); ++coarse) {
        const int first = c.children[coarse], last = c.children[coarse + 1];
        for (int fine = first; fine < (c.coarser ? first + 1 : last); ++fine)
            for (int i = 0; i < P * C; ++i) {
                double value = c.coarser ? 0 : sum[coarse * P * C + i];
                for (int f = first; c.coarser && f < last; ++f) value += sum[f * P * C + i] / (last - first);
                x.push_back(value);
            }
    }
    x.insert(x.end(), sum.begin() + src * P * C, sum.end());
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
    std::vector<int32_t> bounds = {0};
    std::vector<int> group;  // of each patch
    for (int g = 0, first = 0; g < src; ++g) {
        const int last = c.coarser ? first + 1 : c.children[g + 1];
        for (; first < last; ++first) group.insert(group.end(), c.fine[first], g);
        bounds.push_back(group.size());
    }
    const int64_t tokens = group.size(), before = (src * P + tokens) * C, after = (dst * P + tokens) * C;
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
            c, group, r, u, path.numbers(), l, w, b, of_x.numbers(), of_y.numbers(), to_x, to_y
        );
    };
    Numbers exact_x, exact_y;
    const Numbers at[] = {residual.numbers(), update.numbers(), layer.numbers(), weight.numbers(), bias.numbers()};
    value(at[0], at[1], at[2], at[3], at[4], &exact_x, &exact_y);
    for (int32_t isa = first; isa <= best(); ++isa) {
        Norm n = {};
        n.residual = residual.data, n.update = update.data, n.weight = weight.floats(), n.bias = bias.floats();
        n.path_scale = c.scaled ? path.floats() : nullptr, n.layer_scale = c.scaled ? layer.floats() : nullptr;
        n.cu_seqlens = bounds.data(), n.children = coarse == fine ? nullptr : c.children.data();
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
        {{197, 1, 0, 64, 33}, 1, 3, 64}, {{15, 70, 2}, 0, 2, 16}, {{300, 5}, 5, 1, 80}, {{31, 130}, 32, 1, 128},
        {{139, 8}, 1, 42, 128},  // of which the first is the work of all threads
    };
    const Case small = {{15, 40, 0, 2}, 1, 2, 16}, large_scores = {{70, 3, 0}, 1, 2, 48, 200};
    const Change changes[] = {
        {{5, 40, 3}, {0, 1, 2, 3}, true, true, 2, 40},  // the same level
        {{5, 40, 3}, {0, 2, 3}, true, true, 1, 33}, {{70, 1, 9, 3}, {0, 3, 4}, false, true, 3, 64},
        {{5, 40, 3}, {0, 2, 3}, true, false, 1, 7}, {{2, 1}, {0, 2}, false, false, 1, 4100},  // on the heap
    };
    for (const bool bfloat16 : {false, true}) {
        attention(small, bfloat16);
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
