// Linear layers in bfloat16 by AMX: products of rows with packed weights.
#pragma once

#include <stdint.h>

// Shapes: R rows, K and N widths. Tensors are contiguous and bfloat16 unless they say otherwise.
struct Layer {
    const void* tiles;  // of the weight (N, K), as `hlip_pack_weight` makes them
    const float* bias;  // (N), may be null
    int32_t inner, columns;  // K and N
};

// y = first(x), or second(gelu(first(x))).
struct Product {
    const void* x;  // (R, K)
    void* y;  // (R, N of the last layer)
    void* scratch;  // what `hlip_product_scratch` asks for, aligned to 64 bytes
    int64_t rows;
    Layer first, second;  // the latter may have null tiles: there is none
    int32_t gelu;  // whether what the last layer gives passes a GELU
    int32_t threads;
    // (R, N of the first layer), both may be null: the rows that a GELU is given, and gelu(hidden). Between two layers
    // `hidden` is written. With `active`, what the only layer gives is the gradient of gelu(hidden): `active` is
    // written, and y is the gradient of `hidden`.
    void *hidden, *active;
};

// The gradients of a layer's weight and bias, or what is added to them.
struct WeightGradient {
    const void* grad;  // (R, N), of what the layer made
    const void* x;  // (R, K), what it was given
    float* weight;  // (N, K) float32
    float* bias;  // (N)
    void* scratch;  // what `hlip_weight_gradient_scratch` asks for, aligned to 64 bytes
    int64_t rows;
    int32_t inner, columns;  // K and N
    int32_t add;
    int32_t threads;
};

// All only where `hlip_isa` is HLIP_AMX.
extern "C" {
// A weight (N, K), or its transpose (K, N), into tiles of 1 KiB, aligned to 64 bytes: for each 32 columns (N) and 32 of
// the inner width (K), padded with zeros, the tiles of 16 columns and of the other 16. Either width is padded to 32 at
// least.
void hlip_pack_weight(
    const void* weight, void* tiles, int32_t inner, int32_t columns, int32_t transposed, int32_t threads
);
int64_t hlip_product_scratch(const Product*);
void hlip_product(const Product*);
int64_t hlip_weight_gradient_scratch(const WeightGradient*);
void hlip_weight_gradient(const WeightGradient*);
}

namespace amx {
void pack_weight(const void* weight, void* tiles, int64_t inner, int64_t columns, bool transposed, int32_t threads);
int64_t product_scratch(const Product&);
void product(const Product&);
int64_t weight_gradient_scratch(const WeightGradient&);
void weight_gradient(const WeightGradient&);
}  // namespace amx
