// The C interface and the driver: which thread does what, in which order.
//
// A short group is packed and worked through by one thread. A long one is the work of all threads, some heads at a time:
// they pack its units, then take tasks of (head, block of rows). No sum depends on who computes it.
#include "attention.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "attention_kernels.h"

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

static int64_t row_size(const Attention& a) { return int64_t(a.heads) * a.head_dim; }

static Span span_of(const int32_t* bounds, const int32_t* used, int64_t g) {
    return {bounds[g], used ? used[g] : int64_t(bounds[g + 1]) - bounds[g]};
}

static Group group_of(const Attention& a, int64_t g) {
    return {span_of(a.q_bounds, a.q_used, g), span_of(a.k_bounds, a.k_used, g)};
}

// Whether groups follow one another within the rows, and make up all of them where no group leaves some out.
static bool in_order(const int32_t* bounds, const int32_t* used, int64_t groups, int64_t rows) {
    for (int64_t g = 0; g < groups; ++g) {
        const Span s = span_of(bounds, used, g);
        if (s.begin < 0 || s.length < 0 || s.begin + s.length > smaller(bounds[g + 1], rows)) return false;
    }
    return used || (bounds[0] == 0 && bounds[groups] == rows);
}

// Whether there is a kernel, and groups and rows are where they should be: then nothing beyond the groups' rows is read
// or written.
static bool fits(const Attention& a, int32_t isa, int32_t backward) {
    if (a.head_dim <= 0 || a.head_dim % 16 || a.head_dim > HEAD_STEP * HEAD_WIDTHS) return false;
    if ((a.bfloat16 != 0 && a.bfloat16 != 1) || isa < 0 || isa >= HLIP_ISAS) return false;
    if (a.groups < 0 || a.heads < 0 || a.threads < 1) return false;
    const int64_t size = row_size(a);
    if (a.q_stride < size || a.k_stride < size) return false;
    if (backward && (a.grad_q_stride < size || a.grad_k_stride < size)) return false;
    return in_order(a.q_bounds, a.q_used, a.groups, a.q_rows) && in_order(a.k_bounds, a.k_used, a.groups, a.k_rows);
}

// How many heads are worked on at a time, so that their tiles fit into so many bytes.
static int heads_at_once(const Attention& a, int64_t head_bytes, int64_t bytes) {
    if (head_bytes * a.heads <= bytes) return a.heads;
    return head_bytes >= bytes ? 1 : bytes / head_bytes;
}

static bool is_empty(const Group& group) { return group.queries.length == 0 || group.keys.length == 0; }

static bool is_short(const Attention& a, int64_t head_bytes) { return head_bytes * a.heads <= SHORT; }

static int64_t blocks_of(const Kernel& k, Span rows) { return (rows.length + k.block - 1) / k.block; }

struct Place {
    int64_t bytes, group;  // of a head's tiles
};

static Place place_of(const Attention& a, const Kernel& k, int64_t g) {
    const Group group = group_of(a, g);
    return {is_empty(group) ? 0 : int64_t(k.tile_bytes(a, group)), g};
}

static int larger_first(const void* x, const void* y) {
    const Place &a = *static_cast<const Place*>(x), &b = *static_cast<const Place*>(y);
    if (a.bytes != b.bytes) return a.bytes < b.bytes ? 1 : -1;
    return a.group < b.group ? -1 : a.group > b.group;
}

// How the scratch of a call is divided, in bytes: the order of groups, turns, a part for each thread, tiles of a long
// group.
struct Scratch {
    int64_t turns = 0, threads, local, own_turns, thread_bytes, shared, total;

    Scratch(const Attention& a, const Kernel& k) {
        int64_t blocks = 0, of_short = 0, of_long = 0;
        for (int64_t g = 0; g < a.groups; ++g) {
            const int64_t head = place_of(a, k, g).bytes;
            blocks = larger(blocks, blocks_of(k, group_of(a, g).queries));
            if (is_short(a, head))
                of_short = larger(of_short, head * a.heads);
            else
                of_long = larger(of_long, head * heads_at_once(a, head, SHARED));
        }
        const int64_t all_turns = round_up(a.heads * blocks * sizeof(int32_t), LINE);
        turns = round_up(a.groups * sizeof(Place), LINE);
        threads = turns + all_turns;
        local = round_up(of_short, LINE);  // after a thread's tiles
        own_turns = local + round_up(k.local_bytes(a), LINE);
        thread_bytes = own_turns + all_turns;
        shared = round_up(threads + a.threads * thread_bytes, 2 << 20);
        total = shared + of_long;
    }
};

// The results of a group without keys or without queries.
static void clear(const Attention& a, const Group& group, int32_t backward) {
    const int64_t size = a.bfloat16 ? 2 : 4;
    const auto zero = [&](void* tensor, Span rows, int64_t stride) {
        char* to = static_cast<char*>(tensor) + rows.begin * stride * size;
        for (int64_t i = 0; i < rows.length; ++i, to += stride * size) memset(to, 0, row_size(a) * size);
    };
    if (backward) {
        zero(a.grad_q, group.queries, a.grad_q_stride);
        zero(a.grad_k, group.keys, a.grad_k_stride);
        zero(a.grad_v, group.keys, a.grad_k_stride);
        return;
    }
    zero(a.out, group.queries, row_size(a));
    for (int head = 0; head < a.heads; ++head) {
        float* lse = a.lse + head * a.q_rows + group.queries.begin;
        for (int64_t i = 0; i < group.queries.length; ++i) lse[i] = -INFINITY;
    }
}

// All of a group by one thread.
static void run_alone(const Attention& a, const Kernel& k, const Group& group, char* tiles, char* local, Turns turns) {
    const int64_t length = (k.by_keys ? group.keys : group.queries).length, head_bytes = k.tile_bytes(a, group);
    const auto go_through = [&](const Pass& pass) {
        const Heads all = {0, a.heads};
        if (pass.queries) pass.queries(a, group, all, 0, group.queries.length, tiles);
        if (pass.keys) pass.keys(a, group, all, 0, group.keys.length, tiles);
    };
    go_through(k.pack);
    go_through(k.refine);
    for (int head = 0; head < a.heads; ++head) {
        memset(turns.done, 0, blocks_of(k, group.queries) * sizeof(int32_t));
        for (int64_t first = 0; first < length; first += k.block) {
            const int64_t last = smaller(first + k.block, length);
            k.run(a, group, head, first, last, tiles + head * head_bytes, local, turns);
        }
    }
    go_through(k.finish);
}

// A share of a pass that all threads work on; each calls this.
static void share(
    const Attention& a, const Kernel& k, const Pass& pass, const Group& group, Heads heads, char* tiles
) {
    const auto units = [&](Work* work, Span rows) { return work ? (rows.length + k.unit - 1) / k.unit : 0; };
    const int64_t of_queries = units(pass.queries, group.queries), of_keys = units(pass.keys, group.keys);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < of_queries + of_keys; ++i) {
        const bool keys = i >= of_queries;
        const int64_t first = (keys ? i - of_queries : i) * k.unit;
        const int64_t last = smaller(first + k.unit, (keys ? group.keys : group.queries).length);
        (keys ? pass.keys : pass.queries)(a, group, heads, first, last, tiles);
    }
}

// A share of some heads of a group that all threads work on; each calls this. `next` counts tasks: first whole heads,
// as many to each thread, since blocks of a head add to the same sums, which would go from one thread's cache to
// another's; then the blocks of the heads that are left.
static void run_together(
    const Attention& a, const Kernel& k, const Group& group, Heads heads, char* tiles, char* local, Turns turns,
    int64_t* next
) {
    const Span rows = k.by_keys ? group.keys : group.queries;
    const int64_t blocks = blocks_of(k, rows), turns_of_head = blocks_of(k, group.queries);
    const int64_t head_bytes = k.tile_bytes(a, group);
    const int64_t count = heads.last - heads.first, whole = count / a.threads * a.threads;
    const int64_t tasks = whole + (count - whole) * blocks;
    const auto run = [&](int64_t head, int64_t block) {
        const int64_t first = block * k.block, last = smaller(first + k.block, rows.length);
        const Turns own = {turns.done + head * turns_of_head};
        k.run(a, group, heads.first + head, first, last, tiles + head * head_bytes, local, own);
    };
#pragma omp single
    {
        memset(turns.done, 0, count * turns_of_head * sizeof(int32_t));
        *next = 0;
    }
    share(a, k, k.pack, group, heads, tiles);
    share(a, k, k.refine, group, heads, tiles);
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
    share(a, k, k.finish, group, heads, tiles);
}

// The huge pages within a result of rows that lie a stride apart.
struct HugePages {
    static const int64_t SIZE = 2 << 20;
    char *begin, *end;

    HugePages(const Attention& a, void* tensor, int64_t rows, int64_t stride) {
        const int64_t bytes = rows > 0 ? ((rows - 1) * stride + row_size(a)) * (a.bfloat16 ? 2 : 4) : 0;
        begin = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(tensor), SIZE));
        end = reinterpret_cast<char*>((reinterpret_cast<int64_t>(tensor) + bytes) / SIZE * SIZE);
    }

    // Large results are fresh memory at every call: in huge pages it is cleared at a fraction of the cost.
    void advise() const {
#ifdef MADV_HUGEPAGE
        if (end - begin >= 2 * SIZE) madvise(begin, end - begin, MADV_HUGEPAGE);
#endif
    }
    // All threads call this before they write. If two came upon the same fresh page, both would clear it. What lies
    // there stays: it may belong to rows of no group, or to what lies between rows.
    void touch() const {
#pragma omp for schedule(static)
        for (char* page = begin; page < end; page += SIZE) __atomic_fetch_or(page, 0, __ATOMIC_RELAXED);
    }
};

extern "C" __attribute__((visibility("default"))) int64_t hlip_attention_scratch(
    const Attention* a, int32_t isa, int32_t backward
) {
    return fits(*a, isa, backward) ? Scratch(*a, kernel_of(*a, isa, backward)).total : -1;
}

extern "C" __attribute__((visibility("default"))) int32_t hlip_attention(
    const Attention* arguments, int32_t isa, int32_t backward
) {
    const Attention& a = *arguments;
    if (!fits(a, isa, backward)) return -1;
    const Kernel& k = kernel_of(a, isa, backward);
    const Scratch scratch(a, k);
    const HugePages results[] = {
        backward ? HugePages(a, a.grad_q, a.q_rows, a.grad_q_stride) : HugePages(a, a.out, a.q_rows, row_size(a)),
        {a, a.grad_k, backward ? a.k_rows : 0, a.grad_k_stride},
        {a, a.grad_v, backward ? a.k_rows : 0, a.grad_k_stride},
    };
    for (const HugePages& pages : results) pages.advise();
    char* memory = static_cast<char*>(a.scratch);
    Place* order = reinterpret_cast<Place*>(memory);
    for (int64_t g = 0; g < a.groups; ++g) order[g] = place_of(a, k, g);
    qsort(order, a.groups, sizeof(Place), larger_first);
    int64_t long_groups = 0, next = 0;
    while (long_groups < a.groups && !is_short(a, order[long_groups].bytes)) ++long_groups;

#pragma omp parallel num_threads(a.threads)
    {
        char* tiles = memory + scratch.threads + omp_get_thread_num() * scratch.thread_bytes;
        char* local = tiles + scratch.local;
        const Turns own = {reinterpret_cast<int32_t*>(tiles + scratch.own_turns)};
        const Turns turns = {reinterpret_cast<int32_t*>(memory + scratch.turns)};
        for (const HugePages& pages : results) pages.touch();
        for (int64_t i = 0; i < long_groups; ++i) {
            const Group group = group_of(a, order[i].group);
            const int count = heads_at_once(a, order[i].bytes, SHARED);
            for (int head = 0; head < a.heads; head += count) {
                const Heads heads = {head, int(smaller(head + count, a.heads))};
                run_together(a, k, group, heads, memory + scratch.shared, local, turns, &next);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = long_groups; i < a.groups; ++i) {
            const Group group = group_of(a, order[i].group);
            if (is_empty(group))
                clear(a, group, backward);
            else
                run_alone(a, k, group, tiles, local, own);
        }
    }
    return 0;
}
