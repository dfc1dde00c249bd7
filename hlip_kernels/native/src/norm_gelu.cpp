// The C interface of norms and GELU.
#include "norm_gelu.h"

#include <string.h>

#include "attention.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t hlip_norm_blocks(const Norm* n) {
    // Those of prefix rows that change level, and those of all others: see `Rows` in norm_gelu_vector.h.
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

// Whether these groups make up the rows of their level, each with its prefix rows.
static bool make_up(const Norm& n, const int32_t* bounds, int64_t groups) {
    for (int64_t g = 0; g < groups; ++g)
        if (int64_t(bounds[g + 1]) - bounds[g] < n.num_prefix) return false;
    return bounds[0] == 0 && bounds[groups] == n.tokens + groups * n.num_prefix;
}

// Whether each coarse group has the patches of its run of fine groups, of which it has one or more.
static bool are_nested(const Norm& n, const int32_t* fine, int64_t fine_groups, const int32_t* coarse, int64_t groups) {
    const int64_t prefix = n.num_prefix;
    if (n.children[0] != 0 || n.children[groups] != fine_groups) return false;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = n.children[g];
        if (first >= n.children[g + 1] || first >= fine_groups) return false;
        if (coarse[g] - g * prefix != fine[first] - first * prefix) return false;
    }
    return true;
}

static bool is_valid(const Norm& n) {
    if (n.tokens < 0 || n.src_groups < 0 || n.dst_groups < 0 || n.num_prefix < 0 || n.threads < 1) return false;
    if (!n.src) return !n.dst && !n.children && !n.path_scale && !n.src_groups && !n.dst_groups;
    if (!n.dst || !make_up(n, n.src, n.src_groups)) return false;
    if (n.dst != n.src && !make_up(n, n.dst, n.dst_groups)) return false;
    if (n.children)
        return n.src_groups < n.dst_groups ? are_nested(n, n.dst, n.dst_groups, n.src, n.src_groups)
                                           : are_nested(n, n.src, n.src_groups, n.dst, n.dst_groups);
    if (n.src_groups != n.dst_groups) return false;
    return n.dst == n.src || !memcmp(n.dst, n.src, (n.src_groups + 1) * sizeof(int32_t));
}

EXPORT int32_t hlip_norm(const Norm* n, int32_t isa, int32_t backward) {
    if (!is_valid(*n)) return -1;
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
