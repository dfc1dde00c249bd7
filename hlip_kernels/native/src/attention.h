// Attention over the groups of a level: what the C interface, its driver and the kernels of each ISA share.
//
// Everything here has internal linkage: the kernels are compiled with flags of their own, and a linker that merged two
// copies of a function could hand AVX-512 code to a processor without it.
#pragma once

#include <sched.h>
#include <stddef.h>
#include <stdint.h>

// Shapes: R rows of queries, S rows of keys, G groups, H heads, D head dim. In q, k, v and their gradients rows lie a
// stride apart, in elements, at least H D; the heads of a row lie side by side. All else is contiguous.
struct Attention {
    const void *q, *k, *v;  // (R, H, D), (S, H, D), (S, H, D)
    const int32_t *q_bounds, *k_bounds;  // (G + 1), group g begins at row bounds[g] and ends before bounds[g + 1]
    const int32_t *q_used, *k_used;  // (G), how many rows, from the first, group g has; null: all to the next group
    void* out;  // (R, H, D)
    float* lse;  // (H, R), natural logarithm of the softmax's denominator
    const void* grad_out;  // (R, H, D); backward only, as the next
    void *grad_q, *grad_k, *grad_v;  // (R, H, D), (S, H, D), (S, H, D)
    void* scratch;  // what `hlip_attention_scratch` asks for, aligned to 2 MiB
    int64_t q_rows, k_rows;  // R, S
    int64_t q_stride, k_stride, grad_q_stride, grad_k_stride;  // v has the stride of k, grad_v that of grad_k
    int32_t groups, heads, head_dim;
    int32_t bfloat16;  // 1: all tensors but lse are bfloat16; 0: float32
    int32_t threads;
    float softmax_scale;
};

// The rows of a group in tensors of queries, or in tensors of keys.
struct Span {
    int64_t begin, length;
};

struct Group {
    Span queries, keys;
};

// A run of heads, whose tiles lie side by side.
struct Heads {
    int first, last;
};

// For each block of queries, how many blocks of keys have added to its dq: they add in order, so that sums are the same
// whoever computes them.
struct Turns {
    int32_t* done;

    // Turns are short, but where there are more threads than cores, the one that is waited for may not be running.
    void wait(int64_t block, int32_t turn) const {
        for (int spins = 1; __atomic_load_n(&done[block], __ATOMIC_ACQUIRE) != turn; ++spins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins % 1024 == 0) sched_yield();
        }
    }
    void pass(int64_t block, int32_t turn) const { __atomic_store_n(&done[block], turn + 1, __ATOMIC_RELEASE); }
};

// Work on rows first to last of a group, for some heads. `tiles` is memory of these heads, shared by the threads that
// work on them.
typedef void Work(const Attention&, const Group&, Heads, int64_t first, int64_t last, char* tiles);

// Work on all queries and all keys of a group, in any order. Either may be null.
struct Pass {
    Work *queries, *keys;
};

// One direction of attention on one ISA, for groups that have queries and keys. `local` is a thread's own memory.
struct Kernel {
    int32_t unit;  // rows that are packed together
    int32_t block;  // rows of a task
    bool by_keys;  // whether these are keys, as in backward, or queries
    size_t (*tile_bytes)(const Attention&, const Group&);  // of a head
    size_t (*local_bytes)(const Attention&);
    // Rows into tiles; first is a multiple of `unit`.
    Pass pack;
    // The lse of queries once more, from all keys of the group, where one float is too coarse; when all rows are packed.
    Pass refine;
    // Rows first to last of one head, whose tiles are given, against all keys or queries of the group. Tasks of a head
    // begin in the order of their rows.
    void (*run)(const Attention&, const Group&, int head, int64_t first, int64_t last, char* tiles, char* local, Turns);
    // From tiles to the results, when all tasks have ended.
    Pass finish;
};

extern "C" {
enum { HLIP_GENERIC, HLIP_AVX2, HLIP_AVX512, HLIP_AMX, HLIP_ISAS };

// The best ISA that this processor has and this library was built with.
int32_t hlip_isa(void);
// Bytes of scratch that a call needs. With `backward`, of the gradient. -1 if there is no kernel for such a head dim or
// type, or if groups or rows are not where they should be.
int64_t hlip_attention_scratch(const Attention*, int32_t isa, int32_t backward);
// out and lse; with `backward`, grad_q, grad_k and grad_v from all others. Rows in no group are neither read nor
// written. A group without keys has an out of 0 and a lse of minus infinity. Returns 0, or -1 where
// `hlip_attention_scratch` does, and then nothing is written.
int32_t hlip_attention(const Attention*, int32_t isa, int32_t backward);
}

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Head dims are multiples of 16, padded with zeros to a multiple of HEAD_STEP in tiles.
static const int HEAD_STEP = 32;
static const int HEAD_WIDTHS = 4;  // of tiles, for which there are kernels

// The lse, in powers of two, from which on backward sums up a row's weights anew: lse is one float, whose rounding shows
// in every weight of its row, by a factor of e^0.5 at 5e6.
static const float LARGE_LSE = 256;

static inline int64_t padded_head_dim(const Attention& a) { return round_up(a.head_dim, HEAD_STEP); }
