/* Forward attention in FP32 arithmetic, for operands of every type but FP64. This file is a template; the attention_forward_float_*.c files
 * beside it instantiate it with
 *
 *   KERNEL_SUFFIX         the end of the kernel's name, such as float_avx2
 *   KERNEL_WIDE_SUFFIX    the reference kernels that compute rows which overflow FP32 arithmetic
 *   KERNEL_TARGET         the instruction set as a target attribute string, or undefined for the architecture's baseline
 *   KERNEL_PANEL_VECTORS  vectors of query rows in a panel: 1 or 2
 *
 * An item is a tile of query rows of one head, or of all heads that share keys where rows are few. It is cut into panels, which the products
 * work on (panel.h): queries, scores and output lie transposed, a vector being one channel or one key of LANES query rows. A panel's
 * queries, scores and output stay in the first-level cache. Keys and values are read as FP32 numbers once for a block of columns and
 * serve all panels of the item; their rows are `pitch` apart, which is no power of two, lest they share cache sets. Rows that are FP32 numbers
 * are used where they lie, if cache sets allow it.
 *
 * Numerical contract: scores, softmax and sums are FP32; sums over head_dim run in the order of the channels, sums over keys in the order of
 * the columns within blocks of TILE_COLUMNS, and of the blocks. Exponentials are of base 2, with the scale of the scores folded into their
 * argument. Their references are maxima, rounded up to integers: as long as those are small, taking them off a score rounds nothing. Rows
 * that meet a score which is not finite, or a largest one beyond LARGEST_SCORE, or whose result is not finite, are left to the reference
 * kernels of FP64 arithmetic. */
#include "../shared/naming.h"
#include "cpu_kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define KERNEL_FP64 0
#define KERNEL_TILE_ROWS 256
#define KERNEL_TILE_COLUMNS 128

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpsabi"           /* every function that takes or returns a vector is inlined */
#pragma clang diagnostic ignored "-Wunused-function" /* the headers serve other kernels too */
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef KERNEL_TARGET
#pragma clang attribute push(__attribute__((target(KERNEL_TARGET))), apply_to = function)
#endif

/* clang-format off: each file needs those before it */
#include "../shared/conversion.h"
#include "../shared/real.h"
#include "../shared/transpose.h"
#include "../shared/tile.h"
#include "../shared/rows.h"
#include "../shared/row_stream.h"
#include "../shared/panel.h"
/* clang-format on */

/* FP32 arithmetic can overflow where the formulas do not: such rows are computed once more, with wide arithmetic. */
#define AGAIN_ROWS KERNEL_NAME(attention_forward_rows, KERNEL_WIDE_SUFFIX)
#define AGAIN_ROWS_BYTES KERNEL_NAME(attention_forward_rows_bytes, KERNEL_WIDE_SUFFIX)
#define AGAIN_FLOAT_STATISTICS true
void AGAIN_ROWS(const cpu_attention* attention, int64_t b, int64_t h, int64_t first_row, int64_t rows, void* memory);
size_t AGAIN_ROWS_BYTES(const cpu_attention* attention);

enum { PANEL_ROWS = KERNEL_PANEL_VECTORS * LANES, FETCH_NEIGHBOURS = 1 };

static const float FARTHEST_SCORE = INFINITY;

/* ---- Workspace ----------------------------------------------------------------------------------------------------------------------- */

/* Keys and values of some columns, as FP32 numbers. */
typedef struct {
    const real* key;   /* [TILE_COLUMNS][key_pitch] */
    const real* value; /* [TILE_COLUMNS][value_pitch] */
    real *key_memory, *value_memory;
    int64_t key_pitch, value_pitch;
    const real* finite_value; /* [TILE_COLUMNS][finite_pitch]: 0 for what is not finite; the values themselves if all are */
    real* finite_copy;
    int64_t finite_pitch;
} column_block;

typedef struct {
    score_tile tile;
    bool plain;                /* scores are nothing but scaled dot products */
    float factor;              /* what takes scores to binary logarithms */
    real* query;               /* [head_dim][rows] for each panel */
    real* output;              /* [head_dim_v][rows] for each panel */
    row_statistics statistics; /* [tile rows] */
    real_bits* infinite;       /* [tile rows] */
    column_block block;
    real* rows; /* [PANEL_ROWS][row_pitch] */
    int64_t row_pitch;
    real* dropout; /* [TILE_COLUMNS][PANEL_ROWS], or NULL */
    upcoming_rows* upcoming;
} forward_workspace;

/* Distance of rows: their cache lines fall into all sets. */
static int64_t pitch_of(int64_t channels) {
    return (round_up(channels, LANES) / LANES | 1) * LANES;
}

static size_t forward_layout(const cpu_attention* attention, void* memory, forward_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    const int64_t rows = forward_tile_rows(attention), head_dim = attention->head_dim, head_dim_v = attention->head_dim_v;
    const int64_t pitch = pitch_of(head_dim), pitch_v = pitch_of(head_dim_v);
    take_score_tile(&cursor, attention, PANEL_ROWS, false, &workspace->tile);
    workspace->query = workspace_take_reals(&cursor, head_dim * rows);
    workspace->output = workspace_take_reals(&cursor, head_dim_v * rows);
    take_row_statistics(&cursor, rows, &workspace->statistics);
    workspace->infinite = workspace_take(&cursor, rows, sizeof(real_bits));
    workspace->block.key_memory = workspace_take_reals(&cursor, TILE_COLUMNS * pitch);
    workspace->block.value_memory = workspace_take_reals(&cursor, TILE_COLUMNS * pitch_v);
    workspace->block.finite_copy = workspace_take_reals(&cursor, TILE_COLUMNS * pitch_v);
    workspace->row_pitch = maximum(pitch, pitch_v);
    workspace->rows = workspace_take_reals(&cursor, PANEL_ROWS * workspace->row_pitch);
    workspace->dropout = attention->dropout_p > 0 ? workspace_take_reals(&cursor, TILE_COLUMNS * PANEL_ROWS) : NULL;
    return cursor.used;
}

static size_t forward_workspace_bytes(const cpu_attention* attention) {
    size_t bytes = forward_layout(attention, NULL, &(forward_workspace){0});
    size_t wide_bytes = AGAIN_ROWS_BYTES(attention);
    return bytes > wide_bytes ? bytes : wide_bytes;
}

/* ---- Operands ------------------------------------------------------------------------------------------------------------------------ */

static void select_queries(const cpu_attention* attention, forward_workspace* selected, int64_t first) {
    selected->query += first * attention->head_dim;
}

static void open_queries(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    const cpu_tensor query = score_operand(&attention->query);
    const int64_t head_dim = attention->head_dim, pitch = panel->row_pitch;
    const float* rows = tile->valid_rows == tile->rows ? find_tile_rows(attention, tile, &query) : NULL;
    if (rows) {
        transpose_floats(rows, query.strides[2], tile->rows, head_dim, panel->query, tile->rows);
    } else {
        for (int64_t row = 0; row < tile->valid_rows; row++) {
            const row_place place = place_of_row(attention, &tile->position, tile->first_row + row);
            load_rows(&query, tile->position.b, place.h, place.i, 1, head_dim, panel->rows + row * pitch, pitch);
        }
        memset(panel->rows + tile->valid_rows * pitch, 0, (size_t)((tile->rows - tile->valid_rows) * pitch) * sizeof(real));
        transpose_floats(panel->rows, pitch, tile->rows, head_dim, panel->query, tile->rows);
    }
}

/* Whether all of a block's numbers are finite: x * 0 is NaN for those that are not. Rows are whole vectors. */
static bool block_is_finite(const real* block, int64_t pitch, int64_t columns, int64_t channels) {
    vector probe = vector_of(0);
    for (int64_t column = 0; column < columns; column++) {
        const real* row = block + column * pitch;
        for (int64_t channel = 0; channel < channels; channel += LANES) probe += *(const vector_in_memory*)(row + channel) * 0.0f;
    }
    return !vector_any(probe != 0);
}

/* Keys are read by rows, for each panel anew. */
static bool keys_stay(const cpu_attention* attention) {
    return has_aligned_float_rows(&attention->key) && !rows_conflict(&attention->key, attention->head_dim, TILE_COLUMNS);
}

/* Values are read by columns: theirs must not share cache sets. */
static bool values_stay(const cpu_attention* attention) {
    enum { CLOSE = 32 };
    const int64_t stride = attention->value.strides[2];
    return has_aligned_float_rows(&attention->value) && attention->head_dim_v % LANES == 0 && stride >= 0 && stride <= CLOSE;
}

static void load_block(const cpu_attention* attention, forward_workspace* item, int64_t first_column, int64_t columns) {
    const head_position* at = &item->tile.position;
    const cpu_tensor key = score_operand(&attention->key), *value = &attention->value;
    column_block* block = &item->block;
    const int64_t head_dim_v = attention->head_dim_v;
    if (keys_stay(attention)) {
        block->key = (const real*)key.data + row_offset(&key, at->b, at->kv_head, first_column);
        block->key_pitch = key.strides[2];
    } else {
        block->key = block->key_memory;
        block->key_pitch = pitch_of(attention->head_dim);
        load_rows(&key, at->b, at->kv_head, first_column, columns, attention->head_dim, block->key_memory, block->key_pitch);
    }
    if (values_stay(attention)) {
        block->value = (const real*)value->data + row_offset(value, at->b, at->kv_head, first_column);
        block->value_pitch = value->strides[2];
    } else {
        block->value = block->value_memory;
        block->value_pitch = pitch_of(head_dim_v);
        load_rows(value, at->b, at->kv_head, first_column, columns, head_dim_v, block->value_memory, block->value_pitch);
    }
    block->finite_value = block->value;
    block->finite_pitch = block->value_pitch;
    if (block_is_finite(block->value, block->value_pitch, columns, head_dim_v)) return;
    block->finite_value = block->finite_copy;
    block->finite_pitch = pitch_of(head_dim_v);
    copy_finite(block->value, block->value_pitch, columns, head_dim_v, block->finite_copy, block->finite_pitch);
}

/* ---- Softmax ------------------------------------------------------------------------------------------------------------------------- */

/* Beyond this, as binary logarithms, products of scores and the factor are rounded by so much that exponentials may overflow. */
static const float LARGEST_SCORE = 0x1p31f;

/* Replaces a vector of rows of the tile's scores by exp2(score * factor - reference). Returns their sum. `small`: see vectors_exp2_above(). */
INLINE vector weigh_columns(const score_tile* tile, int64_t row, vector factor, vector reference, const bool small) {
    const int64_t rows = tile->rows, columns = tile->columns;
    real* scores = tile->scores + row;
    vector sum = vector_of(0);
    int64_t column = 0;
    for (; column + 1 < columns; column += 2) {
        real* at = scores + column * rows;
        vector weights[2] = {vector_load(at), vector_load(at + rows)};
        vectors_exp2_above(weights, 2, factor, reference, small);
        sum += weights[0];
        sum += weights[1];
        vector_store(at, weights[0]);
        vector_store(at + rows, weights[1]);
    }
    if (column < columns) {
        vector weight = vector_load(scores + column * rows);
        vectors_exp2_above(&weight, 1, factor, reference, small);
        sum += weight;
        vector_store(scores + column * rows, weight);
    }
    return sum;
}

/* Replaces a vector of rows of the panel's scores by their weights and updates their statistics. `largest` are their largest scores, -inf
 * where none is attended. */
INLINE void weigh_rows(forward_workspace* panel, int64_t row, vector largest) {
    const score_tile* tile = &panel->tile;
    const row_statistics* statistics = &panel->statistics;
    const vector old = vector_load(statistics->highest + row), factor = vector_of(panel->factor);
    const vector highest = vector_max(old, __builtin_elementwise_ceil(largest * factor));
    *(vector_mask*)(tile->infinite + row) |= highest > LARGEST_SCORE;
    /* Of what is as far below, as a finite number in place of -inf in a mask is, any small reference makes weights of 0. */
    const vector reference = vector_select(__builtin_elementwise_abs(highest) <= LARGEST_SCORE, highest, vector_of(0));
    const bool large = vector_any(__builtin_elementwise_abs(reference) > (float)LARGEST_REFERENCE);
    const vector sum = large ? weigh_columns(tile, row, factor, reference, false) : weigh_columns(tile, row, factor, reference, true);
    const vector rescale = vector_exp2(old - reference);
    vector_store(statistics->highest + row, highest);
    vector_store(statistics->rescale + row, rescale);
    vector_store(statistics->sum + row, vector_load(statistics->sum + row) * rescale + sum);
}

/* Looks at the scores of columns first ..< last, all of which are attended. */
INLINE void scan_whole_columns(const score_tile* tile, int64_t row, int64_t first, int64_t last, scan* scan) {
    const int64_t rows = tile->rows;
    const real* scores = tile->scores + row;
    int64_t column = first;
    for (; column + 1 < last; column += 2) {
        scan_number(vector_load(scores + column * rows), false, scan);
        scan_number(vector_load(scores + (column + 1) * rows), true, scan);
    }
    if (column < last) scan_number(vector_load(scores + column * rows), false, scan);
}

/* The same where limits or a mask exclude some, whose scores become -inf. Returns which rows attend any. */
INLINE vector_mask scan_columns(const score_tile* tile, int64_t row, int64_t first, int64_t last, scan* scan) {
    vector_mask any = (vector_mask)(real_bits)0;
    for (int64_t column = first; column < last; column++) {
        real* at = tile->scores + column * tile->rows + row;
        const vector_mask attended = attended_rows(tile, column, row);
        any |= attended;
        const vector score = vector_load(at);
        scan->probe += vector_select(attended, score, vector_of(0)) * 0.0f;
        const vector selected = vector_select(attended, score, vector_of(-INFINITY));
        scan->largest = vector_max(scan->largest, selected);
        vector_store(at, selected);
    }
    return any;
}

/* Scores that are nothing but dot products; limits and a boolean mask may exclude some of them. `scans`: of each vector of rows; of none
 * yet, unless all is attended. */
static void weigh_plain_panel(forward_workspace* panel, const scan* scans) {
    const score_tile* tile = &panel->tile;
    for (int64_t row = 0; row < tile->rows; row += LANES) {
        scan scan = scans[row / LANES];
        vector_mask any = (vector_mask)(real_bits)(tile->whole.first < tile->whole.last ? -1 : 0);
        if (!tile->full) {
            any |= scan_columns(tile, row, 0, tile->whole.first, &scan);
            scan_whole_columns(tile, row, tile->whole.first, tile->whole.last, &scan);
            any |= scan_columns(tile, row, tile->whole.last, tile->columns, &scan);
        }
        *(vector_mask*)(tile->infinite + row) |= (scan.probe + scan.probe_odd != 0) & any;
        *(vector_mask*)(panel->statistics.attended + row) |= any;
        weigh_rows(panel, row, vector_max(scan.largest, scan.largest_odd));
    }
}

/* Scores in natural units, to which everything was done that options ask for. */
static void weigh_general_panel(const cpu_attention* attention, forward_workspace* panel) {
    score_tile* tile = &panel->tile;
    finish_scores(attention, tile);
    for (int64_t row = 0; row < tile->rows; row += LANES) {
        vector largest = vector_of(-INFINITY);
        vector_mask attended = *(vector_mask*)(panel->statistics.attended + row);
        if (tile->full) attended = (vector_mask)(real_bits)-1;
        for (int64_t column = 0; column < tile->columns; column++) {
            largest = vector_max(largest, vector_load(tile->scores + column * tile->rows + row));
            if (!tile->full) attended |= *(vector_mask*)(tile->attended + column * tile->rows + row);
        }
        *(vector_mask*)(panel->statistics.attended + row) = attended;
        weigh_rows(panel, row, largest);
    }
}

/* ---- Output -------------------------------------------------------------------------------------------------------------------------- */

/* Whether a row of the placed panel attends a column. */
INLINE bool panel_attends(const forward_workspace* panel, int64_t column, int64_t row) {
    const score_tile* tile = &panel->tile;
    if (!panel->plain) return is_attended(tile, column, row);
    return row < tile->valid_rows && attended_rows(tile, column, row / LANES * LANES)[row % LANES] != 0;
}

/* Values that are not all finite were multiplied as if they were: rows that attend one of the others become NaN in its channel. */
static void poison_output(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    for (int64_t column = 0; column < tile->columns; column++) {
        for (int64_t channel = 0; channel < attention->head_dim_v; channel++) {
            const real value = panel->block.value[column * panel->block.value_pitch + channel];
            if (value - value == 0) continue;
            for (int64_t row = 0; row < tile->valid_rows; row++) {
                if (panel_attends(panel, column, row)) panel->output[channel * tile->rows + row] = NAN;
            }
        }
    }
}

static void apply_dropout(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    load_dropout(attention, &tile->position, tile->first_row, tile->rows, tile->first_column, tile->columns, panel->dropout);
    for (int64_t k = 0; k < tile->columns * tile->rows; k += LANES) {
        vector_store(tile->scores + k, vector_load(tile->scores + k) * vector_load(panel->dropout + k));
    }
}

static forward_workspace* attend_block(const cpu_attention* attention, forward_workspace* waiting, forward_workspace* panel) {
    (void)waiting;
    const score_tile* tile = &panel->tile;
    const column_block* block = &panel->block;
    scan scans[KERNEL_PANEL_VECTORS];
    for (int v = 0; v < KERNEL_PANEL_VECTORS; v++) scans[v] = SCAN_OF_NONE;
    multiply_panel_by_rows(tile->rows, tile->columns, attention->head_dim, block->key, block->key_pitch, panel->query, tile->scores,
                           panel->upcoming, panel->plain && tile->full ? scans : NULL);
    if (panel->plain) {
        weigh_plain_panel(panel, scans);
    } else {
        weigh_general_panel(attention, panel);
    }
    if (panel->dropout) apply_dropout(attention, panel);
    multiply_panel_by_columns(tile->rows, attention->head_dim_v, tile->columns, block->finite_value, block->finite_pitch, tile->scores,
                              panel->output, panel->statistics.rescale);
    if (block->finite_value != block->value) poison_output(attention, panel);
    return NULL;
}

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

/* Whether scores are nothing but scaled dot products, whose largest give the largest weights. */
static bool is_plain(const cpu_attention* attention) {
    const double scale = attention->softmax_scale;
    return nothing_is_added(attention) && scale > 1e-30 && scale < 1e30;
}

static void begin_item(const cpu_attention* attention, forward_workspace* item) {
    item->plain = is_plain(attention);
    item->factor = (float)((item->plain ? attention->softmax_scale : 1) / LN_2);
    if (attention->head_dim_v % LANES != 0) { /* the padding of rows */
        memset(item->block.value_memory, 0, (size_t)(TILE_COLUMNS * pitch_of(attention->head_dim_v)) * sizeof(real));
    }
}

static const float* channel_scales(const cpu_attention* attention, const head_position* position, int64_t* stride) {
    (void)attention, (void)position;
    *stride = 0;
    return NULL;
}

#include "../shared/forward_items.h"

#ifdef KERNEL_TARGET
#pragma clang attribute pop
#endif
#pragma clang diagnostic pop

const cpu_attention_kernel KERNEL_NAME(attention_forward, KERNEL_SUFFIX) = {
    .name = "attention_forward_" KERNEL_TEXT(KERNEL_SUFFIX),
    .item_count = forward_tile_items,
    .workspace_bytes = forward_workspace_bytes,
    .run = forward_run,
};
