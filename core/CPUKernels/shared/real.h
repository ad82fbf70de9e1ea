/* The arithmetic of a kernel: its real type, vectors of it, and the functions that the softmax needs.
 *
 * Part of the templates that kernels are made of; KERNEL_FP64 chooses the type, KERNEL_AVX512 says that the instruction set has that. A
 * vector holds 64 bytes whatever the instruction set; the compiler splits it into registers. All operations on vectors are lane by lane, so
 * a row's result does not depend on the rows beside it. */

#if KERNEL_FP64
typedef double real;
typedef int64_t real_bits;
enum { LANES = 8 };
#define load_row load_row_double
#define store_row store_row_double
#else
typedef float real;
typedef int32_t real_bits;
enum { LANES = 16 };
#define load_row load_row_float
#define store_row store_row_float
#endif

typedef real vector __attribute__((ext_vector_type(LANES)));
typedef vector __attribute__((aligned(1), may_alias)) vector_in_memory; /* a caller's, at any address */
/* What comparing vectors gives, whichever of the integer types of that width it is: a lane is 0 or -1. */
typedef __typeof__((vector){0} < (vector){0}) vector_mask;

#define INLINE static inline __attribute__((always_inline))

INLINE vector vector_load(const real* address) {
    return *(const vector*)address;
}

INLINE void vector_store(real* address, vector value) {
    *(vector*)address = value;
}

INLINE vector vector_of(real value) {
    return (vector)value;
}

INLINE vector vector_select(vector_mask mask, vector where_set, vector elsewhere) {
    return mask ? where_set : elsewhere;
}

/* NaN in `candidate` leaves `highest` alone: NaN reaches a result through its exponential, not through the maximum. */
INLINE vector vector_max(vector highest, vector candidate) {
    return vector_select(candidate > highest, candidate, highest);
}

INLINE bool vector_any(vector_mask mask) {
    real_bits any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= mask[lane];
    return any != 0;
}

#if KERNEL_FP64

INLINE vector vector_exp(vector x) {
    vector result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = exp(x[lane]);
    return result;
}

INLINE vector vector_tanh(vector x) {
    vector result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = tanh(x[lane]);
    return result;
}

#else

/* The sum of a vector's lanes, by a tree. */
INLINE float sum_of_lanes(vector values) {
    vector sum = values + __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    sum += __builtin_shufflevector(sum, sum, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static const float ROUND_TO_INTEGER = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits */

/* e^x within about one unit in the last place for normal results; denormal results are flushed to 0; exp(0) is exactly 1.
 * x = n ln 2 + r: 2^n from the exponent bits, e^r from the polynomial of S. Moshier's Cephes library (expf). */
INLINE vector vector_exp(vector x) {
    vector shifted = x * 1.44269504088896341f + ROUND_TO_INTEGER;
    vector n = shifted - ROUND_TO_INTEGER;
    vector r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vector e = vector_of(1.9875691500e-4f);
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * (r * r) + r + 1.0f;
    vector_mask exponent = (*(vector_mask*)&shifted - 0x4B400000 + 127) << 23;
    e = e * *(vector*)&exponent;
    e = vector_select(x < -87.3f, vector_of(0), e);
    return vector_select(x > 88.3f, vector_of(INFINITY), e);
}

/* Each x becomes a power of 2, within two units in the last place for results from 2^-125 on; smaller ones, and that of -inf, are 0. For
 * exponents below 128; what becomes of NaN is not defined. `count`: at most 4.
 *   vectors_exp2(x, count)                                    2^x; 2^0 is exactly 1
 *   vectors_exp2_above(x, count, factor, reference, small)    2^(x * factor - reference) for references that are integers. `small`: all are
 *                                                             of at most LARGEST_REFERENCE in size. Taking such a one off rounds nothing,
 *                                                             or once with AVX-512 */
enum { LARGEST_REFERENCE = 1 << 22 };

#if defined(KERNEL_AVX512)
/* 2^floor(x) by an instruction, the rest from the polynomial of least relative error (8.3e-8) on 0 ... 1. */
INLINE void vectors_exp2(vector* x, const int count) {
    for (int k = 0; k < count; k++) {
        const __m512 argument = (__m512)x[k];
        const __m512 rest = _mm512_reduce_ps(argument, 0x09); /* argument - floor(argument) */
        __m512 power = _mm512_set1_ps(1.8671300e-3f);
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(9.0170307e-3f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.5799913e-2f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.4016444e-1f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.931513e-1f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
        const __mmask16 normal = _mm512_cmp_ps_mask(argument, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
        x[k] = (vector)_mm512_maskz_scalef_ps(normal, power, argument);
    }
}

INLINE void vectors_exp2_above(vector* x, const int count, vector factor, vector reference, const bool small) {
    (void)small;
    for (int k = 0; k < count; k++) x[k] = x[k] * factor - reference;
    vectors_exp2(x, count);
}
#else
/* 2^n from the exponent bits of `shifted`, n + ROUND_TO_INTEGER, the rest from the polynomial of least relative error (9.1e-8) on -1/2 ... 1/2.
 * Operation by operation for all of them: one after the other, they would fill a processor's schedulers with what waits. */
INLINE void vectors_exp2_parts(const vector* shifted, const vector* r, const int count, vector* result) {
    vector e[4];
    for (int k = 0; k < count; k++) e[k] = 1.3264727e-3f * r[k] + 9.671513e-3f;
    for (int k = 0; k < count; k++) e[k] = e[k] * r[k] + 5.5507336e-2f;
    for (int k = 0; k < count; k++) e[k] = e[k] * r[k] + 2.4022242e-1f;
    for (int k = 0; k < count; k++) e[k] = e[k] * r[k] + 6.93147e-1f;
    for (int k = 0; k < count; k++) e[k] = e[k] * r[k] + 1.0f;
    for (int k = 0; k < count; k++) {
        const vector_mask bits = *(const vector_mask*)&e[k] + (*(const vector_mask*)&shifted[k] << 23);
        result[k] = vector_select(shifted[k] < ROUND_TO_INTEGER - 125, vector_of(0), *(const vector*)&bits);
    }
}

INLINE void vectors_exp2(vector* x, const int count) {
    vector shifted[4], r[4];
    for (int k = 0; k < count; k++) shifted[k] = x[k] + ROUND_TO_INTEGER;
    for (int k = 0; k < count; k++) r[k] = x[k] - (shifted[k] - ROUND_TO_INTEGER);
    vectors_exp2_parts(shifted, r, count, x);
}

INLINE void vectors_exp2_above(vector* x, const int count, vector factor, vector reference, const bool small) {
    const vector base = ROUND_TO_INTEGER - reference;
    const vector_mask large = __builtin_elementwise_abs(reference) > (float)LARGEST_REFERENCE;
    vector shifted[4], r[4];
    for (int k = 0; k < count; k++) shifted[k] = x[k] * factor + base;
    for (int k = 0; k < count; k++) r[k] = x[k] * factor - (shifted[k] - base);
    for (int k = 0; k < count && !small; k++) { /* lane by lane, so that no row's bits depend on those beside it */
        const vector argument = x[k] * factor - reference, rounded = argument + ROUND_TO_INTEGER;
        shifted[k] = vector_select(large, rounded, shifted[k]);
        r[k] = vector_select(large, argument - (rounded - ROUND_TO_INTEGER), r[k]);
    }
    vectors_exp2_parts(shifted, r, count, x);
}
#endif

INLINE vector vector_exp2(vector x) {
    vectors_exp2(&x, 1);
    return x;
}

/* log2(x) within 1.5e-7 and half a unit in the last place, for normal numbers; exact for powers of 2, finite for infinity. x = 2^n * m, m between
 * the roots of 1/2 and 2: the logarithm of m from the series of the inverse hyperbolic tangent of (m - 1) / (m + 1). */
INLINE vector vector_log2(vector x) {
    const vector_mask bits = *(const vector_mask*)&x, exponent = (bits - 0x3F3504F3) >> 23; /* the root of 1/2 has these bits */
    const vector_mask rest = bits - (exponent << 23);
    const vector m = *(const vector*)&rest, t = (m - 1) / (m + 1), square = t * t;
    vector series = vector_of(2.8853901f / 7);
    series = series * square + 2.8853901f / 5;
    series = series * square + 2.8853901f / 3;
    series = series * square + 2.8853901f;
    return series * t + __builtin_convertvector(exponent, vector);
}

/* tanh(x) within a few units in the last place: Cephes' odd polynomial (tanhf) for small arguments, else 1 - 2 / (e^2|x| + 1). */
INLINE vector vector_tanh(vector x) {
    vector square = x * x;
    vector small = vector_of(-5.70498872745e-3f);
    small = small * square + 2.06390887954e-2f;
    small = small * square - 5.37397155531e-2f;
    small = small * square + 1.33314422036e-1f;
    small = small * square - 3.33332819422e-1f;
    small = small * square * x + x;
    vector magnitude = vector_select(x < 0, -x, x);
    vector large = 1.0f - 2.0f / (vector_exp(2.0f * magnitude) + 1.0f);
    large = vector_select(x < 0, -large, large);
    return vector_select(magnitude < 0.625f, small, large);
}

#endif

INLINE real real_exp(real x) {
    return vector_exp(vector_of(x))[0];
}
