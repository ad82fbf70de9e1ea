/* Products with AVX-512's VNNI: vpdpbusd multiplies unsigned bytes of lanes by signed codes. See dot_avx2.h for what is defined here. */
enum { QUERY_BIAS = 128, VALUE_BIAS = 0 };
typedef uint8_t lane_code;

#include "bytes.h"
#include "weights_float.h"

#define add_weighted add_products

#define LANES_OF_ONES ((int_vector)0x01010101)

INLINE int_vector broadcast_codes(int32_t few) {
    int_vector all = (int_vector)few;
    __asm__("" : "+v"(all)); /* in a register, lest it be loaded anew for each product */
    return all;
}

/* The first `count` codes of a register, whole steps; those behind them, which are not read, are 0. */
#define LOADS_FEW_CODES 1
INLINE int_vector load_few_codes(const int8_t* codes, int64_t count) {
    return (int_vector)_mm512_maskz_loadu_epi32((__mmask16)((1u << (count / STEP)) - 1), codes);
}

INLINE int_vector add_products(int_vector sums, int_vector lanes, int_vector codes) {
    return (int_vector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)lanes, (__m512i)codes);
}

/* 2^floor(x) from the exponent, the rest from the polynomial of least relative error on 0 ... 1. */
INLINE void weight_exp2(vector x[STEP], const float factor) {
    for (int k = 0; k < STEP; k++) {
        const __m512 rest = _mm512_reduce_ps((__m512)x[k], 0x09); /* x - floor(x) */
        __m512 power = _mm512_set1_ps(0.07802452f * factor);
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.22606716f * factor));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.69583356f * factor));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.9999252f * factor));
        x[k] = (vector)_mm512_scalef_ps(power, (__m512)x[k]);
    }
}

/* Which weights are small, those below 8, is asked of their logarithms, so that exponentials are not waited for. A weight at the limit is below 8
 * by more, 1e-4 of it, than the error of an exponential. */
INLINE int_vector round_weights(vector weights[STEP], const vector logarithms[STEP], const weight_offset offsets[STEP]) {
    const __m512 small_logarithm = _mm512_set1_ps(-4.9945f); /* log2(8 / 255) - 1.5e-4 */
    for (int k = 0; k < STEP; k++) {
        const __m512 weight = (__m512)weights[k];
        const __mmask16 small = _mm512_cmp_ps_mask((__m512)logarithms[k], small_logarithm, _CMP_LT_OQ);
        weights[k] = (vector)_mm512_mask_add_ps(weight, small, weight, _mm512_set1_ps(offsets[k]));
    }
    const __m512i w0 = _mm512_cvtps_epi32((__m512)weights[0]), w1 = _mm512_cvtps_epi32((__m512)weights[1]);
    const __m512i w2 = _mm512_cvtps_epi32((__m512)weights[2]), w3 = _mm512_cvtps_epi32((__m512)weights[3]);
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(w0, w1), _mm512_packs_epi32(w2, w3));
    return (int_vector)_mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400));
}
