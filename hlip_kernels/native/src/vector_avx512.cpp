// The vector kernels, to be compiled for AVX-512.
#define VECTOR_KERNELS avx512
#include "vector.h"
