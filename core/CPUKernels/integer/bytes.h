/* What products of bytes share: four codes fill 32 bits. VALUE_BIAS is defined before it is included. */
enum { STEP = 4 };
typedef int8_t signed_code;

typedef int8_t thirty_two_codes __attribute__((ext_vector_type(32)));
typedef int8_t sixty_four_codes __attribute__((ext_vector_type(64)));
typedef sixty_four_codes sixty_four_codes_in_memory __attribute__((aligned(1)));

#include "codes.h"

#define SIGNED_ONES ((int_vector)0x01010101)

INLINE void interleave_rows(const int8_t* rows, int64_t pitch, int64_t channels, signed_code* out) {
    int64_t d = 0;
    for (; d + 16 <= channels; d += 16) {
        const sixteen_codes r0 = *(const sixteen_codes_in_memory*)(rows + d), r1 = *(const sixteen_codes_in_memory*)(rows + pitch + d);
        const sixteen_codes r2 = *(const sixteen_codes_in_memory*)(rows + 2 * pitch + d);
        const sixteen_codes r3 = *(const sixteen_codes_in_memory*)(rows + 3 * pitch + d);
        const thirty_two_codes r02 = __builtin_shufflevector(r0, r2, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                                             10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        const thirty_two_codes r13 = __builtin_shufflevector(r1, r3, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                                             10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        const sixty_four_codes all = __builtin_shufflevector(
            r02, r13, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
            16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
        *(sixty_four_codes_in_memory*)(out + d * STEP) = VALUE_BIAS ? all ^ (int8_t)VALUE_BIAS : all;
    }
    for (; d < channels; d++) {
        for (int64_t k = 0; k < STEP; k++) out[d * STEP + k] = (int8_t)(rows[k * pitch + d] ^ (int8_t)VALUE_BIAS);
    }
}
