/* Forward: one item is a tile of query rows of one head. Online softmax over column tiles (Milakov and Gimelshein 2018; Dao et al. 2022).
 * */

typedef struct {
    score_tile tile;
    real* rows;         /* [tile rows][channels]: queries in, output out */
    real* query;        /* [head_dim][tile rows] */
    real* key;          /* [TILE_COLUMNS][head_dim] */
    real* value;        /* [TILE_COLUMNS][head_dim_v] */
    real* finite_value; /* the same, for tiles that are not finite */
    real* output;       /* [head_dim_v][tile rows] */
    real* dropout;      /* [TILE_COLUMNS][tile rows] */
    row_statistics statistics;
} forward_workspace;

static size_t forward_layout(const cpu_attention* attention, void* memory, forward_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    int64_t rows = forward_tile_rows(attention), head_dim = attention->head_dim, head_dim_v = attention->head_dim_v;
    take_score_tile(&cursor, attention, rows, false, &workspace->tile);
    workspace->rows = workspace_take_reals(&cursor, rows * maximum(head_dim, head_dim_v));
    workspace->query = workspace_take_reals(&cursor, head_dim * rows);
    workspace->key = workspace_take_reals(&cursor, TILE_COLUMNS * head_dim);
    workspace->value = workspace_take_reals(&cursor, TILE_COLUMNS * head_dim_v);
    workspace->finite_value = workspace_take_reals(&cursor, TILE_COLUMNS * head_dim_v);
    workspace->output = workspace_take_reals(&cursor, head_dim_v * rows);
    workspace->dropout = attention->dropout_p > 0 ? workspace_take_reals(&cursor, TILE_COLUMNS * rows) : NULL;
    take_row_statistics(&cursor, rows, &workspace->statistics);
    return cursor.used;
}

static size_t forward_workspace_bytes(const cpu_attention* attention) {
    size_t bytes = forward_layout(attention, NULL, &(forward_workspace){0});
#if KERNEL_FP64
    return bytes;
#else
    size_t wide_bytes = KERNEL_WIDE_ROWS_BYTES(attention);
    return bytes > wide_bytes ? bytes : wide_bytes;
#endif
}

/* Replaces the tile's scores by exp(score - highest) and updates the rows' statistics. */
static void accumulate_softmax(forward_workspace* workspace) {
    score_tile* tile = &workspace->tile;
    for (int64_t row = 0; row < tile->rows; row += LANES) {
        vector old_highest = vector_load(workspace->statistics.highest + row);
        vector highest = old_highest;
        vector_mask attended = *(vector_mask*)(workspace->statistics.attended + row);
        vector_mask is_nan = *(vector_mask*)(workspace->statistics.is_nan + row);
        for (int64_t column = 0; column < tile->columns; column++) {
            vector score = vector_load(tile->scores + column * tile->rows + row);
            highest = vector_max(highest, score);
            is_nan |= score != score;
        }
        *(vector_mask*)(workspace->statistics.is_nan + row) = is_nan;
        /* Only -inf so far: any finite reference gives exp(-inf) = 0. */
        vector reference = vector_select(highest == -(real)INFINITY, vector_of(0), highest);
        vector sum = vector_of(0);
        for (int64_t column = 0; column < tile->columns; column++) {
            real* at = tile->scores + column * tile->rows + row;
            vector weight = vector_exp(vector_load(at) - reference);
            sum += weight;
            vector_store(at, weight);
        }
        if (tile->full) {
            attended = (vector_mask)(real_bits)-1;
        } else {
            for (int64_t column = 0; column < tile->columns; column++) {
                attended |= *(vector_mask*)(tile->attended + column * tile->rows + row);
            }
        }
        vector rescale = vector_exp(old_highest - reference);
        vector_store(workspace->statistics.highest + row, highest);
        vector_store(workspace->statistics.rescale + row, rescale);
        vector_store(workspace->statistics.sum + row, vector_load(workspace->statistics.sum + row) * rescale + sum);
        *(vector_mask*)(workspace->statistics.attended + row) = attended;
    }
}

/* A tile of values that are not all finite was multiplied as if they were: rows that attend one of the others become NaN in its channel. */
static void poison_output(const cpu_attention* attention, forward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    for (int64_t column = 0; column < tile->columns; column++) {
        for (int64_t channel = 0; channel < attention->head_dim_v; channel++) {
            real value = workspace->value[column * attention->head_dim_v + channel];
            if (value - value == 0) continue;
            for (int64_t row = 0; row < tile->valid_rows; row++) {
                if (is_attended(tile, column, row)) workspace->output[channel * tile->rows + row] = NAN;
            }
        }
    }
}

static void accumulate_output(const cpu_attention* attention, forward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    const int64_t rows = tile->rows, head_dim_v = attention->head_dim_v;
    vector_mask changed = (vector_mask)(real_bits)0;
    for (int64_t row = 0; row < rows; row += LANES) changed |= vector_load(workspace->statistics.rescale + row) != (real)1;
    if (vector_any(changed)) {
        for (int64_t channel = 0; channel < head_dim_v; channel++) {
            for (int64_t row = 0; row < rows; row += LANES) {
                real* at = workspace->output + channel * rows + row;
                vector_store(at, vector_load(at) * vector_load(workspace->statistics.rescale + row));
            }
        }
    }
    if (workspace->dropout) {
        load_dropout(attention, &tile->position, tile->first_row, rows, tile->first_column, tile->columns, workspace->dropout);
        for (int64_t k = 0; k < tile->columns * rows; k += LANES) {
            vector_store(tile->scores + k, vector_load(tile->scores + k) * vector_load(workspace->dropout + k));
        }
    }
    const real* value = workspace->value;
    bool finite = rows_are_finite(value, head_dim_v, tile->columns, head_dim_v);
    if (!finite) {
        copy_finite(value, head_dim_v, tile->columns, head_dim_v, workspace->finite_value, head_dim_v);
        value = workspace->finite_value;
    }
    multiply(head_dim_v, rows, tile->columns, value, 1, head_dim_v, tile->scores, rows, workspace->output, rows, true);
    if (!finite) poison_output(attention, workspace);
}

#if !KERNEL_FP64
static bool row_is_finite(const real* row, int64_t channels, real logsumexp) {
    return logsumexp - logsumexp == 0 && rows_are_finite(row, channels, 1, channels);
}

/* FP32 arithmetic can overflow where the formulas do not: rows that met a score which is not finite, or whose result is not, are computed
 * once more, with wide arithmetic. */
static void forward_rows_wide(const cpu_attention* attention, const head_position* position, int64_t first_row, int64_t rows,
                              void* memory) {
    cpu_attention wide = *attention;
    wide.float_statistics = true;
    KERNEL_WIDE_ROWS(&wide, position->b, position->h, first_row, rows, memory);
}
#endif

/* Rows first_row ..< first_row + valid_rows, counted from those of `position`, at most a tile of them. */
static void forward_rows(const cpu_attention* attention, head_position position, int64_t first_row, int64_t valid_rows, void* memory) {
    forward_workspace workspace;
    forward_layout(attention, memory, &workspace);
    score_tile* tile = &workspace.tile;
    const head_position* at = &tile->position;
    tile->position = position;
    tile->first_row = first_row;
    tile->valid_rows = valid_rows;
    tile->rows = round_up(valid_rows, LANES);
    const int64_t head_dim = attention->head_dim, head_dim_v = attention->head_dim_v, rows = tile->rows;

    const cpu_tensor query = score_operand(&attention->query), key = score_operand(&attention->key);
    for (int64_t row = 0; row < valid_rows; row++) {
        row_place place = place_of_row(attention, at, first_row + row);
        load_row(&query, at->b, place.h, place.i, head_dim, workspace.rows + row * head_dim);
    }
    transpose_rows(workspace.rows, head_dim, valid_rows, head_dim, workspace.query, rows);
    clear_row_statistics(&workspace.statistics, tile);
    memset(workspace.output, 0, (size_t)(head_dim_v * rows) * sizeof(real));

    column_range range = columns_of_rows(attention, at, first_row, valid_rows);
    for (int64_t column = range.first / TILE_COLUMNS * TILE_COLUMNS; column < range.last; column += TILE_COLUMNS) {
        if (!place_score_tile(attention, tile, column, range.last)) continue;
        load_rows(&key, at->b, at->kv_head, column, tile->columns, head_dim, workspace.key, head_dim);
        load_rows(&attention->value, at->b, at->kv_head, column, tile->columns, head_dim_v, workspace.value, head_dim_v);
        multiply(tile->columns, rows, head_dim, workspace.key, head_dim, 1, workspace.query, rows, tile->scores, rows, false);
        finish_scores(attention, tile);
        accumulate_softmax(&workspace);
        accumulate_output(attention, &workspace);
    }

    int64_t first_statistic = (at->b * attention->num_heads + at->h) * attention->seq_len_q + first_row;
    for (int64_t row = 0; row < valid_rows; row++) {
        real logsumexp;
        row_place place = place_of_row(attention, at, first_row + row);
        real factor = finish_row(attention, place.h, &workspace.statistics, row, &logsumexp);
        for (int64_t channel = 0; channel < head_dim_v; channel++) {
            workspace.rows[row * head_dim_v + channel] =
                workspace.statistics.attended[row] ? workspace.output[channel * rows + row] * factor : 0;
        }
        store_row(&attention->output, at->b, place.h, place.i, head_dim_v, workspace.rows + row * head_dim_v);
        if (attention->logsumexp) set_statistic(attention, attention->logsumexp, first_statistic + row, logsumexp);
        workspace.statistics.rescale[row] = logsumexp;
    }
#if !KERNEL_FP64
    /* Which rows are to be computed again is noted before the workspace is given to it. */
    uint64_t overflow = 0;
    for (int64_t row = 0; row < valid_rows; row++) {
        bool finite = row_is_finite(workspace.rows + row * head_dim_v, head_dim_v, workspace.statistics.rescale[row]);
        if (workspace.statistics.attended[row] && (tile->infinite[row] || !finite)) overflow |= (uint64_t)1 << row;
    }
    for (int64_t row = 0, run; row < valid_rows; row += run + 1) {
        for (run = 0; row + run < valid_rows && overflow >> (row + run) & 1; run++) {}
        if (run > 0) forward_rows_wide(attention, &position, first_row + row, run, memory);
    }
#endif
}

static void forward_run(const cpu_attention* attention, int64_t item, void* memory) {
    int64_t first_row, rows;
    head_position position = locate_forward_tile(attention, item, &first_row, &rows);
    forward_rows(attention, position, first_row, rows, memory);
}

/* For kernels that leave some rows to this one. */
void KERNEL_NAME(attention_forward_rows, KERNEL_SUFFIX)(const cpu_attention* attention, int64_t b, int64_t h, int64_t first_row,
                                                        int64_t rows, void* memory) {
    for (int64_t row = 0; row < rows; row += forward_tile_rows(attention)) {
        forward_rows(attention, locate_head(attention, b, h), first_row + row, minimum(forward_tile_rows(attention), rows - row), memory);
    }
}

size_t KERNEL_NAME(attention_forward_rows_bytes, KERNEL_SUFFIX)(const cpu_attention* attention) {
    return forward_workspace_bytes(attention);
}
