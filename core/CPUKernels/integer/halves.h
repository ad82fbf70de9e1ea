/* Products of two registers: each has half of a vector's lanes. */

typedef int32_t half_vector __attribute__((ext_vector_type(LANES / 2)));

INLINE int_vector join_halves(half_vector low, half_vector high) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

INLINE int_vector broadcast_codes(int32_t few) {
    half_vector half = (half_vector)few;
    __asm__("" : "+x"(half)); /* in a register, lest it be loaded anew for each product */
    return join_halves(half, half);
}
