/* A slice: the floats of one register, and what decode kernels do with it; and the highest of a vector's lanes. */

enum { SLICE = KERNEL_SLICE };

typedef float slice __attribute__((ext_vector_type(SLICE)));
typedef int32_t integer_slice __attribute__((ext_vector_type(SLICE)));
typedef int8_t byte_slice __attribute__((ext_vector_type(SLICE)));

/* What a caller's memory holds, at any address. */
typedef slice __attribute__((aligned(1), may_alias)) float_slice_in_memory;
typedef byte_slice __attribute__((aligned(1), may_alias)) byte_slice_in_memory;

INLINE slice slice_load(const float* address) {
    return *(const float_slice_in_memory*)address;
}

INLINE void slice_store(float* address, slice value) {
    *(float_slice_in_memory*)address = value;
}

INLINE slice slice_of(float value) {
    return (slice)value;
}

/* The first half of adding up each group of four lanes, of floats or integers: two sums of `a` and two of `b`, in turn. */
#if KERNEL_SLICE == 4
#define ADD_HALVES(a, b) (__builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7))
#elif KERNEL_SLICE == 8
#define ADD_HALVES(a, b) \
    (__builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15))
#else
#define ADD_HALVES(a, b)                                                                       \
    (__builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) + \
     __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
#endif

/* The second half: what ADD_HALVES made added, the sums of `a` first. */
#if KERNEL_SLICE == 4
#define ADD_QUARTERS(a, b) (__builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7))
#elif KERNEL_SLICE == 8
#define ADD_QUARTERS(a, b) \
    (__builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#else
#define ADD_QUARTERS(a, b)                                                                     \
    (__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) + \
     __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#endif

#if KERNEL_SLICE > 4
/* Neighbouring groups of four lanes added: the sums of `a`, then those of `b`. */
INLINE slice add_groups(slice a, slice b) {
#if KERNEL_SLICE == 8
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#endif
}
#endif

/* The highest of a vector's lanes. */
INLINE float highest_of_lanes(vector values) {
    vector highest = vector_max(values, __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    highest = vector_max(highest, __builtin_shufflevector(highest, highest, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
    highest = vector_max(highest, __builtin_shufflevector(highest, highest, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
    return highest[1] > highest[0] ? highest[1] : highest[0];
}
