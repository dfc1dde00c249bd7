// Norms and GELU, to be compiled for any processor.
#define ROWS_ISA generic
#include "rows_of.h"
