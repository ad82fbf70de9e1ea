/* Forward attention in FP32 arithmetic, for operands of every type but FP64. This file is a template; the attention_forward_float_*.c files
 * beside it instantiate it with
 *
 *   KERNEL_SUFFIX         the end of the kernel's name, such as float_avx2
 *   KERNEL_WIDE_SUFFIX    the reference kernels that compute rows which overflow FP32 arithmetic
 *   KERNEL_TARGET         the instruction set as a target attribute string, or undefined for the architecture's baseline
 *   KERNEL_PANEL_VECTORS  vectors of query rows in a panel: 1 or 4
 *
 * An item is a tile of query rows of one head, or of all heads that share keys where rows are few. It is cut into panels, which the products
 * work on (panel.h): queries, scores and output lie transposed, a vector being one channel or one key of LANES query rows. A panel's
 * queries, scores and output stay in the first-level cache. Keys and values are read as FP32 numbers once for a block of columns and
 * serve all panels of the item; their rows are `pitch` apart, which is no power of two, lest they share cache sets.
 *
 * Numerical contract: scores, softmax and sums are FP32; sums over head_dim run in the order of the channels, sums over keys in the order of
 * the columns within blocks of TILE_COLUMNS, and of the blocks. Exponentials are of base 2, with the scale of the scores folded into their
 * argument; their references are rounded maxima. Rows that meet a score which is not finite, or whose result is not, are left to the
 * reference kernels of FP64 arithmetic. */
#include "../shared/naming.h"
#include "cpu_kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define KERNEL_FP64 0
#define KERNEL_TILE_ROWS 128
#define KERNEL_TILE_COLUMNS 128

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpsabi"           /* every function that takes or returns a vector is inlined */
#pragma clang diagnostic ignored "-Wunused-function" /* the headers serve other kernels too */
#ifdef KERNEL_TARGET
#pragma clang attribute push(__attribute__((target(KERNEL_TARGET))), apply_to = function)
#endif

/* clang-format off: each file needs those before it */
#include "../shared/conversion.h"
#include "../shared/real.h"
#include "../shared/panel.h"
#include "../shared/transpose.h"
#include "../shared/tile.h"
#include "../shared/rows.h"
/* clang-format on */

#define WIDE_ROWS KERNEL_NAME(attention_forward_rows, KERNEL_WIDE_SUFFIX)
#define WIDE_ROWS_BYTES KERNEL_NAME(attention_forward_rows_bytes, KERNEL_WIDE_SUFFIX)
void WIDE_ROWS(const cpu_attention* attention, int64_t b, int64_t h, int64_t first_row, int64_t rows, void* memory);
size_t WIDE_ROWS_BYTES(const cpu_attention* attention);

enum {
    PANEL_ROWS = KERNEL_PANEL_VECTORS * LANES,
    PANELS = TILE_ROWS / PANEL_ROWS, /* of an item at most */
};

static const float LOG2_E = 1.44269504088896341f;
static const double LN_2 = 0.693147180559945309417;

/* ---- Workspace ----------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    score_tile tile; /* of one panel */
    bool plain;      /* scores are nothing but scaled dot products */
    float factor;    /* what takes scores to binary logarithms */
    int64_t key_pitch, value_pitch;
    real* query;               /* [tile rows / panel][head_dim][panel's rows] */
    real* output;              /* [tile rows / panel][head_dim_v][panel's rows] */
    row_statistics statistics; /* [tile rows]; the highest scores as binary logarithms */
    real_bits* infinite;       /* [tile rows] */
    real* key;                 /* [TILE_COLUMNS][key_pitch] */
    real* value;               /* [TILE_COLUMNS][value_pitch] */
    real* finite_value;        /* the same with 0 for what is not finite */
    bool value_is_finite;
    real* rows;    /* [PANEL_ROWS][the larger pitch] */
    real* dropout; /* [TILE_COLUMNS][PANEL_ROWS], or NULL */
} forward_workspace;

/* Distance of rows: their cache lines fall into all sets. */
static int64_t pitch_of(int64_t channels) {
    return (round_up(channels, LANES) / LANES | 1) * LANES;
}

static size_t forward_layout(const cpu_attention* attention, void* memory, forward_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    const int64_t rows = forward_tile_rows(attention), head_dim = attention->head_dim, head_dim_v = attention->head_dim_v;
    const int64_t pitch = pitch_of(head_dim), pitch_v = pitch_of(head_dim_v);
    workspace->key_pitch = pitch;
    workspace->value_pitch = pitch_v;
    take_score_tile(&cursor, attention, PANEL_ROWS, false, &workspace->tile);
    workspace->query = workspace_take_reals(&cursor, head_dim * rows);
    workspace->output = workspace_take_reals(&cursor, head_dim_v * rows);
    take_row_statistics(&cursor, rows, &workspace->statistics);
    workspace->infinite = workspace_take(&cursor, rows, sizeof(real_bits));
    workspace->key = workspace_take_reals(&cursor, TILE_COLUMNS * pitch);
    workspace->value = workspace_take_reals(&cursor, TILE_COLUMNS * pitch_v);
    workspace->finite_value = workspace_take_reals(&cursor, TILE_COLUMNS * pitch_v);
    workspace->rows = workspace_take_reals(&cursor, PANEL_ROWS * maximum(pitch, pitch_v));
    workspace->dropout = attention->dropout_p > 0 ? workspace_take_reals(&cursor, TILE_COLUMNS * PANEL_ROWS) : NULL;
    return cursor.used;
}

static size_t forward_workspace_bytes(const cpu_attention* attention) {
    size_t bytes = forward_layout(attention, NULL, &(forward_workspace){0});
    size_t wide_bytes = WIDE_ROWS_BYTES(attention);
    return bytes > wide_bytes ? bytes : wide_bytes;
}

/* ---- Panels -------------------------------------------------------------------------------------------------------------------------- */

/* Makes a panel of an item's rows the one that the workspace's tile and statistics speak of. */
static forward_workspace select_panel(const cpu_attention* attention, const forward_workspace* item, int64_t first_row, int64_t rows,
                                      int64_t panel) {
    forward_workspace selected = *item;
    const int64_t first = panel * PANEL_ROWS;
    selected.tile.first_row = first_row + first;
    selected.tile.valid_rows = minimum(PANEL_ROWS, rows - first);
    selected.tile.rows = round_up(selected.tile.valid_rows, LANES);
    selected.tile.infinite = item->infinite + first;
    selected.query = item->query + first * attention->head_dim;
    selected.output = item->output + first * attention->head_dim_v;
    selected.statistics.highest += first;
    selected.statistics.sum += first;
    selected.statistics.rescale += first;
    selected.statistics.attended += first;
    selected.statistics.is_nan += first;
    return selected;
}

/* Reads the panel's queries. */
static void open_panel(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    const cpu_tensor query = score_operand(&attention->query);
    const int64_t head_dim = attention->head_dim, pitch = panel->key_pitch;
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        const row_place place = place_of_row(attention, &tile->position, tile->first_row + row);
        load_row(&query, tile->position.b, place.h, place.i, head_dim, panel->rows + row * pitch);
    }
    memset(panel->rows + tile->valid_rows * pitch, 0, (size_t)((tile->rows - tile->valid_rows) * pitch) * sizeof(real));
    transpose_floats(panel->rows, pitch, tile->rows, head_dim, panel->query, tile->rows);
    clear_row_statistics(&panel->statistics, &panel->tile);
    memset(panel->output, 0, (size_t)(attention->head_dim_v * tile->rows) * sizeof(real));
}

/* Reads a block of keys and values. */
static void load_block(const cpu_attention* attention, forward_workspace* item, int64_t first_column, int64_t columns) {
    const head_position* at = &item->tile.position;
    const cpu_tensor key = score_operand(&attention->key);
    const int64_t head_dim_v = attention->head_dim_v, pitch_v = item->value_pitch;
    load_rows(&key, at->b, at->kv_head, first_column, columns, attention->head_dim, item->key, item->key_pitch);
    load_rows(&attention->value, at->b, at->kv_head, first_column, columns, head_dim_v, item->value, pitch_v);
    item->value_is_finite = rows_are_finite(item->value, pitch_v, columns, head_dim_v);
    if (!item->value_is_finite) copy_finite(item->value, pitch_v, columns, head_dim_v, item->finite_value);
}

/* ---- Softmax ------------------------------------------------------------------------------------------------------------------------- */

/* Replaces a vector of rows of the panel's scores by exp2(score * factor - reference) and updates their statistics. `largest` are their
 * largest scores, -inf where none is attended. */
INLINE void weigh_rows(forward_workspace* panel, int64_t row, vector largest) {
    const score_tile* tile = &panel->tile;
    const row_statistics* statistics = &panel->statistics;
    const vector old = vector_load(statistics->highest + row);
    const vector highest = vector_max(old, largest * panel->factor);
    /* Only -inf so far: any finite reference gives 2^-inf = 0. */
    const vector reference = vector_select(highest == -INFINITY, vector_of(0), highest);
    vector sum = vector_of(0);
    for (int64_t column = 0; column < tile->columns; column++) {
        real* at = tile->scores + column * tile->rows + row;
        const vector weight = vector_exp2(vector_load(at) * panel->factor - reference);
        sum += weight;
        vector_store(at, weight);
    }
    const vector rescale = vector_exp2(old - reference);
    vector_store(statistics->highest + row, highest);
    vector_store(statistics->rescale + row, rescale);
    vector_store(statistics->sum + row, vector_load(statistics->sum + row) * rescale + sum);
}

/* Scores that are nothing but dot products; limits may exclude some of them. */
static void weigh_plain_panel(forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    for (int64_t row = 0; row < tile->rows; row += LANES) {
        const vector_mask first = *(const vector_mask*)(tile->limits + row);
        const vector_mask last = *(const vector_mask*)(tile->limits + tile->rows + row);
        vector largest = vector_of(-INFINITY);
        vector probe = vector_of(0); /* NaN once an attended score is not finite */
        if (tile->full) {
            for (int64_t column = 0; column < tile->columns; column++) {
                const vector score = vector_load(tile->scores + column * tile->rows + row);
                largest = vector_max(largest, score);
                probe += score * 0.0f;
            }
        } else {
            for (int64_t column = 0; column < tile->columns; column++) {
                real* at = tile->scores + column * tile->rows + row;
                const vector_mask attended = ((vector_mask)(real_bits)column >= first) & ((vector_mask)(real_bits)column < last);
                const vector score = vector_load(at);
                probe += vector_select(attended, score, vector_of(0)) * 0.0f;
                const vector selected = vector_select(attended, score, vector_of(-INFINITY));
                largest = vector_max(largest, selected);
                vector_store(at, selected);
            }
        }
        const vector size = largest * panel->factor;
        const vector_mask attends = tile->full ? (vector_mask)(real_bits)-1 : first < last;
        *(vector_mask*)(tile->infinite + row) |= ((probe + (size - size)) != 0) & attends;
        *(vector_mask*)(panel->statistics.attended + row) |= attends;
        weigh_rows(panel, row, largest);
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

/* Whether a row of the placed panel attends a column: limits say it where scores are plain. */
INLINE bool panel_attends(const forward_workspace* panel, int64_t column, int64_t row) {
    const score_tile* tile = &panel->tile;
    if (!panel->plain) return is_attended(tile, column, row);
    return row < tile->valid_rows && column >= tile->limits[row] && column < tile->limits[tile->rows + row];
}

/* Values that are not all finite were multiplied as if they were: rows that attend one of the others become NaN in its channel. */
static void poison_output(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    for (int64_t column = 0; column < tile->columns; column++) {
        for (int64_t channel = 0; channel < attention->head_dim_v; channel++) {
            const real value = panel->value[column * panel->value_pitch + channel];
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

/* Adds what the placed panel attends of the loaded block. */
static void attend_block(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    multiply_panel(tile->rows, tile->columns, attention->head_dim, panel->key, panel->key_pitch, 1, panel->query, tile->scores, NULL);
    if (panel->plain) {
        weigh_plain_panel(panel);
    } else {
        weigh_general_panel(attention, panel);
    }
    if (panel->dropout) apply_dropout(attention, panel);
    const real* value = panel->value_is_finite ? panel->value : panel->finite_value;
    multiply_panel(tile->rows, attention->head_dim_v, tile->columns, value, 1, panel->value_pitch, tile->scores, panel->output,
                   panel->statistics.rescale);
    if (!panel->value_is_finite) poison_output(attention, panel);
}

/* Writes the panel's rows. Returns those (bit by bit) that have to be computed again, since a score or a result was not finite. */
static uint64_t close_panel(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    const head_position* at = &tile->position;
    const row_statistics* statistics = &panel->statistics;
    const int64_t rows = tile->rows, head_dim_v = attention->head_dim_v, pitch_v = panel->value_pitch;
    const int64_t first_statistic = (at->b * attention->num_heads + at->h) * attention->seq_len_q + tile->first_row;
    real factors[PANEL_ROWS] __attribute__((aligned(64)));
    uint64_t again = 0;
    for (int64_t row = 0; row < rows; row++) {
        factors[row] = statistics->attended[row] ? 1 / statistics->sum[row] : 0;
        if (row >= tile->valid_rows || !(attention->logsumexp || attention->sinks)) continue;
        real logsumexp;
        const row_place place = place_of_row(attention, at, tile->first_row + row);
        const double highest = (double)statistics->highest[row] * LN_2;
        statistics->highest[row] = (real)highest;
        factors[row] = finish_row(attention, place.h, statistics, row, &logsumexp);
        if (attention->logsumexp) set_statistic(attention, attention->logsumexp, first_statistic + row, logsumexp);
        if (statistics->attended[row] && logsumexp - logsumexp != 0) again |= (uint64_t)1 << row;
    }
    vector probes[KERNEL_PANEL_VECTORS];
    for (int64_t v = 0; v < rows / LANES; v++) {
        const vector_mask attended = *(const vector_mask*)(statistics->attended + v * LANES);
        const vector factor = vector_load(factors + v * LANES);
        probes[v] = factor * 0.0f;
        for (int64_t channel = 0; channel < head_dim_v; channel++) {
            real* result = panel->output + channel * rows + v * LANES;
            const vector scaled = vector_select(attended, vector_load(result) * factor, vector_of(0));
            probes[v] += scaled * 0.0f;
            vector_store(result, scaled);
        }
    }
    transpose_floats(panel->output, rows, head_dim_v, rows, panel->rows, pitch_v);
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        const row_place place = place_of_row(attention, at, tile->first_row + row);
        store_row(&attention->output, at->b, place.h, place.i, head_dim_v, panel->rows + row * pitch_v);
        const bool finite = probes[row / LANES][row % LANES] == 0;
        if (statistics->attended[row] && (tile->infinite[row] || !finite)) again |= (uint64_t)1 << row;
    }
    return again;
}

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

/* Computes once more, with wide arithmetic, the rows that FP32 arithmetic could not: it can overflow where the formulas do not. */
static void compute_rows_wide(const cpu_attention* attention, const head_position* position, int64_t first_row, uint64_t rows,
                              void* memory) {
    cpu_attention wide = *attention;
    wide.float_statistics = true;
    for (int64_t row = 0, run; row < PANEL_ROWS; row += run + 1) {
        for (run = 0; row + run < PANEL_ROWS && rows >> (row + run) & 1; run++) {}
        if (run > 0) WIDE_ROWS(&wide, position->b, position->h, first_row + row, run, memory);
    }
}

/* Whether scores are nothing but scaled dot products, whose largest give the largest weights. */
static bool is_plain(const cpu_attention* attention) {
    const double scale = attention->softmax_scale;
    return attention->mask.data == NULL && attention->softcap == 0 && attention->alibi_slopes == NULL && scale > 1e-30 && scale < 1e30;
}

static void forward_run(const cpu_attention* attention, int64_t item, void* memory) {
    forward_workspace workspace;
    forward_layout(attention, memory, &workspace);
    int64_t first_row, rows;
    const head_position position = locate_forward_tile(attention, item, &first_row, &rows);
    workspace.tile.position = position;
    workspace.plain = is_plain(attention);
    workspace.factor = workspace.plain ? (float)(attention->softmax_scale / LN_2) : LOG2_E;

    const int64_t panels = divide_up(rows, PANEL_ROWS);
    for (int64_t p = 0; p < panels; p++) {
        forward_workspace panel = select_panel(attention, &workspace, first_row, rows, p);
        open_panel(attention, &panel);
    }
    column_range range = columns_of_rows(attention, &position, first_row, rows);
    for (int64_t column = range.first / TILE_COLUMNS * TILE_COLUMNS; column < range.last; column += TILE_COLUMNS) {
        bool loaded = false;
        for (int64_t p = 0; p < panels; p++) {
            forward_workspace panel = select_panel(attention, &workspace, first_row, rows, p);
            column_range own = columns_of_rows(attention, &position, panel.tile.first_row, panel.tile.valid_rows);
            if (!place_score_tile(attention, &panel.tile, column, own.last)) continue;
            if (!loaded) {
                load_block(attention, &workspace, column, minimum(TILE_COLUMNS, range.last - column));
                panel.value_is_finite = workspace.value_is_finite;
                loaded = true;
            }
            attend_block(attention, &panel);
        }
    }
    uint64_t again[PANELS];
    for (int64_t p = 0; p < panels; p++) {
        forward_workspace panel = select_panel(attention, &workspace, first_row, rows, p);
        again[p] = close_panel(attention, &panel);
    }
    /* The workspace is no longer needed: it is given to what computes rows again. */
    for (int64_t p = 0; p < panels; p++) {
        if (again[p]) compute_rows_wide(attention, &position, first_row + p * PANEL_ROWS, again[p], memory);
    }
}

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
