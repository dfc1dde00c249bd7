// The C interface of norms and GELU.
#include "rows.h"

#include "attention.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t hlip_norm_blocks(const Norm* n) {
    // Those of prefix rows that change level, and those of all others: see norm_of in rows_of.h.
    const int64_t coarse = n->src_groups < n->dst_groups ? n->src_groups : n->dst_groups;
    const int64_t prefix = n->children ? blocks_of(coarse, 1) : 0;
    const int64_t rows = n->tokens + (n->children ? 0 : int64_t(n->src_groups) * n->num_prefix);
    return prefix + blocks_of(rows, 32);
}

EXPORT void hlip_norm(const Norm* n, int32_t isa, int32_t backward) {
#if defined(__x86_64__)
    if (isa == HLIP_AMX) return amx::norm(*n, backward);
    if (isa == HLIP_AVX512) return avx512::norm(*n, backward);
    if (isa == HLIP_AVX2) return avx2::norm(*n, backward);
#endif
    (void)isa;
    generic::norm(*n, backward);
}

EXPORT void hlip_gelu(const Gelu* g, int32_t isa) {
#if defined(__x86_64__)
    if (isa == HLIP_AMX) return amx::gelu(*g);
    if (isa == HLIP_AVX512) return avx512::gelu(*g);
    if (isa == HLIP_AVX2) return avx2::gelu(*g);
#endif
    (void)isa;
    generic::gelu(*g);
}
