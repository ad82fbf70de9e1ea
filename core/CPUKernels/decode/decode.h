/* Forward attention for few query rows over many keys, as when decoding with a cache: every key and value is read once, where it lies, for
 * all query heads that share it. This file is a template; the attention_decode_*.c files beside it instantiate it with
 *
 *   KERNEL_SUFFIX       the end of the kernel's name, such as float_avx2
 *   KERNEL_WIDE_SUFFIX  the FP64 kernels that compute rows which overflow FP32 arithmetic
 *   KERNEL_TARGET       the instruction set as a target attribute string, or undefined for the architecture's baseline
 *   KERNEL_INTEGER      0: products of FP32 numbers (numbers_float.h).  1: of integers (numbers_int8.h), for INT8 and INT4 keys and values
 *   KERNEL_VNNI         integers only: 1 if the instruction set has VNNI
 *   KERNEL_SLICE        floats in a register
 *   KERNEL_REGISTERS    how many of them there are
 *
 * The keys of a sequence are split into parts of PART_KEYS, and an item is a run of parts of one head of keys, or of some that lie side by
 * side. It goes through its parts in blocks, and through a block head by head: dot products of all its query rows with a block's keys (lanes
 * are channels), their softmax (lanes are keys), the weighted sum of the block's values (lanes are channels). What the items leave in shared
 * memory is joined, part by part in their order, when all are done.
 *
 * Elements become numbers in registers, without their scales: those of rows multiply scores and weights, those of channels the queries and
 * the output. FP32 numbers are less their zero points, so that nothing cancels. Rows with other schemes (FP32 only), and those whose channels
 * are no neighbours or do not fill whole steps, are copied block by block.
 *
 * Numerical contract: scores, softmax and output are FP32; integers are rounded as numbers_int8.h says, their sums exact. The sum over the
 * channels runs in KERNEL_SLICE partial sums that a tree adds up, the one over the keys in order within a block, then over blocks and parts
 * in order; blocks and parts begin at multiples of their size whatever the limits are. A row's bits depend neither on threads nor on other
 * rows, heads or batches, nor on strides. Scores are selected, not added. Values that are not finite show in the sum of their block, which is
 * then computed anew without them. A row that attends one, and one whose result or logsumexp is not finite, is left to the FP64 reference
 * kernel. */
#include "../shared/naming.h"
#include "cpu_kernels.h"

#include <float.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KERNEL_FP64 0
/* Codes are few bytes: their kernels wait for products rather than memory. With AVX-512 one run is read fastest (Zen 5). */
#define KERNEL_FETCH_RUNS (KERNEL_INTEGER || KERNEL_SLICE == 16 ? 1 : 4)

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

/* Which keys of a block are meant, bit by bit. Blocks of codes are of more keys, for they are fewer bytes: what is done once a block takes a
 * large share of the time. */
#if KERNEL_INTEGER
typedef unsigned __int128 key_bits;
#else
typedef uint64_t key_bits;
#endif

/* clang-format off: each file needs those before it */
#include "../shared/conversion.h"
#include "../shared/real.h"
#include "../shared/tile.h"
#include "../shared/rows.h"
#include "../shared/row_stream.h"

enum {
    MOST_QUERIES = 4, /* rows of a head: with more, kernels whose lanes are rows are as fast */
    BLOCK_KEYS = CHAR_BIT * sizeof(key_bits),
    PART_KEYS = 8 * BLOCK_KEYS, /* little enough to keep many threads busy, much beside what joining a part costs */
    MOST_HEADS = 16,            /* of an item */
    ITEMS_PER_THREAD = 4,       /* at least, where as many parts of heads are attended */
    ROWS = 4,                   /* query rows that share a register of keys or values */
    SIDE_BY_SIDE = 2,           /* vectors whose exponentials are computed together */
    FETCHES_OF_ROW = 2,         /* during a row's softmax */
};
_Static_assert(BLOCK_KEYS % (SIDE_BY_SIDE * LANES) == 0, "a block is whole groups of vectors");

#include "slices.h"
#if KERNEL_INTEGER
#include "numbers_int8.h"
#else
#include "numbers_float.h"
#endif
#include "operands.h"
#include "products.h"
/* clang-format on */

/* ---- Partial results ----------------------------------------------------------------------------------------------------------------- */

/* What is known of a row after some of its keys. Its output follows on the next cache line. */
typedef struct {
    float highest; /* score */
    float sum;     /* of exp(score - highest) */
    bool attended; /* any key */
    bool left_out; /* it attends a value that is not finite: the FP64 kernel computes it */
} partial_row;

INLINE int64_t padded_output(const cpu_attention* attention) {
    return padded_channels(multiplied_precision(&attention->value), attention->head_dim_v);
}

INLINE size_t partial_bytes(const cpu_attention* attention) {
    return CACHE_LINE + (size_t)round_up(padded_output(attention) * (int64_t)sizeof(float), CACHE_LINE);
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

/* Whether each row lies beside that of the next head, and is read there. */
static bool lies_beside_next_head(const cpu_tensor* tensor, int64_t channels) {
    return tensor->strides[1] == channels && tensor->strides[1] < tensor->strides[2] && stays_in_place(tensor, channels);
}

/* Heads of keys in an item: some, where each row lies beside that of the next head, for memory is read best in long runs. */
static int64_t heads_of_item(const cpu_attention* attention) {
    if (!lies_beside_next_head(&attention->key, attention->head_dim)) return 1;
    if (!lies_beside_next_head(&attention->value, attention->head_dim_v)) return 1;
    int64_t heads = minimum(attention->num_kv_heads, MOST_HEADS);
    const int64_t others = attention->batch_size * part_count(attention), threads = attention->threads;
    while (threads > 1 && heads > 1 && others * divide_up(attention->num_kv_heads, heads) < ITEMS_PER_THREAD * threads) heads /= 2;
    return heads;
}

/* Arrays of rows are of the rows of one head of keys, in one block, unless they are of all heads of an item. */
typedef struct {
    operand key, value;
    number* query;        /* [heads][rows][padded head_dim] */
    float* mean_scores;   /* [heads][rows]: dot products with the keys' channel means */
    key_bits* attended;   /* [rows]: which of the block's keys are */
    float* additions;     /* [rows][BLOCK_KEYS]: the additive mask; NULL without mask */
    float* scores;        /* [rows][BLOCK_KEYS]: dot products, then scores, then weights */
    float* block_highest; /* [rows]: the highest score */
    bool* block_is_nan;   /* [rows]: any score */
#if KERNEL_INTEGER
    float* query_scales;    /* [heads][rows] */
    float* query_sums;      /* [heads][rows]: of the row's numbers */
    number* weights;        /* [rows][BLOCK_KEYS] */
    float* largest_weights; /* [rows] */
    float* factors;         /* [rows]: what the block's weighted sums are multiplied by */
    float* excess;          /* [rows]: what bias and zero points add to those */
#endif
    float* rescale;        /* [rows] */
    float* block_output;   /* [ROWS][padded head_dim_v] */
    float* finite_values;  /* [BLOCK_KEYS][padded head_dim_v]: the block's values with 0 for what is not finite */
    float* row;            /* [padded channels] */
    number* row_numbers;   /* [padded head_dim] */
    partial_row** partial; /* [heads][rows] */
    char* partials;        /* those of a problem with one part, [heads][rows] */
    char* wide;            /* for the FP64 kernel */
} decode_workspace;

static size_t decode_layout(const cpu_attention* attention, void* memory, decode_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    const int64_t rows = group_rows(attention), all_rows = heads_of_item(attention) * rows;
    const int64_t head_dim = padded_channels(attention->key.precision, attention->head_dim), head_dim_v = padded_output(attention);
    take_operand(&cursor, &attention->key, attention->head_dim, &workspace->key);
    take_operand(&cursor, &attention->value, attention->head_dim_v, &workspace->value);
    workspace->query = workspace_take(&cursor, all_rows * head_dim, sizeof(number));
    workspace->mean_scores = workspace_take_reals(&cursor, all_rows);
    workspace->attended = workspace_take(&cursor, rows, sizeof(key_bits));
    workspace->additions = attention->mask.data ? workspace_take_reals(&cursor, rows * BLOCK_KEYS) : NULL;
    workspace->scores = workspace_take_reals(&cursor, rows * BLOCK_KEYS);
    workspace->block_highest = workspace_take_reals(&cursor, rows);
    workspace->block_is_nan = workspace_take(&cursor, rows, sizeof(bool));
#if KERNEL_INTEGER
    workspace->query_scales = workspace_take_reals(&cursor, all_rows);
    workspace->query_sums = workspace_take_reals(&cursor, all_rows);
    workspace->weights = workspace_take(&cursor, rows * BLOCK_KEYS, sizeof(number));
    workspace->largest_weights = workspace_take_reals(&cursor, rows);
    workspace->factors = workspace_take_reals(&cursor, rows);
    workspace->excess = workspace_take_reals(&cursor, rows);
#endif
    workspace->rescale = workspace_take_reals(&cursor, rows);
    workspace->block_output = workspace_take_reals(&cursor, ROWS * head_dim_v);
    workspace->finite_values = has_codes(&attention->value) ? NULL : workspace_take_reals(&cursor, BLOCK_KEYS * head_dim_v);
    workspace->row = workspace_take_reals(&cursor, maximum(head_dim, head_dim_v));
    workspace->row_numbers = workspace_take(&cursor, head_dim, sizeof(number));
    workspace->partial = workspace_take(&cursor, all_rows, sizeof(partial_row*));
    workspace->partials = workspace_take(&cursor, part_count(attention) == 1 ? all_rows : 0, partial_bytes(attention));
    workspace->wide = workspace_take(&cursor, (int64_t)KERNEL_WIDE_ROWS_BYTES(attention), 1);
    return cursor.used;
}

/* The workspace of head n of an item. What is of a block, its scales too, is shared by all heads: it is filled in anew for each. */
static decode_workspace select_head(const cpu_attention* attention, const decode_workspace* item, int64_t n) {
    decode_workspace selected = *item;
    const int64_t first = n * group_rows(attention);
    selected.query += first * padded_channels(attention->key.precision, attention->head_dim);
    selected.mean_scores += first;
#if KERNEL_INTEGER
    selected.query_scales += first;
    selected.query_sums += first;
#endif
    selected.partial += first;
    selected.partials += part_count(attention) == 1 ? partial_bytes(attention) * (size_t)first : 0;
    return selected;
}

static size_t decode_workspace_bytes(const cpu_attention* attention) {
    return decode_layout(attention, NULL, &(decode_workspace){0});
}

/* ---- Rows ---------------------------------------------------------------------------------------------------------------------------- */

#if KERNEL_INTEGER
/* A query's numbers: its codes, if they are meant to be multiplied as they are, else its channels rounded to 16 bits. */
static void round_query(const cpu_attention* attention, const head_position* at, int64_t row, float* channels,
                        decode_workspace* workspace) {
    const cpu_tensor* query = &attention->query;
    const row_place place = place_of_row(attention, at, row);
    const int64_t head_dim = attention->head_dim, padded = workspace->key.padded;
    float scale = 1;
    bool exact = has_codes(query) && query->scale_strides[3] == 0 && !query->zero_points && !has_channel_scales(&workspace->key.tensor);
    if (exact) {
        int8_t scratch[CPU_MAX_HEAD_DIM];
        const int8_t* codes = load_codes(query, at->b, place.h, place.i, head_dim, scratch);
        for (int64_t d = 0; d < head_dim; d++) channels[d] = codes[d];
        if (query->scales) scale = query->scales[scale_index(query, at->b, place.h, place.i)];
    } else {
        vector highest = vector_of(FLT_MIN);
        for (int64_t d = 0; d < padded; d += LANES) {
            const vector numbers = vector_load(channels + d);
            highest = vector_max(vector_max(highest, numbers), -numbers);
        }
        const float largest = highest_of_lanes(highest);
        scale = largest / LARGEST_NUMBER;
        for (int64_t d = 0; d < padded; d += LANES) {
            const vector shifted = vector_load(channels + d) / largest * (float)LARGEST_NUMBER + ROUND_TO_INTEGER;
            vector_store(channels + d, shifted - ROUND_TO_INTEGER);
        }
    }
    vector sums = vector_of(0);
    for (int64_t d = 0; d < padded; d += LANES) sums += vector_load(channels + d);
    workspace->query_scales[row] = scale;
    workspace->query_sums[row] = sum_of_lanes(sums);
}
#endif

/* Puts the numbers of a row in the order of the steps' turns. */
INLINE void take_turns(const number* in_order, int64_t padded, const int turns, int64_t of_turn, number* out) {
    for (int64_t first = 0; first < padded; first += turns * of_turn) {
        for (int64_t n = 0; n < of_turn; n++) {
#pragma clang loop unroll(full)
            for (int turn = 0; turn < turns; turn++) out[first + turn * of_turn + n] = in_order[first + n * turns + turn];
        }
    }
}

/* Reads the queries of all rows as the keys' codes are to meet them. */
static void load_queries(const cpu_attention* attention, const head_position* at, decode_workspace* workspace) {
    const operand* key = &workspace->key;
    const cpu_tensor query = score_operand(&attention->query);
    const int64_t head_dim = attention->head_dim, padded = key->padded;
    const float* scales = NULL;
    if (has_channel_scales(&key->tensor)) {
        scales = key->tensor.scales + at->b * key->tensor.scale_strides[0] + at->kv_head * key->tensor.scale_strides[1];
    }
    const float* means = key->dequantized ? NULL : key->tensor.channel_means;
    if (means) means += at->b * key->tensor.mean_strides[0] + at->kv_head * key->tensor.mean_strides[1];
    for (int64_t row = 0; row < group_rows(attention); row++) {
        const row_place place = place_of_row(attention, at, row);
        float* channels = workspace->row;
        load_row_float(&query, at->b, place.h, place.i, head_dim, channels);
        float mean_score = 0;
        for (int64_t d = 0; d < head_dim && means; d++) mean_score += channels[d] * means[d];
        workspace->mean_scores[row] = mean_score;
        for (int64_t d = 0; d < head_dim && scales; d++) channels[d] *= scales[d * key->tensor.scale_strides[3]];
        for (int64_t d = head_dim; d < padded; d++) channels[d] = 0;
#if KERNEL_INTEGER
        /* Codes hide a query that is not finite. */
        if (!rows_are_finite(channels, head_dim, 1, head_dim)) {
            workspace->mean_scores[row] = NAN;
            memset(channels, 0, (size_t)head_dim * sizeof(float));
        }
        round_query(attention, at, row, channels, workspace);
#endif
        number* out = workspace->query + row * padded;
        const int turns = KEY_TURNS(key->precision);
        number* in_order = turns == 1 ? out : workspace->row_numbers;
        for (int64_t d = 0; d < padded; d++) in_order[d] = (number)channels[d];
        const int64_t of_turn = CHANNEL_STEP(key->precision) / turns;
        if (turns == 2) take_turns(in_order, padded, 2, of_turn, out);
        if (turns == 4) take_turns(in_order, padded, 4, of_turn, out);
    }
}

/* Bits first ..< last. */
INLINE key_bits bits_between(int64_t first, int64_t last) {
    if (first >= last) return 0;
    return (~(key_bits)0 >> (BLOCK_KEYS - (last - first))) << first;
}

/* The columns that a mask excludes: 64 at once, for shifts of more bits take longer. */
static key_bits find_excluded(const float* additions, int64_t columns) {
    key_bits excluded = 0;
    for (int64_t first = 0; first < columns; first += 64) {
        uint64_t few = 0;
        for (int64_t k = 0; k < minimum(64, columns - first); k++) few |= (uint64_t)(additions[first + k] == -INFINITY) << k;
        excluded |= (key_bits)few << first;
    }
    return excluded;
}

/* Which of the block's keys each row attends, and the mask's additions. False if none attends any. */
static bool find_attended(const cpu_attention* attention, const head_position* at, int64_t first_column, int64_t columns,
                          decode_workspace* workspace) {
    key_bits any = 0;
    for (int64_t row = 0; row < group_rows(attention); row++) {
        const row_place place = place_of_row(attention, at, row);
        const column_range range = columns_of_row(attention, at, place.i);
        key_bits attended = bits_between(maximum(range.first - first_column, 0), minimum(range.last - first_column, columns));
        if (workspace->additions && attended) {
            float* additions = workspace->additions + row * BLOCK_KEYS;
            const cpu_tensor* mask = &attention->mask;
            const int64_t offset = row_offset(mask, at->b, place.h, place.i) + first_column * mask->strides[3];
            load_mask_line(mask, (const char*)mask->data + offset * element_bytes(mask->precision), columns, additions);
            attended &= ~find_excluded(additions, columns);
        }
        workspace->attended[row] = attended;
        any |= attended;
    }
    return any != 0;
}

/* A block's scores become weights in stages, each for all rows: within a row one number waits for the next, and what is of other rows is
 * computed meanwhile. */

/* Turns a row's dot products with the block into scores and finds their highest. One that overflows to -inf has no weight, as it has none by
 * the formulas. */
static void score_row(const cpu_attention* attention, const head_position* at, int64_t row, int64_t first_column,
                      decode_workspace* workspace) {
    const vector_mask lane_bits = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                   1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const vector lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const float scale = (float)attention->softmax_scale, softcap = softcap_of(attention), mean_score = workspace->mean_scores[row];
    const row_place place = place_of_row(attention, at, row);
    const float slope = attention->alibi_slopes ? get_statistic(attention, attention->alibi_slopes, place.h) : 0;
    const vector diagonal = vector_of((float)(place.i + at->offset - first_column)) - lanes;
    const key_bits attended = workspace->attended[row];
    const int64_t columns = round_up(workspace->key.columns, SIDE_BY_SIDE * LANES);
    const float *key_scales = workspace->key.scales, *additions = workspace->additions;
    if (additions) additions += row * BLOCK_KEYS;
    float* scores = workspace->scores + row * BLOCK_KEYS;
#if KERNEL_INTEGER
    const float *zero_points = workspace->key.zero_points, query_sum = workspace->query_sums[row],
                query_scale = workspace->query_scales[row];
#endif

    vector highest = vector_of(-INFINITY);
    vector_mask is_nan = 0;
    for (int64_t column = 0; column < columns; column += LANES) {
        vector score = vector_load(scores + column);
#if KERNEL_INTEGER
        score = (score - vector_load(zero_points + column) * query_sum) * query_scale;
#endif
        score = score * vector_load(key_scales + column) + mean_score;
        score *= scale;
        if (softcap > 0) score = softcap * vector_tanh(score / softcap);
        if (additions) score += vector_load(additions + column);
        if (attention->alibi_slopes) {
            const vector distance = diagonal - (float)column;
            score -= slope * vector_select(distance < 0, -distance, distance);
        }
        const real_bits here = (real_bits)(attended >> column & 0xFFFF);
        if (here != 0xFFFF) score = vector_select(((vector_mask)here & lane_bits) != 0, score, vector_of(-INFINITY));
        highest = vector_max(highest, score);
        is_nan |= score != score;
        vector_store(scores + column, score);
    }
    workspace->block_highest[row] = highest_of_lanes(highest);
    workspace->block_is_nan[row] = vector_any(is_nan);
}

/* Takes the block's highest score into a row's partial result. */
static void raise_highest(int64_t row, decode_workspace* workspace) {
    partial_row* partial = workspace->partial[row];
    const float block_highest = workspace->block_highest[row];
    float rescale = 1;
    if (!(block_highest <= partial->highest)) {
        rescale = real_exp(partial->highest - block_highest);
        partial->highest = block_highest;
    }
    partial->attended = true;
    workspace->rescale[row] = rescale;
}

/* Turns a row's scores into weights, and takes their sum into its partial result. A score that is NaN or +inf makes the sum NaN, and so the
 * row known. */
static void weigh_row(int64_t row, decode_workspace* workspace) {
    partial_row* partial = workspace->partial[row];
    const float reference = partial->highest, *value_scales = workspace->value.scales;
    const int64_t columns = workspace->key.columns;
    float* scores = workspace->scores + row * BLOCK_KEYS;
    vector sums = vector_of(0), highest = vector_of(0);
    for (int64_t column = 0; column < columns; column += SIDE_BY_SIDE * LANES) {
        vector weights[SIDE_BY_SIDE];
        for (int n = 0; n < SIDE_BY_SIDE; n++) {
            weights[n] = (vector_load(scores + column + n * LANES) - reference) * (float)(1 / LN_2);
        }
        vectors_exp2(weights, SIDE_BY_SIDE);
        for (int n = 0; n < SIDE_BY_SIDE; n++) {
            sums += weights[n];
            const vector weight = weights[n] * vector_load(value_scales + column + n * LANES);
            highest = vector_max(highest, weight);
            vector_store(scores + column + n * LANES, weight);
        }
    }
    const bool is_known = !workspace->block_is_nan[row] && reference - reference == 0; /* exponentials do not tell */
    partial->sum = partial->sum * workspace->rescale[row] + (is_known ? sum_of_lanes(sums) : NAN);
#if KERNEL_INTEGER
    workspace->largest_weights[row] = highest_of_lanes(highest);
#endif
}

#if KERNEL_INTEGER
typedef number vector_of_numbers __attribute__((ext_vector_type(LANES)));

/* Rounds a row's weights to multiples of their largest one's share of LARGEST_NUMBER. */
static void round_weights(int64_t row, decode_workspace* workspace) {
    const float *weights = workspace->scores + row * BLOCK_KEYS, *zero_points = workspace->value.zero_points;
    const int64_t columns = workspace->value.columns;
    number* rounded_weights = workspace->weights + row * BLOCK_KEYS;
    const float largest = workspace->largest_weights[row];
    const bool vanishes = largest < FLT_MIN * LARGEST_NUMBER;
    const float factor = vanishes ? 0 : LARGEST_NUMBER / largest;
    vector excess = vector_of(0);
    for (int64_t column = 0; column < columns; column += LANES) {
        const vector shifted = vector_load(weights + column) * factor + ROUND_TO_INTEGER;
        const vector_of_numbers rounded = __builtin_convertvector(*(const vector_mask*)&shifted, vector_of_numbers);
        memcpy(rounded_weights + column, &rounded, sizeof rounded);
        excess += (shifted - ROUND_TO_INTEGER) * vector_load(zero_points + column);
    }
    workspace->factors[row] = vanishes ? 0 : largest / LARGEST_NUMBER;
    workspace->excess[row] = sum_of_lanes(excess);
}
#endif

/* The block's weights of all rows. */
static void weigh_block(const cpu_attention* attention, const head_position* at, int64_t first_column, row_queue* queue,
                        decode_workspace* workspace) {
    const int64_t rows = group_rows(attention);
    const key_bits* attended = workspace->attended;
    for (int64_t row = 0; row < rows; row++) {
        if (attended[row]) score_row(attention, at, row, first_column, workspace);
        fetch_queue(queue);
    }
    for (int64_t row = 0; row < rows; row++) {
        if (attended[row]) raise_highest(row, workspace);
    }
    for (int64_t row = 0; row < rows; row++) {
        if (attended[row]) weigh_row(row, workspace);
        fetch_queue(queue);
    }
#if KERNEL_INTEGER
    for (int64_t row = 0; row < rows; row++) {
        if (attended[row]) round_weights(row, workspace);
    }
#endif
}

/* Copies the block's values as FP32 with 0 for what is not finite. Returns the keys of those that were not. */
static key_bits copy_finite_values(const operand* value, int64_t first_column, float* finite) {
    const int64_t padded = value->padded;
    key_bits infinite = 0;
    for (int64_t k = 0; k < value->columns; k++) {
        float* row = finite + k * padded;
        memset(row, 0, (size_t)padded * sizeof(float));
        load_row_float(&value->tensor, value->b, value->head, first_column + k, value->channels, row);
        for (int64_t d = 0; d < value->channels; d++) {
            if (row[d] - row[d] == 0) continue;
            row[d] = 0;
            infinite |= (key_bits)1 << k;
        }
    }
    return infinite;
}

/* Adds the block's weighted values to the output of rows first ..< first + rows. */
static void add_values(int64_t first_column, int64_t first, int64_t rows, row_queue* queue, decode_workspace* workspace) {
    const operand* value = &workspace->value;
    const int64_t padded = value->padded;
#if KERNEL_INTEGER
    (void)first_column;
    multiply_value_block(value, rows, workspace->weights + first * BLOCK_KEYS, workspace->block_output, queue);
#else
    const float* weights = workspace->scores + first * BLOCK_KEYS;
    if (!multiply_value_block(value, rows, weights, workspace->block_output, queue) && workspace->finite_values) {
        const key_bits infinite = copy_finite_values(value, first_column, workspace->finite_values);
        for (int64_t row = first; row < first + rows; row++) {
            if (workspace->attended[row] & infinite) workspace->partial[row]->left_out = true;
        }
        operand finite = *value;
        finite.precision = CPU_FP32;
        finite.rows = (const char*)workspace->finite_values;
        finite.stride = padded * (int64_t)sizeof(float);
        multiply_value_block(&finite, rows, weights, workspace->block_output, queue);
    }
#endif
    for (int64_t row = first; row < first + rows; row++) {
        if (!workspace->attended[row]) continue;
        const float* block = workspace->block_output + (row - first) * padded;
        const float rescale = workspace->rescale[row];
        float* output = partial_output(workspace->partial[row]);
        for (int64_t d = 0; d < padded; d += SLICE) {
            slice addition = slice_load(block + d);
#if KERNEL_INTEGER
            addition = (addition - workspace->excess[row]) * workspace->factors[row];
#endif
            slice_store(output + d, slice_load(output + d) * rescale + addition);
        }
    }
}

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

/* Joins the parts of row i of head h and stores it. */
static void finish_decoded_row(const cpu_attention* attention, int64_t b, int64_t h, int64_t i, partial_row* first, int64_t parts,
                               decode_workspace* workspace) {
    const cpu_tensor* value = &attention->value;
    const cpu_precision precision = multiplied_precision(value);
    const int64_t channels = attention->head_dim_v, padded = padded_output(attention);
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
    float* sums = workspace->block_output;
    memset(sums, 0, (size_t)padded * sizeof(float));
    for (int64_t part = 0; part < parts; part++) {
        partial_row* partial = next_partial(attention, first, part);
        if (!partial->attended) continue;
        const float factor = real_exp(partial->highest - highest);
        const float* addition = partial_output(partial);
        sum += partial->sum * factor;
        for (int64_t d = 0; d < padded; d += SLICE) slice_store(sums + d, slice_load(addition + d) * factor + slice_load(sums + d));
    }

    const row_statistics statistics = {.highest = &highest, .sum = &sum, .attended = &attended, .is_nan = &is_nan};
    const float* scales = NULL;
    if (has_channel_scales(value)) {
        scales = value->scales + b * value->scale_strides[0] + h / group_heads(attention) * value->scale_strides[1];
    }
    float* output = workspace->row; /* of whole steps */
    real logsumexp;
    const real factor = finish_row(attention, h, &statistics, 0, &logsumexp);
    const int64_t step = CHANNEL_STEP(precision);
    for (int64_t start = 0; start < padded; start += step) {
        for (int64_t d = 0; d < step; d++) output[start + value_channel(precision, d)] = attended ? sums[start + d] * factor : 0;
    }
    for (int64_t d = 0; d < channels && scales; d++) output[d] *= scales[d * value->scale_strides[3]];
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
    if (attention->seq_len_q > MOST_QUERIES || attention->dropout_p != 0) return false;
    return !KERNEL_INTEGER || (multiplies_codes(&attention->key) && multiplies_codes(&attention->value));
}

/* Parts that the queries of a sequence attend. */
static int64_t attended_parts(const cpu_attention* attention, int64_t b) {
    const head_position at = locate_head(attention, b, 0);
    const column_range range = columns_of_rows(attention, &at, 0, group_rows(attention));
    const int64_t last = minimum(range.last, at.keys);
    return range.first < last ? divide_up(last, PART_KEYS) - range.first / PART_KEYS : 0;
}

/* Items side by side in the heads of a sequence. */
static int64_t groups_of_heads(const cpu_attention* attention) {
    return divide_up(attention->num_kv_heads, heads_of_item(attention));
}

/* Parts in an item: what follows within an item is fetched in time, and its queries are at hand. Parts are joined one by one, whatever items
 * they are in. */
static int64_t parts_of_item(const cpu_attention* attention) {
    const int64_t parts = part_count(attention), items = ITEMS_PER_THREAD * attention->threads, batch = attention->batch_size;
    const int64_t groups = groups_of_heads(attention);
    if (attention->threads <= 1 || batch * groups >= items) return parts;
    int64_t attended = 0;
    for (int64_t b = 0; b < batch; b++) attended += attended_parts(attention, b);
    return maximum(1, minimum(parts, attended * groups / items));
}

static int64_t decode_items(const cpu_attention* attention) {
    return attention->batch_size * groups_of_heads(attention) * divide_up(part_count(attention), parts_of_item(attention));
}

/* A head of keys of an item. */
typedef struct {
    head_position at;
    decode_workspace workspace;
} decoded_head;

/* Empties the partial results of a head's rows in a part. */
static void clear_partials(const cpu_attention* attention, const decoded_head* head, int64_t part) {
    const decode_workspace* workspace = &head->workspace;
    for (int64_t row = 0; row < group_rows(attention); row++) {
        const row_place place = place_of_row(attention, &head->at, row);
        partial_row* partial = (partial_row*)(workspace->partials + partial_bytes(attention) * (size_t)row);
        if (part_count(attention) > 1) {
            partial = next_partial(attention, find_shared_partials(attention, head->at.b, place.h, place.i), part);
        }
        *partial = (partial_row){.highest = -INFINITY};
        memset(partial_output(partial), 0, (size_t)padded_output(attention) * sizeof(float));
        workspace->partial[row] = partial;
    }
}

static void open_head(const cpu_attention* attention, decoded_head* head) {
    const head_position* at = &head->at;
    const cpu_tensor key = score_operand(&attention->key);
    place_operand(&key, at->b, at->kv_head, attention->head_dim, &head->workspace.key);
    place_operand(&attention->value, at->b, at->kv_head, attention->head_dim_v, &head->workspace.value);
    load_queries(attention, at, &head->workspace);
}

/* How often a block asks for lines of what will be needed: before its values are multiplied, and while they are. About as much time is between
 * each two. */
typedef struct {
    int64_t before_values, of_values;
} fetches;

static fetches fetches_of_block(const cpu_attention* attention, const operand* value, int64_t columns) {
    const int64_t rows = group_rows(attention), groups = divide_up(rows, ROWS), together = minimum(rows, ROWS);
    return (fetches){
        .before_values = groups * divide_up(columns, KEYS_AT_ONCE(together)) + rows * FETCHES_OF_ROW,
        .of_values = groups * divide_up(columns, KEYS_BETWEEN_FETCHES) * divide_up(value->padded / SLICE, SLICES_AT_ONCE(together)),
    };
}

/* What is fetched while a block of head n of `count` is computed with. Of one head, the block's own values and then the keys of the next
 * block, which begins at `next` and ends before `last_fetched`; of several, a share of all that they need of the next block, which is much. */
static row_queue find_rows_to_fetch(const cpu_attention* attention, const decoded_head* heads, int64_t n, int64_t count, int64_t column,
                                    int64_t columns, int64_t last_fetched) {
    const operand *key = &heads[0].workspace.key, *value = &heads[0].workspace.value;
    const int64_t next = column + BLOCK_KEYS, next_columns = minimum(BLOCK_KEYS, last_fetched - next);
    const fetches goes = fetches_of_block(attention, value, columns);
    const int64_t times = goes.before_values + goes.of_values;
    const int64_t value_bytes = row_bytes(value->precision, value->padded), key_bytes = row_bytes(key->precision, key->padded);
    const int64_t value_times = maximum(1, minimum(goes.before_values, times * value_bytes / (value_bytes + key_bytes)));
    const int64_t key_times = maximum(1, times - value_times);
    if (count == 1) {
        return (row_queue){
            .now = stream_operand(value, 1, column, columns, value_times),
            .next = stream_operand(key, 1, next, next_columns, key_times),
        };
    }
    const int64_t first = next_columns * n / count, rows = next_columns * (n + 1) / count - first;
    return (row_queue){
        .now = stream_operand(value, count, next + first, rows, value_times),
        .next = stream_operand(key, count, next + first, rows, key_times),
    };
}

/* Takes a block of keys and values into the partial results of a head's rows. */
static void attend_block(const cpu_attention* attention, decoded_head* head, int64_t column, int64_t columns, row_queue fetched) {
    decode_workspace* workspace = &head->workspace;
    operand *key = &workspace->key, *value = &workspace->value;
    const int64_t rows = group_rows(attention);
    if (!find_attended(attention, &head->at, column, columns, workspace)) return;
    place_block(key, column, columns);
    place_block(value, column, columns);
    gather_block(key);
    for (int64_t row = 0; row < rows; row += ROWS) {
        multiply_key_block(key, minimum(ROWS, rows - row), workspace->query + row * key->padded, workspace->scores + row * BLOCK_KEYS,
                           &fetched);
    }
    weigh_block(attention, &head->at, column, &fetched, workspace);
    gather_block(value); /* not before: they were fetched meanwhile */
    for (int64_t row = 0; row < rows; row += ROWS) add_values(column, row, minimum(ROWS, rows - row), &fetched, workspace);
}

static void decode_run(const cpu_attention* attention, int64_t item, void* memory) {
    decode_workspace workspace;
    decode_layout(attention, memory, &workspace);
    const int64_t parts = part_count(attention), run = parts_of_item(attention), runs = divide_up(parts, run);
    const int64_t groups = groups_of_heads(attention), group = item / runs, most = heads_of_item(attention);
    const int64_t first_head = group % groups * most, count = minimum(most, attention->num_kv_heads - first_head);
    const int64_t first_part = item % runs * run, last_part = minimum(parts, first_part + run);
    const int64_t rows = group_rows(attention);
    decoded_head heads[MOST_HEADS];
    for (int64_t n = 0; n < count; n++) {
        heads[n].at = locate_head(attention, group / groups, (first_head + n) * group_heads(attention));
        heads[n].workspace = select_head(attention, &workspace, n);
    }

    const column_range range = columns_of_rows(attention, &heads[0].at, 0, rows);
    const int64_t first_key = maximum(range.first / BLOCK_KEYS * BLOCK_KEYS, first_part * PART_KEYS);
    const int64_t last_key = minimum(minimum(range.last, heads[0].at.keys), last_part * PART_KEYS);
    for (int64_t n = 0; n < count && first_key < last_key; n++) open_head(attention, &heads[n]);
    for (int64_t part = first_part; part < last_part; part++) {
        for (int64_t n = 0; n < count; n++) clear_partials(attention, &heads[n], part);
        const int64_t last = minimum(last_key, (part + 1) * PART_KEYS);
        for (int64_t column = maximum(first_key, part * PART_KEYS); column < last; column += BLOCK_KEYS) {
            const int64_t columns = minimum(BLOCK_KEYS, last - column);
            for (int64_t n = 0; n < count; n++) {
                attend_block(attention, &heads[n], column, columns,
                             find_rows_to_fetch(attention, heads, n, count, column, columns, last_key));
            }
        }
    }

    for (int64_t n = 0; n < count && parts == 1; n++) {
        for (int64_t row = 0; row < rows; row++) {
            const row_place place = place_of_row(attention, &heads[n].at, row);
            finish_decoded_row(attention, heads[n].at.b, place.h, place.i, heads[n].workspace.partial[row], 1, &workspace);
        }
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
