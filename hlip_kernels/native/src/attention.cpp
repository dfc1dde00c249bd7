// The C interface and the driver: which thread does what, in which order.
//
// A group whose tiles fit the cache of a core is packed and worked through by one thread. A longer one is the work of
// all threads: they pack its units, then take tasks of (head, block of rows). No sum depends on who computes it.
#include "attention.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static const int64_t CACHE = 4 << 20;  // bytes of tiles of a group that one thread works through by itself
static const int64_t LINE = 64;

static const Kernel& kernel_of(const Attention& a, int32_t isa, int32_t backward) {
#if defined(__x86_64__)
    const int64_t width = padded_head_dim(a) / HEAD_STEP - 1;
    if (isa == HLIP_AMX && a.bfloat16) return backward ? amx::backward[width] : amx::forward[width];
    if (isa >= HLIP_AVX512) return backward ? avx512::backward[a.bfloat16] : avx512::forward[a.bfloat16];
    if (isa == HLIP_AVX2) return backward ? avx2::backward[a.bfloat16] : avx2::forward[a.bfloat16];
#else
    (void)isa;
#endif
    return backward ? generic::backward[a.bfloat16] : generic::forward[a.bfloat16];
}

static Group group_of(const Attention& a, int64_t g) {
    const int64_t begin = a.cu_seqlens[g], end = a.cu_seqlens[g + 1];
    const int64_t prefix = g * a.num_prefix, patches = int64_t(a.groups) * a.num_prefix + begin - a.num_prefix;
    return {prefix, patches, a.num_prefix + end - begin, a.num_prefix};
}

static int64_t length_of(const Attention& a, int64_t g) {
    return a.num_prefix + a.cu_seqlens[g + 1] - a.cu_seqlens[g];
}

static int64_t longest(const Attention& a) {
    int64_t most = 0;
    for (int64_t g = 0; g < a.groups; ++g)
        if (length_of(a, g) > most) most = length_of(a, g);
    return most;
}

// How the scratch of a call is divided: the order of groups, turns, a part for each thread, tiles of a long group.
struct Scratch {
    int64_t order, turns, part, tiles, local, shared, total;

    Scratch(const Attention& a, const Kernel& k) {
        const int64_t most = longest(a), tiles_bytes = k.tile_bytes(a, most);
        order = 0;
        turns = round_up(a.groups * 2 * sizeof(int64_t), LINE);
        part = round_up(turns + a.heads * (most / k.block + 1) * sizeof(int32_t), LINE);
        tiles = round_up(smaller(tiles_bytes, CACHE), LINE);
        const int64_t own_turns = round_up((most / k.block + 1) * sizeof(int32_t), LINE);
        local = tiles + own_turns + round_up(k.local_bytes(a), LINE);
        shared = round_up(part + a.threads * local, 2 << 20);
        total = shared + (tiles_bytes > CACHE ? tiles_bytes : 0);
    }
};

struct Place {
    int64_t length, group;
};

static int longer_first(const void* x, const void* y) {
    const Place &a = *static_cast<const Place*>(x), &b = *static_cast<const Place*>(y);
    if (a.length != b.length) return a.length < b.length ? 1 : -1;
    return a.group < b.group ? -1 : a.group > b.group;
}

// All of a group by one thread.
static void run_alone(const Attention& a, const Kernel& k, int64_t g, char* tiles, char* local, Turns turns) {
    const Group group = group_of(a, g);
    if (group.length == 0) return;
    const int64_t blocks = (group.length + k.block - 1) / k.block;
    k.pack(a, group, 0, group.length, tiles);
    for (int head = 0; head < a.heads; ++head) {
        memset(turns.done, 0, blocks * sizeof(int32_t));
        for (int64_t first = 0; first < group.length; first += k.block)
            k.run(a, group, head, first, smaller(first + k.block, group.length), tiles, local, turns);
    }
    if (k.finish) k.finish(a, group, 0, group.length, tiles);
}

// A share of a group that all threads work on; each calls this.
static void run_together(
    const Attention& a, const Kernel& k, int64_t g, char* tiles, char* local, Turns turns, int64_t* next
) {
    const Group group = group_of(a, g);
    const int64_t blocks = (group.length + k.block - 1) / k.block;
#pragma omp single
    {
        memset(turns.done, 0, a.heads * blocks * sizeof(int32_t));
        *next = 0;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < group.length; first += k.unit)
        k.pack(a, group, first, smaller(first + k.unit, group.length), tiles);
    // Numbers are drawn in order, so that whoever waits for a turn waits for a task that runs.
    for (;;) {
        const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (task >= a.heads * blocks) break;
        const int head = task / blocks;
        const int64_t first = task % blocks * k.block;
        const Turns own = {turns.done + head * blocks};
        k.run(a, group, head, first, smaller(first + k.block, group.length), tiles, local, own);
    }
#pragma omp barrier
    if (!k.finish) return;
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < group.length; first += k.unit)
        k.finish(a, group, first, smaller(first + k.unit, group.length), tiles);
}

extern "C" __attribute__((visibility("default"))) int64_t hlip_attention_scratch(
    const Attention* a, int32_t isa, int32_t backward
) {
    return Scratch(*a, kernel_of(*a, isa, backward)).total;
}

extern "C" __attribute__((visibility("default"))) void hlip_attention(
    const Attention* arguments, int32_t isa, int32_t backward
) {
    const Attention& a = *arguments;
    const Kernel& k = kernel_of(a, isa, backward);
    const Scratch scratch(a, k);
    char* memory = static_cast<char*>(a.scratch);
    Place* order = reinterpret_cast<Place*>(memory + scratch.order);
    for (int64_t g = 0; g < a.groups; ++g) order[g] = {length_of(a, g), g};
    qsort(order, a.groups, sizeof(Place), longer_first);
    int64_t long_groups = 0, next = 0;
    while (long_groups < a.groups && int64_t(k.tile_bytes(a, order[long_groups].length)) > CACHE) ++long_groups;

#pragma omp parallel num_threads(a.threads)
    {
        char* tiles = memory + scratch.part + omp_get_thread_num() * scratch.local;
        Turns own = {reinterpret_cast<int32_t*>(tiles + scratch.tiles)};
        char* local = tiles + scratch.local - round_up(k.local_bytes(a), LINE);
        const Turns turns = {reinterpret_cast<int32_t*>(memory + scratch.turns)};
        for (int64_t i = 0; i < long_groups; ++i)
            run_together(a, k, order[i].group, memory + scratch.shared, local, turns, &next);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = long_groups; i < a.groups; ++i) run_alone(a, k, order[i].group, tiles, local, own);
    }
}
