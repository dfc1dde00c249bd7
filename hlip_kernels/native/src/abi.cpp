// What a caller compares with its own before it calls anything else: this function keeps its form for ever.
#include "attention.h"
#include "linear.h"
#include "norm_gelu.h"

// A number for the text of these headers (setup.py), how many ISAs there are, and the size of every structure; 0 ends it.
extern "C" __attribute__((visibility("default"))) const int64_t* hlip_abi(void) {
    static const int64_t numbers[] = {
        HLIP_ABI, HLIP_ISAS, sizeof(Attention), sizeof(Norm), sizeof(Gelu), sizeof(Layer), sizeof(Product),
        sizeof(WeightGradient), 0,
    };
    return numbers;
}
