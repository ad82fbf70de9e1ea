/* Pairs of 16-bit integers in 32 bits: their products are added up, and to a sum. KERNEL_VNNI: the instruction set has one instruction for
 * that. It is asked for by its name: for the intrinsic clang takes a multiplication and an addition, which are sooner done but twice the
 * work, and there are other sums to go on with meanwhile. */

#if defined(KERNEL_AVX512)

typedef __m512i pairs;

INLINE pairs add_pairs(pairs sums, pairs a, pairs b) {
#if KERNEL_VNNI
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}

#else

typedef __m256i pairs;

INLINE pairs add_pairs(pairs sums, pairs a, pairs b) {
#if KERNEL_VNNI
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b));
    return sums;
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}

#endif
