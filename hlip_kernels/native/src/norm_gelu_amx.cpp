// Norms and GELU, to be compiled for processors with AMX, which convert to bfloat16 in one instruction.
#define NORM_GELU_ISA amx
#include "norm_gelu_vector.h"
