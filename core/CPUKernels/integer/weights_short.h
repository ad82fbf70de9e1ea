/* Weights that are rounded as 16-bit integers, two of a row in 32 bits: with AVX2, which has more room for those than for FP32 numbers. There
 * are as many offsets as fractions, so that each fraction is rounded up as often as it is large. */
enum { WEIGHT_FRACTION_BITS = 7 };
typedef int16_t weight_offset;

INLINE weight_offset weight_offset_of(float offset) {
    return (weight_offset)floorf(offset * (1 << WEIGHT_FRACTION_BITS));
}

/* The integers of `first` in the low half of each lane, those of `second` in the high half. */
INLINE __m256i round_halves(__m256 first, __m256 second, __m256i offsets) {
    const __m256i low = _mm256_cvtps_epi32(first), high = _mm256_slli_epi32(_mm256_cvtps_epi32(second), 16);
    const __m256i weights = _mm256_blend_epi16(low, high, 0xAA);
    const __m256i small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8 << WEIGHT_FRACTION_BITS), weights);
    /* (weights * 2^8 + 2^14) >> 15 */
    return _mm256_mulhrs_epi16(_mm256_add_epi16(weights, _mm256_and_si256(small, offsets)), _mm256_set1_epi16(1 << 8));
}

INLINE int_vector round_pair(vector first, vector second, const weight_offset offsets[2]) {
    int32_t both;
    memcpy(&both, offsets, sizeof both);
    const half_vector low = (half_vector)round_halves((__m256)first.lo, (__m256)second.lo, _mm256_set1_epi32(both));
    const half_vector high = (half_vector)round_halves((__m256)first.hi, (__m256)second.hi, _mm256_set1_epi32(both));
    return join_halves(low, high);
}
