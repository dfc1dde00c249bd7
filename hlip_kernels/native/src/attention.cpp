// The C interface and the driver: which thread does what, in which order.
//
// A short group is packed and worked through by one thread. A long one is the work of all threads, some heads at a time:
// they pack its units, then take tasks of (head, block of rows). No sum depends on who computes it.
#include "attention.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels.h"

static const int64_t SHORT = 4 << 20;  // bytes of a short group's tiles, of all heads
static const int64_t SHARED = 256 << 20;  // bytes of tiles of a long group, unless one head needs more
static const int64_t LINE = 64;

static const Kernel& kernel_of(const Attention& a, int32_t isa, int32_t backward) {
    const int64_t width = padded_head_dim(a) / HEAD_STEP - 1;
#if defined(__x86_64__)
    if (isa == HLIP_AMX && a.bfloat16) return (backward ? amx::backward : amx::forward)[width];
    if (isa >= HLIP_AVX512) return (backward ? avx512::backward : avx512::forward)[a.bfloat16][width];
    if (isa == HLIP_AVX2) return (backward ? avx2::backward : avx2::forward)[a.bfloat16][width];
#else
    (void)isa;
#endif
    return (backward ? generic::backward : generic::forward)[a.bfloat16][width];
}

// Whether there is a kernel, and the groups make up the rows: then nothing beyond the tensors is read or written.
static bool fits(const Attention& a, int32_t isa) {
    if (a.head_dim <= 0 || a.head_dim % 16 || a.head_dim > HEAD_STEP * HEAD_WIDTHS) return false;
    if ((a.bfloat16 != 0 && a.bfloat16 != 1) || isa < 0 || isa >= HLIP_ISAS) return false;
    if (a.groups < 0 || a.num_prefix < 0 || a.heads < 0 || a.threads < 1) return false;
    return rise(a.cu_seqlens, a.groups, a.rows - int64_t(a.groups) * a.num_prefix);
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

// How many heads are worked on at a time, so that their tiles fit into so many bytes.
static int heads_at_once(const Attention& a, int64_t head_bytes, int64_t bytes) {
    if (head_bytes * a.heads <= bytes) return a.heads;
    return head_bytes >= bytes ? 1 : bytes / head_bytes;
}

static bool is_short(const Attention& a, const Kernel& k, int64_t length) {
    return int64_t(k.tile_bytes(a, length)) * a.heads <= SHORT;
}

// How the scratch of a call is divided, in bytes: the order of groups, turns, a part for each thread, tiles of a long
// group.
struct Scratch {
    int64_t turns = 0, part, local, own_turns, part_bytes, shared, total;

    Scratch(const Attention& a, const Kernel& k) {
        const int64_t most = longest(a), head = k.tile_bytes(a, most);
        const int64_t all_turns = round_up(a.heads * (most / k.block + 1) * sizeof(int32_t), LINE);
        turns = round_up(a.groups * 2 * sizeof(int64_t), LINE);
        part = turns + all_turns;
        local = smaller(head * a.heads, SHORT);  // after a thread's tiles
        own_turns = local + round_up(k.local_bytes(a), LINE);
        part_bytes = own_turns + all_turns;
        shared = round_up(part + a.threads * part_bytes, 2 << 20);
        total = shared + (is_short(a, k, most) ? 0 : head * heads_at_once(a, head, SHARED));
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
    const int64_t blocks = (group.length + k.block - 1) / k.block, head_bytes = k.tile_bytes(a, group.length);
    const Heads all = {0, a.heads};
    k.pack(a, group, all, 0, group.length, tiles);
    if (k.refine) k.refine(a, group, all, 0, group.length, tiles);
    for (int head = 0; head < a.heads; ++head) {
        memset(turns.done, 0, blocks * sizeof(int32_t));
        for (int64_t first = 0; first < group.length; first += k.block) {
            const int64_t last = smaller(first + k.block, group.length);
            k.run(a, group, head, first, last, tiles + head * head_bytes, local, turns);
        }
    }
    if (k.finish) k.finish(a, group, all, 0, group.length, tiles);
}

// A share of some heads of a group that all threads work on; each calls this. `next` counts tasks: first whole heads,
// as many to each thread, since blocks of a head add to the same sums, which would go from one thread's cache to
// another's; then the blocks of the heads that are left.
static void run_together(
    const Attention& a, const Kernel& k, const Group& group, Heads heads, char* tiles, char* local, Turns turns,
    int64_t* next
) {
    const int64_t blocks = (group.length + k.block - 1) / k.block, head_bytes = k.tile_bytes(a, group.length);
    const int64_t count = heads.last - heads.first, whole = count / a.threads * a.threads;
    const int64_t tasks = whole + (count - whole) * blocks;
    const auto run = [&](int64_t head, int64_t block) {
        const int64_t first = block * k.block, last = smaller(first + k.block, group.length);
        const Turns own = {turns.done + head * blocks};
        k.run(a, group, heads.first + head, first, last, tiles + head * head_bytes, local, own);
    };
#pragma omp single
    {
        memset(turns.done, 0, count * blocks * sizeof(int32_t));
        *next = 0;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < group.length; first += k.unit)
        k.pack(a, group, heads, first, smaller(first + k.unit, group.length), tiles);
    if (k.refine) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < group.length; first += k.unit)
            k.refine(a, group, heads, first, smaller(first + k.unit, group.length), tiles);
    }
    // Numbers are drawn in order, so that whoever waits for a turn waits for a task that runs.
    for (;;) {
        const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (task >= tasks) break;
        if (task < whole)
            for (int64_t block = 0; block < blocks; ++block) run(task, block);
        else
            run(whole + (task - whole) / blocks, (task - whole) % blocks);
    }
#pragma omp barrier
    if (!k.finish) return;
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < group.length; first += k.unit)
        k.finish(a, group, heads, first, smaller(first + k.unit, group.length), tiles);
}

// The huge pages within some memory.
struct HugePages {
    static const int64_t SIZE = 2 << 20;
    char *begin, *end;

    HugePages(void* memory, int64_t bytes)
        : begin(reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory), SIZE))),
          end(reinterpret_cast<char*>((reinterpret_cast<int64_t>(memory) + bytes) / SIZE * SIZE)) {}

    // Large results are fresh memory at every call: in huge pages it is cleared at a fraction of the cost.
    void advise() const {
#ifdef MADV_HUGEPAGE
        if (end - begin >= 2 * SIZE) madvise(begin, end - begin, MADV_HUGEPAGE);
#endif
    }
    // All threads call this before they write. If two came upon the same fresh page, both would clear it.
    void touch() const {
#pragma omp for schedule(static)
        for (char* page = begin; page < end; page += SIZE) *static_cast<volatile char*>(page) = 0;
    }
};

extern "C" __attribute__((visibility("default"))) int64_t hlip_attention_scratch(
    const Attention* a, int32_t isa, int32_t backward
) {
    return fits(*a, isa) ? Scratch(*a, kernel_of(*a, isa, backward)).total : -1;
}

extern "C" __attribute__((visibility("default"))) int32_t hlip_attention(
    const Attention* arguments, int32_t isa, int32_t backward
) {
    const Attention& a = *arguments;
    if (!fits(a, isa)) return -1;
    const Kernel& k = kernel_of(a, isa, backward);
    const Scratch scratch(a, k);
    const int64_t row_bytes = int64_t(a.heads) * a.head_dim * (a.bfloat16 ? 2 : 4);
    const HugePages pages(backward ? a.grad_qkv : a.out, a.rows * row_bytes * (backward ? 3 : 1));
    pages.advise();
    char* memory = static_cast<char*>(a.scratch);
    Place* order = reinterpret_cast<Place*>(memory);
    for (int64_t g = 0; g < a.groups; ++g) order[g] = {length_of(a, g), g};
    qsort(order, a.groups, sizeof(Place), longer_first);
    int64_t long_groups = 0, next = 0;
    while (long_groups < a.groups && !is_short(a, k, order[long_groups].length)) ++long_groups;

#pragma omp parallel num_threads(a.threads)
    {
        char* tiles = memory + scratch.part + omp_get_thread_num() * scratch.part_bytes;
        char* local = tiles + scratch.local;
        const Turns own = {reinterpret_cast<int32_t*>(tiles + scratch.own_turns)};
        const Turns turns = {reinterpret_cast<int32_t*>(memory + scratch.turns)};
        pages.touch();
        for (int64_t i = 0; i < long_groups; ++i) {
            const Group group = group_of(a, order[i].group);
            const int count = heads_at_once(a, k.tile_bytes(a, group.length), SHARED);
            for (int head = 0; head < a.heads; head += count) {
                const Heads heads = {head, int(smaller(head + count, a.heads))};
                run_together(a, k, group, heads, memory + scratch.shared, local, turns, &next);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = long_groups; i < a.groups; ++i) run_alone(a, k, order[i].group, tiles, local, own);
    }
    return 0;
}
