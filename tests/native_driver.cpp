// Runs the native library, given by its path, without Python, so that sanitizers see it alone: every tensor is memory of
// its own, of the exact size. Results are compared with the formula in double. Ends with 1 if one is wrong.
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "../hlip_kernels/native/src/attention.h"

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
    ~Tensor() { free(data); }

    double get(size_t i) const { return bfloat16 ? widen(static_cast<uint16_t*>(data)[i]) : static_cast<float*>(data)[i]; }
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
                    weights.push_back(exp(score * scale));
                    grads.push_back(dp);
                    total += weights.back();
                }
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

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
    const auto isa = reinterpret_cast<decltype(&hlip_isa)>(dlsym(library, "hlip_isa"));
    const auto needs = reinterpret_cast<decltype(&hlip_attention_scratch)>(dlsym(library, "hlip_attention_scratch"));
    const auto run = reinterpret_cast<decltype(&hlip_attention)>(dlsym(library, "hlip_attention"));
    const Case cases[] = {
        {{197, 1, 0, 64, 33}, 1, 3, 64}, {{15, 70, 2}, 0, 2, 16}, {{300, 5}, 5, 1, 80}, {{31, 130}, 32, 1, 128},
        {{139, 8}, 1, 42, 128},  // of which the first is the work of all threads
    };
    bool wrong = false;
    for (const Case& c : cases)
        for (const bool bfloat16 : {false, true}) {
            std::vector<int32_t> bounds = {0};
            for (const int length : c.lengths) bounds.push_back(bounds.back() + length);
            const size_t rows = c.lengths.size() * c.num_prefix + bounds.back(), size = rows * c.heads * c.head_dim;
            Tensor qkv(bfloat16, 3 * size), grad_out(bfloat16, size), out(bfloat16, size), grad(bfloat16, 3 * size);
            Tensor lse(false, rows * c.heads);
            qkv.draw();
            grad_out.draw();
            const float scale = 1 / sqrtf(c.head_dim);
            Numbers exact_out(size), exact_grad(3 * size);
            formula(c, qkv.numbers(), grad_out.numbers(), scale, exact_out, exact_grad);
            for (int32_t i = 0; i <= isa(); ++i) {
                Attention a = {
                    qkv.data, bounds.data(), out.data, static_cast<float*>(lse.data), grad_out.data, grad.data, nullptr,
                    int64_t(rows), int32_t(c.lengths.size()), c.num_prefix, c.heads, c.head_dim, bfloat16, 2, scale,
                };
                for (const int32_t backward : {0, 1}) {
                    const int64_t bytes = round_up(needs(&a, i, backward), 64);
                    a.scratch = aligned_alloc(64, bytes);
                    run(&a, i, backward);
                    free(a.scratch);
                }
                const double worst = fmax(error(out, exact_out), error(grad, exact_grad));
                printf("isa %d, bfloat16 %d, %zu rows, head dim %d: %.1e\n", i, bfloat16, rows, c.head_dim, worst);
                wrong |= !(worst < (bfloat16 ? 1e-2 : 1e-5));
            }
        }
    return wrong;
}
