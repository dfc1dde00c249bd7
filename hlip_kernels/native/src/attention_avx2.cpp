// Attention on vectors, to be compiled for AVX2 and FMA.
#define ATTENTION_ISA avx2
#include "attention_vector_backward.h"
#include "attention_vector_forward.h"
