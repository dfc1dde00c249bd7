// The vector kernels, to be compiled for AVX2 and FMA.
#define VECTOR_KERNELS avx2
#include "vector.h"
