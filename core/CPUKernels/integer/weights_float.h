/* Weights that are rounded as FP32 numbers. */
enum { WEIGHT_FRACTION_BITS = 0 };
typedef float weight_offset;

INLINE int64_t weight_offset_place(int64_t column) {
    return column;
}

INLINE weight_offset weight_offset_of(float offset) {
    return offset;
}
