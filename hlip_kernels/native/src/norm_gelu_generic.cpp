// Norms and GELU, to be compiled for any processor.
#define NORM_GELU_ISA generic
#include "norm_gelu_vector.h"
