/* The geometry of a problem and one tile of scores.
 *
 * A tile is TILE_COLUMNS key columns by up to TILE_ROWS query rows, stored transposed, [column][row], so that a vector holds one column of
 * LANES query rows. Column tiles begin at multiples of TILE_COLUMNS whatever the limits are: a row's sums are then the same with and
 * without padding behind kv_lengths, whichever tiles are skipped. */

#ifndef KERNEL_TILE_ROWS
#define KERNEL_TILE_ROWS 64
#endif
#ifndef KERNEL_TILE_COLUMNS
#define KERNEL_TILE_COLUMNS 64
#endif
enum { TILE_ROWS = KERNEL_TILE_ROWS, TILE_COLUMNS = KERNEL_TILE_COLUMNS };

/* ---- Workspace ----------------------------------------------------------------------------------------------------------------------- */

enum { WORKSPACE_ALIGNMENT = 64 };

/* Hands out aligned pieces of a thread's workspace; counts only, where there is no memory yet. */
typedef struct {
    char* memory; /* NULL: count */
    size_t used;
} workspace_cursor;

static void* workspace_take(workspace_cursor* cursor, int64_t count, size_t element_size) {
    void* piece = cursor->memory ? cursor->memory + cursor->used : NULL;
    size_t bytes = (size_t)count * element_size;
    cursor->used += (bytes + WORKSPACE_ALIGNMENT - 1) / WORKSPACE_ALIGNMENT * WORKSPACE_ALIGNMENT;
    return piece;
}

static real* workspace_take_reals(workspace_cursor* cursor, int64_t count) {
    return workspace_take(cursor, count, sizeof(real));
}

/* ---- Statistics ---------------------------------------------------------------------------------------------------------------------- */

INLINE real get_statistic(const cpu_attention* attention, const void* array, int64_t index) {
    if (attention->float_statistics) return ((const float*)array)[index];
    return ((const real*)array)[index];
}

INLINE void set_statistic(const cpu_attention* attention, void* array, int64_t index, real value) {
    if (attention->float_statistics) {
        ((float*)array)[index] = (float)value;
    } else {
        ((real*)array)[index] = value;
    }
}

/* ---- Geometry ------------------------------------------------------------------------------------------------------------------------ */

INLINE int64_t minimum(int64_t a, int64_t b) {
    return a < b ? a : b;
}

INLINE int64_t maximum(int64_t a, int64_t b) {
    return a > b ? a : b;
}

INLINE int64_t divide_up(int64_t a, int64_t b) {
    return a / b + (a % b != 0);
}

INLINE int64_t round_up(int64_t a, int64_t b) {
    return divide_up(a, b) * b;
}

/* Query rows of a tile, a multiple of LANES. */
INLINE int64_t tile_rows(const cpu_attention* attention) {
    return maximum(LANES, minimum(TILE_ROWS, round_up(attention->seq_len_q, LANES)));
}

INLINE int64_t row_tile_count(const cpu_attention* attention) {
    return divide_up(attention->seq_len_q, tile_rows(attention));
}

INLINE int64_t column_tile_count(const cpu_attention* attention) {
    return divide_up(attention->seq_len_kv, TILE_COLUMNS);
}

/* Query rows of one (batch, head) pair: where its keys end and where its rows stand. Rows are counted on through the heads behind h that
 * share its keys, so a tile can hold rows of several heads: with few queries, keys and values are then read once for all of them. */
typedef struct {
    int64_t b, h, kv_head;
    int64_t keys;   /* columns that exist */
    int64_t offset; /* row i stands at key position i + offset */
} head_position;

static head_position locate_head(const cpu_attention* attention, int64_t b, int64_t h) {
    head_position position = {.b = b, .h = h, .kv_head = h / (attention->num_heads / attention->num_kv_heads)};
    position.keys = attention->kv_lengths ? attention->kv_lengths[b] : attention->seq_len_kv;
    if (attention->query_offsets) {
        position.offset = attention->query_offsets[b * attention->query_offset_stride];
    } else if (attention->lower_right) {
        position.offset = position.keys - attention->seq_len_q;
    }
    return position;
}

/* The head of a row, and its index there. */
typedef struct {
    int64_t h, i;
} row_place;

INLINE row_place place_of_row(const cpu_attention* attention, const head_position* position, int64_t row) {
    if (row < attention->seq_len_q) return (row_place){position->h, row};
    return (row_place){position->h + row / attention->seq_len_q, row % attention->seq_len_q};
}

/* The columns first ..< last that causality, window and length leave to row i; last <= first: none. */
typedef struct {
    int64_t first, last;
} column_range;

static column_range columns_of_row(const cpu_attention* attention, const head_position* position, int64_t i) {
    column_range range = {0, position->keys};
    int64_t diagonal = i + position->offset;
    if (attention->causal) range.last = minimum(range.last, diagonal + 1);
    if (attention->window_right >= 0) range.last = minimum(range.last, diagonal + attention->window_right + 1);
    if (attention->window_left >= 0) range.first = maximum(range.first, diagonal - attention->window_left);
    /* A row can stand far beyond the keys: without this the empty range would lie there too, and whoever takes its end would walk to it. */
    range.first = minimum(range.first, position->keys);
    if (range.last < range.first) range.last = range.first;
    return range;
}

/* The columns of the outermost of rows first_row ..< first_row + rows. Limits grow with i, so those of the others lie between. */
typedef struct {
    column_range first, last;
} outer_columns;

static outer_columns columns_of_outer_rows(const cpu_attention* attention, const head_position* position, int64_t first_row, int64_t rows) {
    row_place begin = place_of_row(attention, position, first_row), end = place_of_row(attention, position, first_row + rows - 1);
    bool one_head = begin.h == end.h;
    return (outer_columns){
        .first = columns_of_row(attention, position, one_head ? begin.i : 0),
        .last = columns_of_row(attention, position, one_head ? end.i : attention->seq_len_q - 1),
    };
}

/* All columns that some row of first_row ..< first_row + rows may attend. */
static column_range columns_of_rows(const cpu_attention* attention, const head_position* position, int64_t first_row, int64_t rows) {
    const outer_columns outer = columns_of_outer_rows(attention, position, first_row, rows);
    column_range range = {minimum(outer.first.first, position->keys), outer.last.last};
    if (range.last < range.first) range.last = range.first;
    return range;
}

/* ---- Reading tiles ------------------------------------------------------------------------------------------------------------------- */

/* Rows of a tensor as reals, [rows][channels]. */
static void load_rows(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t first_row, int64_t rows, int64_t channels, real* tile,
                      int64_t row_stride) {
#if KERNEL_FP64
    for (int64_t row = 0; row < rows; row++) load_row(tensor, b, h, first_row + row, channels, tile + row * row_stride);
#else
    load_rows_float(tensor, b, h, first_row, rows, channels, tile, row_stride);
#endif
}

/* Query or key as scores may use it. Both carry the same rotation, which leaves dot products as they are: where rows are FP32 it need not
 * be undone, only gradients have to be rotated back. */
static cpu_tensor score_operand(const cpu_tensor* tensor) {
    cpu_tensor operand = *tensor;
#if !KERNEL_FP64
    operand.rotated = false;
#endif
    return operand;
}

/* Takes a gradient in the space of score_operand() back to that of the tensor. */
static void leave_score_space(const cpu_tensor* tensor, real* row, int64_t channels) {
#if KERNEL_FP64
    (void)tensor, (void)row, (void)channels;
#else
    if (tensor->rotated) rotate_row(row, row, channels);
#endif
}

/* The transpose of tile[rows][channels] into [channels][padded_rows]; the padding is 0. */
static void transpose_rows(const real* tile, int64_t row_stride, int64_t rows, int64_t channels, real* transposed, int64_t padded_rows) {
    for (int64_t channel = 0; channel < channels; channel++) {
        real* out = transposed + channel * padded_rows;
        for (int64_t row = 0; row < rows; row++) out[row] = tile[row * row_stride + channel];
        for (int64_t row = rows; row < padded_rows; row++) out[row] = 0;
    }
}

/* Whether every element is finite: x - x is 0 for a finite x, else NaN. */
static bool rows_are_finite(const real* tile, int64_t row_stride, int64_t rows, int64_t channels) {
    real sum = 0;
    for (int64_t row = 0; row < rows; row++) {
        const real* values = tile + row * row_stride;
        real partial[LANES] = {0};
        int64_t channel = 0;
        for (; channel + LANES <= channels; channel += LANES) {
            for (int lane = 0; lane < LANES; lane++) partial[lane] += values[channel + lane] - values[channel + lane];
        }
        for (; channel < channels; channel++) sum += values[channel] - values[channel];
        for (int lane = 0; lane < LANES; lane++) sum += partial[lane];
    }
    return sum == 0;
}

/* Copies a tile, which may be its own copy, with 0 in place of what is not finite. */
static void copy_finite(const real* tile, int64_t row_stride, int64_t rows, int64_t channels, real* finite, int64_t finite_stride) {
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t channel = 0; channel < channels; channel++) {
            real value = tile[row * row_stride + channel];
            finite[row * finite_stride + channel] = value - value == 0 ? value : 0;
        }
    }
}

/* ---- Masks --------------------------------------------------------------------------------------------------------------------------- */

/* Element of an additive mask as a real. A finite number stays finite: only -inf masks. */
static real additive_mask_value(const cpu_tensor* mask, const char* address) {
    switch (mask->precision) {
    case CPU_FP32: return (real) * (const float_in_memory*)address;
    case CPU_FP16: return (real)float_from_half(*(const half_in_memory*)address);
    case CPU_BF16: return (real)float_from_bfloat(*(const half_in_memory*)address);
    default: break;
    }
    double value = *(const double_in_memory*)address;
#if !KERNEL_FP64
    if (value - value == 0) value = value > FLT_MAX ? FLT_MAX : value < -FLT_MAX ? -FLT_MAX : value;
#endif
    return (real)value;
}

/* What a mask leaves of a tile. */
typedef enum { MASK_NONE, MASK_SOME, MASK_ALL } mask_share;

/* The share of a boolean mask's rows, from their first to their last column. */
static mask_share share_of_boolean_mask(const cpu_attention* attention, const head_position* position, int64_t first_row, int64_t rows,
                                        int64_t first_column, int64_t columns) {
    const cpu_tensor* mask = &attention->mask;
    const char* base = (const char*)mask->data + position->b * mask->strides[0] + first_column * mask->strides[3];
    bool any = false, all = true;
    for (int64_t row = 0; row < rows && (all || !any); row++) {
        const row_place place = place_of_row(attention, position, first_row + row);
        const char* line = base + place.h * mask->strides[1] + place.i * mask->strides[2];
        char none = 0;
        char every = 1;
        if (mask->strides[3] == 1) {
            for (int64_t column = 0; column < columns; column++) {
                none |= line[column];
                every &= line[column] != 0;
            }
        } else {
            for (int64_t column = 0; column < columns; column++) {
                none |= line[column * mask->strides[3]];
                every &= line[column * mask->strides[3]] != 0;
            }
        }
        any |= none != 0;
        all &= every != 0;
    }
    return all ? MASK_ALL : any ? MASK_SOME : MASK_NONE;
}

/* What the mask adds to a row's scores, -inf where it masks. Returns whether any element is left. */
static bool load_mask_line(const cpu_tensor* mask, const char* line, int64_t columns, real* additions) {
    const int64_t step = mask->strides[3] * element_bytes(mask->precision);
    if (mask->precision == CPU_BOOL) {
        for (int64_t column = 0; column < columns; column++) additions[column] = line[column * step] ? 0 : -(real)INFINITY;
    } else if (mask->precision == CPU_FP32 && mask->strides[3] == 1) {
        for (int64_t column = 0; column < columns; column++) additions[column] = (real)((const float_in_memory*)line)[column];
    } else {
        for (int64_t column = 0; column < columns; column++) additions[column] = additive_mask_value(mask, line + column * step);
    }
    bool any = false;
    for (int64_t column = 0; column < columns; column++) any |= !(additions[column] == -(real)INFINITY);
    return any;
}

/* The mask's share of a tile, and unless that is all of it, what it adds to the scores: [column][row], -inf where it masks. */
static mask_share load_mask(const cpu_attention* attention, const head_position* position, int64_t first_row, int64_t rows,
                            int64_t padded_rows, int64_t first_column, int64_t columns, real* additions) {
    const cpu_tensor* mask = &attention->mask;
    if (mask->precision == CPU_BOOL) {
        const mask_share share = share_of_boolean_mask(attention, position, first_row, rows, first_column, columns);
        if (share != MASK_SOME) return share;
    }
    const int64_t size = element_bytes(mask->precision);
    const char* base = (const char*)mask->data + (position->b * mask->strides[0] + first_column * mask->strides[3]) * size;
    bool any = false;
    enum { LINES = 8 }; /* what is written of a column at a time */
    real lines[LINES][TILE_COLUMNS];
    for (int64_t first = 0; first < padded_rows; first += LINES) {
        for (int64_t line = 0; line < LINES; line++) {
            const int64_t row = first + line;
            if (row < rows) {
                const row_place place = place_of_row(attention, position, first_row + row);
                const char* address = base + (place.h * mask->strides[1] + place.i * mask->strides[2]) * size;
                any |= load_mask_line(mask, address, columns, lines[line]);
            } else {
                for (int64_t column = 0; column < columns; column++) lines[line][column] = -(real)INFINITY;
            }
        }
        for (int64_t column = 0; column < columns; column++) {
            for (int64_t line = 0; line < LINES; line++) additions[column * padded_rows + first + line] = lines[line][column];
        }
    }
    return any ? MASK_SOME : MASK_NONE;
}

/* ---- Dropout ------------------------------------------------------------------------------------------------------------------------- */

/* Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). */
static void philox(uint64_t key, const uint32_t counter[4], uint32_t words[4]) {
    uint32_t key_low = (uint32_t)key, key_high = (uint32_t)(key >> 32);
    uint32_t x0 = counter[0], x1 = counter[1], x2 = counter[2], x3 = counter[3];
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53u * x0;
        uint64_t product1 = (uint64_t)0xCD9E8D57u * x2;
        x0 = (uint32_t)(product1 >> 32) ^ x1 ^ key_low;
        x1 = (uint32_t)product1;
        x2 = (uint32_t)(product0 >> 32) ^ x3 ^ key_high;
        x3 = (uint32_t)product0;
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    words[0] = x0;
    words[1] = x1;
    words[2] = x2;
    words[3] = x3;
}

/* Dropout's factors of a tile, [column][row]: 0, or 1 / (1 - dropout_p). first_column is a multiple of 4. */
static void load_dropout(const cpu_attention* attention, const head_position* position, int64_t first_row, int64_t padded_rows,
                         int64_t first_column, int64_t columns, real* factors) {
    uint64_t threshold = (uint64_t)(attention->dropout_p * 4294967296.0);
    real kept = attention->dropout_p < 1 ? (real)(1 / (1 - attention->dropout_p)) : 0;
    uint64_t first_head = (uint64_t)position->b * (uint64_t)attention->num_heads;
    for (int64_t column = 0; column < columns; column += 4) {
        int64_t group = minimum(4, columns - column);
        for (int64_t row = 0; row < padded_rows; row++) {
            row_place place = place_of_row(attention, position, first_row + row);
            uint32_t head = (uint32_t)(first_head + (uint64_t)place.h);
            uint32_t counter[4] = {(uint32_t)((first_column + column) >> 2), (uint32_t)place.i, head, attention->dropout_offset};
            uint32_t words[4];
            philox(attention->seed, counter, words);
            for (int64_t k = 0; k < group; k++) factors[(column + k) * padded_rows + row] = words[k] >= threshold ? kept : 0;
        }
    }
}

/* ---- Scores -------------------------------------------------------------------------------------------------------------------------- */

/* A tile of scores and where it lies. Arrays are [column][row], `rows` apart. */
typedef struct {
    head_position position;
    int64_t first_row, valid_rows, rows; /* `rows` is padded to LANES */
    int64_t first_column, columns;
    bool full;           /* every element of the valid rows is attended: `attended` is not filled in */
    column_range whole;  /* columns that all valid rows attend; none where `masked` */
    bool masked;         /* the mask excludes some, or adds to scores: `additions` is filled in */
    real* scores;        /* in: dot products of query and key; out: s, -inf where masked */
    real* additions;     /* the additive mask's part; workspace where there is a mask */
    real* cap_slopes;    /* backward with softcap: 1 - tanh^2 = ds/dc; else NULL */
    real_bits* attended; /* 0 or -1 */
    real_bits* limits;   /* workspace, 2 * rows */
    real_bits* infinite; /* of each row: set once an attended score, or what softcap made of it, is not finite */
} score_tile;

/* The cap in this arithmetic: one too small for it is its smallest, one too large is off. */
static real softcap_of(const cpu_attention* attention) {
#if !KERNEL_FP64
    if (attention->softcap > FLT_MAX) return 0;
    if (attention->softcap > 0 && attention->softcap < FLT_MIN) return FLT_MIN;
#endif
    return (real)attention->softcap;
}

static void take_score_tile(workspace_cursor* cursor, const cpu_attention* attention, int64_t rows, bool backward, score_tile* tile) {
    tile->rows = rows;
    tile->scores = workspace_take_reals(cursor, TILE_COLUMNS * rows);
    tile->attended = workspace_take(cursor, TILE_COLUMNS * rows, sizeof(real_bits));
    tile->limits = workspace_take(cursor, 2 * rows, sizeof(real_bits));
    tile->infinite = workspace_take(cursor, rows, sizeof(real_bits));
    tile->additions = attention->mask.data ? workspace_take_reals(cursor, TILE_COLUMNS * rows) : NULL;
    tile->cap_slopes = backward && softcap_of(attention) > 0 ? workspace_take_reals(cursor, TILE_COLUMNS * rows) : NULL;
}

/* Sets the tile's place; it ends before last_column, behind which none of its rows attends anything. False if no element of it is attended,
 * so that it can be skipped. Reads masks only. */
static bool place_score_tile(const cpu_attention* attention, score_tile* tile, int64_t first_column, int64_t last_column) {
    tile->first_column = first_column;
    tile->columns = minimum(TILE_COLUMNS, minimum(last_column, tile->position.keys) - first_column);
    if (tile->columns <= 0) return false;
    tile->masked = false;
    const outer_columns outer = columns_of_outer_rows(attention, &tile->position, tile->first_row, tile->valid_rows);
    tile->whole.first = minimum(maximum(outer.last.first - first_column, 0), tile->columns);
    tile->whole.last = minimum(maximum(outer.first.last - first_column, tile->whole.first), tile->columns);
    tile->full = tile->whole.last - tile->whole.first == tile->columns;
    bool any = tile->full;
    for (int64_t row = 0; row < tile->rows; row++) {
        tile->limits[row] = 0;
        tile->limits[tile->rows + row] = row < tile->valid_rows ? (real_bits)tile->columns : 0;
    }
    for (int64_t row = 0; row < tile->valid_rows && !tile->full; row++) {
        const int64_t i = place_of_row(attention, &tile->position, tile->first_row + row).i;
        const column_range range = columns_of_row(attention, &tile->position, i);
        const int64_t first = minimum(maximum(range.first - first_column, 0), tile->columns);
        const int64_t last = minimum(maximum(range.last - first_column, 0), tile->columns);
        tile->limits[row] = (real_bits)first;
        tile->limits[tile->rows + row] = (real_bits)last;
        any |= first < last;
    }
    if (!any || !tile->additions) return any;
    const mask_share share =
        load_mask(attention, &tile->position, tile->first_row, tile->valid_rows, tile->rows, first_column, tile->columns, tile->additions);
    tile->masked = share != MASK_ALL;
    if (tile->masked) {
        tile->full = false;
        tile->whole = (column_range){0, 0};
    }
    return share != MASK_NONE;
}

/* Whether scores are scaled dot products to which nothing is added; limits and boolean masks only exclude. */
static bool nothing_is_added(const cpu_attention* attention) {
    const bool boolean = attention->mask.data == NULL || attention->mask.precision == CPU_BOOL;
    return boolean && attention->softcap == 0 && attention->alibi_slopes == NULL;
}

/* Which of a vector of the placed tile's rows attend a column, where nothing_is_added(). */
INLINE vector_mask attended_rows(const score_tile* tile, int64_t column, int64_t row) {
    const vector_mask first = *(const vector_mask*)(tile->limits + row);
    const vector_mask last = *(const vector_mask*)(tile->limits + tile->rows + row);
    const vector_mask attended = ((vector_mask)(real_bits)column >= first) & ((vector_mask)(real_bits)column < last);
    return tile->masked ? attended & (vector_load(tile->additions + column * tile->rows + row) == 0) : attended;
}

/* Turns dot products into scores: scale, softcap, mask, ALiBi, then selection. */
static void finish_scores(const cpu_attention* attention, score_tile* tile) {
    const real scale = (real)attention->softmax_scale, softcap = softcap_of(attention);
    const int64_t rows = tile->rows;
    for (int64_t row = 0; row < rows; row += LANES) {
        vector diagonal = vector_of(0); /* key position of each row, from the tile's first column */
        vector slope = vector_of(0);
        for (int lane = 0; lane < LANES && attention->alibi_slopes; lane++) {
            if (row + lane >= tile->valid_rows) break;
            row_place place = place_of_row(attention, &tile->position, tile->first_row + row + lane);
            diagonal[lane] = (real)(place.i + tile->position.offset - tile->first_column);
            slope[lane] = get_statistic(attention, attention->alibi_slopes, place.h);
        }
        vector_mask first = *(const vector_mask*)(tile->limits + row);
        vector_mask last = *(const vector_mask*)(tile->limits + rows + row);
        vector_mask infinite = *(const vector_mask*)(tile->infinite + row);
        for (int64_t column = 0; column < tile->columns; column++) {
            const int64_t at = column * rows + row;
            vector score = vector_load(tile->scores + at) * scale;
            vector excess = score - score; /* 0 if finite, else NaN */
            if (softcap > 0) {
                vector capped = vector_tanh(score / softcap);
                score = softcap * capped;
                if (tile->cap_slopes) vector_store(tile->cap_slopes + at, 1 - capped * capped);
            }
            vector_mask attended = ((vector_mask)(real_bits)column >= first) & ((vector_mask)(real_bits)column < last);
            if (tile->masked) {
                vector addition = vector_load(tile->additions + at);
                score += addition;
                attended &= ~(addition == -(real)INFINITY);
            }
            if (attention->alibi_slopes) {
                vector distance = diagonal - (real)column;
                score -= slope * vector_select(distance < 0, -distance, distance);
            }
            infinite |= (excess + (score - score) != 0) & attended;
            if (!tile->full) {
                score = vector_select(attended, score, vector_of(-(real)INFINITY));
                *(vector_mask*)(tile->attended + at) = attended;
            }
            vector_store(tile->scores + at, score);
        }
        *(vector_mask*)(tile->infinite + row) = infinite;
    }
}

INLINE bool is_attended(const score_tile* tile, int64_t column, int64_t row) {
    return row < tile->valid_rows && (tile->full || tile->attended[column * tile->rows + row]);
}
