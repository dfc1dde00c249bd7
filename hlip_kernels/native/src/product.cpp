// The C interface of products. Where there is no AMX, nobody calls it: PyTorch's are used.
#include "product.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
EXPORT int64_t hlip_weight_bytes(int64_t inner, int64_t columns) { return amx::weight_bytes(inner, columns); }

EXPORT void hlip_pack_weight(
    const void* weight, int64_t inner, int64_t columns, int32_t transposed, void* tiles, int32_t threads
) {
    amx::pack_weight(weight, inner, columns, transposed, tiles, threads);
}

EXPORT int64_t hlip_product_scratch(const Product* p) { return amx::product_scratch(*p); }

EXPORT void hlip_product(const Product* p) { amx::product(*p); }
#endif
