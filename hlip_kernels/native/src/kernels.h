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
DECLARE_KERNELS(amx)
