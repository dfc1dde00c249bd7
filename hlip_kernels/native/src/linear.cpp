// The C interface of products. Where there is no AMX, nobody calls it: PyTorch's are used.
#include "linear.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
EXPORT void hlip_pack_weight(
    const void* weight, void* tiles, int32_t inner, int32_t columns, int32_t transposed, int32_t threads
) {
    amx::pack_weight(weight, tiles, inner, columns, transposed, threads);
}

EXPORT int64_t hlip_product_scratch(const Product* p) { return amx::product_scratch(*p); }

EXPORT void hlip_product(const Product* p) { amx::product(*p); }

EXPORT int64_t hlip_weight_gradient_scratch(const WeightGradient* g) { return amx::weight_gradient_scratch(*g); }

EXPORT void hlip_weight_gradient(const WeightGradient* g) { amx::weight_gradient(*g); }
#endif
