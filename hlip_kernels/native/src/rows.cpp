// The C interface of norms and GELU.
#include "rows.h"

#include "attention.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t hlip_norm_blocks(const Norm* n) {
    // Those of prefix rows that change level, and those of all others: see `Rows` in rows_of.h.
    const int64_t coarse = n->src_groups < n->dst_groups ? n->src_groups : n->dst_groups;
    const int64_t prefix = n->children ? blocks_of(coarse, 1) : 0;
    const int64_t rows = n->tokens + (n->children ? 0 : int64_t(n->src_groups) * n->num_prefix);
    return prefix + blocks_of(rows, 32);
}

static void (*norm_of(int32_t isa))(const Norm&, bool) {
#if defined(__x86_64__)
    if (isa == HLIP_AMX) return amx::norm;
    if (isa == HLIP_AVX512) return avx512::norm;
    if (isa == HLIP_AVX2) return avx2::norm;
#endif
    (void)isa;
    return generic::norm;
}

EXPORT int32_t hlip_norm(const Norm* n, int32_t isa, int32_t backward) {
    const bool to_finer = n->src_groups < n->dst_groups;
    const int32_t coarse = to_finer ? n->src_groups : n->dst_groups, fine = to_finer ? n->dst_groups : n->src_groups;
    if (n->tokens < 0 || coarse < 0 || n->num_prefix < 0 || n->threads < 1) return -1;
    if (n->cu_seqlens && !rise(n->cu_seqlens, n->src_groups, n->tokens)) return -1;
    if (n->children ? !rise(n->children, coarse, fine) : coarse != fine) return -1;
    norm_of(isa)(*n, backward);
    return 0;
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
