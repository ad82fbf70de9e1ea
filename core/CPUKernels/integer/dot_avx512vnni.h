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

/* Weights are computed a vector at a time, in between products. */
#define WEIGHS_AMONG_PRODUCTS

/* 2^floor(x) from the exponent, the rest from the polynomial of least relative error on 0 ... 1. */
INLINE vector weight_of(vector x, const float factor) {
    const __m512 rest = _mm512_reduce_ps((__m512)x, 0x09); /* x - floor(x) */
    __m512 power = _mm512_set1_ps(0.07802452f * factor);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.22606716f * factor));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.69583356f * factor));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.9999252f * factor));
    return (vector)_mm512_scalef_ps(power, (__m512)x);
}

INLINE void weight_exp2(vector x[STEP], const float factor) {
    for (int k = 0; k < STEP; k++) x[k] = weight_of(x[k], factor);
}

/* Adds the offset to small weights, those below 8. Which are is asked of their logarithms, so that exponentials are not waited for. A weight at
 * the limit is below 8 by more, 1e-4 of it, than the error of an exponential. */
INLINE vector move_small_weight(vector weight, vector logarithm, weight_offset offset) {
    const __m512 small_logarithm = _mm512_set1_ps(-4.9945f); /* log2(8 / 255) - 1.5e-4 */
    const __mmask16 small = _mm512_cmp_ps_mask((__m512)logarithm, small_logarithm, _CMP_LT_OQ);
    return (vector)_mm512_mask_add_ps((__m512)weight, small, (__m512)weight, _mm512_set1_ps(offset));
}

INLINE int_vector integer_weight(vector weight) {
    return (int_vector)_mm512_cvtps_epi32((__m512)weight);
}

INLINE int_vector pack_weights(const int_vector weights[STEP]) {
    const __m512i first = _mm512_packs_epi32((__m512i)weights[0], (__m512i)weights[1]);
    const __m512i second = _mm512_packs_epi32((__m512i)weights[2], (__m512i)weights[3]);
    return (int_vector)_mm512_shuffle_epi8(_mm512_packus_epi16(first, second),
                                           _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400));
}

INLINE int_vector round_weights(const vector weights[STEP], const vector logarithms[STEP], const weight_offset offsets[STEP]) {
    int_vector rounded[STEP];
    for (int k = 0; k < STEP; k++) rounded[k] = integer_weight(move_small_weight(weights[k], logarithms[k], offsets[k]));
    return pack_weights(rounded);
}
