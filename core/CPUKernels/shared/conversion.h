/* Elements and rows of tensors as numbers: conversions between precisions, INT4 nibbles, and whole rows read (and dequantised) or written.
 *
 * All functions are static inline, without a target attribute and without global state, so that each translation unit compiles them for the
 * instruction set of its kernels. A kernel for AVX2 includes the system headers and cpu_kernels.h first, then, once per translation unit:
 *
 *   #pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
 *   #include "conversion.h"
 *   ... the kernel ...
 *   #pragma clang attribute pop
 *
 * A kernel whose arithmetic is FP32 uses load_row_float() and store_row_float(), one whose arithmetic is FP64 the _double ones. Loops are
 * branchless where the compiler is to vectorise them. Dequantisation is defined bit by bit: each of its operations is one rounding to FP32,
 * never contracted, in both arithmetics. Operands may lie at any address: they are read and written through types without alignment. */
#ifndef CONVERSION_H
#define CONVERSION_H

#include "cpu_kernels.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Channels that a row has at most. */
enum { CPU_MAX_HEAD_DIM = 1024 };

/* What a caller's memory holds, at any address. */
typedef float __attribute__((aligned(1), may_alias)) float_in_memory;
typedef double __attribute__((aligned(1), may_alias)) double_in_memory;
typedef uint16_t __attribute__((aligned(1), may_alias)) half_in_memory; /* FP16 and BF16 */

/* ---- Scalars ------------------------------------------------------------------------------------------------------------------------- */

static inline uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* FP16 to FP32, exact. KERNEL_HALF: the instruction set has it. */
static inline float float_from_half(uint16_t half) {
#if defined(KERNEL_HALF) || defined(__aarch64__)
    _Float16 value;
    memcpy(&value, &half, sizeof value);
    return (float)value;
#else
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t rebias = 112u << 23; /* the exponents' biases are 127 and 15 */
    /* A denormal half is its fraction times 2^-24: put behind the exponent of 2^-14, whose value is then taken off again. No FP32 denormal
     * appears on the way, so this also holds where they are flushed. */
    const uint32_t denormal = bits_from_float(float_from_bits(magnitude + rebias + (1u << 23)) - float_from_bits(rebias + (1u << 23)));
    const uint32_t normal = magnitude + rebias + (magnitude >= 31u << 23 ? rebias : 0); /* Inf and NaN: exponent 31 becomes 255 */
    return float_from_bits(sign | (magnitude < 1u << 23 ? denormal : normal));
#endif
}

/* FP32 to FP16, to nearest, ties to even; too large becomes Inf, NaN stays NaN. */
static inline uint16_t half_from_float(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t sign = (bits >> 16) & 0x8000;
    /* Normal: rebias the exponent and round off 13 bits; a carry moves into the exponent, as it should, up to that of Inf. */
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    /* Denormal: adding 0.5, whose last place is 2^-24, leaves the rounded fraction in the low bits. */
    const uint32_t denormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - (126u << 23);
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t finite = magnitude < 113u << 23 ? denormal : normal;
    return (uint16_t)(sign | (magnitude >= 143u << 23 ? special : finite));
}

/* BF16 to FP32, exact. */
static inline float float_from_bfloat(uint16_t bfloat) {
    return float_from_bits((uint32_t)bfloat << 16);
}

/* FP32 to BF16, to nearest, ties to even; too large becomes Inf, NaN stays NaN. */
static inline uint16_t bfloat_from_float(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/* FP64 to FP32, rounded to odd: an inexact result is the neighbour with an odd last bit. Rounding that to a narrower type gives what
 * rounding the FP64 value once would give. */
static inline float float_rounded_to_odd(double value) {
    const float nearest = (float)value;
    const double widened = (double)nearest;
    const double magnitude = value < 0 ? -value : value;
    const double widened_magnitude = widened < 0 ? -widened : widened;
    uint32_t bits = bits_from_float(nearest);
    bits -= widened_magnitude > magnitude; /* back to the neighbour towards zero */
    bits |= widened != value;
    return float_from_bits(bits);
}

/* FP64 to FP16 and BF16: one rounding, to nearest, ties to even. */
static inline uint16_t half_from_double(double value) {
    return half_from_float(float_rounded_to_odd(value));
}

static inline uint16_t bfloat_from_double(double value) {
    return bfloat_from_float(float_rounded_to_odd(value));
}

/* ---- Addresses and codes ------------------------------------------------------------------------------------------------------------- */

/* Index of a row's first element (INT4: code) in its tensor. */
static inline int64_t row_offset(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s) {
    return b * tensor->strides[0] + h * tensor->strides[1] + s * tensor->strides[2];
}

/* Whether a tensor is INT8 or INT4. */
static inline bool has_codes(const cpu_tensor* tensor) {
    return tensor->precision == CPU_INT8 || tensor->precision == CPU_INT4;
}

/* Index of the first scale of row s, and of its first zero point. */
static inline int64_t scale_index(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s) {
    const int64_t step = tensor->scale_tokens == 1 ? s : s / tensor->scale_tokens; /* a division takes longer than all the rest */
    return b * tensor->scale_strides[0] + h * tensor->scale_strides[1] + step * tensor->scale_strides[2];
}

/* The byte that holds the INT4 code of channel d of the row that begins at `offset`; the code is its low nibble if d is even, else its high
 * one. All strides but the channels' are even, and so is the channel that is multiplied: the division is exact. */
static inline int64_t int4_byte_index(const cpu_tensor* tensor, int64_t offset, int64_t d) {
    return (offset + (d - (d & 1)) * tensor->strides[3]) / 2;
}

/* The two codes of a byte, sign-extended. */
static inline int8_t int4_low(uint8_t byte) {
    return (int8_t)(((byte & 15) ^ 8) - 8);
}

static inline int8_t int4_high(uint8_t byte) {
    return (int8_t)(((byte >> 4) ^ 8) - 8);
}

/* The byte of two codes, of which the low four bits count. */
static inline uint8_t int4_pair(int8_t low, int8_t high) {
    return (uint8_t)((low & 15) | (high & 15) << 4);
}

/* The 16 codes of eight bytes that follow one another. */
static inline void unpack_eight_bytes(const uint8_t* bytes, int8_t* codes) {
    typedef uint8_t eight_bytes __attribute__((ext_vector_type(8)));
    typedef uint8_t sixteen_bytes __attribute__((ext_vector_type(16)));
    typedef eight_bytes eight_bytes_in_memory __attribute__((aligned(1)));
    typedef sixteen_bytes sixteen_bytes_in_memory __attribute__((aligned(1)));
    const eight_bytes both = *(const eight_bytes_in_memory*)bytes, low = both & 15, high = both >> 4;
    const sixteen_bytes all = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    *(sixteen_bytes_in_memory*)codes = (all ^ 8) - 8;
}

/* The codes of a row of INT8 or INT4, one a byte: in place where they lie so, else in `scratch` (of `channels` bytes). */
static inline const int8_t* load_codes(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, int8_t* scratch) {
    const int64_t offset = row_offset(tensor, b, h, s);
    const int64_t stride = tensor->strides[3];
    if (tensor->precision == CPU_INT8) {
        const int8_t* codes = (const int8_t*)tensor->data + offset;
        if (stride == 1) {
            return codes;
        }
        for (int64_t d = 0; d < channels; ++d) {
            scratch[d] = codes[d * stride];
        }
        return scratch;
    }
    /* Neighbouring pairs of channels are 2 * stride codes apart, which is `stride` bytes. */
    const uint8_t* bytes = (const uint8_t*)tensor->data + int4_byte_index(tensor, offset, 0);
    const int64_t pairs = channels / 2;
    if (stride == 1) {
        int64_t pair = 0;
        for (; pair + 8 <= pairs; pair += 8) unpack_eight_bytes(bytes + pair, scratch + 2 * pair);
        for (; pair < pairs; ++pair) {
            scratch[2 * pair] = int4_low(bytes[pair]);
            scratch[2 * pair + 1] = int4_high(bytes[pair]);
        }
    } else {
        for (int64_t pair = 0; pair < pairs; ++pair) {
            scratch[2 * pair] = int4_low(bytes[pair * stride]);
            scratch[2 * pair + 1] = int4_high(bytes[pair * stride]);
        }
    }
    if (channels & 1) {
        scratch[channels - 1] = int4_low(bytes[pairs * stride]);
    }
    return scratch;
}

/* ---- Rotation and dequantisation ----------------------------------------------------------------------------------------------------- */

/* Sixteen numbers, in as many registers as the instruction set needs. */
typedef float rotation_vector __attribute__((ext_vector_type(16)));

/* Vectors that are rotated in registers: as many as there is room for. */
#if defined(KERNEL_AVX512)
enum { ROTATION_LANES = 16, ROTATION_VECTORS = 8 };
#else
enum { ROTATION_LANES = 16, ROTATION_VECTORS = 4 };
#endif

/* One stage on numbers some lanes apart: those of each pair become their sum and their difference. Products by 1 and -1 are exact, so that
 * both are rounded once, also where one instruction multiplies and adds. */
#if defined(KERNEL_TARGET) || defined(__aarch64__)
#define ROTATION_ADD(product, sign, number) __builtin_elementwise_fma(product, sign, number)
#else
#define ROTATION_ADD(product, sign, number) ((product) * (sign) + (number))
#endif
#define ROTATE_STAGE(vector, signs, ...) vector = ROTATION_ADD(vector, signs, __builtin_shufflevector(vector, vector, __VA_ARGS__))

/* The stages of distance 1, 2, 4 ... up to half of sixteen times `vectors` numbers, at most ROTATION_VECTORS, and the product of what results
 * and a factor. From `source` to `target`, which may be the same. */
static inline __attribute__((always_inline)) void rotate_block(const void* source, float* target, const int vectors, float factor) {
#pragma clang fp contract(off)
    const rotation_vector by_1 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
    const rotation_vector by_2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
    const rotation_vector by_4 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
    const rotation_vector by_8 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    rotation_vector numbers[ROTATION_VECTORS];
    memcpy(numbers, source, (size_t)vectors * sizeof(rotation_vector));
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; ++v) {
        ROTATE_STAGE(numbers[v], by_1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        ROTATE_STAGE(numbers[v], by_2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        ROTATE_STAGE(numbers[v], by_4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
        ROTATE_STAGE(numbers[v], by_8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    }
#pragma clang loop unroll(full)
    for (int distance = 1; distance < vectors; distance *= 2) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; ++v) {
            if ((v & distance) != 0) {
                continue;
            }
            const rotation_vector sum = numbers[v] + numbers[v + distance], difference = numbers[v] - numbers[v + distance];
            numbers[v] = sum;
            numbers[v + distance] = difference;
        }
    }
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; ++v) {
        numbers[v] *= factor;
    }
    memcpy(target, numbers, (size_t)vectors * sizeof(rotation_vector));
}

#undef ROTATE_STAGE
#undef ROTATION_ADD

/* A stage of one distance on n numbers, and the product of what results and a factor. */
static inline void rotate_stage(float* numbers, int64_t n, int64_t distance, float factor) {
#pragma clang fp contract(off)
    for (int64_t start = 0; start < n; start += 2 * distance) {
        float *first = numbers + start, *second = first + distance;
        for (int64_t d = 0; d < distance; ++d) {
            const float x = first[d], y = second[d];
            first[d] = (x + y) * factor;
            second[d] = (x - y) * factor;
        }
    }
}

/* The FP32 number nearest 1/sqrt(n), for a power of two. */
static inline float rotation_factor(int64_t n) {
    const uint32_t exponent = (uint32_t)__builtin_ctzll((uint64_t)n);
    const uint32_t root_of_two = exponent % 2 != 0 ? 0x3504f3 : 0; /* the fraction of the number nearest sqrt(2) */
    return float_from_bits(((127 - (exponent + 1) / 2) << 23) + root_of_two);
}

/* The Walsh-Hadamard transform of each block of n numbers, n being the largest power of two that divides `channels`: natural order, stages of
 * distance 1, 2, 4 ... n/2, then one product by the factor that makes it its own inverse. Of `rows` rows, from `source`, floats at any address
 * and `pitch` bytes apart, to `target`, where they follow one another. Both may be the same
 * memory if rows of the source do too. */
static inline void rotate_rows(const void* source, int64_t pitch, int64_t rows, float* target, int64_t channels) {
    const int64_t n = channels & -channels, most = ROTATION_VECTORS * ROTATION_LANES;
    const float factor = rotation_factor(n);
#define ROTATE_BLOCKS(vectors, factor)                                                        \
    for (int64_t row = 0; row < rows; ++row) {                                                \
        const char* from = (const char*)source + row * pitch;                                 \
        float* to = target + row * channels;                                                  \
        for (int64_t start = 0; start < channels; start += (vectors) * ROTATION_LANES) {      \
            rotate_block(from + start * (int64_t)sizeof(float), to + start, vectors, factor); \
        }                                                                                     \
    }
    int64_t distance = most;
    if (n < ROTATION_LANES) {
        distance = 1;
        for (int64_t row = 0; row < rows; ++row) {
            memmove(target + row * channels, (const char*)source + row * pitch, (size_t)channels * sizeof(float));
        }
    } else if (n == ROTATION_LANES) {
        ROTATE_BLOCKS(1, factor)
    } else if (n == 2 * ROTATION_LANES) {
        ROTATE_BLOCKS(2, factor)
    } else if (n == 4 * ROTATION_LANES) {
        ROTATE_BLOCKS(4, factor)
    } else {
        ROTATE_BLOCKS(ROTATION_VECTORS, n == most ? factor : 1.0f)
    }
#undef ROTATE_BLOCKS
    for (; distance < n; distance *= 2) {
        for (int64_t start = 0; start < rows * channels; start += n) {
            rotate_stage(target + start, n, distance, 2 * distance == n ? factor : 1.0f);
        }
    }
}

/* One row of that. */
static inline void rotate_row(const void* source, float* target, int64_t channels) {
    rotate_rows(source, 0, 1, target, channels);
}

/* out = scale * float(code - zero_point): the difference is exact, its conversion and the product are one rounding each. */
static inline void dequantize_codes(const int8_t* codes, int64_t count, float scale, int32_t zero_point, float* out) {
#pragma clang fp contract(off)
    if (zero_point >= -(1 << 30) && zero_point <= 1 << 30) { /* 32 bits hold the difference, and vectors of them convert faster */
        for (int64_t d = 0; d < count; ++d) {
            out[d] = scale * (float)((int32_t)codes[d] - zero_point);
        }
    } else {
        for (int64_t d = 0; d < count; ++d) {
            out[d] = scale * (float)((int64_t)codes[d] - zero_point);
        }
    }
}

/* A row of INT8 or INT4 as real numbers: codes scaled, channel means added, rotation undone. */
static inline void load_quantized_row(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, float* out) {
#pragma clang fp contract(off)
    int8_t scratch[CPU_MAX_HEAD_DIM];
    const int8_t* codes = load_codes(tensor, b, h, s, channels, scratch);

    const int64_t first = scale_index(tensor, b, h, s);
    const int64_t stride = tensor->scale_strides[3];
    const float* scales = tensor->scales;
    const int32_t* zero_points = tensor->zero_points;
    if (stride == 0 || scales == NULL) { /* one scale a row */
        dequantize_codes(codes, channels, scales != NULL ? scales[first] : 1.0f, zero_points != NULL ? zero_points[first] : 0, out);
    } else if (tensor->scale_channels == 1) { /* one a channel */
        for (int64_t d = 0; d < channels; ++d) {
            const int64_t zero_point = zero_points != NULL ? zero_points[first + d * stride] : 0;
            out[d] = scales[first + d * stride] * (float)(codes[d] - zero_point);
        }
    } else { /* one a group of channels */
        int64_t index = first;
        for (int64_t start = 0; start < channels; start += tensor->scale_channels, index += stride) {
            const int64_t rest = channels - start;
            const int64_t count = rest < tensor->scale_channels ? rest : tensor->scale_channels;
            dequantize_codes(codes + start, count, scales[index], zero_points != NULL ? zero_points[index] : 0, out + start);
        }
    }

    if (tensor->channel_means != NULL) {
        const float* means = tensor->channel_means + b * tensor->mean_strides[0] + h * tensor->mean_strides[1];
        for (int64_t d = 0; d < channels; ++d) {
            out[d] += means[d];
        }
    }
    if (tensor->rotated) {
        rotate_row(out, out, channels);
    }
}

/* ---- Rows ---------------------------------------------------------------------------------------------------------------------------- */

enum { CACHE_LINE = 64 };

/* The cache line that holds a byte. */
static inline const char* line_of(const char* byte) {
    return byte - (uintptr_t)byte % CACHE_LINE;
}

/* Of INT4, the bytes of two. */
static inline int64_t element_bytes(cpu_precision precision) {
    switch (precision) {
    case CPU_FP64: return 8;
    case CPU_FP32: return 4;
    case CPU_FP16:
    case CPU_BF16: return 2;
    case CPU_INT8:
    case CPU_INT4:
    case CPU_BOOL: break;
    }
    return 1;
}

/* The bodies of functions that move a row between numbers and a tensor's elements of type ELEMENT. Neighbouring elements have a loop of
 * their own, for the vectoriser. */
#define LOAD_ROW(ELEMENT, CONVERT)                                       \
    do {                                                                 \
        const ELEMENT* elements = (const ELEMENT*)tensor->data + offset; \
        if (stride == 1) {                                               \
            for (int64_t d = 0; d < channels; ++d) {                     \
                out[d] = CONVERT(elements[d]);                           \
            }                                                            \
        } else {                                                         \
            for (int64_t d = 0; d < channels; ++d) {                     \
                out[d] = CONVERT(elements[d * stride]);                  \
            }                                                            \
        }                                                                \
    } while (0)

#define STORE_ROW(ELEMENT, CONVERT)                          \
    do {                                                     \
        ELEMENT* elements = (ELEMENT*)tensor->data + offset; \
        if (stride == 1) {                                   \
            for (int64_t d = 0; d < channels; ++d) {         \
                elements[d] = CONVERT(row[d]);               \
            }                                                \
        } else {                                             \
            for (int64_t d = 0; d < channels; ++d) {         \
                elements[d * stride] = CONVERT(row[d]);      \
            }                                                \
        }                                                    \
    } while (0)

/* Row (b, h, s) of a tensor of any numeric precision, dequantised where it is quantised; FP64 is rounded to FP32. channels is at most
 * CPU_MAX_HEAD_DIM for quantised tensors. */
static inline void load_row_float(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, float* out) {
    const int64_t offset = row_offset(tensor, b, h, s);
    const int64_t stride = tensor->strides[3];
    switch (tensor->precision) {
    case CPU_FP32: LOAD_ROW(float_in_memory, (float)); break;
    case CPU_FP16: LOAD_ROW(half_in_memory, float_from_half); break;
    case CPU_BF16: LOAD_ROW(half_in_memory, float_from_bfloat); break;
    case CPU_FP64: LOAD_ROW(double_in_memory, (float)); break;
    case CPU_INT4:
    case CPU_INT8: load_quantized_row(tensor, b, h, s, channels, out); break;
    case CPU_BOOL: /* masks are not read by rows of numbers */ break;
    }
}

/* Whether rows are FP32 numbers that follow one another, at any address: the most frequent rows. */
static inline bool has_float_rows(const cpu_tensor* tensor) {
    return tensor->precision == CPU_FP32 && tensor->strides[3] == 1;
}

/* Whether they are that, aligned, so that they can be used where they lie. */
static inline bool has_aligned_float_rows(const cpu_tensor* tensor) {
    return has_float_rows(tensor) && (uintptr_t)tensor->data % sizeof(float) == 0;
}

/* Row (b, h, s) of a tensor where it lies, if has_float_rows(). Else NULL. */
static inline const float_in_memory* find_row_float(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s) {
    return has_float_rows(tensor) ? (const float_in_memory*)tensor->data + row_offset(tensor, b, h, s) : NULL;
}

/* Rows first ..< first + rows, `pitch` apart. */
static inline void load_rows_float(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t channels,
                                   float* out, int64_t pitch) {
    for (int64_t row = 0; row < rows; ++row) {
        float* copy = out + row * pitch;
        const float_in_memory* source = find_row_float(tensor, b, h, first + row);
        if (source != NULL) {
            for (int64_t d = 0; d < channels; ++d) {
                copy[d] = source[d];
            }
        } else {
            load_row_float(tensor, b, h, first + row, channels, copy);
        }
    }
}

/* The same as load_row_float() in FP64. Quantised rows have the FP32 values that define them. */
static inline void load_row_double(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, double* out) {
    const int64_t offset = row_offset(tensor, b, h, s);
    const int64_t stride = tensor->strides[3];
    switch (tensor->precision) {
    case CPU_FP32: LOAD_ROW(float_in_memory, (double)); break;
    case CPU_FP16: LOAD_ROW(half_in_memory, float_from_half); break;
    case CPU_BF16: LOAD_ROW(half_in_memory, float_from_bfloat); break;
    case CPU_FP64: LOAD_ROW(double_in_memory, (double)); break;
    case CPU_INT4:
    case CPU_INT8: {
        float row[CPU_MAX_HEAD_DIM];
        load_quantized_row(tensor, b, h, s, channels, row);
        for (int64_t d = 0; d < channels; ++d) {
            out[d] = (double)row[d];
        }
        break;
    }
    case CPU_BOOL: break;
    }
}

/* Writes row (b, h, s) of a tensor of a float type, rounding to nearest even where it is narrower. */
static inline void store_row_float(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, const float* row) {
    const int64_t offset = row_offset(tensor, b, h, s);
    const int64_t stride = tensor->strides[3];
    switch (tensor->precision) {
    case CPU_FP32: STORE_ROW(float_in_memory, (float)); break;
    case CPU_FP16: STORE_ROW(half_in_memory, half_from_float); break;
    case CPU_BF16: STORE_ROW(half_in_memory, bfloat_from_float); break;
    case CPU_FP64: STORE_ROW(double_in_memory, (double)); break;
    case CPU_INT4: /* results are never of these types */
    case CPU_INT8:
    case CPU_BOOL: break;
    }
}

/* The same from FP64: one rounding, also to FP16 and BF16. */
static inline void store_row_double(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, const double* row) {
    const int64_t offset = row_offset(tensor, b, h, s);
    const int64_t stride = tensor->strides[3];
    switch (tensor->precision) {
    case CPU_FP32: STORE_ROW(float_in_memory, (float)); break;
    case CPU_FP16: STORE_ROW(half_in_memory, half_from_double); break;
    case CPU_BF16: STORE_ROW(half_in_memory, bfloat_from_double); break;
    case CPU_FP64: STORE_ROW(double_in_memory, (double)); break;
    case CPU_INT4:
    case CPU_INT8:
    case CPU_BOOL: break;
    }
}

#undef LOAD_ROW
#undef STORE_ROW

#endif /* CONVERSION_H */
