// Attention on 16-byte vectors, which every processor that the compiler knows has or is given.
#define ATTENTION_ISA generic
#include "attention_vector_backward.h"
#include "attention_vector_forward.h"
