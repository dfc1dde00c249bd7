// Attention over the groups of a level: what the C interface, its driver and the kernels of each ISA share.
//
// Everything here has internal linkage: the kernels are compiled with flags of their own, and a linker that merged two
// copies of a function could hand AVX-512 code to a processor without it.
#pragma once

#include <sched.h>
#include <stddef.h>
#include <stdint.h>

// Shapes: R rows, G groups, P prefix rows a group, H heads, D head dim. Tensors are contiguous.
struct Attention {
    const void* qkv;  // (R, 3, H, D)
    const int32_t* cu_seqlens;  // (G + 1), bounds of the groups in the patch stream
    void* out;  // (R, H, D)
    float* lse;  // (H, R), natural logarithm of the softmax's denominator
    const void* grad_out;  // (R, H, D); backward only, as the next
    void* grad_qkv;  // (R, 3, H, D)
    void* scratch;  // what `hlip_attention_scratch` asks for, aligned to 2 MiB
    int64_t rows;
    int32_t groups, num_prefix, heads, head_dim;
    int32_t bfloat16;  // 1: all tensors but lse are bfloat16; 0: float32
    int32_t threads;
    float softmax_scale;
};

// The rows of one group. Its row i is row `prefix + i` of the tensor for i < num_prefix, otherwise `patches + i`.
struct Group {
    int64_t prefix, patches, length;
    int32_t num_prefix;

    int64_t row(int64_t i) const { return (i < num_prefix ? prefix : patches) + i; }
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

// One direction of attention on one ISA. `tiles` is memory of some heads of a group, shared by the threads that work on
// them; `local` is a thread's own.
struct Kernel {
    int32_t unit;  // rows that are packed together
    int32_t block;  // rows of a task: queries in forward, keys in backward
    size_t (*tile_bytes)(const Attention&, int64_t length);  // of a head
    size_t (*local_bytes)(const Attention&);
    // Rows first to last into tiles; first is a multiple of `unit`.
    void (*pack)(const Attention&, const Group&, Heads, int64_t first, int64_t last, char* tiles);
    // What is known of rows first to last once more, from all rows of the group, when they are packed. May be null.
    void (*refine)(const Attention&, const Group&, Heads, int64_t first, int64_t last, char* tiles);
    // Rows first to last of one head, whose tiles are given, against all rows of the group. Tasks of a head begin in the
    // order of their rows.
    void (*run)(const Attention&, const Group&, int head, int64_t first, int64_t last, char* tiles, char* local, Turns);
    // Rows first to last from tiles to the result, when all tasks have ended. May be null.
    void (*finish)(const Attention&, const Group&, Heads, int64_t first, int64_t last, char* tiles);
};

extern "C" {
enum { HLIP_GENERIC, HLIP_AVX2, HLIP_AVX512, HLIP_AMX, HLIP_ISAS };

// The best ISA that this processor has and this library was built with.
int32_t hlip_isa(void);
// Bytes of scratch that a call needs. With `backward`, of the gradient. -1 if there is no kernel for such a head dim or
// type, or if the groups do not make up the rows.
int64_t hlip_attention_scratch(const Attention*, int32_t isa, int32_t backward);
// out and lse; with `backward`, grad_qkv from all others. Returns 0, or -1 where `hlip_attention_scratch` does, and then
// nothing is written.
int32_t hlip_attention(const Attention*, int32_t isa, int32_t backward);
}

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether bounds, (count + 1), rise from 0 to `last`.
static inline bool rise(const int32_t* bounds, int64_t count, int64_t last) {
    for (int64_t i = 0; i < count; ++i)
        if (bounds[i] > bounds[i + 1]) return false;
    return bounds[0] == 0 && bounds[count] == last;
}

// Head dims are multiples of 16, padded with zeros to a multiple of HEAD_STEP in tiles.
static const int HEAD_STEP = 32;
static const int HEAD_WIDTHS = 4;  // of tiles, for which there are kernels

// The lse, in powers of two, from which on backward sums up a row's weights anew: lse is one float, whose rounding shows
// in every weight of its row, by a factor of e^0.5 at 5e6.
static const float LARGE_LSE = 256;

static inline int64_t padded_head_dim(const Attention& a) { return round_up(a.head_dim, HEAD_STEP); }
