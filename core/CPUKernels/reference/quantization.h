/* Quantising and dequantising: docs/numerics.md defines the results bit by bit, so they are the same for every instruction set.
 *
 * A template, like attention.h: the quantization_reference*.c files beside it instantiate it with KERNEL_SUFFIX, KERNEL_TARGET and, where the
 * instruction set has those, KERNEL_AVX512 and KERNEL_HALF.
 *
 * One item is one head of one sequence. Whatever the granularity, its tokens and channels fall into rectangles that share a scale; those of
 * the same tokens make a band. Rows are read anew in each pass over a band, so the memory a thread needs grows with the head size alone; only
 * the first ones are kept from the pass that finds the means.
 * Where each token has a scale, some tokens are worked on side by side, step by step: one alone is a long chain of operations. */
#include "cpu_kernels.h"
#include "../shared/naming.h"

#include <float.h>
#include <math.h>
#include <string.h>

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpsabi" /* every function that takes or returns a vector is inlined */
#ifdef KERNEL_TARGET
#pragma clang attribute push(__attribute__((target(KERNEL_TARGET))), apply_to = function)
#endif

#include "../shared/conversion.h"

/* Every FP32 operation of this file is one rounding. */
#pragma clang fp contract(off)

/* ---- Vectors ------------------------------------------------------------------------------------------------------------------------- */

/* Vectors of 16 numbers and of their bits. */
enum { CHUNK = 16 };
typedef float chunk_floats __attribute__((ext_vector_type(CHUNK)));
typedef double chunk_doubles __attribute__((ext_vector_type(CHUNK)));
typedef int32_t chunk_integers __attribute__((ext_vector_type(CHUNK)));
typedef uint32_t chunk_words __attribute__((ext_vector_type(CHUNK)));
typedef int8_t chunk_codes __attribute__((ext_vector_type(CHUNK)));

static inline __attribute__((always_inline)) chunk_floats load_whole_chunk(const float* numbers) {
    chunk_floats chunk;
    memcpy(&chunk, numbers, sizeof chunk);
    return chunk;
}

static inline __attribute__((always_inline)) void store_whole_chunk(float* numbers, chunk_floats chunk) {
    memcpy(numbers, &chunk, sizeof chunk);
}

/* The numbers from channel d on; 0 beyond the last one. */
static inline __attribute__((always_inline)) chunk_floats load_chunk(const float* row, int64_t d, int64_t channels) {
    if (channels - d >= CHUNK) {
        return load_whole_chunk(row + d);
    }
    chunk_floats numbers = 0;
    for (int64_t k = 0; k < channels - d; ++k) {
        numbers[k] = row[d + k];
    }
    return numbers;
}

/* ---- Workspace ----------------------------------------------------------------------------------------------------------------------- */

/* Arrays of head_dim elements, of one row or as many as it says. */
typedef struct row_workspace {
    double* sums; /* of each channel over the tokens */
    float* rows;  /* of TOKENS_AT_ONCE tokens, rotated and smoothed as the scheme asks */
    float* kept;  /* of the first `kept_tokens` tokens, rotated, where there are means to subtract */
    int64_t kept_tokens;
    float* row;         /* the row in hand; the first of `rows` */
    float* means;       /* of each channel, while they are not yet in the output */
    float* scales;      /* of each channel of a band */
    float* zero_points; /* likewise; small integers, as FP32 numbers */
    uint32_t* highest;  /* extremes of each channel of a band, as bits */
    uint32_t* lowest;
    int8_t* codes; /* of the row in hand */
} row_workspace;

enum {
    TOKENS_AT_ONCE = 8,
    WORKSPACE_BYTES_PER_CHANNEL = sizeof(double) + (TOKENS_AT_ONCE + 5) * sizeof(float) + sizeof(int8_t),
    KEPT_BYTES = 1 << 17,
};

/* How many tokens' rotated rows are kept, a multiple of TOKENS_AT_ONCE. */
static int64_t count_kept_tokens(const cpu_quantization* quantization) {
    if (quantization->output.channel_means == NULL || quantization->head_dim == 0) {
        return 0;
    }
    const int64_t room = KEPT_BYTES / (quantization->head_dim * (int64_t)sizeof(float));
    return (quantization->seq_len < room ? quantization->seq_len : room) / TOKENS_AT_ONCE * TOKENS_AT_ONCE;
}

static size_t workspace_bytes(const cpu_quantization* quantization) {
    const size_t kept = (size_t)count_kept_tokens(quantization) * sizeof(float);
    return (size_t)quantization->head_dim * (WORKSPACE_BYTES_PER_CHANNEL + kept);
}

static row_workspace divide_workspace(const cpu_quantization* quantization, void* workspace) {
    const int64_t head_dim = quantization->head_dim;
    row_workspace parts;
    parts.sums = workspace;
    parts.rows = (float*)(parts.sums + head_dim);
    parts.row = parts.rows;
    parts.kept = parts.rows + TOKENS_AT_ONCE * head_dim;
    parts.kept_tokens = count_kept_tokens(quantization);
    parts.means = parts.kept + parts.kept_tokens * head_dim;
    parts.scales = parts.means + head_dim;
    parts.zero_points = parts.scales + head_dim;
    parts.highest = (uint32_t*)(parts.zero_points + head_dim);
    parts.lowest = parts.highest + head_dim;
    parts.codes = (int8_t*)(parts.lowest + head_dim);
    return parts;
}

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

typedef struct quantization_item {
    const cpu_quantization* quantization;
    int64_t b, h;
    int64_t tokens; /* that take part */
    int64_t channels;
    const float* means; /* of each channel, to subtract; NULL without smoothing */
    row_workspace work;
} quantization_item;

static quantization_item make_item(const cpu_quantization* quantization, int64_t item, void* workspace) {
    const int64_t b = item / quantization->num_heads;
    return (quantization_item){
        .quantization = quantization,
        .b = b,
        .h = item % quantization->num_heads,
        .tokens = quantization->lengths != NULL ? quantization->lengths[b] : quantization->seq_len,
        .channels = quantization->head_dim,
        .means = NULL,
        .work = divide_workspace(quantization, workspace),
    };
}

/* How many tokens are worked on together from token s on, up to the last that takes part. */
static int64_t tokens_together(const quantization_item* item, int64_t s) {
    return item->tokens - s < TOKENS_AT_ONCE ? item->tokens - s : TOKENS_AT_ONCE;
}

/* Tokens side by side: rows of channels, `pitch` apart. */
typedef struct token_rows {
    const float* first;
    int64_t pitch;
} token_rows;

/* Asks for as many tokens as are in hand, those TOKENS_AT_ONCE behind them, where there are other heads between them: each may lie on a page
 * of its own. Neighbours are fetched by the processor. */
static void prefetch_tokens(const quantization_item* item, int64_t first, int64_t count) {
    const cpu_tensor* input = &item->quantization->input;
    const int64_t size = element_bytes(input->precision);
    if (input->strides[3] != 1 || input->strides[2] == item->channels) {
        return;
    }
    for (int64_t s = first + TOKENS_AT_ONCE; s < first + TOKENS_AT_ONCE + count && s < item->tokens; ++s) {
        const char* row = (const char*)input->data + row_offset(input, item->b, item->h, s) * size;
        for (const char* line = line_of(row); line < row + item->channels * size; line += CACHE_LINE) {
            __builtin_prefetch(line);
        }
    }
}

/* Puts tokens first ..< first + count, rounded to FP32 and rotated if the scheme asks for it, into `rows`, one behind the other. */
static void load_rotated_tokens(const quantization_item* item, int64_t first, int64_t count, float* rows) {
    const cpu_tensor* input = &item->quantization->input;
    const int64_t channels = item->channels;
    prefetch_tokens(item, first, count);
    if (!item->quantization->output.rotated) {
        load_rows_float(input, item->b, item->h, first, count, channels, rows, channels);
        return;
    }
    const void* source = find_row_float(input, item->b, item->h, first);
    int64_t pitch = input->strides[2] * (int64_t)sizeof(float);
    if (source == NULL) {
        load_rows_float(input, item->b, item->h, first, count, channels, rows, channels);
        source = rows;
        pitch = channels * (int64_t)sizeof(float);
    }
    rotate_rows(source, pitch, count, rows, channels);
}

/* Takes the means off a row. */
static inline void subtract_means(const float* row, const float* means, int64_t channels, float* out) {
    int64_t d = 0;
    for (; d + CHUNK <= channels; d += CHUNK) {
        store_whole_chunk(out + d, load_whole_chunk(row + d) - load_whole_chunk(means + d));
    }
    for (; d < channels; ++d) {
        out[d] = row[d] - means[d];
    }
}

/* Puts tokens first ..< first + count, rounded to FP32, rotated and smoothed as the scheme asks, into work.rows. */
static void load_tokens(const quantization_item* item, int64_t first, int64_t count) {
    const int64_t channels = item->channels;
    float* rows = item->work.rows;
    const float* source = rows;
    if (item->means != NULL && first + count <= item->work.kept_tokens) {
        source = item->work.kept + first * channels;
    } else {
        load_rotated_tokens(item, first, count, rows);
    }
    if (item->means == NULL) {
        return;
    }
    for (int64_t row = 0; row < count; ++row) {
        subtract_means(source + row * channels, item->means, channels, rows + row * channels);
    }
}

/* The same tokens: where they lie if nothing is to be done to them, else in work.rows. */
static token_rows find_tokens(const quantization_item* item, int64_t first, int64_t count) {
    const cpu_quantization* quantization = item->quantization;
    const cpu_tensor* input = &quantization->input;
    if (has_aligned_float_rows(input) && !quantization->output.rotated && item->means == NULL) {
        prefetch_tokens(item, first, count);
        return (token_rows){(const float*)input->data + row_offset(input, item->b, item->h, first), input->strides[2]};
    }
    load_tokens(item, first, count);
    return (token_rows){item->work.rows, item->channels};
}

static void load_row(const quantization_item* item, int64_t s) {
    load_tokens(item, s, 1);
}

/* Adds some rows, one after the other, to the sums of their channels. */
static void add_rows(const float* rows, int64_t count, int64_t channels, double* sums) {
    int64_t d = 0;
    for (; d + CHUNK <= channels; d += CHUNK) {
        chunk_doubles partial;
        memcpy(&partial, sums + d, sizeof partial);
        for (int64_t row = 0; row < count; ++row) {
            partial += __builtin_convertvector(load_whole_chunk(rows + row * channels + d), chunk_doubles);
        }
        memcpy(sums + d, &partial, sizeof partial);
    }
    for (; d < channels; ++d) {
        for (int64_t row = 0; row < count; ++row) {
            sums[d] += (double)rows[row * channels + d];
        }
    }
}

/* Computes each channel's mean into `means`, which load_tokens() subtracts from now on, and keeps the first tokens for it. */
static void smooth_item(quantization_item* item, float* means) {
    double* sums = item->work.sums;
    for (int64_t d = 0; d < item->channels; ++d) {
        sums[d] = 0.0;
    }
    for (int64_t s = 0; s < item->tokens; s += TOKENS_AT_ONCE) {
        const int64_t count = tokens_together(item, s);
        float* rows = s + count <= item->work.kept_tokens ? item->work.kept + s * item->channels : item->work.rows;
        load_rotated_tokens(item, s, count, rows);
        add_rows(rows, count, item->channels, sums);
    }
    for (int64_t d = 0; d < item->channels; ++d) {
        means[d] = item->tokens > 0 ? (float)(sums[d] / (double)item->tokens) : 0.0f;
    }
    item->means = means;
}

/* ---- Extremes ------------------------------------------------------------------------------------------------------------------------ */

/* The lowest and highest of some values and 0, which changes neither formula of a scale and stands for the values where there are none. */
typedef struct value_range {
    float lowest, highest;
} value_range;

/* Extremes are gathered as bits: as signed integers those of positive numbers order like the numbers, as unsigned integers those of
 * negative numbers order like their magnitudes and above all others. Integer maxima vectorise, and a NaN or Inf comes out as an extreme. */
static const uint32_t HIGHEST_OF_NONE = 0;         /* 0.0f */
static const uint32_t LOWEST_OF_NONE = 0x80000000; /* -0.0f */

static void clear_extremes(const quantization_item* item) {
    for (int64_t d = 0; d < item->channels; ++d) {
        item->work.highest[d] = HIGHEST_OF_NONE;
        item->work.lowest[d] = LOWEST_OF_NONE;
    }
}

/* Takes work.row into the extremes of its channels. */
static void gather_extremes(const quantization_item* item) {
    const float* row = item->work.row;
    uint32_t* highest = item->work.highest;
    uint32_t* lowest = item->work.lowest;
    for (int64_t d = 0; d < item->channels; ++d) {
        const uint32_t bits = bits_from_float(row[d]);
        highest[d] = (int32_t)bits > (int32_t)highest[d] ? bits : highest[d];
        lowest[d] = bits > lowest[d] ? bits : lowest[d];
    }
}

/* The extremes of channels first ..< last together. */
static value_range range_of_channels(const quantization_item* item, int64_t first, int64_t last) {
    uint32_t highest = HIGHEST_OF_NONE;
    uint32_t lowest = LOWEST_OF_NONE;
    for (int64_t d = first; d < last; ++d) {
        highest = (int32_t)item->work.highest[d] > (int32_t)highest ? item->work.highest[d] : highest;
        lowest = item->work.lowest[d] > lowest ? item->work.lowest[d] : lowest;
    }
    return (value_range){float_from_bits(lowest), float_from_bits(highest)};
}

/* The extremes of the whole tensor, from those of its items. */
static value_range range_of_tensor(const cpu_quantization* quantization) {
    value_range range = {0.0f, 0.0f};
    for (int64_t item = 0; item < quantization->batch_size * quantization->num_heads; ++item) {
        range.lowest = fminf(range.lowest, quantization->extremes[2 * item]);
        range.highest = fmaxf(range.highest, quantization->extremes[2 * item + 1]);
    }
    return range;
}

/* ---- Scales -------------------------------------------------------------------------------------------------------------------------- */

typedef struct scale_and_zero_point {
    float scale;
    float zero_point;
} scale_and_zero_point;

/* Lowest and highest code. */
static float lowest_code(const cpu_tensor* output) {
    const bool asymmetric = output->zero_points != NULL;
    return output->precision == CPU_INT8 ? (asymmetric ? -128.0f : -127.0f) : (asymmetric ? -8.0f : -7.0f);
}

static float highest_code(const cpu_tensor* output) {
    return output->precision == CPU_INT8 ? 127.0f : 7.0f;
}

/* Rounds numbers, or vectors of them, to the nearest integer, ties to even, where |value| < 2^22: after the sum the last place is 1. Unlike
 * rintf() it vectorises on any processor. */
#define ROUND_TO_EVEN(value) (((value) + 0x1.8p23f) - 0x1.8p23f)

static inline float clamp(float value, float lowest, float highest) {
    value = value < lowest ? lowest : value;
    return value > highest ? highest : value;
}

/* One number for each of TOKENS_AT_ONCE tokens. */
typedef float token_floats __attribute__((ext_vector_type(TOKENS_AT_ONCE)));

typedef struct token_ranges {
    token_floats lowest, highest;
} token_ranges;

typedef struct token_scales {
    token_floats scale, zero_point;
} token_scales;

/* The scales and zero points that ranges give. */
static inline __attribute__((always_inline)) token_scales scales_for_ranges(const cpu_tensor* output, token_ranges ranges) {
    const token_floats lowest = lowest_code(output), highest = highest_code(output), none = 0.0f, one = 1.0f;
    if (output->zero_points == NULL) {
        const token_floats scale = __builtin_elementwise_max(-ranges.lowest, ranges.highest) / highest;
        return (token_scales){.scale = scale >= FLT_MIN ? scale : one, .zero_point = none};
    }
    const token_floats steps = highest - lowest, scale = ranges.highest / steps - ranges.lowest / steps;
    token_floats zero_point = lowest - ROUND_TO_EVEN(ranges.lowest / scale);
    zero_point = zero_point < lowest ? lowest : zero_point;
    zero_point = zero_point > highest ? highest : zero_point;
    return (token_scales){.scale = scale >= FLT_MIN ? scale : one, .zero_point = scale >= FLT_MIN ? zero_point : none};
}

static scale_and_zero_point scale_for_range(const cpu_tensor* output, value_range range) {
    const token_scales same = scales_for_ranges(output, (token_ranges){.lowest = range.lowest, .highest = range.highest});
    return (scale_and_zero_point){same.scale[0], same.zero_point[0]};
}

static void write_scale(const cpu_tensor* output, int64_t index, scale_and_zero_point value) {
    output->scales[index] = value.scale;
    if (output->zero_points != NULL) {
        output->zero_points[index] = (int32_t)value.zero_point;
    }
}

/* Sets what encode_row() uses for channels first ..< last. */
static void use_scale(const quantization_item* item, int64_t first, int64_t last, scale_and_zero_point value) {
    for (int64_t d = first; d < last; ++d) {
        item->work.scales[d] = value.scale;
        item->work.zero_points[d] = value.zero_point;
    }
}

/* ---- Codes --------------------------------------------------------------------------------------------------------------------------- */

/* Quantises work.row into work.codes. A scale of 1 in place of one below FLT_MIN needs no case of its own: its codes come out 0. */
static void encode_row(const quantization_item* item) {
    const float lowest = lowest_code(&item->quantization->output);
    const float highest = highest_code(&item->quantization->output);
    const int64_t channels = item->channels; /* bytes may alias the item: the loop's count must not lie in it */
    const float* row = item->work.row;
    const float* scales = item->work.scales;
    const float* zero_points = item->work.zero_points;
    int8_t* codes = item->work.codes;
    for (int64_t d = 0; d < channels; ++d) {
        const float code = ROUND_TO_EVEN(row[d] / scales[d]) + zero_points[d];
        codes[d] = (int8_t)(int32_t)clamp(code, lowest, highest);
    }
}

/* Writes work.codes to token s of the output. */
static void store_codes(const quantization_item* item, int64_t s) {
    const cpu_tensor* output = &item->quantization->output;
    const int8_t* codes = item->work.codes;
    const int64_t channels = item->channels;
    const int64_t offset = row_offset(output, item->b, item->h, s);
    const int64_t stride = output->strides[3];
    if (output->precision == CPU_INT8) {
        int8_t* out = (int8_t*)output->data + offset;
        if (stride == 1) {
            memcpy(out, codes, (size_t)channels);
        } else {
            for (int64_t d = 0; d < channels; ++d) {
                out[d * stride] = codes[d];
            }
        }
        return;
    }
    /* Both codes of a byte are of this token, so no other item writes to it. */
    uint8_t* out = (uint8_t*)output->data + int4_byte_index(output, offset, 0);
    const int64_t pairs = channels / 2;
    if (stride == 1) {
        for (int64_t pair = 0; pair < pairs; ++pair) {
            out[pair] = int4_pair(codes[2 * pair], codes[2 * pair + 1]);
        }
    } else {
        for (int64_t pair = 0; pair < pairs; ++pair) {
            out[pair * stride] = int4_pair(codes[2 * pair], codes[2 * pair + 1]);
        }
    }
    if (channels & 1) {
        out[pairs * stride] = int4_pair(codes[channels - 1], 0);
    }
}

static void write_rows(const quantization_item* item, int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
        load_row(item, s);
        encode_row(item);
        store_codes(item, s);
    }
}

/* Writes tokens first ..< last and their scales, one for each group of `width` channels, the first of them at `index`. False, with nothing
 * written but scales, if a value is not finite. */
static bool write_band(const quantization_item* item, int64_t first, int64_t last, int64_t width, int64_t index) {
    const cpu_tensor* output = &item->quantization->output;
    clear_extremes(item);
    for (int64_t s = first; s < last; ++s) {
        load_row(item, s);
        gather_extremes(item);
    }
    for (int64_t channel = 0; channel < item->channels; channel += width, index += output->scale_strides[3]) {
        const int64_t end = channel + width < item->channels ? channel + width : item->channels;
        const value_range range = range_of_channels(item, channel, end);
        if (!isfinite(range.lowest) || !isfinite(range.highest)) {
            return false;
        }
        const scale_and_zero_point value = scale_for_range(output, range);
        write_scale(output, index, value);
        use_scale(item, channel, end, value);
    }
    write_rows(item, first, last);
    return true;
}

/* ---- Tokens -------------------------------------------------------------------------------------------------------------------------- */

/* Extremes of each of CHUNK classes of numbers: see gather_extremes(). */
typedef struct chunk_extremes {
    chunk_words highest, lowest;
} chunk_extremes;

static const chunk_extremes EXTREMES_OF_NONE = {.highest = HIGHEST_OF_NONE, .lowest = LOWEST_OF_NONE};

/* Takes numbers in. */
static inline __attribute__((always_inline)) chunk_extremes extremes_with(chunk_extremes extremes, const float* numbers, int64_t count) {
    for (int64_t d = 0; d < count; d += CHUNK) {
        const chunk_floats chunk = load_chunk(numbers, d, count); /* 0 beyond the last one changes no extreme */
        chunk_words bits;
        memcpy(&bits, &chunk, sizeof bits);
        extremes.highest = (chunk_words)__builtin_elementwise_max((chunk_integers)bits, (chunk_integers)extremes.highest);
        extremes.lowest = __builtin_elementwise_max(bits, extremes.lowest);
    }
    return extremes;
}

static inline value_range range_of_extremes(chunk_extremes extremes) {
    return (value_range){
        float_from_bits(__builtin_reduce_max(extremes.lowest)),
        float_from_bits((uint32_t)__builtin_reduce_max((chunk_integers)extremes.highest)),
    };
}

/* The magnitudes of some numbers, as bits, taken into the largest of each of CHUNK classes. */
static inline __attribute__((always_inline)) chunk_integers magnitudes_with(chunk_integers largest, chunk_floats numbers) {
    chunk_integers bits;
    memcpy(&bits, &numbers, sizeof bits);
    return __builtin_elementwise_max(bits & INT32_MAX, largest);
}

/* The magnitudes of a row, likewise. */
static inline __attribute__((always_inline)) chunk_integers magnitudes_of_row(const float* row, int64_t channels) {
    chunk_integers largest = 0;
    int64_t d = 0;
    for (; d + CHUNK <= channels; d += CHUNK) {
        largest = magnitudes_with(largest, load_whole_chunk(row + d));
    }
    return d < channels ? magnitudes_with(largest, load_chunk(row, d, channels)) : largest;
}

typedef int32_t token_integers __attribute__((ext_vector_type(TOKENS_AT_ONCE)));

/* The largest integer of each chunk: halves of two chunks beside each other, then quarters of four, and so on. */
static inline __attribute__((always_inline)) token_integers largest_of_chunks(const chunk_integers chunks[TOKENS_AT_ONCE]) {
    chunk_integers halves[TOKENS_AT_ONCE / 2], quarters[TOKENS_AT_ONCE / 4];
#pragma clang loop unroll(full)
    for (int n = 0; n < TOKENS_AT_ONCE / 2; ++n) {
        const chunk_integers a = chunks[2 * n], b = chunks[2 * n + 1];
        halves[n] = __builtin_elementwise_max(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                                              __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    }
#pragma clang loop unroll(full)
    for (int n = 0; n < TOKENS_AT_ONCE / 4; ++n) {
        const chunk_integers a = halves[2 * n], b = halves[2 * n + 1];
        quarters[n] = __builtin_elementwise_max(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                                                __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
    }
    const chunk_integers a = quarters[0], b = quarters[1];
    const chunk_integers pairs =
        __builtin_elementwise_max(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                                  __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    return __builtin_elementwise_max(__builtin_shufflevector(pairs, pairs, 0, 4, 8, 12, 2, 6, 10, 14),
                                     __builtin_shufflevector(pairs, pairs, 1, 5, 9, 13, 3, 7, 11, 15));
}
_Static_assert(TOKENS_AT_ONCE == 8 && CHUNK == 16, "what largest_of_chunks() takes");

static inline token_floats token_floats_of_bits(token_integers bits) {
    token_floats numbers;
    memcpy(&numbers, &bits, sizeof numbers);
    return numbers;
}

/* The ranges of `count` tokens, and of none behind them. With `symmetric`, the smallest around 0 that holds a row, which is all that such a
 * scale depends on. */
static inline __attribute__((always_inline)) token_ranges ranges_of_tokens(token_rows rows, int64_t count, int64_t channels,
                                                                           const bool symmetric) {
    chunk_integers highest[TOKENS_AT_ONCE], lowest[TOKENS_AT_ONCE];
    for (int64_t row = 0; row < TOKENS_AT_ONCE; ++row) {
        const float* numbers = rows.first + (row < count ? row : 0) * rows.pitch;
        if (symmetric) {
            highest[row] = row < count ? magnitudes_of_row(numbers, channels) : 0;
        } else {
            const chunk_extremes extremes = row < count ? extremes_with(EXTREMES_OF_NONE, numbers, channels) : EXTREMES_OF_NONE;
            highest[row] = (chunk_integers)extremes.highest;
            lowest[row] = (chunk_integers)(extremes.lowest ^ LOWEST_OF_NONE); /* as signed integers they order likewise */
        }
    }
    const token_floats top = token_floats_of_bits(largest_of_chunks(highest));
    if (symmetric) {
        return (token_ranges){.lowest = -top, .highest = top};
    }
    return (token_ranges){.lowest = token_floats_of_bits(largest_of_chunks(lowest) ^ INT32_MIN), .highest = top};
}

static inline bool are_finite(token_floats numbers) {
    const token_integers failed = numbers - numbers != 0;
    return __builtin_reduce_or(failed) == 0;
}

/* How the codes of a row that shares a scale are found. */
typedef struct row_code {
    chunk_floats scale, inverse, zero_point, lowest, highest;
    chunk_integers farthest; /* from an integer that a quotient was, as bits */
} row_code;

/* What encode_row() does, for some numbers. Symmetric codes need no limit: the row's largest number is 127 or 7 scales but for rounding.
 * `divide`: as defined, by divisions. Otherwise by the scale's inverse: quotients are off by up to 5e-5 then, which matters only near the
 * middle between two integers. */
static inline __attribute__((always_inline)) chunk_codes encode_chunk(chunk_floats numbers, row_code* code, const bool symmetric,
                                                                      const bool divide) {
    const chunk_floats quotients = divide ? numbers / code->scale : numbers * code->inverse;
    chunk_floats rounded = ROUND_TO_EVEN(quotients);
    if (!divide) {
        code->farthest = magnitudes_with(code->farthest, quotients - rounded);
    }
    if (!symmetric) {
        rounded += code->zero_point;
        rounded = rounded < code->lowest ? code->lowest : rounded; /* none is NaN */
        rounded = rounded > code->highest ? code->highest : rounded;
    }
    return __builtin_convertvector(__builtin_convertvector(rounded, chunk_integers), chunk_codes);
}

/* Quantises a row that shares a scale. False if a quotient is too near the middle between two integers, and codes are not to be used. */
static inline __attribute__((always_inline)) bool encode_token_by(const float* row, int64_t channels, row_code code, int8_t* codes,
                                                                  const bool symmetric, const bool divide) {
    int64_t d = 0;
    for (; d + CHUNK <= channels; d += CHUNK) {
        const chunk_codes chunk = encode_chunk(load_whole_chunk(row + d), &code, symmetric, divide);
        memcpy(codes + d, &chunk, sizeof chunk);
    }
    if (d < channels) {
        const chunk_codes chunk = encode_chunk(load_chunk(row, d, channels), &code, symmetric, divide);
        for (int64_t k = 0; k < channels - d; ++k) {
            codes[d + k] = chunk[k];
        }
    }
    const chunk_integers near_middle = code.farthest > (int32_t)bits_from_float(0.4999f);
    return __builtin_reduce_or(near_middle) == 0;
}

/* Sixteen divisions take ten cycles on Intel's processors with AVX-512, twice what the inverse and its test take. Eight take five on others,
 * and are done meanwhile. */
#if defined(KERNEL_AVX512)
enum { TRY_INVERSE = 1 };
#else
enum { TRY_INVERSE = 0 };
#endif

/* Writes tokens first ..< first + count, TOKENS_AT_ONCE at most, and the scale of each, the first of them at `index`. False, with nothing
 * written, if a value is not finite. */
static inline __attribute__((always_inline)) bool write_tokens_as(const quantization_item* item, int64_t first, int64_t count,
                                                                  int64_t index, const bool symmetric) {
    const cpu_tensor* output = &item->quantization->output;
    const int64_t channels = item->channels; /* bytes may alias the item */
    const token_rows rows = find_tokens(item, first, count);
    const token_ranges ranges = ranges_of_tokens(rows, count, channels, symmetric);
    if (!are_finite(ranges.lowest) || !are_finite(ranges.highest)) {
        return false;
    }
    const token_scales values = scales_for_ranges(output, ranges);
    const token_floats inverses = 1.0f / values.scale;
    for (int64_t row = 0; row < count; ++row) {
        write_scale(output, index + row * output->scale_strides[2], (scale_and_zero_point){values.scale[row], values.zero_point[row]});
    }
    const bool in_place = output->precision == CPU_INT8 && output->strides[3] == 1;
    int8_t* codes = in_place ? (int8_t*)output->data + row_offset(output, item->b, item->h, first) : item->work.codes;
    const int64_t pitch = in_place ? output->strides[2] : 0;
    const float lowest = lowest_code(output), highest = highest_code(output);
    for (int64_t row = 0; row < count; ++row) {
        const float* numbers = rows.first + row * rows.pitch;
        const row_code code = {
            .scale = values.scale[row],
            .inverse = inverses[row],
            .zero_point = values.zero_point[row],
            .lowest = lowest,
            .highest = highest,
            .farthest = 0,
        };
        if (!TRY_INVERSE || !encode_token_by(numbers, channels, code, codes + row * pitch, symmetric, false)) {
            encode_token_by(numbers, channels, code, codes + row * pitch, symmetric, true);
        }
        if (!in_place) {
            store_codes(item, first + row);
        }
    }
    return true;
}

static bool write_tokens(const quantization_item* item, int64_t first, int64_t count, int64_t index) {
    if (item->quantization->output.zero_points == NULL) {
        return write_tokens_as(item, first, count, index, true);
    }
    return write_tokens_as(item, first, count, index, false);
}

/* ---- Passes -------------------------------------------------------------------------------------------------------------------------- */

static bool quantize_scan(const cpu_quantization* quantization, int64_t index, void* workspace) {
    quantization_item item = make_item(quantization, index, workspace);
    if (quantization->output.channel_means != NULL) {
        smooth_item(&item, item.work.means);
    }
    chunk_extremes extremes = EXTREMES_OF_NONE;
    for (int64_t s = 0; s < item.tokens; s += TOKENS_AT_ONCE) {
        const int64_t count = tokens_together(&item, s);
        const token_rows rows = find_tokens(&item, s, count);
        for (int64_t row = 0; row < count; ++row) {
            extremes = extremes_with(extremes, rows.first + row * rows.pitch, item.channels);
        }
    }
    const value_range range = range_of_extremes(extremes);
    quantization->extremes[2 * index] = range.lowest;
    quantization->extremes[2 * index + 1] = range.highest;
    return isfinite(range.lowest) && isfinite(range.highest);
}

static bool quantize_write(const cpu_quantization* quantization, int64_t index, void* workspace) {
    quantization_item item = make_item(quantization, index, workspace);
    const cpu_tensor* output = &quantization->output;
    if (output->channel_means != NULL) {
        smooth_item(&item, output->channel_means + item.b * output->mean_strides[0] + item.h * output->mean_strides[1]);
    }

    const int64_t first_scale = item.b * output->scale_strides[0] + item.h * output->scale_strides[1];
    if (output->scale_strides[2] == 0 && output->scale_strides[3] == 0) { /* one scale, whose range the scan has found */
        const float* extremes = quantization->extremes + 2 * index;
        const value_range range = quantization->per_tensor ? range_of_tensor(quantization) : (value_range){extremes[0], extremes[1]};
        const scale_and_zero_point value = scale_for_range(output, range);
        if (index == 0 || !quantization->per_tensor) {
            write_scale(output, first_scale, value);
        }
        use_scale(&item, 0, item.channels, value);
        write_rows(&item, 0, item.tokens);
        return true;
    }

    /* Bands cover all tokens, also those that take no part: their scales are 1. */
    const bool one_band = output->scale_strides[2] == 0;
    const int64_t height = one_band ? quantization->seq_len : output->scale_tokens;
    const int64_t bands = one_band ? 1 : (quantization->seq_len + height - 1) / height;
    const int64_t width = output->scale_strides[3] == 0 ? item.channels : output->scale_channels;
    int64_t band = 0;
    for (int64_t count; height == 1 && width >= item.channels && band < item.tokens; band += count) {
        count = tokens_together(&item, band);
        if (!write_tokens(&item, band, count, first_scale + band * output->scale_strides[2])) {
            return false;
        }
    }
    for (; band < bands; ++band) {
        const int64_t first = band * height;
        const int64_t last = height < item.tokens - first ? first + height : item.tokens;
        if (!write_band(&item, first, last, width, first_scale + band * output->scale_strides[2])) {
            return false;
        }
    }
    return true;
}

static void dequantize(const cpu_quantization* quantization, int64_t index, void* workspace) {
    const quantization_item item = make_item(quantization, index, workspace);
    for (int64_t s = 0; s < item.tokens; ++s) {
        load_row_float(&quantization->input, item.b, item.h, s, item.channels, item.work.row);
        store_row_float(&quantization->output, item.b, item.h, s, item.channels, item.work.row);
    }
}

#ifdef KERNEL_TARGET
#pragma clang attribute pop
#endif
#pragma clang diagnostic pop

const cpu_quantization_kernel KERNEL_NAME(quantization, KERNEL_SUFFIX) = {
    .name = "quantization_" KERNEL_TEXT(KERNEL_SUFFIX),
    .workspace_bytes = workspace_bytes,
    .scan = quantize_scan,
    .write = quantize_write,
    .dequantize = dequantize,
};
