/* Forward attention on INT8 and INT4 operands by integer dot products. This file is a template; the attention_forward_int8_*.c files beside it
 * instantiate it with
 *
 *   KERNEL_SUFFIX         the end of the kernel's name, such as int8_avx2
 *   KERNEL_AGAIN_SUFFIX   the reference kernels that compute what this one leaves
 *   KERNEL_TARGET         the instruction set as a target attribute string
 *   KERNEL_PANEL_VECTORS  vectors of query rows in a panel: 1 or 2
 *   KERNEL_DOT            the header with the products of that instruction set: its comment says what it defines
 *   KERNEL_REST           the kernel of this template that computes sequences with larger codes, where KERNEL_DOT serves small ones alone
 *
 * Items, panels and blocks of columns are those of the float kernels (forward_items.h). Both products multiply a vector, whose lanes are query
 * rows, by STEP neighbouring codes that are the same for all lanes:
 *
 *     scores[key][row]     = sum over d of (query[row][d] + QUERY_BIAS) * key[d] - QUERY_BIAS * sum over d of key[d]
 *     weights[key][row]    = round(255 * exp(score) * value scale of the key / the largest such product of the row in this block of keys)
 *     output[channel][row] = sum over keys of weights * (value + VALUE_BIAS) - VALUE_BIAS * sum over keys of weights
 *
 * Scores carry the logarithm of their value's scale from the start. The largest weight is that of a block of TILE_COLUMNS keys, so each
 * block uses all of the 8 bits; blocks are joined in FP32. Small weights are rounded up or down by an offset of their column, evenly spread
 * over the columns: to the nearest, many keys of little weight would all be lost (or all be doubled). Keys whose value is 0 take part in
 * the sum alone. INT4 codes are unpacked, their zero points subtracted, when a block is read.
 *
 * Numerical contract: codes and dot products are exact, the same bits for every instruction set; scores, statistics and the output are FP32;
 * a weight has an error of at most 1/510 of its block's largest (with WEIGHT_FRACTION_BITS, a little more), one below 8/255 of it at most
 * 1/255, without bias; the sum, and so logsumexp, is that of unrounded exponentials within 1e-4. Rows whose scores are not finite, or whose
 * highest is far from 0, and sequences with zero points beyond a byte or extreme scales, are left to the reference kernels (sequences to
 * KERNEL_REST first). */
#include "../shared/naming.h"
#include "cpu_kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define KERNEL_FP64 0
#define KERNEL_TILE_COLUMNS 128
#define KERNEL_TILE_ROWS 256

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpsabi"           /* every function that takes or returns a vector is inlined */
#pragma clang diagnostic ignored "-Wunused-function" /* the headers serve other kernels too */
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#pragma clang attribute push(__attribute__((target(KERNEL_TARGET))), apply_to = function)

/* clang-format off: each file needs those before it */
#include "../shared/conversion.h"
#include "../shared/real.h"
#include "../shared/transpose.h"
#include "../shared/tile.h"
#include "../shared/rows.h"
#include "../shared/row_stream.h"
/* clang-format on */

/* LANES integers, each the place of STEP codes or of their sum. */
typedef int32_t int_vector __attribute__((ext_vector_type(LANES)));

#include KERNEL_DOT

#ifndef LOADS_FEW_CODES
#define LOADS_FEW_CODES 0
#define load_few_codes(codes, count) ((void)(codes), (void)(count), (int_vector)0)
#endif

#ifndef SHORT_STEPS
enum { LARGEST_CODE = INT8_MAX }; /* of keys and values, less their zero points */
#endif

#define AGAIN_ROWS KERNEL_NAME(attention_forward_rows, KERNEL_AGAIN_SUFFIX)
#define AGAIN_ROWS_BYTES KERNEL_NAME(attention_forward_rows_bytes, KERNEL_AGAIN_SUFFIX)
#define AGAIN_FLOAT_STATISTICS false
void AGAIN_ROWS(const cpu_attention* attention, int64_t b, int64_t h, int64_t first_row, int64_t rows, void* memory);
size_t AGAIN_ROWS_BYTES(const cpu_attention* attention);

enum { PANEL_ROWS = KERNEL_PANEL_VECTORS * LANES, LARGEST_WEIGHT = 255, FETCH_NEIGHBOURS = 0 /* they are few bytes */ };

/* Scores carry logarithms of scales: those are lost beside numbers that are much larger. */
static const float FARTHEST_SCORE = 8192;

/* ---- What is served ------------------------------------------------------------------------------------------------------------------ */

/* Whether all channels of a row share a scale. */
static bool has_row_scales(const cpu_tensor* tensor) {
    return tensor->scale_strides[3] == 0;
}

/* Whether the difference of code and zero point can be a byte: INT4's can, if its zero points are as small as its codes. */
static bool has_byte_codes(const cpu_tensor* tensor) {
    return tensor->precision == CPU_INT4 || tensor->zero_points == NULL;
}

static bool forward_serves(const cpu_attention* attention) {
    const cpu_tensor *query = &attention->query, *key = &attention->key, *value = &attention->value;
    if (!has_codes(query) || !has_codes(key) || !has_codes(value)) return false;
    if (!has_byte_codes(query) || !has_byte_codes(key) || !has_byte_codes(value)) return false;
    if (LARGEST_CODE < INT8_MAX && (key->precision != CPU_INT4 || value->precision != CPU_INT4)) return false;
    bool channel_values = value->scale_channels == 1 && value->scale_strides[2] == 0;
    return has_row_scales(query) && has_row_scales(key) && (has_row_scales(value) || channel_values) && attention->dropout_p == 0;
}

/* ---- Regular sequences --------------------------------------------------------------------------------------------------------------- */

/* Whether no difference of an INT4 code, -8 ... 7, and one of these zero points is beyond `largest`. */
static bool are_zero_points_small(const int32_t* zero_points, int64_t count, int64_t stride, int32_t largest) {
    bool small = true;
    for (int64_t n = 0; n < count; n++) small &= zero_points[n * stride] >= 8 - largest && zero_points[n * stride] <= largest - 8;
    return small;
}

/* Whether no scale is so extreme that the weights of one block would be too far apart for FP32. */
static bool are_scales_moderate(const float* scales, int64_t count, int64_t stride) {
    bool moderate = true;
    for (int64_t n = 0; n < count; n++) moderate &= scales[n * stride] > 1e-15f && scales[n * stride] < 1e15f;
    return moderate;
}

/* Whether zero points are so small that no code less its own is beyond `largest`, and scales, where `with_scales`, moderate. */
static bool tensor_is_regular(const cpu_tensor* tensor, int64_t b, int64_t heads, int64_t tokens, int64_t channels, int32_t largest,
                              bool with_scales) {
    const int64_t stride = tensor->scale_strides[2], channel_stride = tensor->scale_strides[3];
    const int64_t count = stride ? divide_up(tokens, tensor->scale_tokens) : minimum(tokens, 1);
    bool regular = true;
    for (int64_t h = 0; h < heads; h++) {
        const int64_t first = scale_index(tensor, b, h, 0);
        for (int64_t d = 0; d < (channel_stride ? channels : 1) && tensor->zero_points; d++) {
            regular &= are_zero_points_small(tensor->zero_points + first + d * channel_stride, count, stride, largest);
        }
        if (with_scales && tensor->scales) regular &= are_scales_moderate(tensor->scales + first, count, stride);
    }
    return regular;
}

/* Whether this kernel computes a sequence. All of it or nothing, so that no row's bits depend on which rows share its tile. */
static bool sequence_is_regular(const cpu_attention* attention, int64_t b) {
    const int64_t keys = attention->kv_lengths ? attention->kv_lengths[b] : attention->seq_len_kv;
    const int64_t heads = attention->num_heads, kv_heads = attention->num_kv_heads;
    return tensor_is_regular(&attention->query, b, heads, attention->seq_len_q, attention->head_dim, INT8_MAX, false) &&
           tensor_is_regular(&attention->key, b, kv_heads, keys, attention->head_dim, LARGEST_CODE, false) &&
           tensor_is_regular(&attention->value, b, kv_heads, keys, attention->head_dim_v, LARGEST_CODE, has_row_scales(&attention->value));
}

/* In shared memory: whether each sequence is regular. */
static bool was_found_regular(const cpu_attention* attention, int64_t b) {
    return ((const uint8_t*)attention->shared)[b] != 0;
}

#ifdef KERNEL_REST
/* The problem as KERNEL_REST sees it, which takes the shared memory behind this kernel's. */
static cpu_attention problem_of_rest(const cpu_attention* attention) {
    cpu_attention rest = *attention;
    rest.shared = (uint8_t*)attention->shared + attention->batch_size;
    return rest;
}
#endif

static size_t shared_bytes(const cpu_attention* attention) {
    size_t bytes = (size_t)attention->batch_size;
#ifdef KERNEL_REST
    bytes += KERNEL_REST.shared_bytes(attention);
#endif
    return bytes;
}

static int64_t prepare_items(const cpu_attention* attention) {
    return attention->batch_size;
}

static void prepare_run(const cpu_attention* attention, int64_t item, void* memory) {
    (void)memory;
    ((uint8_t*)attention->shared)[item] = sequence_is_regular(attention, item);
#ifdef KERNEL_REST
    const cpu_attention rest = problem_of_rest(attention);
    if (!was_found_regular(attention, item)) KERNEL_REST.prepare(&rest, item, memory);
#endif
}

/* ---- Workspace ----------------------------------------------------------------------------------------------------------------------- */

/* Keys and values of some columns. Arrays over columns have TILE_COLUMNS elements. */
typedef struct {
    const signed_code* keys; /* [columns][key_pitch] */
    int64_t key_pitch;
    signed_code* key_memory;
    signed_code* values;  /* [columns / STEP][head_dim_v][STEP] */
    int32_t* key_offsets; /* -QUERY_BIAS * sum of the key's codes; not used without a bias */
    float* key_scales;    /* times softmax_scale, as binary logarithms where scores are plain */
    float largest_key_scale;
    float* value_logs;     /* log2 of the value's scale; 0 where values have a scale a channel */
    float* value_inverses; /* 1 / that scale */
    uint8_t* zero;         /* whether the value is 0 in all channels */
    bool any_zero;
} column_block;

/* What is found of a vector of rows while its scores are computed, as binary logarithms of weights. */
typedef struct {
    vector highest;
    vector_mask any; /* whether a column is attended */
} scan;

typedef struct {
    score_tile tile;           /* scores: FP32; before that, where they are not plain, int32 dot products */
    bool plain;                /* scores are nothing but scaled dot products */
    lane_code* query;          /* [head_dim / STEP][rows][STEP] for each panel: differences + QUERY_BIAS */
    float* query_scales;       /* [tile rows] */
    float* mean_scores;        /* [tile rows]: dot(query, channel means of the keys), 0 without smoothing */
    real* output;              /* [head_dim_v][rows] for each panel */
    row_statistics statistics; /* [tile rows] */
    real_bits* infinite;       /* [tile rows] */
    lane_code* weights;        /* [TILE_COLUMNS / STEP][PANEL_ROWS][STEP] */
    int32_t* weight_sums;      /* [PANEL_ROWS]: -VALUE_BIAS * sum of a block's rounded weights */
    float* block_factors;      /* [PANEL_ROWS]: what a block's integer sums are multiplied by */
    weight_offset* offsets;    /* [TILE_COLUMNS]: what is added to a small weight before it is rounded to the nearest */
    column_block block, block_before;
    scan scans[KERNEL_PANEL_VECTORS]; /* of the block, where scores are plain */
    real* rows;                       /* [PANEL_ROWS][row_pitch] */
    int64_t row_pitch;
    upcoming_rows* upcoming;
} forward_workspace;

static int64_t steps_of(int64_t channels) {
    return divide_up(channels, STEP);
}

/* Codes that one product of sums takes. */
enum { CODES = LANES * STEP };

/* Of a key in workspace. Where sums are needed, whole vectors are added up. */
static int64_t key_pitch_of(const cpu_attention* attention) {
    const int64_t codes = steps_of(attention->head_dim) * STEP;
    return QUERY_BIAS ? round_up(codes, CODES) : codes;
}

static void take_column_block(workspace_cursor* cursor, const cpu_attention* attention, column_block* block) {
    block->key_memory = workspace_take(cursor, TILE_COLUMNS * key_pitch_of(attention), sizeof(signed_code));
    block->values = workspace_take(cursor, TILE_COLUMNS * attention->head_dim_v, sizeof(signed_code));
    block->key_offsets = workspace_take(cursor, TILE_COLUMNS, sizeof(int32_t));
    block->key_scales = workspace_take_reals(cursor, TILE_COLUMNS);
    block->value_logs = workspace_take_reals(cursor, TILE_COLUMNS);
    block->value_inverses = workspace_take_reals(cursor, TILE_COLUMNS);
    block->zero = workspace_take(cursor, TILE_COLUMNS, 1);
}

static size_t forward_layout(const cpu_attention* attention, void* memory, forward_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    const int64_t rows = forward_tile_rows(attention), head_dim_v = attention->head_dim_v;
    const int64_t codes = steps_of(attention->head_dim) * STEP;
    take_score_tile(&cursor, attention, PANEL_ROWS, false, &workspace->tile);
    workspace->query = workspace_take(&cursor, codes * rows, sizeof(lane_code));
    workspace->query_scales = workspace_take_reals(&cursor, rows);
    workspace->mean_scores = workspace_take_reals(&cursor, rows);
    workspace->output = workspace_take_reals(&cursor, head_dim_v * rows);
    take_row_statistics(&cursor, rows, &workspace->statistics);
    workspace->infinite = workspace_take(&cursor, rows, sizeof(real_bits));
    workspace->weights = workspace_take(&cursor, TILE_COLUMNS * PANEL_ROWS, sizeof(lane_code));
    workspace->weight_sums = workspace_take(&cursor, PANEL_ROWS, sizeof(int32_t));
    workspace->block_factors = workspace_take_reals(&cursor, PANEL_ROWS);
    workspace->offsets = workspace_take(&cursor, TILE_COLUMNS, sizeof(weight_offset));
    take_column_block(&cursor, attention, &workspace->block);
    workspace->block_before = workspace->block;
#ifdef WEIGHS_AMONG_PRODUCTS
    take_column_block(&cursor, attention, &workspace->block_before);
#endif
    workspace->row_pitch = round_up(maximum(head_dim_v, steps_of(attention->head_dim)), LANES);
    workspace->rows = workspace_take_reals(&cursor, PANEL_ROWS * workspace->row_pitch);
    return cursor.used;
}

static size_t forward_workspace_bytes(const cpu_attention* attention) {
    size_t bytes = forward_layout(attention, NULL, &(forward_workspace){0});
#ifdef KERNEL_REST
    const size_t others = KERNEL_REST.workspace_bytes(attention);
#else
    const size_t others = AGAIN_ROWS_BYTES(attention);
#endif
    return bytes > others ? bytes : others;
}

/* ---- Operands ------------------------------------------------------------------------------------------------------------------------ */

/* Codes of a row without their zero point: where they lie, or in `scratch`. */
static const int8_t* load_differences(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, int8_t* scratch) {
    if (tensor->zero_points == NULL) return load_codes(tensor, b, h, s, channels, scratch);
    int8_t unpacked[CPU_MAX_HEAD_DIM]; /* not in `scratch`, so that the loops below are vectors */
    const int8_t* codes = load_codes(tensor, b, h, s, channels, unpacked);
    const int64_t stride = tensor->scale_strides[3]; /* 0: one zero point a row */
    const int32_t* zero_points = tensor->zero_points + scale_index(tensor, b, h, s);
    if (stride == 0) {
        for (int64_t d = 0; d < channels; d++) scratch[d] = (int8_t)((uint32_t)codes[d] - (uint32_t)zero_points[0]);
    } else {
        for (int64_t d = 0; d < channels; d++) scratch[d] = (int8_t)((uint32_t)codes[d] - (uint32_t)zero_points[d * stride]);
    }
    return scratch;
}

/* A row's codes as products take them; those behind the last channel are 0. */
static void write_codes(const int8_t* codes, int64_t channels, int64_t padded, signed_code* out) {
    typedef signed_code sixteen_written __attribute__((ext_vector_type(16)));
    typedef sixteen_written sixteen_written_in_memory __attribute__((aligned(sizeof(signed_code))));
    int64_t d = 0;
    for (; d + 16 <= channels; d += 16) {
        const sixteen_codes few = *(const sixteen_codes_in_memory*)(codes + d);
        *(sixteen_written_in_memory*)(out + d) = __builtin_convertvector(few, sixteen_written);
    }
    for (; d < padded; d++) out[d] = d < channels ? codes[d] : 0;
}

/* The dot product of a row's codes with channel means. */
static float multiply_means(const int8_t* codes, const float* means, int64_t channels) {
    vector sums = vector_of(0);
    int64_t d = 0;
    for (; d + LANES <= channels; d += LANES) {
        const sixteen_codes few = *(const sixteen_codes_in_memory*)(codes + d);
        sums += __builtin_convertvector(few, vector) * *(const vector_in_memory*)(means + d);
    }
    float sum = 0;
    for (; d < channels; d++) sum += (float)codes[d] * means[d];
    return sum + sum_of_lanes(sums);
}

/* The scales of some tokens, which are the same for all channels, times a factor; 1 where there are none. */
static void load_scales(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t first, int64_t count, float factor, float* scales) {
    for (int64_t n = 0; n < count; n++) {
        scales[n] = factor * (tensor->scales ? tensor->scales[scale_index(tensor, b, h, first + n)] : 1);
    }
}

static void select_queries(const cpu_attention* attention, forward_workspace* selected, int64_t first) {
    selected->query += first * steps_of(attention->head_dim) * STEP;
    selected->query_scales += first;
    selected->mean_scores += first;
}

/* Where the codes of the panel's rows lie, if they can be moved from there by STEP at once; else NULL. */
static const int8_t* find_query_codes(const cpu_attention* attention, const score_tile* tile) {
    const cpu_tensor* query = &attention->query;
    if (sizeof(signed_code) != 1 || query->precision != CPU_INT8 || query->zero_points || query->strides[3] != 1) return NULL;
    if (attention->head_dim % STEP != 0 || query->strides[2] % STEP != 0) return NULL;
    if (!is_of_one_head(attention, tile)) return NULL;
    const row_place first = place_of_row(attention, &tile->position, tile->first_row);
    const int8_t* codes = (const int8_t*)query->data + row_offset(query, tile->position.b, first.h, first.i);
    return (uintptr_t)codes % sizeof(float) == 0 ? codes : NULL;
}

/* STEP codes have the size of a number: they are transposed as such. */
static void open_queries(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    const head_position* at = &tile->position;
    const cpu_tensor *query = &attention->query, *key = &attention->key;
    const float* means = key->channel_means;
    if (means) means += at->b * key->mean_strides[0] + at->kv_head * key->mean_strides[1];
    const int64_t head_dim = attention->head_dim, steps = steps_of(head_dim), rows = tile->rows, valid_rows = tile->valid_rows;
    const int8_t* in_place = find_query_codes(attention, tile);
    int8_t scratch[CPU_MAX_HEAD_DIM];
    for (int64_t row = 0; row < rows; row++) {
        panel->query_scales[row] = 0;
        panel->mean_scores[row] = 0;
    }
    for (int64_t row = 0; row < valid_rows; row++) {
        const row_place place = place_of_row(attention, at, tile->first_row + row);
        const float scale = query->scales ? query->scales[scale_index(query, at->b, place.h, place.i)] : 1;
        panel->query_scales[row] = scale;
        if (in_place && !means) continue;
        const int8_t* differences = load_differences(query, at->b, place.h, place.i, head_dim, scratch);
        if (means) panel->mean_scores[row] = scale * multiply_means(differences, means, head_dim);
        if (in_place) continue;
        signed_code* codes = (signed_code*)(panel->rows + row * panel->row_pitch);
        write_codes(differences, head_dim, steps * STEP, codes);
    }
    if (valid_rows < rows) memset(panel->query, 0, (size_t)(steps * STEP * rows) * sizeof(lane_code));
    const float* source = in_place ? (const float*)in_place : panel->rows;
    const int64_t pitch = in_place ? query->strides[2] / STEP : panel->row_pitch;
    transpose_floats(source, pitch, valid_rows, steps, (float*)panel->query, rows);
    lane_code* codes = panel->query;
    const int64_t count = steps * STEP * rows;
    for (int64_t n = 0; n < count && QUERY_BIAS; n++) codes[n] ^= (lane_code)QUERY_BIAS; /* of a byte: 128 more */
}

/* Whether keys are used where they lie. */
static bool keys_stay(const cpu_attention* attention) {
    return sizeof(signed_code) == 1 && attention->key.precision == CPU_INT8 && attention->key.strides[3] == 1 &&
           attention->head_dim % (QUERY_BIAS && !LOADS_FEW_CODES ? CODES : STEP) == 0;
}

/* The sums of the lanes of LANES vectors: first within groups of four lanes, then of the groups. */
INLINE int_vector sums_of_lanes(const int_vector vectors[LANES]) {
    int_vector groups[LANES / 4];
#pragma clang loop unroll(full)
    for (int n = 0; n < LANES / 4; n++) {
        const int_vector *four = vectors + 4 * n, a = four[0], b = four[1], c = four[2], d = four[3];
        const int_vector ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                              __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        const int_vector cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                              __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        groups[n] = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                    __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    int_vector pairs[2];
#pragma clang loop unroll(full)
    for (int n = 0; n < 2; n++) {
        const int_vector first = groups[2 * n], second = groups[2 * n + 1];
        pairs[n] = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(first, second, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    return __builtin_shufflevector(pairs[0], pairs[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(pairs[0], pairs[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

/* -QUERY_BIAS times the sum of each key's codes, which are whole registers where !LOADS_FEW_CODES. */
static void sum_keys(const column_block* block, int64_t columns, int64_t codes) {
    typedef int_vector __attribute__((aligned(1))) int_vector_in_memory;
    const int64_t whole = codes / CODES * CODES;
    for (int64_t column = 0; column < columns; column += LANES) {
        int_vector sums[LANES];
        for (int64_t n = 0; n < LANES; n++) {
            const signed_code* key = block->keys + minimum(column + n, columns - 1) * block->key_pitch;
            sums[n] = 0;
            for (int64_t d = 0; d < whole; d += CODES) {
                sums[n] = add_products(sums[n], LANES_OF_ONES, *(const int_vector_in_memory*)(key + d));
            }
            if (whole < codes) sums[n] = add_products(sums[n], LANES_OF_ONES, load_few_codes(key + whole, codes - whole));
        }
        *(int_vector*)(block->key_offsets + column) = sums_of_lanes(sums) * -QUERY_BIAS;
    }
}

static void load_keys(const cpu_attention* attention, forward_workspace* item, int64_t first_column, int64_t columns) {
    const cpu_tensor* key = &attention->key;
    const head_position* at = &item->tile.position;
    const int64_t head_dim = attention->head_dim;
    column_block* block = &item->block;
    if (keys_stay(attention)) {
        block->keys = (const signed_code*)key->data + row_offset(key, at->b, at->kv_head, first_column);
        block->key_pitch = key->strides[2];
    } else {
        block->keys = block->key_memory;
        block->key_pitch = key_pitch_of(attention);
        for (int64_t column = 0; column < columns; column++) {
            signed_code* codes = block->key_memory + column * block->key_pitch;
            int8_t wide_scratch[CPU_MAX_HEAD_DIM];
            int8_t* scratch = sizeof(signed_code) == 1 ? (int8_t*)codes : wide_scratch; /* what is unpacked there needs no copy */
            const int8_t* differences = load_differences(key, at->b, at->kv_head, first_column + column, head_dim, scratch);
            if ((const void*)differences != codes) write_codes(differences, head_dim, head_dim, codes);
        }
    }
    if (QUERY_BIAS) sum_keys(block, columns, keys_stay(attention) ? head_dim : key_pitch_of(attention));
    const float scale = item->plain ? (float)(attention->softmax_scale / LN_2) : 1;
    /* Also of columns that no row of this item attends: which scale is the largest must not depend on which rows are in an item. */
    const int64_t known = minimum(TILE_COLUMNS, at->keys - first_column);
    load_scales(key, at->b, at->kv_head, first_column, known, scale, block->key_scales);
    block->largest_key_scale = 0;
    for (int64_t column = 0; column < known; column++) {
        block->largest_key_scale = fmaxf(block->largest_key_scale, fabsf(block->key_scales[column]));
    }
}

static bool is_zero(const int8_t* codes, int64_t count) {
    int64_t d = 0;
    for (; d + 16 <= count; d += 16) {
        int64_t halves[2];
        memcpy(halves, codes + d, sizeof halves);
        if ((halves[0] | halves[1]) != 0) return false;
    }
    for (; d < count; d++) {
        if (codes[d] != 0) return false;
    }
    return true;
}

/* What the scales of values add to scores, and its inverse. */
static void scale_values(const cpu_attention* attention, forward_workspace* item, int64_t first_column, int64_t columns) {
    const cpu_tensor* value = &attention->value;
    const head_position* at = &item->tile.position;
    column_block* block = &item->block;
    float* scales = block->value_inverses;
    if (has_row_scales(value)) {
        load_scales(value, at->b, at->kv_head, first_column, columns, 1, scales);
        for (int64_t column = 0; column < columns && block->any_zero; column++) {
            if (block->zero[column]) scales[column] = 1;
        }
    } else {
        for (int64_t column = 0; column < columns; column++) scales[column] = 1;
    }
    const int64_t padded = round_up(columns, LANES);
    for (int64_t column = columns; column < padded; column++) scales[column] = INFINITY;
    for (int64_t column = 0; column < padded; column += LANES) {
        const vector scale = vector_load(scales + column);
        vector_store(block->value_logs + column, vector_log2(scale));
        vector_store(block->value_inverses + column, 1 / scale);
    }
}

static void load_values(const cpu_attention* attention, forward_workspace* item, int64_t first_column, int64_t columns) {
    const cpu_tensor* value = &attention->value;
    const head_position* at = &item->tile.position;
    const int64_t channels = attention->head_dim_v;
    const bool stay = value->precision == CPU_INT8 && value->strides[3] == 1;
    column_block* block = &item->block;
    int8_t rows[STEP * CPU_MAX_HEAD_DIM];
    bool any_zero = false;
    for (int64_t column = 0; column < columns; column += STEP) {
        const int64_t s = first_column + column, present = minimum(STEP, columns - column);
        const int8_t* source = rows;
        int64_t pitch = channels;
        if (stay && present == STEP) {
            source = (const int8_t*)value->data + row_offset(value, at->b, at->kv_head, s);
            pitch = value->strides[2];
        } else {
            if (present < STEP) memset(rows, 0, (size_t)(STEP * channels));
            for (int64_t k = 0; k < present; k++) {
                int8_t* row = rows + k * channels;
                const int8_t* differences = load_differences(value, at->b, at->kv_head, s + k, channels, row);
                if (differences != row) memcpy(row, differences, (size_t)channels);
            }
        }
        interleave_rows(source, pitch, channels, block->values + column * channels);
        for (int64_t k = 0; k < present; k++) {
            const bool zero = is_zero(source + k * pitch, channels);
            block->zero[column + k] = zero;
            any_zero |= zero;
        }
    }
    block->any_zero = any_zero;
    scale_values(attention, item, first_column, columns);
}

/* The block before it stays in memory, for a panel that waits. */
static void load_block(const cpu_attention* attention, forward_workspace* item, int64_t first_column, int64_t columns) {
    const column_block memory = item->block_before;
    item->block_before = item->block;
    item->block = memory;
    load_keys(attention, item, first_column, columns);
    load_values(attention, item, first_column, columns);
}

/* ---- Products ------------------------------------------------------------------------------------------------------------------------ */

/* Accumulators: see panel.h. Short sums need as many registers again. */
#ifdef SHORT_STEPS
enum { PRODUCT_ROWS = 3, PRODUCT_REST = 3 };
#else
enum { PRODUCT_ROWS = 6, PRODUCT_REST = 4 };
#endif

/* STEP codes in every lane. */
INLINE int_vector share_codes(const signed_code* codes) {
    int32_t few;
    memcpy(&few, codes, sizeof few);
    return broadcast_codes(few);
}

#ifdef SHORT_STEPS
/* Adds to sums[n][v] the products of SHORT_STEPS steps. */
INLINE void accumulate_short_products(const int vectors, const int count, const lane_code* lane_codes, const signed_code* codes,
                                      int64_t step_stride, int64_t stride, int_vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS]) {
    short_sums few[PRODUCT_ROWS][KERNEL_PANEL_VECTORS];
#pragma clang loop unroll(full)
    for (int step = 0; step < SHORT_STEPS; step++) {
#pragma clang loop unroll(full)
        for (int n = 0; n < count; n++) {
            const int_vector factor = share_codes(codes + step * step_stride + n * stride);
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++) {
                const int_vector lanes = *(const int_vector*)(lane_codes + (step * vectors + v) * LANES * STEP);
                const short_sums products = multiply_shortly(lanes, factor);
                few[n][v] = step == 0 ? products : join_short_sums(few[n][v], products);
            }
        }
    }
#pragma clang loop unroll(full)
    for (int n = 0; n < count; n++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) sums[n][v] = add_short_sums(sums[n][v], few[n][v]);
    }
}
#endif

/* Adds to sums[n][v], for n < count and v < vectors, the products of all steps: lanes [step][rows][STEP] with the codes of n at
 * codes + step * step_stride + n * stride. */
INLINE void accumulate_products(const int vectors, const int count, int64_t steps, const lane_code* lane_codes, const signed_code* codes,
                                int64_t step_stride, int64_t stride, const bool weighted,
                                int_vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS]) {
    int64_t step = 0;
#ifdef SHORT_STEPS
    for (; step + SHORT_STEPS <= steps; step += SHORT_STEPS) {
        accumulate_short_products(vectors, count, lane_codes + step * vectors * LANES * STEP, codes + step * step_stride, step_stride,
                                  stride, sums);
    }
#endif
    for (; step < steps; step++) {
        int_vector lanes[KERNEL_PANEL_VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) lanes[v] = *(const int_vector*)(lane_codes + (step * vectors + v) * LANES * STEP);
#pragma clang loop unroll(full)
        for (int n = 0; n < count; n++) {
            const int_vector factor = share_codes(codes + step * step_stride + n * stride);
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++) {
                sums[n][v] = weighted ? add_weighted(sums[n][v], lanes[v], factor) : add_products(sums[n][v], lanes[v], factor);
            }
        }
    }
}

/* How the products of keys are left in tile.scores. */
typedef enum {
    AS_PRODUCTS,           /* as they are, int32 */
    AS_LOGARITHMS,         /* of weights, where scores are plain and all rows attend the columns */
    AS_LOGARITHMS_LIMITED, /* where some may not: NO_WEIGHT then */
} left_products;

/* The logarithm of a column's weight. */
INLINE vector logarithm_of_column(const score_tile* tile, int64_t column, int64_t row, int_vector product, vector scale, float value_log,
                                  const bool limited, scan* scan) {
    vector logarithm = __builtin_convertvector(product, vector) * scale + value_log;
    if (limited) {
        const vector_mask attended = attended_rows(tile, column, row);
        scan->any |= attended;
        logarithm = vector_select(attended, logarithm, vector_of(NO_WEIGHT));
    }
    scan->highest = vector_max(scan->highest, logarithm);
    return logarithm;
}

/* What keys are multiplied with and become. In variables of their own: for all the compiler knows, scores are written over the workspace. */
typedef struct {
    const signed_code* keys;
    const lane_code* query;
    const int32_t* offsets;
    const float *scales, *value_logs; /* of keys */
    vector query_scales[KERNEL_PANEL_VECTORS];
    scan scans[KERNEL_PANEL_VECTORS];
    int64_t pitch, steps;
    float* scores;
} key_product;

/* What sums start from. */
INLINE void open_products(const int vectors, const int count, int64_t first, const key_product* product,
                          int_vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS]) {
#pragma clang loop unroll(full)
    for (int k = 0; k < count; k++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) sums[k][v] = QUERY_BIAS ? (int_vector)product->offsets[first + k] : (int_vector)0;
    }
}

/* Adds the products of steps first_step ..< last_step. */
INLINE void add_steps(const int vectors, const int count, int64_t first, int64_t first_step, int64_t last_step, const key_product* product,
                      int_vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS]) {
    accumulate_products(vectors, count, last_step - first_step, product->query + first_step * vectors * LANES * STEP,
                        product->keys + first * product->pitch + first_step * STEP, STEP, product->pitch, false, sums);
}

/* Writes them to tile.scores. */
INLINE void leave_products(const int vectors, const int count, const left_products left, int64_t first, const score_tile* tile,
                           key_product* product, const int_vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS]) {
#pragma clang loop unroll(full)
    for (int k = 0; k < count; k++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            float* at = product->scores + ((first + k) * vectors + v) * LANES;
            if (left == AS_PRODUCTS) {
                *(int_vector*)at = sums[k][v];
            } else {
                const vector scale = product->query_scales[v] * product->scales[first + k];
                const bool limited = left == AS_LOGARITHMS_LIMITED;
                vector_store(at, logarithm_of_column(tile, first + k, v * LANES, sums[k][v], scale, product->value_logs[first + k], limited,
                                                     &product->scans[v]));
            }
        }
    }
}

/* Scores of `count` keys from `first` on against the panel. */
INLINE void multiply_keys(const int vectors, const int count, const left_products left, int64_t first, const score_tile* tile,
                          key_product* product, upcoming_rows* upcoming) {
    int_vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS];
    open_products(vectors, count, first, product, sums);
    add_steps(vectors, count, first, 0, product->steps, product, sums);
    leave_products(vectors, count, left, first, tile, product, sums);
    fetch_upcoming(upcoming);
}

/* Adds `count` channels of a block's weighted values to the output. */
INLINE void multiply_values(const int vectors, const int count, int64_t steps, const signed_code* values, int64_t channels,
                            const forward_workspace* panel, float* output) {
    int_vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS];
#pragma clang loop unroll(full)
    for (int d = 0; d < count; d++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            sums[d][v] = VALUE_BIAS ? *(const int_vector*)(panel->weight_sums + v * LANES) : (int_vector)0;
        }
    }
    accumulate_products(vectors, count, steps, panel->weights, values, channels * STEP, STEP, true, sums);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        const vector rescale = vector_load(panel->statistics.rescale + v * LANES), factor = vector_load(panel->block_factors + v * LANES);
#pragma clang loop unroll(full)
        for (int d = 0; d < count; d++) {
            float* at = output + (d * vectors + v) * LANES;
            const vector sum = __builtin_convertvector(sums[d][v], vector) * factor;
            vector_store(at, vector_load(at) * rescale + sum);
        }
    }
}

/* Calls body(n, count) for all n from 0 to below `total`, by as many as accumulators hold. */
#define BY_PRODUCT_ROWS(total, body)                                                                                     \
    do {                                                                                                                 \
        int64_t n = 0;                                                                                                   \
        for (; (total) - n >= PRODUCT_ROWS && (total) - n != 2 * PRODUCT_REST && (total) - n != 2 * PRODUCT_REST - 1;) { \
            body(n, PRODUCT_ROWS);                                                                                       \
            n += PRODUCT_ROWS;                                                                                           \
        }                                                                                                                \
        for (; (total) - n >= PRODUCT_REST; n += PRODUCT_REST) body(n, PRODUCT_REST);                                    \
        switch ((total) - n) {                                                                                           \
        case 3: body(n, 3); break;                                                                                       \
        case 2: body(n, 2); break;                                                                                       \
        case 1: body(n, 1); break;                                                                                       \
        default: break;                                                                                                  \
        }                                                                                                                \
    } while (0)

INLINE key_product product_of_keys(const int vectors, const forward_workspace* panel, int64_t steps) {
    const column_block* block = &panel->block;
    key_product product = {
        .keys = block->keys,
        .query = panel->query,
        .offsets = block->key_offsets,
        .scales = block->key_scales,
        .value_logs = block->value_logs,
        .pitch = block->key_pitch,
        .steps = steps,
        .scores = panel->tile.scores,
    };
    for (int v = 0; v < vectors; v++) {
        product.query_scales[v] = vector_load(panel->query_scales + v * LANES);
        product.scans[v] = panel->scans[v];
    }
    return product;
}

/* Products of the block's keys with the panel. */
INLINE void compute_products_of(const int vectors, const forward_workspace* panel, int64_t steps) {
    key_product product = product_of_keys(vectors, panel, steps);
#define MULTIPLY_KEYS(n, count) multiply_keys(vectors, count, AS_PRODUCTS, n, &panel->tile, &product, panel->upcoming)
    BY_PRODUCT_ROWS(panel->tile.columns, MULTIPLY_KEYS);
#undef MULTIPLY_KEYS
}

/* Plain scores of the block's keys from `first` on, as logarithms of weights. */
INLINE void compute_logarithms_of(const int vectors, forward_workspace* panel, int64_t steps, int64_t first) {
    const column_range whole = panel->tile.whole;
    const int64_t columns = panel->tile.columns - first;
    key_product product = product_of_keys(vectors, panel, steps);
#define MULTIPLY_KEYS(n, count)                                                                                     \
    if (first + (n) >= whole.first && first + (n) + (count) <= whole.last) {                                        \
        multiply_keys(vectors, count, AS_LOGARITHMS, first + (n), &panel->tile, &product, panel->upcoming);         \
    } else {                                                                                                        \
        multiply_keys(vectors, count, AS_LOGARITHMS_LIMITED, first + (n), &panel->tile, &product, panel->upcoming); \
    }
    BY_PRODUCT_ROWS(columns, MULTIPLY_KEYS);
#undef MULTIPLY_KEYS
    for (int v = 0; v < vectors; v++) panel->scans[v] = product.scans[v];
}

INLINE void accumulate_output_of(const int vectors, const forward_workspace* panel, int64_t channels) {
    const int64_t steps = divide_up(panel->tile.columns, STEP);
#define MULTIPLY_VALUES(n, count) \
    multiply_values(vectors, count, steps, panel->block.values + (n) * STEP, channels, panel, panel->output + (n) * vectors * LANES)
    BY_PRODUCT_ROWS(channels, MULTIPLY_VALUES);
#undef MULTIPLY_VALUES
}

/* Calls the function with the number of vectors of the panel as a constant. */
#if KERNEL_PANEL_VECTORS == 2
#define WITH_VECTORS(function, panel, ...)                  \
    if ((panel)->tile.rows == LANES) {                      \
        function(1, panel, __VA_ARGS__);                    \
    } else {                                                \
        function(KERNEL_PANEL_VECTORS, panel, __VA_ARGS__); \
    }
#else
#define WITH_VECTORS(function, panel, ...) function(1, panel, __VA_ARGS__);
#endif

static void compute_products(const forward_workspace* panel, int64_t steps) {
    WITH_VECTORS(compute_products_of, panel, steps)
}

static void compute_logarithms(forward_workspace* panel, int64_t steps, int64_t first) {
    WITH_VECTORS(compute_logarithms_of, panel, steps, first)
}

static void accumulate_output(const forward_workspace* panel, int64_t channels) {
    WITH_VECTORS(accumulate_output_of, panel, channels)
}

/* ---- Softmax ------------------------------------------------------------------------------------------------------------------------- */

/* Offsets -1/2 ..< 1/2 of a block's columns, as evenly spread over any run of columns as can be: multiples of the golden ratio. */
static void spread_offsets(weight_offset* offsets) {
    for (int64_t column = 0; column < TILE_COLUMNS; column++) {
        const float multiple = (float)column * 0.6180339887f;
        offsets[weight_offset_place(column)] = weight_offset_of(multiple - floorf(multiple) - 0.5f);
    }
}

/* The highest score of a vector of rows among keys whose value is 0, as a binary logarithm, and the sum of their exponentials over that of
 * it. */
typedef struct {
    vector highest, sum;
} zero_values;

/* Takes keys whose value is 0 out of tile.scores. */
INLINE zero_values take_zero_values(const column_block* block, const score_tile* tile, int64_t row) {
    zero_values taken = {.highest = vector_of(NO_WEIGHT), .sum = vector_of(0)};
    for (int64_t column = 0; column < tile->columns; column++) {
        if (block->zero[column]) taken.highest = vector_max(taken.highest, vector_load(tile->scores + column * tile->rows + row));
    }
    const vector reference = vector_select(taken.highest == NO_WEIGHT, vector_of(0), taken.highest);
    for (int64_t column = 0; column < tile->columns; column++) {
        if (!block->zero[column]) continue;
        float* at = tile->scores + column * tile->rows + row;
        taken.sum += vector_exp2(vector_load(at) - reference);
        vector_store(at, vector_of(NO_WEIGHT));
    }
    return taken;
}

/* What is known of a vector of rows while a block's weights are computed. */
typedef struct {
    vector highest, offset; /* of the binary logarithms; what scores have in addition */
    zero_values zeros;
    vector reference, sum; /* of the exponentials, which are taken over the reference */
    int_vector weight_sum;
} weighing;

INLINE weighing open_weighing(vector highest, vector offset, zero_values zeros) {
    return (weighing){
        .highest = highest,
        .offset = offset,
        .zeros = zeros,
        .reference = vector_select(highest == NO_WEIGHT, vector_of(0), highest),
        .sum = vector_of(0),
        .weight_sum = 0,
    };
}

/* Columns in whole steps; those behind the last one get no weight. */
INLINE int64_t pad_columns(const score_tile* tile, int64_t row) {
    const int64_t columns = round_up(tile->columns, STEP);
    for (int64_t column = tile->columns; column < columns; column++) {
        vector_store(tile->scores + column * tile->rows + row, vector_of(NO_WEIGHT));
    }
    return columns;
}

/* Rounds the weights of a vector of rows in columns first ..< last. tile.scores holds their binary logarithms, NO_WEIGHT where there is
 * none. */
INLINE void weigh_columns(const forward_workspace* panel, int64_t row, int64_t first, int64_t last, weighing* weighing) {
    /* In variables of their own: for all the compiler knows, weights are written over the workspace. */
    const int64_t rows = panel->tile.rows;
    const float* inverses = panel->block.value_inverses;
    const weight_offset* offsets = panel->offsets;
    const float* scores = panel->tile.scores + row;
    lane_code* out = panel->weights + row * STEP;
    const vector reference = weighing->reference;
    vector sum = weighing->sum;
    int_vector weight_sum = weighing->weight_sum;
    for (int64_t column = first; column < last; column += STEP) {
        vector logarithms[STEP], weights[STEP];
        for (int k = 0; k < STEP; k++) logarithms[k] = weights[k] = vector_load(scores + (column + k) * rows) - reference;
        weight_exp2(weights, LARGEST_WEIGHT * (1 << WEIGHT_FRACTION_BITS));
        for (int k = 0; k < STEP; k++) sum += weights[k] * inverses[column + k];
        const int_vector packed = round_weights(weights, logarithms, offsets + column);
        if (VALUE_BIAS) weight_sum = add_weighted(weight_sum, packed, SIGNED_ONES);
        *(int_vector*)(out + column * rows) = packed;
    }
    weighing->sum = sum;
    weighing->weight_sum = weight_sum;
}

/* Joins the block with what came before. */
INLINE void close_weighing(forward_workspace* panel, int64_t row, const weighing* weighing) {
    const row_statistics* statistics = &panel->statistics;
    const vector highest = weighing->highest, offset = weighing->offset;
    const zero_values zeros = weighing->zeros;
    if (VALUE_BIAS) *(int_vector*)(panel->weight_sums + row) = weighing->weight_sum * -VALUE_BIAS;

    *(vector_mask*)(panel->tile.infinite + row) |= highest > -NO_WEIGHT;
    const vector old = vector_load(statistics->highest + row);
    const vector block = vector_select(highest == NO_WEIGHT, vector_of(-INFINITY), highest + offset);
    const vector zero_block = vector_select(zeros.highest == NO_WEIGHT, vector_of(-INFINITY), zeros.highest + offset);
    const vector joined = vector_max(vector_max(old, block), zero_block);
    const vector origin = vector_select(joined == -INFINITY, vector_of(0), joined);
    const vector rescale = vector_exp2(old - origin);
    const vector factor = vector_exp2(block - origin) * (1.0f / LARGEST_WEIGHT);
    const vector sum = weighing->sum * (factor * (1.0f / (1 << WEIGHT_FRACTION_BITS)));
    const vector total = vector_load(statistics->sum + row) * rescale + sum + zeros.sum * vector_exp2(zero_block - origin);
    vector_store(statistics->highest + row, joined);
    vector_store(statistics->rescale + row, rescale);
    vector_store(statistics->sum + row, total);
    vector_store(panel->block_factors + row, factor);
}

/* All columns of a vector of rows. */
INLINE void weigh_rows(forward_workspace* panel, int64_t row, weighing weighing) {
    weigh_columns(panel, row, 0, pad_columns(&panel->tile, row), &weighing);
    close_weighing(panel, row, &weighing);
}

/* The highest of a vector of rows in tile.scores. */
INLINE vector highest_of_block(const score_tile* tile, int64_t row) {
    vector highest = vector_of(NO_WEIGHT);
    for (int64_t column = 0; column < tile->columns; column++) {
        highest = vector_max(highest, vector_load(tile->scores + column * tile->rows + row));
    }
    return highest;
}

/* Of a block whose scores are nothing but scaled dot products; limits and a boolean mask may exclude some of them. */
INLINE weighing open_plain_weighing(const cpu_attention* attention, forward_workspace* panel, int64_t row) {
    const score_tile* tile = &panel->tile;
    const column_block* block = &panel->block;
    const vector_mask any = panel->scans[row / LANES].any;
    vector highest = panel->scans[row / LANES].highest;
    const vector offset = vector_load(panel->mean_scores + row) * (float)(attention->softmax_scale / LN_2);
    /* An infinite scale makes a score of 0 NaN, of which neither the highest score nor a weight tells. */
    const vector size = highest + offset, scale = vector_load(panel->query_scales + row) * block->largest_key_scale;
    *(vector_mask*)(tile->infinite + row) |= ((size - size != 0) | (scale - scale != 0) | (highest == NO_WEIGHT)) & any;
    *(vector_mask*)(panel->statistics.attended + row) |= any;
    zero_values zeros = {.highest = vector_of(NO_WEIGHT), .sum = vector_of(0)};
    if (block->any_zero) {
        zeros = take_zero_values(block, tile, row);
        highest = highest_of_block(tile, row);
    }
    return open_weighing(highest, offset, zeros);
}

static void open_scans(forward_workspace* panel) {
    const column_range whole = panel->tile.whole;
    const vector_mask any = whole.first < whole.last ? (vector_mask)(real_bits)-1 : (vector_mask)(real_bits)0;
    for (int v = 0; v < KERNEL_PANEL_VECTORS; v++) panel->scans[v] = (scan){vector_of(NO_WEIGHT), any};
}

static void weigh_plain_block(const cpu_attention* attention, forward_workspace* panel) {
    for (int64_t row = 0; row < panel->tile.rows; row += LANES) {
        weigh_rows(panel, row, open_plain_weighing(attention, panel, row));
    }
}

#ifdef WEIGHS_AMONG_PRODUCTS
enum {
    PARTS = KERNEL_PANEL_VECTORS * STEP, /* vectors of weights that are computed in between the products of STEP keys */
    MOST_STEPS_AT_ONCE = 4,              /* of keys between two of them: with more, that gains nothing */
};
_Static_assert(VALUE_BIAS == 0 && WEIGHT_FRACTION_BITS == 0 && STEP <= PRODUCT_ROWS, "what weigh_among_products() leaves out");

/* Whether a panel waits for the next one, that it may be weighed while that is multiplied. */
static bool waits_for_next(const cpu_attention* attention, const forward_workspace* panel) {
    const int64_t steps = steps_of(attention->head_dim);
    return panel->tile.rows == PANEL_ROWS && steps % PARTS == 0 && steps <= MOST_STEPS_AT_ONCE * PARTS;
}

/* Weighs the columns before `last` of one panel and multiplies their keys, or those of the next block, with another panel, whose scores take
 * their place. One keeps the units busy that the other leaves idle, but only if their instructions alternate: processors do not look far
 * enough ahead for more (Zen 5). `steps_at_once`: of keys between two vectors of weights. */
INLINE void weigh_among_products(const int steps_at_once, const forward_workspace* weighed, weighing weighings[KERNEL_PANEL_VECTORS],
                                 const forward_workspace* multiplied, key_product* product, int64_t last) {
    enum { VECTORS = KERNEL_PANEL_VECTORS };
    /* In variables of their own: for all the compiler knows, weights are written over the workspace. */
    const float* inverses = weighed->block.value_inverses;
    const weight_offset* offsets = weighed->offsets;
    lane_code* out = weighed->weights;
    vector reference[VECTORS], sum[VECTORS];
    for (int v = 0; v < VECTORS; v++) reference[v] = weighings[v].reference, sum[v] = weighings[v].sum;
    for (int64_t column = 0; column < last; column += STEP) {
        const float* scores = product->scores + column * VECTORS * LANES;
        int_vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS];
        int_vector weights[STEP];
        open_products(VECTORS, STEP, column, product, sums);
#pragma clang loop unroll(full)
        for (int part = 0; part < PARTS; part++) {
            const int v = part / STEP, k = part % STEP;
            const vector logarithm = vector_load(scores + (k * VECTORS + v) * LANES) - reference[v];
            const vector weight = weight_of(logarithm, LARGEST_WEIGHT);
            sum[v] += weight * inverses[column + k];
            weights[k] = integer_weight(move_small_weight(weight, logarithm, offsets[column + k]));
            __asm__ volatile("" ::: "memory"); /* lest the compiler sorts them again, for which registers do not suffice */
            add_steps(VECTORS, STEP, column, part * steps_at_once, (part + 1) * steps_at_once, product, sums);
            if (k == STEP - 1) *(int_vector*)(out + (column * VECTORS + v * STEP) * LANES) = pack_weights(weights);
        }
        leave_products(VECTORS, STEP, AS_LOGARITHMS, column, &multiplied->tile, product, sums);
        fetch_upcoming(multiplied->upcoming);
    }
    for (int v = 0; v < VECTORS; v++) weighings[v].sum = sum[v];
}

/* Weighs a block for one panel and computes the plain scores of the next one. */
static void weigh_and_multiply(const cpu_attention* attention, forward_workspace* weighed, forward_workspace* multiplied) {
    enum { VECTORS = KERNEL_PANEL_VECTORS };
    const int64_t steps = steps_of(attention->head_dim);
    weighing weighings[VECTORS];
    int64_t columns = 0, column = 0;
    for (int v = 0; v < VECTORS; v++) {
        weighings[v] = open_plain_weighing(attention, weighed, v * LANES);
        columns = pad_columns(&weighed->tile, v * LANES);
    }
    open_scans(multiplied);
    const column_range whole = multiplied->tile.whole;
    if (whole.first == 0) {
        key_product product = product_of_keys(VECTORS, multiplied, steps);
        column = minimum(columns, whole.last) / STEP * STEP;
        switch (steps) {
        case PARTS: weigh_among_products(1, weighed, weighings, multiplied, &product, column); break;
        case 2 * PARTS: weigh_among_products(2, weighed, weighings, multiplied, &product, column); break;
        case 3 * PARTS: weigh_among_products(3, weighed, weighings, multiplied, &product, column); break;
        default: weigh_among_products(MOST_STEPS_AT_ONCE, weighed, weighings, multiplied, &product, column); break;
        }
        for (int v = 0; v < VECTORS; v++) multiplied->scans[v] = product.scans[v];
    }
    for (int v = 0; v < VECTORS; v++) {
        weigh_columns(weighed, v * LANES, column, columns, &weighings[v]);
        close_weighing(weighed, v * LANES, &weighings[v]);
    }
    if (column < multiplied->tile.columns) compute_logarithms(multiplied, steps, column);
}
#endif

/* The block's scores in natural units, with everything that options do to them. */
static void compute_scores(const cpu_attention* attention, forward_workspace* panel) {
    score_tile* tile = &panel->tile;
    for (int64_t column = 0; column < tile->columns; column++) {
        const float scale = panel->block.key_scales[column];
        for (int64_t row = 0; row < tile->rows; row += LANES) {
            float* at = tile->scores + column * tile->rows + row;
            const vector product = __builtin_convertvector(*(const int_vector*)at, vector) * scale;
            vector_store(at, product * vector_load(panel->query_scales + row) + vector_load(panel->mean_scores + row));
        }
    }
    finish_scores(attention, tile);
}

static void weigh_general_block(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    compute_products(panel, steps_of(attention->head_dim));
    compute_scores(attention, panel);
    for (int64_t row = 0; row < tile->rows; row += LANES) {
        vector_mask attended = *(vector_mask*)(panel->statistics.attended + row);
        for (int64_t column = 0; column < tile->columns; column++) {
            float* at = tile->scores + column * tile->rows + row;
            attended |= tile->full ? (vector_mask)(real_bits)-1 : *(vector_mask*)(tile->attended + column * tile->rows + row);
            const vector logarithm = vector_load(at) * (float)(1 / LN_2) + panel->block.value_logs[column];
            vector_store(at, vector_max(vector_of(NO_WEIGHT), logarithm));
        }
        *(vector_mask*)(panel->statistics.attended + row) = attended;
        const zero_values zeros = take_zero_values(&panel->block, tile, row);
        weigh_rows(panel, row, open_weighing(highest_of_block(tile, row), vector_of(0), zeros));
    }
}

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

/* Whether scores are nothing but scaled dot products. */
static bool is_plain(const cpu_attention* attention) {
    return nothing_is_added(attention) && fabs(attention->softmax_scale) < 1e30;
}

static void begin_item(const cpu_attention* attention, forward_workspace* item) {
    item->plain = is_plain(attention);
    spread_offsets(item->offsets);
    const int64_t pitch = key_pitch_of(attention);
    if (attention->head_dim < pitch && !keys_stay(attention)) { /* what is behind their last code */
        memset(item->block.key_memory, 0, (size_t)(TILE_COLUMNS * pitch) * sizeof(signed_code));
#ifdef WEIGHS_AMONG_PRODUCTS
        memset(item->block_before.key_memory, 0, (size_t)(TILE_COLUMNS * pitch) * sizeof(signed_code));
#endif
    }
}

/* What remains of a block whose plain scores are computed. */
static void finish_plain_block(const cpu_attention* attention, forward_workspace* panel) {
    weigh_plain_block(attention, panel);
    accumulate_output(panel, attention->head_dim_v);
}

static forward_workspace* attend_block(const cpu_attention* attention, forward_workspace* waiting, forward_workspace* panel) {
    if (panel && !panel->plain) {
        weigh_general_block(attention, panel);
        accumulate_output(panel, attention->head_dim_v);
        return NULL;
    }
#ifdef WEIGHS_AMONG_PRODUCTS
    const bool waits = panel && waits_for_next(attention, panel);
    if (waits && waiting) {
        weigh_and_multiply(attention, waiting, panel);
        accumulate_output(waiting, attention->head_dim_v);
        return panel;
    }
#else
    const bool waits = false;
#endif
    if (waiting) finish_plain_block(attention, waiting);
    if (!panel) return NULL;
    open_scans(panel);
    compute_logarithms(panel, steps_of(attention->head_dim), 0);
    if (waits) return panel;
    finish_plain_block(attention, panel);
    return NULL;
}

static const float* channel_scales(const cpu_attention* attention, const head_position* position, int64_t* stride) {
    const cpu_tensor* value = &attention->value;
    *stride = value->scale_strides[3];
    if (has_row_scales(value) || !value->scales) return NULL;
    return value->scales + scale_index(value, position->b, position->kv_head, 0);
}

#include "../shared/forward_items.h"

/* An item of a regular sequence, or what computes the others' does it. */
static void run_item(const cpu_attention* attention, int64_t item, void* memory) {
    int64_t first_row, rows;
    const head_position position = locate_forward_tile(attention, item, &first_row, &rows);
    if (was_found_regular(attention, position.b)) {
        forward_run(attention, item, memory);
    } else {
#ifdef KERNEL_REST
        const cpu_attention rest = problem_of_rest(attention);
        KERNEL_REST.run(&rest, item, memory);
#else
        AGAIN_ROWS(attention, position.b, position.h, first_row, rows, memory);
#endif
    }
}

#pragma clang attribute pop
#pragma clang diagnostic pop

const cpu_attention_kernel KERNEL_NAME(attention_forward, KERNEL_SUFFIX) = {
    .name = "attention_forward_" KERNEL_TEXT(KERNEL_SUFFIX),
    .serves = forward_serves,
    .shared_bytes = shared_bytes,
    .prepare_items = prepare_items,
    .prepare = prepare_run,
    .item_count = forward_tile_items,
    .workspace_bytes = forward_workspace_bytes,
    .run = run_item,
};
