// Norms and GELU, to be compiled for AVX-512.
#define NORM_GELU_ISA avx512
#include "norm_gelu_vector.h"
