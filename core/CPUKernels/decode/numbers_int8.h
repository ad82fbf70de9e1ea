/* The numbers that decode kernels multiply, in integers of 16 bits: INT8 and INT4 codes less their zero points, queries and weights. One
 * instruction (vpmaddwd) multiplies pairs of them and adds each pair to a sum of 32 bits.
 *
 * Queries that are quantised by rows are taken as they are, others are rounded to 16 bits: an error of at most 1/65534 of the row's largest
 * number. Weights are rounded to 15 bits: at most 1/65534 of the largest weight of their block. Sums do not overflow: at most
 * 1024 / SLICE channels, or BLOCK_KEYS keys, of 32767 * 255 each. */
#include <immintrin.h>

typedef int16_t number;
typedef int16_t numbers __attribute__((ext_vector_type(2 * SLICE))); /* what one instruction multiplies */
typedef integer_slice accumulator;

enum {
    CHANNEL_STEP = 4 * SLICE, /* channels that loops go through at once: a byte of INT4 holds two */
    KEYS_IN_SUM = 2,          /* keys whose values one instruction adds up */
    LARGEST_NUMBER = 32767,
    LARGEST_ZERO_POINT = 127, /* that is subtracted from codes */
};

typedef numbers __attribute__((aligned(1), may_alias)) numbers_in_memory;
typedef int8_t bytes __attribute__((ext_vector_type(2 * SLICE)));
typedef bytes __attribute__((aligned(1), may_alias)) bytes_in_memory;

INLINE numbers numbers_load(const number* address) {
    return *(const numbers_in_memory*)address;
}

INLINE numbers numbers_of(number value) {
    return (numbers)value;
}

/* One number for each of KEYS_IN_SUM keys, in all lanes. */
INLINE numbers numbers_of_keys(const number* of_keys) {
    int32_t pair;
    memcpy(&pair, of_keys, sizeof pair);
    const integer_slice pairs = (integer_slice)pair;
    numbers both;
    memcpy(&both, &pairs, sizeof both);
    return both;
}

INLINE accumulator add_products(accumulator before, numbers a, numbers b) {
#if KERNEL_SLICE == 16
    return (accumulator)_mm512_add_epi32((__m512i)before, _mm512_madd_epi16((__m512i)a, (__m512i)b));
#else
    return (accumulator)_mm256_add_epi32((__m256i)before, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#endif
}

INLINE slice slice_of_sums(accumulator values) {
    return __builtin_convertvector(values, slice);
}

/* The codes of bytes that hold two each: of channels with an even index (half 0) or an odd one. */
INLINE numbers unpack_codes(numbers pairs, const int half) {
    return half == 0 ? (pairs << 12) >> 12 : pairs >> 4;
}

/* Half 0 or 1 of CHANNEL_STEP channels: their codes less the zero point (where `shifted`). Of INT4, half 0 holds the even channels and half 1
 * the odd ones. */
INLINE numbers load_numbers(const cpu_precision precision, const bool shifted, const char* step, const int half, numbers zero_point) {
    const bytes codes = *(const bytes_in_memory*)(precision == CPU_INT4 ? step : step + half * 2 * SLICE);
    numbers values = __builtin_convertvector(codes, numbers);
    if (precision == CPU_INT4) values = unpack_codes(values, half);
    return shifted ? values - zero_point : values;
}

/* The bytes of two keys in turn. */
INLINE bytes interleave_bytes(byte_slice a, byte_slice b) {
#if KERNEL_SLICE == 16
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                   30, 15, 31);
#else
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

/* Half 0 or 1 of 2 * SLICE channels of the values of KEYS_IN_SUM keys: a key's number beside the other's. */
INLINE numbers load_values(const cpu_precision precision, const bool shifted, const char* step, const char* next, const int half,
                           numbers zero_points) {
    const int64_t at = precision == CPU_INT4 ? 0 : half * SLICE;
    const bytes codes = interleave_bytes(*(const byte_slice_in_memory*)(step + at), *(const byte_slice_in_memory*)(next + at));
    numbers values = __builtin_convertvector(codes, numbers);
    if (precision == CPU_INT4) values = unpack_codes(values, half);
    return shifted ? values - zero_points : values;
}
