/* The numbers that decode kernels multiply, in integers of 16 bits: INT8 and INT4 codes, queries and weights. One instruction (vpmaddwd)
 * multiplies pairs of them and adds each pair up to 32 bits; with VNNI it adds to a sum as well (vpdpwssd).
 *
 * With registers of 32 bytes, INT8 codes are widened as they are loaded. Other codes are multiplied as unsigned numbers, code + CODE_BIAS:
 * those come out of their bytes by a mask or a shift, without moving between lanes. What that adds to a sum, bias times the sum of the other
 * factors, is taken off together with zero points.
 *
 * Queries that are quantised by rows are taken as they are, others are rounded to 16 bits: an error of at most 1/65534 of the row's largest
 * number. Weights are rounded to 15 bits: at most 1/65534 of the largest weight of their block. Sums do not overflow: at most 256
 * channels (those of 4 lanes of 16, or of 2 of 8), or BLOCK_KEYS keys, of 32767 * 255 each. */

#include "../shared/pairs.h"

typedef int16_t number;
typedef uint16_t numbers __attribute__((ext_vector_type(2 * SLICE))); /* what one instruction multiplies; bits of signed numbers */
typedef integer_slice accumulator;

enum {
    KEYS_IN_SUM = 2, /* keys whose values one instruction adds up */
    LARGEST_NUMBER = 32767,
};

_Static_assert((int64_t)BLOCK_KEYS * LARGEST_NUMBER * 255 <= INT32_MAX, "32 bits hold the weighted sum of a block");
_Static_assert((int64_t)CPU_MAX_HEAD_DIM / 4 * LARGEST_NUMBER * 255 <= INT32_MAX, "32 bits hold what is added up as integers of a key");

/* Channels that loops go through at once: those of a register of bytes. */
#define CHANNEL_STEP(precision) ((precision) == CPU_INT4 ? 8 * SLICE : 4 * SLICE)
/* Whether codes are widened as they are loaded: then they need no bias. */
#define WIDENS(precision) (SLICE == 8 && (precision) == CPU_INT8)
/* In how many turns the numbers of a step are taken: turn `n` has the channels n, n + turns, n + 2 * turns ... Of values whose codes are widened
 * the slices are as value_channel() says. */
#define KEY_TURNS(precision) ((precision) == CPU_INT4 ? 4 : WIDENS(precision) ? 1 : 2)
#define VALUE_TURNS(precision) ((precision) == CPU_INT4 ? 8 : 4)
/* What is added to codes. */
#define CODE_BIAS(precision) ((precision) == CPU_INT4 ? 8 : WIDENS(precision) ? 0 : 128)

typedef numbers __attribute__((aligned(1), may_alias)) numbers_in_memory;
typedef uint32_t word_slice __attribute__((ext_vector_type(SLICE)));
typedef word_slice __attribute__((aligned(1), may_alias)) word_slice_in_memory;

INLINE numbers numbers_load(const number* address) {
    return *(const numbers_in_memory*)address;
}

INLINE numbers numbers_from_words(word_slice words) {
    numbers halves;
    memcpy(&halves, &words, sizeof halves);
    return halves;
}

/* One number for each of KEYS_IN_SUM keys, in all lanes. */
INLINE numbers numbers_of_keys(const number* of_keys) {
    uint32_t pair;
    memcpy(&pair, of_keys, sizeof pair);
    return numbers_from_words((word_slice)pair);
}

INLINE accumulator add_products(accumulator before, numbers a, numbers b) {
    return (accumulator)add_pairs((pairs)before, (pairs)a, (pairs)b);
}

INLINE slice slice_of_sums(accumulator values) {
    return __builtin_convertvector(values, slice);
}

#if KERNEL_SLICE == 8
/* Sixteen bytes as 16-bit integers. */
INLINE numbers widened_codes(const char* bytes) {
    __m128i codes;
    memcpy(&codes, bytes, sizeof codes);
    return (numbers)_mm256_cvtepi8_epi16(codes);
}
#endif

/* Number `turn` of each 16 bits of codes, biased. */
INLINE numbers biased_codes(const cpu_precision precision, numbers codes, const int turn) {
    if (precision == CPU_INT4) return ((codes ^ 0x8888) >> (4 * turn)) & 15;
    codes ^= 0x8080;
    return turn == 0 ? codes & 255 : codes >> 8;
}

/* Turn `turn` of a step of a key. */
INLINE numbers load_key(const cpu_precision precision, const bool shifted, const char* step, const int turn, slice zero_point) {
    (void)shifted, (void)zero_point;
#if KERNEL_SLICE == 8
    if (WIDENS(precision)) return widened_codes(step + turn * 16);
#endif
    return biased_codes(precision, *(const numbers_in_memory*)step, turn);
}

/* Which channel of a step of values the number at `place` is, where slice after slice of load_values() is put behind one another. */
INLINE int64_t value_channel(cpu_precision precision, int64_t place) {
    if (WIDENS(precision)) return (place & ~12) | (place & 4) << 1 | (place & 8) >> 1;
    return place % SLICE * VALUE_TURNS(precision) + place / SLICE;
}

/* Slice `turn` of a step of the values of KEYS_IN_SUM keys: in each lane of 32 bits a number of the one and of the other. */
INLINE numbers load_values(const cpu_precision precision, const bool shifted, const char* step, const char* next, const int turn,
                           slice zero_point) {
    (void)shifted, (void)zero_point;
#if KERNEL_SLICE == 8
    if (WIDENS(precision)) {
        const numbers first = widened_codes(step + turn / 2 * 16), second = widened_codes(next + turn / 2 * 16);
        return turn % 2 == 0 ? __builtin_shufflevector(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27)
                             : __builtin_shufflevector(first, second, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#endif
    const int turns = VALUE_TURNS(precision) / 2;
    const word_slice a = *(const word_slice_in_memory*)step, b = *(const word_slice_in_memory*)next;
    word_slice shifted_halves = turn < turns ? b << 16 : a >> 16;
#if defined(KERNEL_AVX512)
    __asm__("" : "+v"(shifted_halves)); /* lest both steps become one shuffle, which takes longer */
#endif
    const word_slice halves = shifted_halves | (turn < turns ? a & 0xFFFF : b & 0xFFFF0000);
    return biased_codes(precision, numbers_from_words(halves), turn % turns);
}
