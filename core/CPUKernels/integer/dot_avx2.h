/* Products with AVX2: codes are widened to 16 bits, of which vpmaddwd multiplies and adds pairs without loss. (vpmaddubsw on bytes would
 * saturate.)
 *
 * Like every KERNEL_DOT header this defines
 *   STEP, lane_code, signed_code      codes that one product sums; how they are stored in lanes, and how those are that all lanes share
 *   QUERY_BIAS, VALUE_BIAS            what is added to queries and values so that lanes, or codes, are unsigned; 0: nothing
 *   broadcast_codes(few)              STEP codes in every lane
 *   add_products(sums, lanes, codes)  in each lane, the sum of STEP products of queries and keys added
 *   add_weighted(sums, lanes, codes)  the same of weights and values
 *   LANES_OF_ONES, SIGNED_ONES        lanes and codes that are all 1, where there is a bias
 *   interleave_rows()                 writes STEP rows of bytes as [channel][STEP] codes, plus VALUE_BIAS
 *   weight_exp2(x, factor)            STEP vectors become factor * 2^x within 8e-5 of it; for NO_WEIGHT next to nothing
 *   WEIGHT_FRACTION_BITS              weights are computed as 0 ... 255, times 2 to the power of this
 *   weight_offset, weight_offset_of() an offset of a weight, as rounding uses it
 *   weight_offset_place(column)       where that of a column lies
 *   round_weights(weights, logarithms, offsets)
 *                                     STEP vectors of weights, rounded to integers 0 ... 255, as lanes; to the nearest, but small ones after
 *                                     adding the offset of their column. logarithms: binary ones of weights / 255
 * and where there are registers enough to compute weights a vector at a time, in between products
 *   WEIGHS_AMONG_PRODUCTS             defined
 *   weight_of(x, factor)              weight_exp2() of one vector
 *   move_small_weight(weight, logarithm, offset), integer_weight(weight), pack_weights(weights)
 *                                     the steps of round_weights()
 * and where less than a register of keys can be loaded
 *   LOADS_FEW_CODES                   1
 *   load_few_codes(codes, count)      `count` codes, whole steps, as lanes; 0 behind them, where nothing is read
 * and where keys and values have to be INT4
 *   LARGEST_CODE                      that keys and values can have, less their zero points
 *   SHORT_STEPS                       steps that 16 bits hold the sums of
 *   short_sums                        of all lanes
 *   multiply_shortly(lanes, codes)    the STEP products of each lane
 *   join_short_sums(a, b)             those of a step and of others before it
 *   add_short_sums(sums, few)         sums with those of a few steps added */
enum { STEP = 2, QUERY_BIAS = 0, VALUE_BIAS = 0 };
typedef int16_t lane_code;
typedef int16_t signed_code;

#include "codes.h"

#define add_weighted add_products

#define LANES_OF_ONES ((int_vector)0x00010001)
#define SIGNED_ONES ((int_vector)0x00010001)
#define weight_exp2 short_exp2

typedef int16_t sixteen_shorts __attribute__((ext_vector_type(16)));
typedef int8_t thirty_two_codes __attribute__((ext_vector_type(32)));
typedef int16_t thirty_two_shorts __attribute__((ext_vector_type(32)));
typedef thirty_two_shorts thirty_two_shorts_in_memory __attribute__((aligned(2)));
#include "halves.h"

INLINE int_vector add_products(int_vector sums, int_vector lanes, int_vector codes) {
    const half_vector low = (half_vector)_mm256_madd_epi16((__m256i)lanes.lo, (__m256i)codes.lo);
    const half_vector high = (half_vector)_mm256_madd_epi16((__m256i)lanes.hi, (__m256i)codes.hi);
    return sums + join_halves(low, high);
}

INLINE void interleave_rows(const int8_t* rows, int64_t pitch, int64_t channels, signed_code* out) {
    int64_t d = 0;
    for (; d + 16 <= channels; d += 16) {
        const sixteen_codes a = *(const sixteen_codes_in_memory*)(rows + d), b = *(const sixteen_codes_in_memory*)(rows + pitch + d);
        const thirty_two_codes pairs = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                                               10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        *(thirty_two_shorts_in_memory*)(out + d * STEP) = __builtin_convertvector(pairs, thirty_two_shorts);
    }
    for (; d < channels; d++) {
        for (int64_t k = 0; k < STEP; k++) out[d * STEP + k] = rows[k * pitch + d];
    }
}

#include "weights_short.h"

INLINE int64_t weight_offset_place(int64_t column) {
    return column;
}

INLINE int_vector round_weights(const vector weights[STEP], const vector logarithms[STEP], const weight_offset offsets[STEP]) {
    (void)logarithms;
    return round_pair(weights[0], weights[1], offsets);
}
