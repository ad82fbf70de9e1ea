/* Weights rounded as 16-bit integers, four of a row as bytes in 32 bits. */
#include "weights_short.h"

/* Those of the first and the third column, then the others: pairs whose integers are two bytes apart. */
INLINE int64_t weight_offset_place(int64_t column) {
    return (column & ~(int64_t)3) | (column & 1) << 1 | (column >> 1 & 1);
}

INLINE int_vector round_weights(const vector weights[STEP], const vector logarithms[STEP], const weight_offset offsets[STEP]) {
    (void)logarithms;
    return round_pair(weights[0], weights[2], offsets) | (round_pair(weights[1], weights[3], offsets + 2) << 8);
}
