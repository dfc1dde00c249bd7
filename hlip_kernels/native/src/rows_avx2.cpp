// Norms and GELU, to be compiled for AVX2 and FMA.
#define ROWS_ISA avx2
#include "rows_of.h"
