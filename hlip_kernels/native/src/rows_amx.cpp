// Norms and GELU, to be compiled for processors with AMX, which convert to bfloat16 in one instruction.
#define ROWS_ISA amx
#include "rows_of.h"
