// With "instructions", writes what each instruction of AVX-512 and AVX512-BF16 gives for many operands: compiled with the
// compiler's immintrin.h and with the one beside this file, it must write the same. With "tiles", writes a product of tiles
// (c, a, b and the result); with "unconfigured", uses a tile that was never configured, and with "released", one that no
// longer is.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "../../hlip_kernels/native/src/tiles_amx.h"

static uint64_t state = 88172645463325252;

static uint32_t draw() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 16;
}

// Any bits, numbers near 1, or those that instructions treat apart.
static float number(int kind) {
    static const float apart[] = {0, -0.0f, 1, -1, 0.5f, 1.5f, -0.75f, INFINITY, -INFINITY, NAN, 1e-40f, -1e-42f,
                                  0x1p-126f, 0x1p127f, -126.5f, 127.99f, -149, -1e30f, 3.4e38f, 0x1.018p0f, 0x1.008p0f};
    const uint32_t bits = draw();
    float x;
    if (kind == 0) return apart[bits % (sizeof apart / sizeof *apart)];
    if (kind == 1) return int32_t(bits) * 0x1p-28f;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static __m512 numbers(int kind) {
    alignas(64) float x[16];
    for (float& lane : x) lane = number(kind);
    return _mm512_load_ps(x);
}

static void write(__m512 x) {
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, x);
    for (float& lane : lanes)
        if (lane != lane) lane = NAN;  // which one, the order of operands decides, and a compiler that
    fwrite(lanes, 1, sizeof lanes, stdout);
}
static void write(__m512i x) {
    alignas(64) char bytes[64];
    _mm512_store_si512(bytes, x);
    fwrite(bytes, 1, sizeof bytes, stdout);
}

static void instructions() {
    for (int i = 0; i < 3000; ++i) {
        const __m512 x = numbers(i % 3), y = numbers(i / 3 % 3), z = numbers(i / 9 % 3);
        const __m512i a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
        const __mmask16 mask = draw();
        const __mmask32 wide = draw();
        for (const __m512 result :
             {_mm512_add_ps(x, y), _mm512_sub_ps(x, y), _mm512_mul_ps(x, y), _mm512_div_ps(x, y), _mm512_min_ps(x, y),
              _mm512_max_ps(x, y), _mm512_fmadd_ps(x, y, z), _mm512_fmsub_ps(x, y, z),
              _mm512_mask_mul_ps(z, mask, x, y), _mm512_set1_ps(number(i % 3)), _mm512_setzero_ps(),
              _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), _mm512_maskz_scalef_ps(mask, x, y),
              _mm512_maskz_scalef_ps(0xffff, x, _mm512_mul_ps(y, _mm512_set1_ps(16))),
              _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero), _mm512_getexp_ps(x),
              _mm512_maskz_loadu_ps(mask, &y), _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_min_ps(x, _mm512_set1_ps(9)))),
              _mm512_dpbf16_ps(x, (__m512bh)a, (__m512bh)b), _mm512_dpbf16_ps(z, (__m512bh)a, (__m512bh)b),
              _mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(a, 1)),
              _mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(b))})
            write(result);
        for (const __m512i result :
             {(__m512i)_mm512_cvtne2ps_pbh(x, y), _mm512_set1_epi16(draw()), _mm512_setzero_si512(),
              _mm512_maskz_loadu_epi16(wide, &x), _mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b),
              _mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b), _mm512_shuffle_i32x4(a, b, 0x88),
              _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_permutex2var_epi16(a, _mm512_castps_si512(z), b),
              _mm512_add_epi16(a, b), _mm512_loadu_si512(&z)})
            write(result);
        const __m256bh narrow = _mm512_cvtneps_pbh(x);
        fwrite(&narrow, 1, sizeof narrow, stdout);
        const __mmask16 masks[] = {_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), _mm512_mask_cmp_ps_mask(mask, x, y, _CMP_LT_OQ)};
        fwrite(masks, 1, sizeof masks, stdout);
        alignas(64) __m512i part = b;
        _mm512_mask_storeu_epi16(&part, wide, a);
        write(part);
        _mm512_mask_storeu_ps(&part, mask, z);
        write(part);
        _mm512_stream_si512(&part, a);
        _mm_sfence();
        write(part);
    }
    // To about 14 bits, and processors differ.
    for (const float x : {1.0f, 3.0f, -7.0f, 1e30f, 0x1p-100f}) {
        const float one = _mm512_reduce_max_ps(_mm512_rcp14_ps(_mm512_set1_ps(x))) * x;
        const float same = _mm512_reduce_max_ps(_mm512_maskz_rcp14_ps(0xffff, _mm512_set1_ps(x))) * x;
        if (!(fabsf(one - 1) < 1e-4f) || !(fabsf(same - 1) < 1e-4f)) exit(2);
    }
}

#ifdef HLIP_EMULATED
static void tiles() {
    alignas(64) static float c[256];
    alignas(64) static uint16_t a[512], b[512];
    for (float& x : c) x = number(1);
    for (uint16_t* to : {a, b})
        for (int i = 0; i < 512; ++i) to[i] = _mm512_cvtneps_pbh(_mm512_set1_ps(number(1)))[0];
    // Row 0 with column 0: 2^24 at an even place, and 1 at all others. Row 1: numbers that vanish, but for a denormal
    // that is no zero elsewhere.
    for (int i = 0; i < 32; ++i) {
        a[i] = i ? 0x3f80 : 0x4b80;
        a[32 + i] = 0x0001;
        b[i / 2 * 32 + i % 2] = 0x3f80;
    }
    c[0] = 0;
    c[16] = 1e-40f;
    for (const void* operand : {static_cast<void*>(c), static_cast<void*>(a), static_cast<void*>(b)})
        fwrite(operand, 1, 1024, stdout);
    const amx::TilesInUse in_use;
    amx::tile_load<0>(c);
    amx::tile_load<1>(a);
    amx::tile_stream<2>(b);
    amx::tile_multiply<0, 1, 2>();
    amx::tile_store<0>(c);
    fwrite(c, 1, sizeof c, stdout);
    amx::tile_store<7>(c);  // cleared by the configuration
    fwrite(c, 1, sizeof c, stdout);
}

static void released() {
    { const amx::TilesInUse in_use; }
    amx::tile_zero<0>();
}
#endif

int main(int, char** arguments) {
    const char* what = arguments[1];
    if (!strcmp(what, "instructions")) instructions();
#ifdef HLIP_EMULATED
    if (!strcmp(what, "tiles")) tiles();
    if (!strcmp(what, "unconfigured")) amx::tile_zero<0>();
    if (!strcmp(what, "released")) released();
    if (!strcmp(what, "unaligned")) _mm512_load_ps(arguments[1] + 64 - reinterpret_cast<uintptr_t>(arguments[1]) % 64 + 4);
#endif
}
