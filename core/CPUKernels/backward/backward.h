/* Backward on float and quantised operands: the gradients of queries, keys and values in one pass of five matrix products. This file is a
 * template; the files beside it instantiate it with
 *
 *   KERNEL_SUFFIX   the end of the kernels' names, such as float_avx2
 *   KERNEL_TARGET   the instruction set as a target attribute string, or undefined for the architecture's baseline
 *   KERNEL_PANEL_VECTORS  vectors of columns or channels in a block of a product: 1, or 2 with registers of 64 bytes
 *   KERNEL_INTEGER  0: all products are of FP32 numbers (products_float.h). 1: all but one are of codes and 16-bit integers (products_int8.h)
 *   KERNEL_VNNI     1: the instruction set multiplies pairs of 16 bits and adds them to a sum at once
 *
 * An item is a tile of columns of one key head. It keeps the tile's keys and values, and the gradients of both, while it walks over the
 * query rows of its group of heads:
 *
 *     S  = Q K^T      P  = exp(scale S - logsumexp)           dV += P^T dO       dQ += dS K
 *     dP = dO V^T     dS = P (dP - d_values)                  dK += dS^T Q
 *
 * Tiles are [row][column], with columns in the lanes of vectors: keys and values are transposed once for an item, and queries and output
 * gradients are used as they are, as scalars in the first two products and as vectors of channels in the next two. What masks leave out at
 * the edges of a tile is not multiplied: every block of rows has its range of columns, and every column its range of rows.
 *
 * The gradient of a query sums over the columns of many items, and each adds its share in the order of the column tiles: a counter for each
 * tile of rows says whose turn it is. Items are begun in their order, column tiles of one head far apart, so there is seldom a wait, and
 * an item waits for items before it only. So no result depends on threads.
 *
 * Numerical contract: sums over rows and columns run in order within a tile, and then over the tiles. Excluded terms are selected away, and
 * tiles that are not finite, which one test a tile finds, take a careful path. */
#include "../shared/naming.h"
#include "cpu_kernels.h"

#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KERNEL_FP64 0

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpsabi"           /* every function that takes or returns a vector is inlined */
#pragma clang diagnostic ignored "-Wunused-function" /* the headers serve other kernels too */
#ifdef KERNEL_TARGET
#pragma clang attribute push(__attribute__((target(KERNEL_TARGET))), apply_to = function)
#endif

/* clang-format off: each file needs those before it */
#include "../shared/conversion.h"
#include "../shared/real.h"
#include "../shared/tile.h"
#include "../shared/transpose.h"
#include "../shared/row_stream.h"
/* clang-format on */

/* A block of accumulators beside the vectors of one operand and a scalar of the other: with AVX2, 6 rows by one vector of two registers are
 * 12 of 16 registers; with AVX-512, 8 by 2 are 16 of 32; with NEON, 6 by one vector of four registers 24 of 32. A rest of four rows still
 * hides the latency of two multiply-adds a cycle. */
enum { BLOCK_VECTORS = KERNEL_PANEL_VECTORS, BLOCK_ROWS = BLOCK_VECTORS > 1 ? 8 : 6, BLOCK_REST = 4 };

/* Tiles are whole blocks, and what an item keeps of its columns and rows should stay in a second level cache of 512 KB. */
enum {
    PANEL = BLOCK_VECTORS * LANES, /* columns or channels of a block */
    ROW_TILE = 96,                 /* query rows of a tile */
    COLUMN_TILE = 96,              /* key columns of a tile with up to FEW_CHANNELS channels, else the smaller number */
    SMALL_COLUMN_TILE = BLOCK_VECTORS > 1 ? 64 : 48,
    FEW_CHANNELS = 128,
    GROUP = SMALL_COLUMN_TILE, /* rows or columns whose scalars or panels stay in the first level cache */
};
_Static_assert(GROUP % PANEL == 0 && COLUMN_TILE % PANEL == 0, "groups and tiles of columns are whole panels");

/* ---- Tiles and workspace ------------------------------------------------------------------------------------------------------------- */

/* Key columns of a tile. */
static int64_t column_tile(const cpu_attention* attention) {
    return maximum(attention->head_dim, attention->head_dim_v) <= FEW_CHANNELS ? COLUMN_TILE : SMALL_COLUMN_TILE;
}

static int64_t column_tiles(const cpu_attention* attention) {
    return divide_up(attention->seq_len_kv, column_tile(attention));
}

static int64_t row_tiles(const cpu_attention* attention) {
    return divide_up(attention->seq_len_q, ROW_TILE);
}

/* The pitch of rows of `count` numbers: an odd number of cache lines, so that rows spread over the sets of a cache. */
static int64_t pitch_of(int64_t count) {
    return (round_up(count, PANEL) / LANES | 1) * LANES;
}

/* What is fetched while a tile is computed with: the rows of the next one, and behind the last tile of an item the keys and values of the
 * next item. */
typedef struct {
    row_stream query, grad_output, key, value;
} upcoming_tile;

typedef struct {
    int64_t first, last;
} span;

#if KERNEL_INTEGER
#include "operands_int8.h"
#else
#include "operands_float.h"
#endif

typedef struct {
    head_position position;
    int64_t first_column, columns; /* of the tile: those that exist */
    int64_t first_row, rows;
    bool full;               /* every element is attended */
    bool masked;             /* the mask excludes some, or adds to scores: `additions` is filled in */
    bool grad_output_finite; /* of the tile's rows */
    int64_t pitch, pitch_v;  /* of rows of head_dim and head_dim_v channels */
    int64_t column_pitch;    /* of rows of columns */
    operands operands;       /* as they are multiplied */
    real* grad_output;       /* [ROW_TILE][pitch_v] */
    real* weights;           /* [ROW_TILE][column_pitch]: dot products, then probabilities with dropout applied */
    real* grad_scores;       /* [ROW_TILE][column_pitch]: dP, then the gradient of the scaled dot products */
    real* additions;         /* [ROW_TILE][column_pitch], where there is a mask: what it adds to scores, -inf where it excludes */
    real* dropout;           /* [columns], where there is dropout: the factors of a row */
    real* grad_query;        /* [ROW_TILE][pitch] */
    real* grad_key;          /* [columns][pitch] */
    real* grad_value;        /* [columns][pitch_v] */
    real* row;               /* a row of channels */
    real* logsumexp;         /* [ROW_TILE] */
    real* offsets;           /* [ROW_TILE]: d_values less the gradient of logsumexp */
    upcoming_tile upcoming;
    span columns_of[ROW_TILE]; /* what masks but the tensor leave to each row of the tile */
} backward_workspace;

static size_t backward_layout(const cpu_attention* attention, void* memory, backward_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    const int64_t columns = column_tile(attention);
    const int64_t pitch = pitch_of(attention->head_dim), pitch_v = pitch_of(attention->head_dim_v), column_pitch = pitch_of(columns);
    workspace->pitch = pitch;
    workspace->pitch_v = pitch_v;
    workspace->column_pitch = column_pitch;
    take_operands(attention, &cursor, &workspace->operands, pitch, pitch_v, columns, column_pitch);
    workspace->grad_output = workspace_take_reals(&cursor, ROW_TILE * pitch_v);
    workspace->weights = workspace_take_reals(&cursor, ROW_TILE * column_pitch);
    workspace->grad_scores = workspace_take_reals(&cursor, ROW_TILE * column_pitch);
    workspace->additions = attention->mask.data ? workspace_take_reals(&cursor, ROW_TILE * column_pitch) : NULL;
    workspace->dropout = attention->dropout_p > 0 ? workspace_take_reals(&cursor, columns) : NULL;
    workspace->grad_query = workspace_take_reals(&cursor, ROW_TILE * pitch);
    workspace->grad_key = workspace_take_reals(&cursor, columns * pitch);
    workspace->grad_value = workspace_take_reals(&cursor, columns * pitch_v);
    workspace->row = workspace_take_reals(&cursor, maximum(pitch, pitch_v));
    workspace->logsumexp = workspace_take_reals(&cursor, ROW_TILE);
    workspace->offsets = workspace_take_reals(&cursor, ROW_TILE);
    return cursor.used;
}

static size_t backward_workspace_bytes(const cpu_attention* attention) {
    return backward_layout(attention, NULL, &(backward_workspace){0});
}

/* ---- Sums of query gradients --------------------------------------------------------------------------------------------------------- */

/* Where the gradients of a head's queries are summed, and whose turn it is: in the caller's memory where that holds FP32 in rows, else in
 * shared memory behind the counters. */
typedef struct {
    _Atomic int32_t* turns; /* [row tiles]: the column tile that may add to a tile of rows */
    char* sums;
    int64_t row_bytes;
    bool in_place;
} query_sums;

static bool sums_in_place(const cpu_attention* attention) {
    return attention->grad_query.precision == CPU_FP32 && (attention->grad_query.strides[3] == 1 || attention->head_dim == 1);
}

static int64_t turn_bytes(const cpu_attention* attention) {
    return round_up(attention->batch_size * attention->num_heads * row_tiles(attention) * (int64_t)sizeof(int32_t), WORKSPACE_ALIGNMENT);
}

static size_t backward_shared_bytes(const cpu_attention* attention) {
    if (!attention->grad_query.data) return 0;
    const int64_t rows = sums_in_place(attention) ? 0 : attention->batch_size * attention->num_heads * attention->seq_len_q;
    return (size_t)turn_bytes(attention) + (size_t)(rows * attention->head_dim) * sizeof(real);
}

static query_sums locate_query_sums(const cpu_attention* attention, int64_t b, int64_t h) {
    const int64_t head = b * attention->num_heads + h;
    query_sums sums = {.in_place = sums_in_place(attention)};
    sums.turns = (_Atomic int32_t*)attention->shared + head * row_tiles(attention);
    if (sums.in_place) {
        sums.sums = (char*)attention->grad_query.data + row_offset(&attention->grad_query, b, h, 0) * (int64_t)sizeof(real);
        sums.row_bytes = attention->grad_query.strides[2] * (int64_t)sizeof(real);
    } else {
        sums.row_bytes = attention->head_dim * (int64_t)sizeof(real);
        sums.sums = (char*)attention->shared + turn_bytes(attention) + head * attention->seq_len_q * sums.row_bytes;
    }
    return sums;
}

/* The tiles of columns that some row of a tile of rows attends, masks of tensors aside; last <= first: none. */
static span column_tiles_of(const cpu_attention* attention, const head_position* position, int64_t row_tile) {
    const int64_t first_row = row_tile * ROW_TILE, columns = column_tile(attention);
    column_range range = columns_of_rows(attention, position, first_row, minimum(ROW_TILE, attention->seq_len_q - first_row));
    if (range.last <= range.first) return (span){0, 0};
    return (span){range.first / columns, divide_up(range.last, columns)};
}

static int64_t backward_prepare_items(const cpu_attention* attention) {
    return attention->grad_query.data ? attention->batch_size * attention->num_heads * row_tiles(attention) : 0;
}

/* Clears the sums of a tile of rows, which is all that becomes of one without columns. */
static void backward_prepare(const cpu_attention* attention, int64_t item, void* memory) {
    const int64_t tiles = row_tiles(attention), row_tile = item % tiles, head = item / tiles;
    const int64_t b = head / attention->num_heads, h = head % attention->num_heads, first_row = row_tile * ROW_TILE;
    const head_position position = locate_head(attention, b, h);
    const query_sums sums = locate_query_sums(attention, b, h);
    const span columns = column_tiles_of(attention, &position, row_tile);
    atomic_init(sums.turns + row_tile, (int32_t)columns.first);
    for (int64_t row = first_row; row < minimum(first_row + ROW_TILE, attention->seq_len_q); row++) {
        memset(sums.sums + row * sums.row_bytes, 0, (size_t)attention->head_dim * sizeof(real));
        if (columns.last > columns.first || sums.in_place) continue;
        memset(memory, 0, (size_t)attention->head_dim * sizeof(real));
        store_row(&attention->grad_query, b, h, row, attention->head_dim, memory);
    }
}

static void wait_for_turn(_Atomic int32_t* turn, int32_t mine) {
    enum { PATIENCE = 1000 };
    for (int64_t tries = 0; atomic_load_explicit(turn, memory_order_acquire) != mine; tries++) {
        if (tries > PATIENCE) {
            sched_yield(); /* whoever is before this item may lack a processor */
            continue;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

/* Adds the tile's gradients of queries, unless all of them are 0, when its turn has come. The last tile of columns completes them. */
static void add_to_query_sums(const cpu_attention* attention, backward_workspace* workspace, bool any) {
    const head_position* at = &workspace->position;
    const query_sums sums = locate_query_sums(attention, at->b, at->h);
    const int64_t row_tile = workspace->first_row / ROW_TILE, head_dim = attention->head_dim;
    const int64_t tile = workspace->first_column / column_tile(attention);
    const bool complete = tile + 1 == column_tiles_of(attention, at, row_tile).last;
    const real scale = (real)attention->softmax_scale;
    wait_for_turn(sums.turns + row_tile, (int32_t)tile);
    for (int64_t row = 0; row < workspace->rows && (any || complete); row++) {
        float_in_memory* sum = (float_in_memory*)(sums.sums + (workspace->first_row + row) * sums.row_bytes);
        const real* share = workspace->grad_query + row * workspace->pitch;
        if (any) {
            for (int64_t channel = 0; channel < head_dim; channel++) sum[channel] += share[channel];
        }
        if (!complete) continue;
        for (int64_t channel = 0; channel < head_dim; channel++) workspace->row[channel] = sum[channel] * scale;
        leave_score_space(&attention->query, workspace->row, head_dim);
        store_row(&attention->grad_query, at->b, at->h, workspace->first_row + row, head_dim, workspace->row);
    }
    atomic_store_explicit(sums.turns + row_tile, (int32_t)tile + 1, memory_order_release);
}

/* ---- Loading ------------------------------------------------------------------------------------------------------------------------- */

/* Rows of a tensor, [rows][pitch], with 0 behind their channels. Returns whether all are finite. */
static bool load_tile(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t first_row, int64_t rows, int64_t channels, real* tile,
                      int64_t pitch) {
    const bool vectors = tensor->precision == CPU_FP32 && tensor->strides[3] == 1;
    const int64_t padded = round_up(channels, PANEL), whole = channels / LANES * LANES;
    vector_mask finite = (vector_mask)(real_bits)-1;
    for (int64_t row = 0; row < rows; row++) {
        real* out = tile + row * pitch;
        int64_t channel = 0;
        if (vectors) { /* what load_row() does, in one go */
            const float_in_memory* numbers = (const float_in_memory*)tensor->data + row_offset(tensor, b, h, first_row + row);
            for (; channel < whole; channel += LANES) {
                vector loaded = *(const vector_in_memory*)(numbers + channel);
                vector_store(out + channel, loaded);
                finite &= loaded - loaded == 0; /* else NaN */
            }
            for (int64_t rest = channel; rest < channels; rest++) out[rest] = numbers[rest];
        } else {
            load_row(tensor, b, h, first_row + row, channels, out);
        }
        for (int64_t pad = channels; pad < padded; pad++) out[pad] = 0;
        for (; channel < padded; channel += LANES) {
            vector loaded = vector_load(out + channel);
            finite &= loaded - loaded == 0;
        }
    }
    return !vector_any(~finite);
}

/* Rows of a tile as panels of columns. What lies behind the rows is 0. */
static void transpose_into_panels(const real* tile, int64_t pitch, int64_t rows, int64_t channels, real* panels) {
    for (int64_t first = 0; first < rows; first += PANEL) {
        real* panel = panels + first * channels;
        if (rows - first < PANEL) memset(panel, 0, (size_t)(PANEL * channels) * sizeof(real));
        transpose_floats(tile + first * pitch, pitch, minimum(PANEL, rows - first), channels, panel, PANEL);
    }
}

/* Puts 0 in place of what is not finite. */
static void clear_what_is_not_finite(real* tile, int64_t pitch, int64_t rows, int64_t channels) {
    copy_finite(tile, pitch, rows, channels, tile, pitch);
}

static void load_statistics(const cpu_attention* attention, backward_workspace* workspace) {
    const head_position* at = &workspace->position;
    const int64_t first = (at->b * attention->num_heads + at->h) * attention->seq_len_q + workspace->first_row;
    for (int64_t row = 0; row < workspace->rows; row++) {
        real offset = get_statistic(attention, attention->d_values, first + row);
        if (attention->grad_logsumexp) offset -= get_statistic(attention, attention->grad_logsumexp, first + row);
        workspace->logsumexp[row] = get_statistic(attention, attention->logsumexp, first + row);
        workspace->offsets[row] = offset;
    }
}

/* ---- Masks --------------------------------------------------------------------------------------------------------------------------- */

/* What the mask adds to the scores of a row, from first_column on. Returns whether it leaves any. */
static bool load_mask_row(const cpu_attention* attention, const head_position* at, int64_t row, int64_t first_column, int64_t columns,
                          real* additions) {
    const cpu_tensor* mask = &attention->mask;
    const int64_t* strides = mask->strides;
    const int64_t element = at->b * strides[0] + at->h * strides[1] + row * strides[2] + first_column * strides[3];
    return load_mask_line(mask, (const char*)mask->data + element * element_bytes(mask->precision), columns, additions);
}

/* Finds what each row of the tile attends. False: nothing at all. */
static bool place_tile(const cpu_attention* attention, backward_workspace* workspace) {
    const head_position* at = &workspace->position;
    const int64_t columns = workspace->columns;
    bool any = false, full = true;
    for (int64_t row = 0; row < workspace->rows; row++) {
        column_range range = columns_of_row(attention, at, workspace->first_row + row);
        int64_t first = minimum(maximum(range.first - workspace->first_column, 0), columns);
        int64_t last = maximum(minimum(range.last - workspace->first_column, columns), first);
        workspace->columns_of[row] = (span){first, last};
        any |= first < last;
        full &= first == 0 && last == columns;
    }
    workspace->full = full;
    workspace->masked = false;
    if (!any || !attention->mask.data) return any;
    if (attention->mask.precision == CPU_BOOL) {
        const mask_share share =
            share_of_boolean_mask(attention, at, workspace->first_row, workspace->rows, workspace->first_column, columns);
        if (share != MASK_SOME) return share == MASK_ALL;
    }
    workspace->full = false;
    workspace->masked = true;
    any = false;
    for (int64_t row = 0; row < workspace->rows; row++) {
        any |= load_mask_row(attention, at, workspace->first_row + row, workspace->first_column, columns,
                             workspace->additions + row * workspace->column_pitch);
    }
    return any;
}

static bool is_attended_at(const backward_workspace* workspace, int64_t row, int64_t column) {
    const span columns = workspace->columns_of[row];
    if (column < columns.first || column >= columns.last) return false;
    return !workspace->masked || workspace->additions[row * workspace->column_pitch + column] != -(real)INFINITY;
}

/* The columns that some row of first ..< first + rows attends. */
static span columns_of_block(const backward_workspace* workspace, int64_t first, int64_t rows) {
    if (workspace->full) return (span){0, workspace->columns};
    span all = {INT64_MAX, 0};
    for (int64_t row = first; row < first + rows; row++) {
        const span columns = workspace->columns_of[row];
        if (columns.first >= columns.last) continue;
        all.first = minimum(all.first, columns.first);
        all.last = maximum(all.last, columns.last);
    }
    return all.first < all.last ? all : (span){0, 0};
}

/* The rows that attend some column of first ..< first + columns; limits grow with the rows, so these have no gap that matters. */
static span rows_of_block(const backward_workspace* workspace, int64_t first, int64_t columns) {
    span all = {0, workspace->rows};
    if (workspace->full) return all;
    while (all.first < all.last && workspace->columns_of[all.first].last <= first) all.first++;
    while (all.last > all.first && workspace->columns_of[all.last - 1].first >= first + columns) all.last--;
    return all;
}

/* ---- Products ------------------------------------------------------------------------------------------------------------------------ */

/* c[row][lane] (+)= sum over k of a[row * a_row + k * a_depth] * b[k * b_pitch + lane], for PANEL lanes. `rows` and `accumulate` are
 * constants wherever this is inlined, and one of the strides of a is 1. Each element sums over k in order; its value does not depend on
 * those beside it. */
INLINE void multiply_block(const int rows, int64_t depth, const real* a, int64_t a_row, int64_t a_depth, const real* b, int64_t b_pitch,
                           real* c, int64_t c_pitch, const bool accumulate) {
    vector sums[BLOCK_ROWS][BLOCK_VECTORS];
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < BLOCK_VECTORS; v++) sums[row][v] = vector_of(0);
    }
    const real* rest = a + BLOCK_ROWS / 2 * a_row; /* two bases reach all rows by scaled indices */
#pragma clang loop unroll_count(4)
    for (int64_t k = 0; k < depth; k++) {
        vector vectors[BLOCK_VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < BLOCK_VECTORS; v++) vectors[v] = vector_load(b + k * b_pitch + v * LANES);
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) {
            const real* factors = row < BLOCK_ROWS / 2 ? a + row * a_row : rest + (row - BLOCK_ROWS / 2) * a_row;
            vector factor = vector_of(factors[k * a_depth]);
#pragma clang loop unroll(full)
            for (int v = 0; v < BLOCK_VECTORS; v++) sums[row][v] += factor * vectors[v];
        }
    }
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < BLOCK_VECTORS; v++) {
            real* at = c + row * c_pitch + v * LANES;
            vector_store(at, accumulate ? vector_load(at) + sums[row][v] : sums[row][v]);
        }
    }
}

/* Out of line, so that the loops have all registers: a block of `rows` rows whose scalars follow one another along k, overwriting c. */
__attribute__((noinline)) static void multiply_rows(int64_t rows, int64_t depth, const real* a, int64_t a_row, const real* b,
                                                    int64_t b_pitch, real* c, int64_t c_pitch) {
    switch (rows) {
    case BLOCK_ROWS: multiply_block(BLOCK_ROWS, depth, a, a_row, 1, b, b_pitch, c, c_pitch, false); break;
    case BLOCK_REST: multiply_block(BLOCK_REST, depth, a, a_row, 1, b, b_pitch, c, c_pitch, false); break;
    default: multiply_block(1, depth, a, a_row, 1, b, b_pitch, c, c_pitch, false); break;
    }
}

/* The same where the scalars of one k follow one another, adding to c. */
__attribute__((noinline)) static void accumulate_rows(int64_t rows, int64_t depth, const real* a, int64_t a_depth, const real* b,
                                                      int64_t b_pitch, real* c, int64_t c_pitch) {
    switch (rows) {
    case BLOCK_ROWS: multiply_block(BLOCK_ROWS, depth, a, 1, a_depth, b, b_pitch, c, c_pitch, true); break;
    case BLOCK_REST: multiply_block(BLOCK_REST, depth, a, 1, a_depth, b, b_pitch, c, c_pitch, true); break;
    default: multiply_block(1, depth, a, 1, a_depth, b, b_pitch, c, c_pitch, true); break;
    }
}

/* Rows of the next block, where `rest` are left. */
static int64_t block_rows(int64_t rest) {
    return rest >= BLOCK_ROWS ? BLOCK_ROWS : rest >= BLOCK_REST ? BLOCK_REST : 1;
}

/* gradient[column][channel] += sum over rows of factors[row][column] * operand[row][channel]. The factors of a group of columns stay in the
 * first level cache. */
static void accumulate_over_rows(const backward_workspace* workspace, int64_t channels, const real* factors, const real* operand,
                                 int64_t pitch, real* gradient) {
    const int64_t column_pitch = workspace->column_pitch;
    for (int64_t group = 0; group < workspace->columns; group += GROUP) {
        const int64_t end = minimum(group + GROUP, workspace->columns);
        for (int64_t channel = 0; channel < channels; channel += PANEL) {
            for (int64_t column = group, count; column < end; column += count) {
                count = block_rows(end - column);
                const span rows = rows_of_block(workspace, column, count);
                if (rows.first >= rows.last) continue;
                accumulate_rows(count, rows.last - rows.first, factors + rows.first * column_pitch + column, column_pitch,
                                operand + rows.first * pitch + channel, pitch, gradient + column * pitch + channel, pitch);
            }
        }
    }
}

/* ---- Gradients of scores ------------------------------------------------------------------------------------------------------------- */

/* e^x within two units in the last place where it matters: that of 0 is exactly 1, and errors grow to four units towards the smallest
 * normal number. x ends where 2^n has become 0 or infinity; NaN stays NaN. 2^n from the exponent bits, the rest from the polynomial of
 * least relative error (1.05e-7) on -ln(2)/2 ... ln(2)/2 among those that begin with 1 + x. */
INLINE vector weight_of(vector x) {
    x = vector_select(x < -88.1f, vector_of(-88.1f), x);
    x = vector_select(x > 89.0f, vector_of(89.0f), x);
    vector shifted = x * 1.44269504088896341f + ROUND_TO_INTEGER;
    vector r = x - (shifted - ROUND_TO_INTEGER) * 0.69314718055994531f;
    vector e = vector_of(8.312501254e-3f);
    e = e * r + 4.189033155e-2f;
    e = e * r + 1.666711539e-1f;
    e = e * r + 4.999923031e-1f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    vector_mask exponent = (*(vector_mask*)&shifted - 0x4B400000 + 127) << 23;
    return e * *(vector*)&exponent;
}

/* What becomes of a tile's dot products. */
enum { GRADIENTS, D_VALUES };

/* For one row: dot products become weights, dP becomes the gradient of the scaled dot products. Both are 0 where the row attends nothing,
 * and stay as they are in columns behind the tile's last. Or, for D_VALUES: returns the sum of weights times dP. `plain`: no option changes
 * scores or weights; `whole`: every column is attended. */
INLINE real differentiate_row(const cpu_attention* attention, const backward_workspace* workspace, int64_t row, const int wanted,
                              const bool plain, const bool whole) {
    const head_position* at = &workspace->position;
    const span columns = workspace->columns_of[row];
    const real scale = (real)attention->softmax_scale, softcap = plain ? 0 : softcap_of(attention);
    const vector logsumexp = vector_of(workspace->logsumexp[row]), offset = vector_of(workspace->offsets[row]);
    real* weights = workspace->weights + row * workspace->column_pitch;
    real* grad_scores = workspace->grad_scores + row * workspace->column_pitch;
    const real* additions = !plain && workspace->masked ? workspace->additions + row * workspace->column_pitch : NULL;
    const real* dropout = plain ? NULL : workspace->dropout;
    const bool has_slope = !plain && attention->alibi_slopes != NULL;
    const real slope = has_slope ? get_statistic(attention, attention->alibi_slopes, at->h) : 0;
    const real diagonal = (real)(workspace->first_row + row + at->offset - workspace->first_column);
    if (dropout) {
        load_dropout(attention, at, workspace->first_row + row, 1, workspace->first_column, workspace->columns, workspace->dropout);
    }
    vector lane_columns;
    for (int lane = 0; lane < LANES; lane++) lane_columns[lane] = (real)lane;
    vector sums = vector_of(0);
    for (int64_t column = 0; column < workspace->columns; column += LANES) {
        if (!whole && (columns.first >= column + LANES || columns.last <= column)) {
            if (wanted == D_VALUES) continue;
            vector_store(weights + column, vector_of(0));
            vector_store(grad_scores + column, vector_of(0));
            continue;
        }
        const vector place = lane_columns + (real)column;
        vector score = vector_load(weights + column) * scale, cap_slope = vector_of(1);
        vector_mask attended = (place >= (real)columns.first) & (place < (real)columns.last);
        if (softcap > 0) {
            vector capped = vector_tanh(score / softcap);
            score = softcap * capped;
            cap_slope = 1 - capped * capped;
        }
        if (additions) {
            vector addition = vector_load(additions + column);
            score += addition;
            attended &= ~(addition == -(real)INFINITY);
        }
        if (has_slope) {
            vector distance = diagonal - place;
            score -= slope * vector_select(distance < 0, -distance, distance);
        }
        vector weight = weight_of(score - logsumexp);
        vector gradient = vector_load(grad_scores + column);
        if (dropout) gradient *= vector_load(dropout + column);
        if (wanted == D_VALUES) { /* not even behind the last column may anything else be added */
            sums += vector_select(attended, weight * gradient, vector_of(0));
            continue;
        }
        gradient = weight * (gradient - offset);
        if (softcap > 0) gradient *= cap_slope;
        if (dropout) weight *= vector_load(dropout + column);
        if (!whole) {
            weight = vector_select(attended, weight, vector_of(0));
            gradient = vector_select(attended, gradient, vector_of(0));
        }
        vector_store(weights + column, weight);
        vector_store(grad_scores + column, gradient);
    }
    real sum = 0;
    for (int lane = 0; lane < LANES && wanted == D_VALUES; lane++) sum += sums[lane];
    return sum;
}

/* Whether no option changes the tile's scores or weights. */
static bool is_plain(const cpu_attention* attention, const backward_workspace* workspace) {
    return !(softcap_of(attention) > 0) && !workspace->masked && !attention->alibi_slopes && !workspace->dropout;
}

static void differentiate(const cpu_attention* attention, const backward_workspace* workspace) {
    const bool plain = is_plain(attention, workspace);
    for (int64_t row = 0; row < workspace->rows; row++) {
        if (!plain) {
            differentiate_row(attention, workspace, row, GRADIENTS, false, false);
        } else if (workspace->full) {
            differentiate_row(attention, workspace, row, GRADIENTS, true, true);
        } else {
            differentiate_row(attention, workspace, row, GRADIENTS, true, false);
        }
    }
}

/* Adds the tile's weights times dP to the sums of its rows, which lie where their offsets will. */
static void add_to_d_values(const cpu_attention* attention, const backward_workspace* workspace) {
    const bool plain = is_plain(attention, workspace);
    for (int64_t row = 0; row < workspace->rows; row++) {
        workspace->offsets[row] += plain ? differentiate_row(attention, workspace, row, D_VALUES, true, false)
                                         : differentiate_row(attention, workspace, row, D_VALUES, false, false);
    }
}

/* ---- What is not finite -------------------------------------------------------------------------------------------------------------- */

/* Columns attended by a row that is not finite become NaN in its channels, and then the row is made finite. */
static void poison_columns(const backward_workspace* workspace, real* operand, int64_t pitch, int64_t channels, real* gradient) {
    for (int64_t row = 0; row < workspace->rows; row++) {
        for (int64_t channel = 0; channel < channels; channel++) {
            const real value = operand[row * pitch + channel];
            if (value - value == 0) continue;
            for (int64_t column = 0; column < workspace->columns; column++) {
                if (is_attended_at(workspace, row, column)) gradient[column * pitch + channel] = NAN;
            }
        }
    }
    clear_what_is_not_finite(operand, pitch, workspace->rows, channels);
}

/* ---- Products with keys and values --------------------------------------------------------------------------------------------------- */

/* In products_*.h. */
static void multiply_panel(const product* product, int64_t rows, int64_t depth, int64_t row, int64_t column, int64_t column_pitch);
static void multiply_key_rows(const backward_workspace* workspace, int64_t rows, int64_t row, int64_t first, int64_t last, int64_t channel);

/* out[row][column] = sum over channels of rows[row][channel] * panels[column][channel], where the tile is attended. The panels of a group of
 * columns stay in the first level cache. */
static void multiply_by_panels(const backward_workspace* workspace, int64_t channels, const product* product, row_stream* upcoming) {
    for (int64_t group = 0; group < workspace->columns; group += GROUP) {
        for (int64_t row = 0, count; row < workspace->rows; row += count) {
            count = block_rows(workspace->rows - row);
            const span attended = columns_of_block(workspace, row, count);
            const int64_t last = minimum(attended.last, group + GROUP);
            for (int64_t column = maximum(attended.first / PANEL * PANEL, group); column < last; column += PANEL) {
                multiply_panel(product, count, divide_up(channels, IN_ELEMENT), row, column, workspace->column_pitch);
                fetch_lines(upcoming);
            }
        }
    }
}

/* grad_query[row][channel] = sum over columns of grad_scores[row][column] * key[column][channel], in groups of rows likewise. */
static void multiply_by_keys(const cpu_attention* attention, backward_workspace* workspace) {
    const int64_t channels = attention->head_dim;
    const query_sums sums = locate_query_sums(attention, workspace->position.b, workspace->position.h);
    for (int64_t group = 0; group < workspace->rows; group += GROUP) {
        const int64_t end = minimum(group + GROUP, workspace->rows);
        for (int64_t row = group; row < end; row++) {
            const char* sum = sums.sums + (workspace->first_row + row) * sums.row_bytes;
            for (int64_t byte = 0; byte < channels * (int64_t)sizeof(real); byte += CACHE_LINE) __builtin_prefetch(sum + byte);
        }
        for (int64_t channel = 0; channel < channels; channel += PANEL) {
            for (int64_t row = group, count; row < end; row += count) {
                count = block_rows(end - row);
                const span columns = columns_of_block(workspace, row, count);
                multiply_key_rows(workspace, count, row, columns.first, columns.last, channel);
                fetch_lines(&workspace->upcoming.key);
                fetch_lines(&workspace->upcoming.value);
            }
        }
    }
}

#if KERNEL_INTEGER
#include "products_int8.h"
#else
#include "products_float.h"
#endif

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

static int64_t kv_head_count(const cpu_attention* attention) {
    return attention->batch_size * attention->num_kv_heads;
}

/* Tiles of the same columns of all heads follow one another, so that two that add to the same queries are seldom worked on at once. */
static int64_t backward_items(const cpu_attention* attention) {
    return kv_head_count(attention) * column_tiles(attention);
}

/* The first query head of an item. */
static head_position locate_item(const cpu_attention* attention, int64_t item) {
    const int64_t head = item % kv_head_count(attention), group = attention->num_heads / attention->num_kv_heads;
    return locate_head(attention, head / attention->num_kv_heads, head % attention->num_kv_heads * group);
}

/* The first tile of rows from `row_tile` on of a head that attends a tile of columns; the number of all where none does. */
static int64_t next_row_tile(const cpu_attention* attention, const head_position* at, int64_t tile, int64_t row_tile) {
    for (; row_tile < row_tiles(attention); row_tile++) {
        const span columns = column_tiles_of(attention, at, row_tile);
        if (tile >= columns.first && tile < columns.last) break;
    }
    return row_tile;
}

/* What follows a tile of rows of the head at the workspace's position: the head's `row_tile`, or behind its last one the first of the next head
 * that shares the keys, or of the item that this thread takes next if all take as long. */
static upcoming_tile find_upcoming_tile(const cpu_attention* attention, const backward_workspace* workspace, int64_t item,
                                        int64_t row_tile) {
    upcoming_tile upcoming = {0};
    head_position at = workspace->position;
    const int64_t group = attention->num_heads / attention->num_kv_heads;
    const int64_t blocks = divide_up(workspace->rows, block_rows(workspace->rows));
    const int64_t column_panels = divide_up(workspace->columns, PANEL), channel_panels = divide_up(attention->head_dim, PANEL);
    int64_t tile = item / kv_head_count(attention);
    if (row_tile == row_tiles(attention) && (at.h + 1) % group != 0) {
        at = locate_head(attention, at.b, at.h + 1);
        row_tile = next_row_tile(attention, &at, tile, 0);
    } else if (row_tile == row_tiles(attention)) {
        item += attention->threads;
        if (item >= backward_items(attention)) return upcoming;
        at = locate_item(attention, item);
        tile = item / kv_head_count(attention);
        row_tile = next_row_tile(attention, &at, tile, 0);
        const int64_t column = tile * column_tile(attention), columns = minimum(column_tile(attention), at.keys - column);
        const int64_t times = blocks * channel_panels;
        upcoming.key = stream_rows(&attention->key, at.b, at.kv_head, attention->head_dim, column, columns, times);
        upcoming.value = stream_rows(&attention->value, at.b, at.kv_head, attention->head_dim_v, column, columns, times);
    }
    const int64_t row = row_tile * ROW_TILE, rows = minimum(ROW_TILE, attention->seq_len_q - row), times = blocks * column_panels;
    upcoming.query = stream_rows(&attention->query, at.b, at.h, attention->head_dim, row, rows, times);
    upcoming.grad_output = stream_rows(&attention->grad_output, at.b, at.h, attention->head_dim_v, row, rows, times);
    return upcoming;
}

/* One tile of rows of the head at the workspace's position, against the item's columns. `next`: the head's next one. */
static void run_tile(const cpu_attention* attention, backward_workspace* workspace, int64_t item, int64_t row_tile, int64_t next) {
    const int64_t head_dim_v = attention->head_dim_v, pitch_v = workspace->pitch_v;
    const bool wants_query = attention->grad_query.data != NULL;
    workspace->first_row = row_tile * ROW_TILE;
    workspace->rows = minimum(ROW_TILE, attention->seq_len_q - workspace->first_row);
    if (!place_tile(attention, workspace)) {
        if (wants_query) add_to_query_sums(attention, workspace, false);
        return;
    }
    load_statistics(attention, workspace);
    load_rows_of_tile(attention, workspace);
    workspace->upcoming = find_upcoming_tile(attention, workspace, item, next);
    multiply_rows_of_tile(attention, workspace);
    differentiate(attention, workspace);
    if (attention->grad_value.data) {
        if (!workspace->grad_output_finite) {
            poison_columns(workspace, workspace->grad_output, pitch_v, head_dim_v, workspace->grad_value);
        }
        accumulate_over_rows(workspace, head_dim_v, workspace->weights, workspace->grad_output, pitch_v, workspace->grad_value);
    }
    place_grad_scores(attention, workspace);
    if (attention->grad_key.data) accumulate_grad_key(attention, workspace);
    if (wants_query) {
        multiply_by_keys(attention, workspace);
        complete_grad_query(attention, workspace);
        add_to_query_sums(attention, workspace, true);
    }
}

static void backward_run(const cpu_attention* attention, int64_t item, void* memory) {
    backward_workspace workspace;
    backward_layout(attention, memory, &workspace);
    const int64_t group = attention->num_heads / attention->num_kv_heads, tile = item / kv_head_count(attention);
    const int64_t pitch = workspace.pitch, pitch_v = workspace.pitch_v;
    workspace.first_column = tile * column_tile(attention);
    workspace.position = locate_item(attention, item);
    const int64_t b = workspace.position.b, kv_head = workspace.position.kv_head;
    workspace.columns = minimum(column_tile(attention), workspace.position.keys - workspace.first_column);
    if (workspace.columns > 0) load_keys_and_values(attention, &workspace);
    memset(workspace.grad_key, 0, (size_t)(column_tile(attention) * pitch) * sizeof(real));
    memset(workspace.grad_value, 0, (size_t)(column_tile(attention) * pitch_v) * sizeof(real));

    for (int64_t h = kv_head * group; workspace.columns > 0 && h < (kv_head + 1) * group; h++) {
        workspace.position = locate_head(attention, b, h);
        int64_t row_tile = next_row_tile(attention, &workspace.position, tile, 0);
        while (row_tile < row_tiles(attention)) {
            const int64_t next = next_row_tile(attention, &workspace.position, tile, row_tile + 1);
            run_tile(attention, &workspace, item, row_tile, next);
            row_tile = next;
        }
    }
    const int64_t stored = minimum(column_tile(attention), attention->seq_len_kv - workspace.first_column);
    for (int64_t k = 0; k < stored; k++) {
        real* grad_key = workspace.grad_key + k * pitch;
        for (int64_t channel = 0; channel < attention->head_dim; channel++) grad_key[channel] *= (real)attention->softmax_scale;
        leave_score_space(&attention->key, grad_key, attention->head_dim);
        const int64_t column = workspace.first_column + k;
        if (attention->grad_key.data) store_row(&attention->grad_key, b, kv_head, column, attention->head_dim, grad_key);
        if (attention->grad_value.data) {
            store_row(&attention->grad_value, b, kv_head, column, attention->head_dim_v, workspace.grad_value + k * pitch_v);
        }
    }
}

/* ---- d_values ------------------------------------------------------------------------------------------------------------------------ */

static int64_t d_values_items(const cpu_attention* attention) {
    return attention->batch_size * attention->num_heads * row_tiles(attention);
}

static size_t d_values_workspace_bytes(const cpu_attention* attention) {
    if (!attention->output.data) return backward_workspace_bytes(attention);
    return (size_t)(2 * pitch_of(attention->head_dim_v) + COLUMN_TILE) * sizeof(real);
}

/* Whether masks exclude every column of a row. `additions` has room for COLUMN_TILE numbers. */
static bool row_is_empty(const cpu_attention* attention, const head_position* position, int64_t row, real* additions) {
    const column_range range = columns_of_row(attention, position, row);
    bool any = false;
    for (int64_t column = range.first; column < range.last && !any; column += COLUMN_TILE) {
        any =
            !attention->mask.data || load_mask_row(attention, position, row, column, minimum(COLUMN_TILE, range.last - column), additions);
    }
    return !any;
}

/* From the output. */
static void sum_products_with_output(const cpu_attention* attention, const head_position* position, int64_t first_row, int64_t rows,
                                     real* memory) {
    const int64_t channels = attention->head_dim_v, pitch = pitch_of(channels), b = position->b, h = position->h;
    real *output = memory, *grad_output = output + pitch, *additions = grad_output + pitch;
    for (int64_t row = first_row; row < first_row + rows; row++) {
        load_tile(&attention->output, b, h, row, 1, channels, output, pitch);
        load_tile(&attention->grad_output, b, h, row, 1, channels, grad_output, pitch);
        round_grad_output(grad_output, channels);
        vector products = vector_of(0);
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            products += vector_load(output + channel) * vector_load(grad_output + channel);
        }
        real sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += products[lane];
        if (sum - sum != 0 && row_is_empty(attention, position, row, additions)) sum = 0;
        set_statistic(attention, attention->d_values, (b * attention->num_heads + h) * attention->seq_len_q + row, sum);
    }
}

/* Without the output: one tile of rows against all columns. */
static void sum_weighted_gradients(const cpu_attention* attention, const head_position* position, int64_t first_row, int64_t rows,
                                   void* memory) {
    backward_workspace workspace;
    backward_layout(attention, memory, &workspace);
    workspace.position = *position;
    workspace.first_row = first_row;
    workspace.rows = rows;
    workspace.upcoming = (upcoming_tile){0};
    const int64_t statistic = (position->b * attention->num_heads + position->h) * attention->seq_len_q + first_row;
    load_rows_of_tile(attention, &workspace);
    for (int64_t row = 0; row < rows; row++) {
        workspace.logsumexp[row] = get_statistic(attention, attention->logsumexp, statistic + row);
        workspace.offsets[row] = 0;
    }
    const span tiles = column_tiles_of(attention, position, first_row / ROW_TILE);
    for (int64_t tile = tiles.first; tile < tiles.last; tile++) {
        workspace.first_column = tile * column_tile(attention);
        workspace.columns = minimum(column_tile(attention), position->keys - workspace.first_column);
        if (!place_tile(attention, &workspace)) continue;
        load_keys_and_values(attention, &workspace);
        multiply_rows_of_tile(attention, &workspace);
        add_to_d_values(attention, &workspace);
    }
    for (int64_t row = 0; row < rows; row++) set_statistic(attention, attention->d_values, statistic + row, workspace.offsets[row]);
}

static void d_values_run(const cpu_attention* attention, int64_t item, void* memory) {
    const int64_t tiles = row_tiles(attention), head = item / tiles, first_row = item % tiles * ROW_TILE;
    const head_position position = locate_head(attention, head / attention->num_heads, head % attention->num_heads);
    const int64_t rows = minimum(ROW_TILE, attention->seq_len_q - first_row);
    if (attention->output.data) {
        sum_products_with_output(attention, &position, first_row, rows, memory);
    } else {
        sum_weighted_gradients(attention, &position, first_row, rows, memory);
    }
}

#ifdef KERNEL_TARGET
#pragma clang attribute pop
#endif
#pragma clang diagnostic pop

const cpu_attention_kernel KERNEL_NAME(attention_backward, KERNEL_SUFFIX) = {
    .name = "attention_backward_" KERNEL_TEXT(KERNEL_SUFFIX),
    .serves = backward_serves,
    .shared_bytes = backward_shared_bytes,
    .prepare_items = backward_prepare_items,
    .prepare = backward_prepare,
    .item_count = backward_items,
    .workspace_bytes = backward_workspace_bytes,
    .run = backward_run,
};

const cpu_attention_kernel KERNEL_NAME(attention_d_values, KERNEL_SUFFIX) = {
    .name = "attention_d_values_" KERNEL_TEXT(KERNEL_SUFFIX),
    .serves = backward_serves,
    .item_count = d_values_items,
    .workspace_bytes = d_values_workspace_bytes,
    .run = d_values_run,
};
