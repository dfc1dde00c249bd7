// Norms and GELU, to be compiled for AVX2 and FMA.
#define NORM_GELU_ISA avx2
#include "norm_gelu_vector.h"
