// The kernels of each ISA: by whether the tensors are bfloat16, and by head dim / 32 - 1.
#pragma once

#include "attention.h"

#define DECLARE_KERNELS(isa) \
    namespace isa { \
    extern const Kernel forward[2][4], backward[2][4]; \
    }
DECLARE_KERNELS(generic)
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)

// In bfloat16 only.
namespace amx {
extern const Kernel forward[4], backward[4];
}
