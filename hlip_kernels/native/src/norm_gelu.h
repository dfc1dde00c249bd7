// What is done to rows and elements between the products of a block: LayerNorm, and GELU in backward.
#pragma once

#include <stdint.h>

// Shapes: R = G * P + T rows of a level, G groups, P prefix rows a group, T patch tokens, C width. Tensors are contiguous.
// The rows of a level lie group after group, in each its prefix rows and then its patches: patch t of the batch, in group
// g of a level, is its row t + (g + 1) * P.
// Residuals (x) are of one type, updates (y) of another: bfloat16 or float32.
struct Norm {
    const void* residual;  // (R_src, C)
    const void* update;  // (R_src, C), may be null in forward; in backward only if there is a layer_scale
    const float* path_scale;  // (G_src), may be null
    const float* layer_scale;  // (C), may be null
    const float* weight;  // (C)
    const float* bias;  // (C); forward only
    const int32_t* src;  // (G_src + 1), bounds of the groups' rows; null, as is dst, if rows are in no groups
    const int32_t* dst;  // (G_dst + 1)
    const int32_t* children;  // (coarser G + 1), bounds of its runs of finer groups; null if the levels are the same
    void* x;  // (R_dst, C), the new residual; null in forward if y alone is wanted, of a residual as it is
    void* y;  // (R_dst, C), its normalised rows
    float* mean;  // (R_dst), with x
    float* rstd;  // (R_dst), with x
    const void* grad_x;  // (R_dst, C), may be null; from here backward only
    const void* grad_y;  // (R_dst, C)
    void* grad_residual;  // (R_src, C)
    void* grad_update;  // (R_src, C), null where it equals grad_residual
    float* partial;  // (hlip_norm_blocks, 3, C)
    float* sums;  // (3, C): gradients of weight, bias and layer_scale
    int64_t tokens;
    int32_t src_groups, dst_groups, num_prefix, width;
    int32_t bfloat16_x, bfloat16_y;
    int32_t threads;
    float eps;
};

struct Gelu {
    const void* x;  // (n)
    void* y;  // (n), gelu(x)
    void* grad;  // (n), of y, and then of x
    int64_t size;
    int32_t bfloat16;
    int32_t threads;
};

extern "C" {
// Blocks of rows whose sums are kept apart in backward.
int64_t hlip_norm_blocks(const Norm*);
// Returns 0, or -1 if the groups do not make up the rows of both levels, and then nothing is written.
int32_t hlip_norm(const Norm*, int32_t isa, int32_t backward);
// y = gelu(x), and the gradient of y is made that of x.
void hlip_gelu(const Gelu*, int32_t isa);
}

#define DECLARE_NORM_GELU(isa) \
    namespace isa { \
    void norm(const Norm&, bool backward); \
    void gelu(const Gelu&); \
    }
DECLARE_NORM_GELU(generic)
DECLARE_NORM_GELU(avx2)
DECLARE_NORM_GELU(avx512)
DECLARE_NORM_GELU(amx)

// Rows, or groups of prefix rows, that make one block: so many that there are at most 128 blocks of each kind, whatever
// the number of threads.
static inline int64_t block_of(int64_t items, int64_t least) {
    const int64_t size = (items + 127) / 128;
    return size > least ? size : least;
}
static inline int64_t blocks_of(int64_t items, int64_t least) {
    const int64_t size = block_of(items, least);
    return (items + size - 1) / size;
}
