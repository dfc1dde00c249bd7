// The attention kernels of each ISA: by whether the tensors are bfloat16, and by padded head dim / HEAD_STEP - 1.
#pragma once

#include "attention.h"

#define DECLARE_KERNELS(isa) \
    namespace isa { \
    extern const Kernel forward[2][HEAD_WIDTHS], backward[2][HEAD_WIDTHS]; \
    }
DECLARE_KERNELS(generic)
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)

// In bfloat16 only.
namespace amx {
extern const Kernel forward[HEAD_WIDTHS], backward[HEAD_WIDTHS];
}
