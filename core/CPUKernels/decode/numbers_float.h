/* The numbers that decode kernels multiply, in FP32: elements and codes become floats in registers, less their zero points. Products and
 * sums are FP32, so that what results has the error of FP32 arithmetic. */

typedef float number;
typedef slice numbers; /* what one instruction multiplies */
typedef slice accumulator;

enum { KEYS_IN_SUM = 1 }; /* keys whose values one instruction adds up */

/* Channels that loops go through at once. */
#define CHANNEL_STEP(precision) ((void)(precision), 2 * SLICE)
/* In how many turns the numbers of a step are taken, where they are not taken one behind the other: turn `n` has the channels n, n + turns,
 * n + 2 * turns ... A byte of INT4 holds two. */
#define KEY_TURNS(precision) ((precision) == CPU_INT4 ? 2 : 1)
#define VALUE_TURNS(precision) KEY_TURNS(precision)
/* What is added to codes. */
#define CODE_BIAS(precision) ((void)(precision), 0)

typedef uint32_t word_slice __attribute__((ext_vector_type(SLICE)));
typedef _Float16 __attribute__((ext_vector_type(SLICE), aligned(1), may_alias)) half_slice_in_memory;
typedef uint16_t __attribute__((ext_vector_type(SLICE), aligned(1), may_alias)) bfloat_slice_in_memory;

INLINE numbers numbers_load(const number* address) {
    return slice_load(address);
}

/* One number for each of KEYS_IN_SUM keys, in all lanes. */
INLINE numbers numbers_of_keys(const number* of_keys) {
    return slice_of(*of_keys);
}

INLINE accumulator add_products(accumulator before, numbers a, numbers b) {
    return before + a * b;
}

INLINE slice slice_of_sums(accumulator values) {
    return values;
}

/* Half 0 or 1 of a step: its numbers, or its codes less the zero point (where `shifted`). Of INT4, half 0 holds the even channels and half 1
 * the odd ones. */
INLINE numbers load_key(const cpu_precision precision, const bool shifted, const char* step, const int half, slice zero_point) {
    slice value;
    switch (precision) {
    case CPU_FP16: return __builtin_convertvector(*(const half_slice_in_memory*)(step + half * SLICE * 2), slice);
    case CPU_BF16: {
        const word_slice bits = __builtin_convertvector(*(const bfloat_slice_in_memory*)(step + half * SLICE * 2), word_slice) << 16;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    case CPU_INT8: value = __builtin_convertvector(*(const byte_slice_in_memory*)(step + half * SLICE), slice); break;
    case CPU_INT4: {
        integer_slice codes = __builtin_convertvector(*(const byte_slice_in_memory*)step, integer_slice);
        codes = half == 0 ? (integer_slice)((word_slice)codes << 28) >> 28 : codes >> 4;
        value = __builtin_convertvector(codes, slice);
        break;
    }
    default: return slice_load((const float*)step + half * SLICE);
    }
    return shifted ? value - zero_point : value;
}

/* Which channel of a step of values the number at `place` is, where slice after slice of load_values() is put behind one another. */
INLINE int64_t value_channel(cpu_precision precision, int64_t place) {
    return VALUE_TURNS(precision) == 1 ? place : place % SLICE * 2 + place / SLICE;
}

/* The same as load_key() for values of KEYS_IN_SUM keys. */
INLINE numbers load_values(const cpu_precision precision, const bool shifted, const char* step, const char* next, const int half,
                           slice zero_point) {
    (void)next;
    return load_key(precision, shifted, step, half, zero_point);
}
