// The kernels of each ISA, by whether the tensors are bfloat16 and by direction.
#pragma once

#include "attention.h"

#define DECLARE_KERNELS(isa) \
    namespace isa { \
    extern const Kernel forward[2], backward[2]; \
    }
DECLARE_KERNELS(generic)
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)

// In bfloat16 only, by head dim / 32 - 1.
namespace amx {
extern const Kernel forward[4], backward[4];
}
