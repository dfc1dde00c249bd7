// Attention on vectors, to be compiled for AVX-512.
#define ATTENTION_ISA avx512
#include "attention_vector_backward.h"
#include "attention_vector_forward.h"
