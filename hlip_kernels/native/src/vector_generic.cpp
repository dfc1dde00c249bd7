// The vector kernels with 16-byte vectors, which every processor that the compiler knows has or is given.
#define VECTOR_KERNELS generic
#include "vector.h"
