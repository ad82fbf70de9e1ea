/* Forward attention for few query rows over many keys, as when decoding with a cache: every key and value is read once, where it lies, for
 * all query heads that share it. This file is a template; the attention_decode_float_*.c files beside it instantiate it with
 *
 *   KERNEL_SUFFIX       the end of the kernel's name, such as float_avx2
 *   KERNEL_WIDE_SUFFIX  the FP64 kernels that compute rows which overflow FP32 arithmetic
 *   KERNEL_TARGET       the instruction set as a target attribute string, or undefined for the architecture's baseline
 *   KERNEL_SLICE        floats in a register
 *   KERNEL_REGISTERS    how many of them there are
 *
 * The keys of a sequence are split into parts of PART_KEYS, and an item is one part of one head of keys. It goes through its part in blocks:
 * dot products of all its query rows with a block's keys (lanes are channels), their softmax (lanes are keys), the weighted sum of the
 * block's values (lanes are channels). What the items leave in shared memory is joined, part by part in their order, when all are done.
 *
 * FP16, BF16, INT8 and INT4 become FP32 in registers, without their scales: those of rows multiply scores and weights, those of channels
 * the queries and the output. Zero points are subtracted from the codes, so that nothing cancels. Rows with other schemes, and those whose
 * channels are no neighbours or do not fill whole registers, are copied block by block.
 *
 * Numerical contract: arithmetic is FP32. The sum over the channels runs in KERNEL_SLICE partial sums that a tree adds up, the one over
 * the keys in order within a block, then over blocks and parts in order; blocks and parts begin at multiples of their size whatever the
 * limits are. A row's bits depend neither on threads nor on other rows, heads or batches, nor on strides. Scores are selected, not added.
 * Values that are not finite show in the sum of their block, which is then computed anew without them. A row that attends one, or a score
 * that is not finite, and one whose result is not, is left to the FP64 reference kernel. */
#include "../shared/naming.h"
#include "cpu_kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define KERNEL_FP64 0

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpsabi"           /* every function that takes or returns a vector is inlined */
#pragma clang diagnostic ignored "-Wunused-function" /* the headers serve other kernels too */

#define KERNEL_WIDE_ROWS KERNEL_NAME(attention_forward_rows, KERNEL_WIDE_SUFFIX)
#define KERNEL_WIDE_ROWS_BYTES KERNEL_NAME(attention_forward_rows_bytes, KERNEL_WIDE_SUFFIX)
void KERNEL_WIDE_ROWS(const cpu_attention* attention, int64_t b, int64_t h, int64_t first_row, int64_t rows, void* memory);
size_t KERNEL_WIDE_ROWS_BYTES(const cpu_attention* attention);

#ifdef KERNEL_TARGET
#pragma clang attribute push(__attribute__((target(KERNEL_TARGET))), apply_to = function)
#endif

/* clang-format off: each file needs those before it */
#include "../shared/conversion.h"
#include "../shared/real.h"
#include "../shared/tile.h"
#include "../shared/rows.h"
/* clang-format on */

enum {
    MOST_QUERIES = 4,         /* rows of a head: with more, kernels whose lanes are rows are as fast */
    PART_KEYS = 512,          /* of an item: little enough to keep many threads busy, much beside what joining a part costs */
    BLOCK_KEYS = 64,          /* of a block: bits of a 64-bit number say which are attended */
    ROWS = 4,                 /* query rows that share a register of keys or values */
    SLICE = KERNEL_SLICE,     /* lanes of a slice: channels in a register */
    CHANNEL_STEP = 2 * SLICE, /* channels of what loops go through at once: a byte of INT4 holds two */
    CACHE_LINE = 64,
};

/* ---- Slices -------------------------------------------------------------------------------------------------------------------------- */

typedef float slice __attribute__((ext_vector_type(SLICE)));
typedef int32_t integer_slice __attribute__((ext_vector_type(SLICE)));
typedef uint32_t word_slice __attribute__((ext_vector_type(SLICE)));

/* What a caller's memory holds, at any address. */
typedef slice __attribute__((aligned(1), may_alias)) float_slice_in_memory;
typedef _Float16 __attribute__((ext_vector_type(SLICE), aligned(1), may_alias)) half_slice_in_memory;
typedef uint16_t __attribute__((ext_vector_type(SLICE), aligned(1), may_alias)) bfloat_slice_in_memory;
typedef int8_t __attribute__((ext_vector_type(SLICE), aligned(1), may_alias)) byte_slice_in_memory;

INLINE slice slice_load(const float* address) {
    return *(const float_slice_in_memory*)address;
}

INLINE void slice_store(float* address, slice value) {
    *(float_slice_in_memory*)address = value;
}

INLINE slice slice_of(float value) {
    return (slice)value;
}

/* Bytes of `channels` channels. */
INLINE int64_t row_bytes(cpu_precision precision, int64_t channels) {
    return precision == CPU_INT4 ? divide_up(channels, 2) : channels * element_bytes(precision);
}

/* Half 0 or 1 of CHANNEL_STEP channels: their numbers, or their codes less the zero point (where `shifted`). Of INT4, half 0 holds the even
 * channels and half 1 the odd ones. */
INLINE slice load_slice(const cpu_precision precision, const bool shifted, const char* step, const int half, slice zero_point) {
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

/* The first half of adding up each group of four lanes: two sums of `a` and two of `b`, in turn. */
INLINE slice add_halves(slice a, slice b) {
#if KERNEL_SLICE == 4
    return __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif KERNEL_SLICE == 8
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#endif
}

/* The second half: the sums of add_halves() added, those of `a` first. */
INLINE slice add_quarters(slice a, slice b) {
#if KERNEL_SLICE == 4
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
#elif KERNEL_SLICE == 8
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#endif
}

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

/* The sums of the lanes of SLICE slices, each by the same tree. */
INLINE slice add_lanes(const slice slices[SLICE]) {
    slice groups[SLICE / 4];
#pragma clang loop unroll(full)
    for (int group = 0; group < SLICE / 4; group++) {
        const slice* of_group = slices + group * 4;
        groups[group] = add_quarters(add_halves(of_group[0], of_group[1]), add_halves(of_group[2], of_group[3]));
    }
#if KERNEL_SLICE == 4
    return groups[0];
#elif KERNEL_SLICE == 8
    return add_groups(groups[0], groups[1]);
#else
    return add_groups(add_groups(groups[0], groups[1]), add_groups(groups[2], groups[3]));
#endif
}

/* Slices of even and odd channels as those of neighbouring channels. */
INLINE void interleave_slices(slice* even, slice* odd) {
    const slice a = *even, b = *odd;
#if KERNEL_SLICE == 4
    *even = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    *odd = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif KERNEL_SLICE == 8
    *even = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    *odd = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    *even = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *odd = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

/* Calls body(precision, shifted) with both as constants; without codes nothing is shifted. */
#define WITH_PRECISION(precision, shifted, body) \
    switch (precision) {                         \
    case CPU_FP16: body(CPU_FP16, false); break; \
    case CPU_BF16: body(CPU_BF16, false); break; \
    case CPU_INT8:                               \
        if (shifted) {                           \
            body(CPU_INT8, true);                \
        } else {                                 \
            body(CPU_INT8, false);               \
        }                                        \
        break;                                   \
    case CPU_INT4:                               \
        if (shifted) {                           \
            body(CPU_INT4, true);                \
        } else {                                 \
            body(CPU_INT4, false);               \
        }                                        \
        break;                                   \
    default: body(CPU_FP32, false); break;       \
    }

/* ---- Keys and values ----------------------------------------------------------------------------------------------------------------- */

/* The keys or values of one head, and the block of them at hand. */
typedef struct {
    cpu_tensor tensor;
    int64_t b, head, channels;
    int64_t steps;           /* of CHANNEL_STEP channels, the last one padded */
    cpu_precision precision; /* of the rows as they are multiplied */
    bool dequantized;        /* copied as real numbers: no scale nor zero point is left to apply */
    bool in_place;           /* not copied */
    bool shifted;            /* there are zero points */
    char* copies;            /* workspace: BLOCK_KEYS rows, in FP32 at most */

    int64_t columns; /* of the block */
    const char* rows;
    int64_t stride;     /* bytes from row to row */
    float* scales;      /* [BLOCK_KEYS]; 1 where there are none */
    float* zero_points; /* [BLOCK_KEYS] */
} operand;

INLINE bool has_codes(const cpu_tensor* tensor) {
    return tensor->precision == CPU_INT8 || tensor->precision == CPU_INT4;
}

/* Whether each channel has one scale for all rows. */
INLINE bool has_channel_scales(const cpu_tensor* tensor) {
    return has_codes(tensor) && tensor->scales && tensor->scale_strides[3] != 0 && tensor->scale_strides[2] == 0 &&
           tensor->scale_channels == 1 && !tensor->zero_points;
}

/* Whether scales and zero points can wait until codes were multiplied. */
INLINE bool multiplies_codes(const cpu_tensor* tensor) {
    return has_codes(tensor) && (tensor->scale_strides[3] == 0 || !(tensor->scales || tensor->zero_points) || has_channel_scales(tensor));
}

INLINE int64_t channel_steps(int64_t channels) {
    return divide_up(channels, CHANNEL_STEP);
}

INLINE int64_t padded_channels(int64_t channels) {
    return channel_steps(channels) * CHANNEL_STEP;
}

static void take_operand(workspace_cursor* cursor, int64_t channels, operand* operand) {
    operand->copies = workspace_take(cursor, BLOCK_KEYS * padded_channels(channels), sizeof(float));
    operand->scales = workspace_take_reals(cursor, BLOCK_KEYS);
    operand->zero_points = workspace_take_reals(cursor, BLOCK_KEYS);
}

static void place_operand(const cpu_tensor* tensor, int64_t b, int64_t head, int64_t channels, operand* operand) {
    operand->tensor = *tensor;
    operand->b = b;
    operand->head = head;
    operand->channels = channels;
    operand->steps = channel_steps(channels);
    operand->dequantized = has_codes(tensor) && !multiplies_codes(tensor);
    operand->precision = operand->dequantized ? CPU_FP32 : tensor->precision;
    operand->in_place = !operand->dequantized && tensor->strides[3] == 1 && channels % CHANNEL_STEP == 0;
    operand->shifted = !operand->dequantized && has_codes(tensor) && tensor->zero_points;
}

/* Row `s` of the tensor as its own elements, neighbours, padded with zeros. */
static void copy_row(const operand* operand, int64_t s, char* copy) {
    const cpu_tensor* tensor = &operand->tensor;
    const int64_t channels = operand->channels, stride = tensor->strides[3];
    const int64_t offset = row_offset(tensor, operand->b, operand->head, s);
    const int64_t bytes = row_bytes(operand->precision, operand->steps * CHANNEL_STEP);
    memset(copy, 0, (size_t)bytes);
    if (operand->dequantized) {
        load_row_float(tensor, operand->b, operand->head, s, channels, (float*)copy);
    } else if (tensor->precision == CPU_INT4) {
        int8_t scratch[CPU_MAX_HEAD_DIM + 1];
        load_codes(tensor, operand->b, operand->head, s, channels, scratch);
        scratch[channels] = 0;
        for (int64_t d = 0; d < channels; d += 2) copy[d / 2] = (char)int4_pair(scratch[d], scratch[d + 1]);
    } else {
        const int64_t size = element_bytes(tensor->precision);
        const char* elements = (const char*)tensor->data + offset * size;
        for (int64_t d = 0; d < channels; d++) memcpy(copy + d * size, elements + d * stride * size, (size_t)size);
    }
}

/* Numbers that belong to rows first ..< first + columns, one each. */
#define LOAD_ROW_NUMBERS(numbers, array)                                                                                         \
    do {                                                                                                                         \
        const int64_t* strides = tensor->scale_strides;                                                                          \
        const int64_t base = operand->b * strides[0] + operand->head * strides[1];                                               \
        for (int64_t k = 0; k < columns; k++) {                                                                                  \
            const int64_t group = tensor->scale_tokens == 1 || strides[2] == 0 ? first + k : (first + k) / tensor->scale_tokens; \
            (numbers)[k] = (float)(array)[base + group * strides[2]];                                                            \
        }                                                                                                                        \
    } while (0)

/* Makes rows first ..< first + columns the block at hand. */
static void place_block(operand* operand, int64_t first, int64_t columns) {
    const cpu_tensor* tensor = &operand->tensor;
    operand->columns = columns;
    if (operand->in_place) {
        const int64_t offset = row_offset(tensor, operand->b, operand->head, first);
        operand->rows =
            (const char*)tensor->data + (tensor->precision == CPU_INT4 ? offset / 2 : offset * element_bytes(tensor->precision));
        operand->stride = tensor->precision == CPU_INT4 ? tensor->strides[2] / 2 : tensor->strides[2] * element_bytes(tensor->precision);
    } else {
        operand->rows = operand->copies;
        operand->stride = row_bytes(operand->precision, operand->steps * CHANNEL_STEP);
        for (int64_t k = 0; k < columns; k++) copy_row(operand, first + k, operand->copies + k * operand->stride);
    }
    if (has_codes(tensor) && !operand->dequantized && tensor->scales && !has_channel_scales(tensor)) {
        LOAD_ROW_NUMBERS(operand->scales, tensor->scales);
    } else {
        for (int64_t k = 0; k < columns; k++) operand->scales[k] = 1;
    }
    for (int64_t k = 0; k < columns; k++) operand->zero_points[k] = 0;
    if (operand->shifted) LOAD_ROW_NUMBERS(operand->zero_points, tensor->zero_points);
}

/* Rows that will be needed, to be fetched a few cache lines at a time while others are computed with. */
typedef struct {
    const char* row;
    int64_t stride, bytes; /* from row to row; of a row */
    int64_t rows;          /* left */
    int64_t line;          /* of the row at hand, in bytes from its start */
    int64_t lines_at_once;
} row_stream;

/* The rows of `operand` from `first` on, at most `most`, to be fetched in `times` goes. */
static row_stream stream_rows(const operand* operand, int64_t first, int64_t rows, int64_t times) {
    row_stream stream = {0};
    if (!operand->in_place || rows <= 0) return stream;
    stream.bytes = row_bytes(operand->precision, operand->channels);
    const int64_t size = row_bytes(operand->precision, 2);
    stream.row = (const char*)operand->tensor.data + row_offset(&operand->tensor, operand->b, operand->head, first) * size / 2;
    stream.stride = operand->tensor.strides[2] * size / 2;
    stream.rows = rows;
    stream.lines_at_once = divide_up(rows * divide_up(stream.bytes, CACHE_LINE), times);
    return stream;
}

INLINE void fetch_lines(row_stream* stream) {
    for (int64_t k = 0; k < stream->lines_at_once && stream->rows > 0; k++) {
        __builtin_prefetch(stream->row + stream->line);
        stream->line += CACHE_LINE;
        if (stream->line >= stream->bytes) {
            stream->line = 0;
            stream->row += stream->stride;
            stream->rows--;
        }
    }
}

/* ---- Products ------------------------------------------------------------------------------------------------------------------------ */

/* Keys that are multiplied together with `rows` rows, and slices of values that are: their sums fill most registers, and are as many as the
 * latency of multiply-adds asks for. */
#define KEYS_AT_ONCE(rows) (((rows) > 2 ? 2 : 4) * (KERNEL_REGISTERS / 16))
#define SLICES_AT_ONCE(rows) ((rows) > 2 && KERNEL_REGISTERS == 16 ? 2 : 4)

enum { MOST_KEYS_AT_ONCE = KEYS_AT_ONCE(1), MOST_SUMS = KEYS_AT_ONCE(ROWS) * ROWS, STEPS_OF_VALUES = 8 };

/* Dot products of `rows` queries with the block's keys: scores[row][BLOCK_KEYS]. */
INLINE void multiply_keys(const cpu_precision precision, const bool shifted, const int rows, const operand* key, const float* query,
                          float* scores, row_stream* stream) {
    const int keys = KEYS_AT_ONCE(rows);
    const int64_t query_stride = key->steps * CHANNEL_STEP;
    for (int64_t column = 0; column < key->columns; column += keys) {
        const char* at[MOST_KEYS_AT_ONCE];
        slice zero_points[MOST_KEYS_AT_ONCE];
        slice sums[MOST_SUMS];
        fetch_lines(stream);
#pragma clang loop unroll(full)
        for (int k = 0; k < keys; k++) {
            const int64_t here = minimum(column + k, key->columns - 1); /* behind the block's end: the last one again */
            at[k] = key->rows + here * key->stride;
            zero_points[k] = slice_of(key->zero_points[here]);
        }
#pragma clang loop unroll(full)
        for (int n = 0; n < MOST_SUMS; n++) sums[n] = slice_of(0);
        for (int64_t step = 0; step < key->steps; step++) {
#pragma clang loop unroll(full)
            for (int half = 0; half < 2; half++) {
                slice numbers[MOST_KEYS_AT_ONCE];
#pragma clang loop unroll(full)
                for (int k = 0; k < keys; k++) {
                    numbers[k] = load_slice(precision, shifted, at[k] + step * row_bytes(precision, CHANNEL_STEP), half, zero_points[k]);
                }
#pragma clang loop unroll(full)
                for (int row = 0; row < rows; row++) {
                    const slice factor = slice_load(query + row * query_stride + step * CHANNEL_STEP + half * SLICE);
#pragma clang loop unroll(full)
                    for (int k = 0; k < keys; k++) sums[row * keys + k] += factor * numbers[k];
                }
            }
        }
        float products[MOST_SUMS];
#pragma clang loop unroll(full)
        for (int n = 0; n < rows * keys; n += SLICE) slice_store(products + n, add_lanes(sums + n));
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) {
            memcpy(scores + row * BLOCK_KEYS + column, products + row * keys, (size_t)keys * sizeof(float));
        }
    }
}

/* The weighted sum of some slices of the block's values for `rows` rows: output[row][channel]. Returns 0 if all of it is finite, else NaN in
 * some lane. */
INLINE slice multiply_values(const cpu_precision precision, const bool shifted, const int rows, const int slices, const operand* value,
                             int64_t step, const float* weights, float* output, row_stream* stream) {
    const char* values = value->rows + step * row_bytes(precision, CHANNEL_STEP);
    slice sums[ROWS][4];
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int n = 0; n < slices; n++) sums[row][n] = slice_of(0);
    }
    for (int64_t column = 0; column < value->columns; column += STEPS_OF_VALUES) {
        fetch_lines(stream);
        const int64_t end = minimum(column + STEPS_OF_VALUES, value->columns);
        for (int64_t k = column; k < end; k++) {
            const char* at = values + k * value->stride;
            const slice zero_point = slice_of(value->zero_points[k]);
            slice numbers[4];
#pragma clang loop unroll(full)
            for (int n = 0; n < slices; n++) {
                numbers[n] = load_slice(precision, shifted, at + n / 2 * row_bytes(precision, CHANNEL_STEP), n % 2, zero_point);
            }
#pragma clang loop unroll(full)
            for (int row = 0; row < rows; row++) {
                const slice weight = slice_of(weights[row * BLOCK_KEYS + k]);
#pragma clang loop unroll(full)
                for (int n = 0; n < slices; n++) sums[row][n] += weight * numbers[n];
            }
        }
    }
    slice excess = slice_of(0); /* x - x is 0 for a finite x, else NaN */
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int n = 0; n < slices; n++) {
            excess += sums[row][n] - sums[row][n];
            if (precision == CPU_INT4 && n % 2 == 0) interleave_slices(&sums[row][n], &sums[row][n + 1]);
            slice_store(output + row * value->steps * CHANNEL_STEP + step * CHANNEL_STEP + n * SLICE, sums[row][n]);
        }
    }
    return excess;
}

static void multiply_key_block(const operand* key, int64_t rows, const float* query, float* scores, row_stream* stream) {
#define MULTIPLY(precision, shifted)                                                     \
    switch (rows) {                                                                      \
    case 1: multiply_keys(precision, shifted, 1, key, query, scores, stream); break;     \
    case 2: multiply_keys(precision, shifted, 2, key, query, scores, stream); break;     \
    case 3: multiply_keys(precision, shifted, 3, key, query, scores, stream); break;     \
    default: multiply_keys(precision, shifted, ROWS, key, query, scores, stream); break; \
    }
    WITH_PRECISION(key->precision, key->shifted, MULTIPLY)
#undef MULTIPLY
}

/* All slices for `rows` rows. */
INLINE bool multiply_all_values(const cpu_precision precision, const bool shifted, const int rows, const operand* value,
                                const float* weights, float* output, row_stream* stream) {
    const int steps = SLICES_AT_ONCE(rows) / 2;
    slice excess = slice_of(0);
    int64_t step = 0;
    for (; step + steps <= value->steps; step += steps) {
        excess += multiply_values(precision, shifted, rows, steps * 2, value, step, weights, output, stream);
    }
    for (; step < value->steps; step++) {
        excess += multiply_values(precision, shifted, rows, 2, value, step, weights, output, stream);
    }
    float sum = 0;
    for (int lane = 0; lane < SLICE; lane++) sum += excess[lane];
    return sum == 0;
}

/* The weighted sums of the block's values. False if one is not finite. */
static bool multiply_value_block(const operand* value, int64_t rows, const float* weights, float* output, row_stream* stream) {
#define MULTIPLY(precision, shifted)                                                               \
    switch (rows) {                                                                                \
    case 1: return multiply_all_values(precision, shifted, 1, value, weights, output, stream);     \
    case 2: return multiply_all_values(precision, shifted, 2, value, weights, output, stream);     \
    case 3: return multiply_all_values(precision, shifted, 3, value, weights, output, stream);     \
    default: return multiply_all_values(precision, shifted, ROWS, value, weights, output, stream); \
    }
    WITH_PRECISION(value->precision, value->shifted, MULTIPLY)
#undef MULTIPLY
}

/* ---- Partial results ----------------------------------------------------------------------------------------------------------------- */

/* What is known of a row after some of its keys. Its output follows on the next cache line. */
typedef struct {
    float highest; /* score */
    float sum;     /* of exp(score - highest) */
    bool attended; /* any key */
    bool left_out; /* something is not finite: the FP64 kernel computes this row */
} partial_row;

INLINE size_t partial_bytes(const cpu_attention* attention) {
    return CACHE_LINE + (size_t)round_up(padded_channels(attention->head_dim_v) * (int64_t)sizeof(float), CACHE_LINE);
}

INLINE float* partial_output(partial_row* partial) {
    return (float*)((char*)partial + CACHE_LINE);
}

INLINE int64_t part_count(const cpu_attention* attention) {
    return maximum(1, divide_up(attention->seq_len_kv, PART_KEYS));
}

INLINE int64_t group_heads(const cpu_attention* attention) {
    return attention->num_heads / attention->num_kv_heads;
}

INLINE int64_t group_rows(const cpu_attention* attention) {
    return group_heads(attention) * attention->seq_len_q;
}

/* Rows of a problem with one part are finished at once, and their partial results lie in workspace. */
static size_t decode_shared_bytes(const cpu_attention* attention) {
    if (part_count(attention) == 1) return 0;
    size_t bytes = partial_bytes(attention);
    const int64_t counts[] = {attention->batch_size, attention->num_heads, attention->seq_len_q, part_count(attention)};
    for (int n = 0; n < 4; n++) {
        if (__builtin_mul_overflow(bytes, (size_t)counts[n], &bytes)) return SIZE_MAX;
    }
    return bytes;
}

/* Of row i of head h: the parts' results one behind the other. */
static partial_row* find_shared_partials(const cpu_attention* attention, int64_t b, int64_t h, int64_t i) {
    const int64_t row = (b * attention->num_heads + h) * attention->seq_len_q + i;
    return (partial_row*)((char*)attention->shared + partial_bytes(attention) * (size_t)(row * part_count(attention)));
}

INLINE partial_row* next_partial(const cpu_attention* attention, partial_row* partial, int64_t count) {
    return (partial_row*)((char*)partial + partial_bytes(attention) * (size_t)count);
}

/* ---- Workspace ----------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    operand key, value;
    float* query;          /* [rows][padded head_dim] */
    float* mean_scores;    /* [rows]: dot products with the keys' channel means */
    uint64_t* attended;    /* [rows]: which of the block's keys are */
    float* additions;      /* [rows][BLOCK_KEYS]: the additive mask; NULL without mask */
    float* weights;        /* [rows][BLOCK_KEYS]: dot products, then weights */
    float* rescale;        /* [rows] */
    float* block_output;   /* [ROWS][padded head_dim_v] */
    float* finite_values;  /* [BLOCK_KEYS][padded head_dim_v]: the block's values with 0 for what is not finite */
    float* row;            /* [padded channels] */
    partial_row** partial; /* [rows] */
    char* partials;        /* those of a problem with one part */
    char* wide;            /* for the FP64 kernel */
} decode_workspace;

static size_t decode_layout(const cpu_attention* attention, void* memory, decode_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    const int64_t rows = group_rows(attention);
    const int64_t head_dim = padded_channels(attention->head_dim), head_dim_v = padded_channels(attention->head_dim_v);
    take_operand(&cursor, attention->head_dim, &workspace->key);
    take_operand(&cursor, attention->head_dim_v, &workspace->value);
    workspace->query = workspace_take_reals(&cursor, rows * head_dim);
    workspace->mean_scores = workspace_take_reals(&cursor, rows);
    workspace->attended = workspace_take(&cursor, rows, sizeof(uint64_t));
    workspace->additions = attention->mask.data ? workspace_take_reals(&cursor, rows * BLOCK_KEYS) : NULL;
    workspace->weights = workspace_take_reals(&cursor, rows * BLOCK_KEYS);
    workspace->rescale = workspace_take_reals(&cursor, rows);
    workspace->block_output = workspace_take_reals(&cursor, ROWS * head_dim_v);
    workspace->finite_values = has_codes(&attention->value) ? NULL : workspace_take_reals(&cursor, BLOCK_KEYS * head_dim_v);
    workspace->row = workspace_take_reals(&cursor, maximum(head_dim, head_dim_v));
    workspace->partial = workspace_take(&cursor, rows, sizeof(partial_row*));
    workspace->partials = workspace_take(&cursor, part_count(attention) == 1 ? rows : 0, partial_bytes(attention));
    workspace->wide = workspace_take(&cursor, (int64_t)KERNEL_WIDE_ROWS_BYTES(attention), 1);
    return cursor.used;
}

static size_t decode_workspace_bytes(const cpu_attention* attention) {
    return decode_layout(attention, NULL, &(decode_workspace){0});
}

/* ---- Rows ---------------------------------------------------------------------------------------------------------------------------- */

/* Reads the queries of all rows as the keys' codes are to meet them. */
static void load_queries(const cpu_attention* attention, const head_position* at, decode_workspace* workspace) {
    const operand* key = &workspace->key;
    const cpu_tensor query = score_operand(&attention->query);
    const int64_t head_dim = attention->head_dim, padded = key->steps * CHANNEL_STEP;
    const float* scales = NULL;
    if (has_channel_scales(&key->tensor)) {
        scales = key->tensor.scales + at->b * key->tensor.scale_strides[0] + at->kv_head * key->tensor.scale_strides[1];
    }
    const float* means = key->dequantized ? NULL : key->tensor.channel_means;
    if (means) means += at->b * key->tensor.mean_strides[0] + at->kv_head * key->tensor.mean_strides[1];
    for (int64_t row = 0; row < group_rows(attention); row++) {
        const row_place place = place_of_row(attention, at, row);
        float* numbers = workspace->row;
        load_row_float(&query, at->b, place.h, place.i, head_dim, numbers);
        float mean_score = 0;
        for (int64_t d = 0; d < head_dim && means; d++) mean_score += numbers[d] * means[d];
        workspace->mean_scores[row] = mean_score;
        for (int64_t d = 0; d < head_dim && scales; d++) numbers[d] *= scales[d * key->tensor.scale_strides[3]];
        for (int64_t d = head_dim; d < padded; d++) numbers[d] = 0;
        float* out = workspace->query + row * padded;
        if (key->precision == CPU_INT4) {
            for (int64_t step = 0; step < padded; step += CHANNEL_STEP) {
                for (int64_t d = 0; d < CHANNEL_STEP; d++) out[step + d % 2 * SLICE + d / 2] = numbers[step + d];
            }
        } else {
            memcpy(out, numbers, (size_t)padded * sizeof(float));
        }
    }
}

/* Bits first ..< last. */
INLINE uint64_t bits_between(int64_t first, int64_t last) {
    if (first >= last) return 0;
    return (~(uint64_t)0 >> (64 - (last - first))) << first;
}

/* Which of the block's keys each row attends, and the mask's additions. False if none attends any. */
static bool find_attended(const cpu_attention* attention, const head_position* at, int64_t first_column, int64_t columns,
                          decode_workspace* workspace) {
    uint64_t any = 0;
    for (int64_t row = 0; row < group_rows(attention); row++) {
        const row_place place = place_of_row(attention, at, row);
        const column_range range = columns_of_row(attention, at, place.i);
        uint64_t attended = bits_between(maximum(range.first - first_column, 0), minimum(range.last - first_column, columns));
        if (workspace->additions && attended) {
            float* additions = workspace->additions + row * BLOCK_KEYS;
            const head_position head = {.b = at->b, .h = place.h};
            load_mask(attention, &head, place.i, 1, 1, first_column, columns, additions);
            for (int64_t k = 0; k < columns; k++) attended &= ~((uint64_t)(additions[k] == -INFINITY) << k);
        }
        workspace->attended[row] = attended;
        any |= attended;
    }
    return any != 0;
}

/* Turns a row's dot products with the block into scores and those into weights, and takes them into its partial result. */
static void weigh_block(const cpu_attention* attention, const head_position* at, int64_t row, int64_t first_column,
                        decode_workspace* workspace) {
    const vector_mask lane_bits = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                   1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const vector lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const float scale = (float)attention->softmax_scale, softcap = softcap_of(attention), mean_score = workspace->mean_scores[row];
    const row_place place = place_of_row(attention, at, row);
    const float slope = attention->alibi_slopes ? get_statistic(attention, attention->alibi_slopes, place.h) : 0;
    const vector diagonal = vector_of((float)(place.i + at->offset - first_column)) - lanes;
    const uint64_t attended = workspace->attended[row];
    const int64_t columns = workspace->key.columns;
    partial_row* partial = workspace->partial[row];
    float* weights = workspace->weights + row * BLOCK_KEYS;

    vector highest = vector_of(-INFINITY);
    vector_mask infinite = (vector_mask)(real_bits)0;
    for (int64_t column = 0; column < columns; column += LANES) {
        vector score = vector_load(weights + column) * vector_load(workspace->key.scales + column) + mean_score;
        score *= scale;
        const vector excess = score - score; /* 0 if finite, else NaN */
        if (softcap > 0) score = softcap * vector_tanh(score / softcap);
        if (workspace->additions) score += vector_load(workspace->additions + row * BLOCK_KEYS + column);
        if (attention->alibi_slopes) {
            const vector distance = diagonal - (float)column;
            score -= slope * vector_select(distance < 0, -distance, distance);
        }
        const vector_mask here = ((vector_mask)(real_bits)(attended >> column & 0xFFFF) & lane_bits) != 0;
        infinite |= (excess + (score - score) != 0) & here;
        score = vector_select(here, score, vector_of(-INFINITY));
        highest = vector_max(highest, score);
        vector_store(weights + column, score);
    }
    partial->attended = true;
    if (vector_any(infinite)) partial->left_out = true;

    float reference = partial->highest;
    for (int lane = 0; lane < LANES; lane++) reference = highest[lane] > reference ? highest[lane] : reference;
    const float rescale = real_exp(partial->highest - reference);
    partial->highest = reference;
    vector sums = vector_of(0);
    for (int64_t column = 0; column < columns; column += LANES) {
        const vector weight = vector_exp(vector_load(weights + column) - reference);
        sums += weight;
        vector_store(weights + column, weight * vector_load(workspace->value.scales + column));
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    partial->sum = partial->sum * rescale + sum;
    workspace->rescale[row] = rescale;
}

/* Copies the block's values as FP32 with 0 for what is not finite. Returns the keys of those that were not. */
static uint64_t copy_finite_values(const operand* value, int64_t first_column, float* finite) {
    const int64_t padded = value->steps * CHANNEL_STEP;
    uint64_t infinite = 0;
    for (int64_t k = 0; k < value->columns; k++) {
        float* row = finite + k * padded;
        memset(row, 0, (size_t)padded * sizeof(float));
        load_row_float(&value->tensor, value->b, value->head, first_column + k, value->channels, row);
        for (int64_t d = 0; d < value->channels; d++) {
            if (row[d] - row[d] == 0) continue;
            row[d] = 0;
            infinite |= (uint64_t)1 << k;
        }
    }
    return infinite;
}

/* Adds the block's weighted values to the output of rows first ..< first + rows. */
static void add_values(int64_t first_column, int64_t first, int64_t rows, row_stream* stream, decode_workspace* workspace) {
    const operand* value = &workspace->value;
    const float* weights = workspace->weights + first * BLOCK_KEYS;
    const int64_t padded = value->steps * CHANNEL_STEP;
    if (!multiply_value_block(value, rows, weights, workspace->block_output, stream) && workspace->finite_values) {
        const uint64_t infinite = copy_finite_values(value, first_column, workspace->finite_values);
        for (int64_t row = first; row < first + rows; row++) {
            if (workspace->attended[row] & infinite) workspace->partial[row]->left_out = true;
        }
        operand finite = *value;
        finite.precision = CPU_FP32;
        finite.rows = (const char*)workspace->finite_values;
        finite.stride = padded * (int64_t)sizeof(float);
        multiply_value_block(&finite, rows, weights, workspace->block_output, stream);
    }
    for (int64_t row = first; row < first + rows; row++) {
        if (!workspace->attended[row]) continue;
        const float* sums = workspace->block_output + (row - first) * padded;
        const float rescale = workspace->rescale[row];
        float* output = partial_output(workspace->partial[row]);
        for (int64_t d = 0; d < padded; d += SLICE) slice_store(output + d, slice_load(output + d) * rescale + slice_load(sums + d));
    }
}

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

/* Joins the parts of row i of head h and stores it. */
static void finish_decoded_row(const cpu_attention* attention, int64_t b, int64_t h, int64_t i, partial_row* first, int64_t parts,
                               decode_workspace* workspace) {
    const int64_t channels = attention->head_dim_v, padded = padded_channels(channels);
    real highest = -INFINITY, sum = 0;
    real_bits attended = 0, is_nan = 0;
    bool left_out = false;
    for (int64_t part = 0; part < parts; part++) {
        const partial_row* partial = next_partial(attention, first, part);
        if (!partial->attended) continue;
        attended = -1;
        left_out |= partial->left_out;
        highest = partial->highest > highest ? partial->highest : highest;
    }
    float* output = workspace->row;
    memset(output, 0, (size_t)padded * sizeof(float));
    for (int64_t part = 0; part < parts; part++) {
        partial_row* partial = next_partial(attention, first, part);
        if (!partial->attended) continue;
        const float factor = real_exp(partial->highest - highest);
        const float* addition = partial_output(partial);
        sum += partial->sum * factor;
        for (int64_t d = 0; d < padded; d += SLICE) slice_store(output + d, slice_load(addition + d) * factor + slice_load(output + d));
    }

    const row_statistics statistics = {.highest = &highest, .sum = &sum, .attended = &attended, .is_nan = &is_nan};
    const cpu_tensor* value = &attention->value;
    const float* scales = NULL;
    if (has_channel_scales(value)) {
        scales = value->scales + b * value->scale_strides[0] + h / group_heads(attention) * value->scale_strides[1];
    }
    real logsumexp;
    const real factor = finish_row(attention, h, &statistics, 0, &logsumexp);
    for (int64_t d = 0; d < channels; d++) {
        output[d] = attended ? output[d] * factor : 0;
        if (scales) output[d] *= scales[d * value->scale_strides[3]];
    }
    store_row(&attention->output, b, h, i, channels, output);
    const int64_t index = (b * attention->num_heads + h) * attention->seq_len_q + i;
    if (attention->logsumexp) set_statistic(attention, attention->logsumexp, index, logsumexp);
    left_out |= !rows_are_finite(output, channels, 1, channels) || logsumexp - logsumexp != 0;
    if (!attended || !left_out) return;
    cpu_attention wide = *attention;
    wide.float_statistics = true;
    KERNEL_WIDE_ROWS(&wide, b, h, i, 1, workspace->wide);
}

static bool decode_serves(const cpu_attention* attention) {
    return attention->seq_len_q <= MOST_QUERIES && attention->dropout_p == 0;
}

static int64_t decode_items(const cpu_attention* attention) {
    return attention->batch_size * attention->num_kv_heads * part_count(attention);
}

static void decode_run(const cpu_attention* attention, int64_t item, void* memory) {
    decode_workspace workspace;
    decode_layout(attention, memory, &workspace);
    const int64_t parts = part_count(attention), part = item % parts, head = item / parts;
    const int64_t rows = group_rows(attention), padded_v = padded_channels(attention->head_dim_v);
    const head_position at =
        locate_head(attention, head / attention->num_kv_heads, head % attention->num_kv_heads * group_heads(attention));
    for (int64_t row = 0; row < rows; row++) {
        const row_place place = place_of_row(attention, &at, row);
        partial_row* partial = (partial_row*)(workspace.partials + partial_bytes(attention) * (size_t)row);
        if (parts > 1) partial = next_partial(attention, find_shared_partials(attention, at.b, place.h, place.i), part);
        *partial = (partial_row){.highest = -INFINITY};
        memset(partial_output(partial), 0, (size_t)padded_v * sizeof(float));
        workspace.partial[row] = partial;
    }

    column_range range = columns_of_rows(attention, &at, 0, rows);
    range.first = maximum(range.first / BLOCK_KEYS * BLOCK_KEYS, part * PART_KEYS);
    const int64_t last_key = minimum(range.last, at.keys);
    range.last = minimum(last_key, (part + 1) * PART_KEYS);
    if (range.first < range.last) {
        const cpu_tensor key = score_operand(&attention->key);
        place_operand(&key, at.b, at.kv_head, attention->head_dim, &workspace.key);
        place_operand(&attention->value, at.b, at.kv_head, attention->head_dim_v, &workspace.value);
        load_queries(attention, &at, &workspace);
    }
    for (int64_t column = range.first; column < range.last; column += BLOCK_KEYS) {
        const int64_t columns = minimum(BLOCK_KEYS, range.last - column), next = column + BLOCK_KEYS;
        if (!find_attended(attention, &at, column, columns, &workspace)) continue;
        place_block(&workspace.key, column, columns);
        place_block(&workspace.value, column, columns);
        row_stream values = stream_rows(&workspace.value, column, columns, divide_up(columns, KEYS_AT_ONCE(minimum(rows, ROWS))));
        row_stream keys =
            stream_rows(&workspace.key, next, minimum(BLOCK_KEYS, last_key - next),
                        divide_up(columns, STEPS_OF_VALUES) * divide_up(workspace.value.steps * 2, SLICES_AT_ONCE(minimum(rows, ROWS))));
        for (int64_t row = 0; row < rows; row += ROWS) {
            multiply_key_block(&workspace.key, minimum(ROWS, rows - row), workspace.query + row * workspace.key.steps * CHANNEL_STEP,
                               workspace.weights + row * BLOCK_KEYS, &values);
        }
        for (int64_t row = 0; row < rows; row++) {
            if (workspace.attended[row]) weigh_block(attention, &at, row, column, &workspace);
        }
        for (int64_t row = 0; row < rows; row += ROWS) add_values(column, row, minimum(ROWS, rows - row), &keys, &workspace);
    }

    for (int64_t row = 0; row < rows && parts == 1; row++) {
        const row_place place = place_of_row(attention, &at, row);
        finish_decoded_row(attention, at.b, place.h, place.i, workspace.partial[row], 1, &workspace);
    }
}

static int64_t decode_finish_items(const cpu_attention* attention) {
    return part_count(attention) == 1 ? 0 : attention->batch_size * attention->num_heads;
}

static void decode_finish(const cpu_attention* attention, int64_t item, void* memory) {
    decode_workspace workspace;
    decode_layout(attention, memory, &workspace);
    const int64_t b = item / attention->num_heads, h = item % attention->num_heads;
    for (int64_t i = 0; i < attention->seq_len_q; i++) {
        finish_decoded_row(attention, b, h, i, find_shared_partials(attention, b, h, i), part_count(attention), &workspace);
    }
}

#ifdef KERNEL_TARGET
#pragma clang attribute pop
#endif
#pragma clang diagnostic pop

const cpu_attention_kernel KERNEL_NAME(attention_decode, KERNEL_SUFFIX) = {
    .name = "attention_decode_" KERNEL_TEXT(KERNEL_SUFFIX),
    .serves = decode_serves,
    .shared_bytes = decode_shared_bytes,
    .item_count = decode_items,
    .workspace_bytes = decode_workspace_bytes,
    .run = decode_run,
    .finish_items = decode_finish_items,
    .finish = decode_finish,
};
