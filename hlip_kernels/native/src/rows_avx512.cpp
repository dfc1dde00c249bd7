// Norms and GELU, to be compiled for AVX-512.
#define ROWS_ISA avx512
#include "rows_of.h"
