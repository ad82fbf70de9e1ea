/* Backward: scores are recomputed tile by tile from Q, K and logsumexp. Query gradients belong to row tiles, key and value gradients to
 * column tiles, so nothing is summed across items: no atomics, one order of summation. */

typedef struct {
    score_tile tile;    /* scores: first s, then the dropped-out probabilities */
    int64_t head_pitch; /* head_dim and head_dim_v rounded up to LANES: row strides of the natural tiles */
    int64_t head_pitch_v;
    real* query;         /* [tile rows][head_pitch] */
    real* query_columns; /* its transpose, [head_dim][tile rows] */
    real* grad_output;   /* [tile rows][head_pitch_v] */
    real* grad_output_columns;
    real* output;         /* [head_dim_v], a row of the forward result */
    real* key;            /* [TILE_COLUMNS][head_pitch] */
    real* value;          /* [TILE_COLUMNS][head_pitch_v] */
    real* finite;         /* a tile with what is not finite replaced by 0 */
    real* grad_scores;    /* [TILE_COLUMNS][tile rows]: dP, then ds, then dc */
    real* dropout;        /* [TILE_COLUMNS][tile rows], or NULL */
    real* logsumexp;      /* [tile rows] */
    real* d_values;       /* [tile rows] */
    real* grad_logsumexp; /* [tile rows] */
    real* grad_query;     /* [head_dim][tile rows] */
    real* grad_key;       /* [TILE_COLUMNS][head_pitch] */
    real* grad_value;     /* [TILE_COLUMNS][head_pitch_v] */
    double* grad_bias;    /* [TILE_COLUMNS][tile rows], or NULL */
} backward_workspace;

static size_t backward_layout(const cpu_attention* attention, void* memory, backward_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    int64_t rows = tile_rows(attention);
    int64_t pitch = round_up(attention->head_dim, LANES), pitch_v = round_up(attention->head_dim_v, LANES);
    workspace->head_pitch = pitch;
    workspace->head_pitch_v = pitch_v;
    take_score_tile(&cursor, attention, rows, true, &workspace->tile);
    workspace->query = workspace_take_reals(&cursor, rows * pitch);
    workspace->query_columns = workspace_take_reals(&cursor, pitch * rows);
    workspace->grad_output = workspace_take_reals(&cursor, rows * pitch_v);
    workspace->grad_output_columns = workspace_take_reals(&cursor, pitch_v * rows);
    workspace->output = workspace_take_reals(&cursor, maximum(pitch, pitch_v));
    workspace->key = workspace_take_reals(&cursor, TILE_COLUMNS * pitch);
    workspace->value = workspace_take_reals(&cursor, TILE_COLUMNS * pitch_v);
    workspace->finite = workspace_take_reals(&cursor, maximum(TILE_COLUMNS, rows) * maximum(pitch, pitch_v));
    workspace->grad_scores = workspace_take_reals(&cursor, TILE_COLUMNS * rows);
    workspace->dropout = attention->dropout_p > 0 ? workspace_take_reals(&cursor, TILE_COLUMNS * rows) : NULL;
    workspace->logsumexp = workspace_take_reals(&cursor, rows);
    workspace->d_values = workspace_take_reals(&cursor, rows);
    workspace->grad_logsumexp = workspace_take_reals(&cursor, rows);
    workspace->grad_query = workspace_take_reals(&cursor, pitch * rows);
    workspace->grad_key = workspace_take_reals(&cursor, TILE_COLUMNS * pitch);
    workspace->grad_value = workspace_take_reals(&cursor, TILE_COLUMNS * pitch_v);
    workspace->grad_bias = attention->grad_mask.data ? workspace_take(&cursor, TILE_COLUMNS * rows, sizeof(double)) : NULL;
    return cursor.used;
}

static size_t backward_workspace_bytes(const cpu_attention* attention) {
    return backward_layout(attention, NULL, &(backward_workspace){0});
}

/* ---- Steps that the passes share ----------------------------------------------------------------------------------------------------- */

/* Reads what belongs to the query rows of the tile's position from first_row on; d_values only if they are known already. */
static void load_query_rows(const cpu_attention* attention, backward_workspace* workspace, int64_t first_row, bool with_d_values) {
    score_tile* tile = &workspace->tile;
    const head_position* at = &tile->position;
    const int64_t rows = tile->rows, pitch = workspace->head_pitch, pitch_v = workspace->head_pitch_v;
    const cpu_tensor query = score_operand(&attention->query);
    tile->first_row = first_row;
    tile->valid_rows = minimum(rows, attention->seq_len_q - first_row);
    memset(workspace->query, 0, (size_t)(rows * pitch) * sizeof(real));
    memset(workspace->grad_output, 0, (size_t)(rows * pitch_v) * sizeof(real));
    load_rows(&query, at->b, at->h, first_row, tile->valid_rows, attention->head_dim, workspace->query, pitch);
    load_rows(&attention->grad_output, at->b, at->h, first_row, tile->valid_rows, attention->head_dim_v, workspace->grad_output, pitch_v);
    transpose_rows(workspace->query, pitch, tile->valid_rows, attention->head_dim, workspace->query_columns, rows);
    transpose_rows(workspace->grad_output, pitch_v, tile->valid_rows, attention->head_dim_v, workspace->grad_output_columns, rows);
    int64_t statistic = (at->b * attention->num_heads + at->h) * attention->seq_len_q + first_row;
    const bool with_grad_logsumexp = attention->grad_logsumexp != NULL;
    for (int64_t row = 0; row < rows; row++) {
        bool valid = row < tile->valid_rows;
        tile->infinite[row] = 0;
        workspace->logsumexp[row] = valid ? get_statistic(attention, attention->logsumexp, statistic + row) : 0;
        workspace->d_values[row] = valid && with_d_values ? get_statistic(attention, attention->d_values, statistic + row) : 0;
        workspace->grad_logsumexp[row] =
            valid && with_grad_logsumexp ? get_statistic(attention, attention->grad_logsumexp, statistic + row) : 0;
    }
}

/* Lays out the workspace and reads the query rows of an item that is a tile of them. */
static void open_row_tile(const cpu_attention* attention, int64_t item, void* memory, bool with_d_values, backward_workspace* workspace) {
    backward_layout(attention, memory, workspace);
    int64_t first_row;
    workspace->tile.position = locate_row_tile(attention, item, &first_row);
    load_query_rows(attention, workspace, first_row, with_d_values);
}

static void load_key_value_rows(const cpu_attention* attention, backward_workspace* workspace, int64_t first_column, int64_t columns) {
    const head_position* at = &workspace->tile.position;
    const cpu_tensor key = score_operand(&attention->key);
    load_rows(&key, at->b, at->kv_head, first_column, columns, attention->head_dim, workspace->key, workspace->head_pitch);
    load_rows(&attention->value, at->b, at->kv_head, first_column, columns, attention->head_dim_v, workspace->value,
              workspace->head_pitch_v);
}

/* For the placed tile, with its rows and columns loaded: tile.scores becomes the probabilities p, grad_scores becomes dp (dropout applied).
 * Both are 0 where masked. */
static void recompute_probabilities(const cpu_attention* attention, backward_workspace* workspace) {
    score_tile* tile = &workspace->tile;
    const int64_t rows = tile->rows;
    multiply(tile->columns, rows, attention->head_dim, workspace->key, workspace->head_pitch, 1, workspace->query_columns, rows,
             tile->scores, rows, false);
    multiply(tile->columns, rows, attention->head_dim_v, workspace->value, workspace->head_pitch_v, 1, workspace->grad_output_columns, rows,
             workspace->grad_scores, rows, false);
    finish_scores(attention, tile);
    if (workspace->dropout) {
        load_dropout(attention, &tile->position, tile->first_row, rows, tile->first_column, tile->columns, workspace->dropout);
    }
    for (int64_t column = 0; column < tile->columns; column++) {
        for (int64_t row = 0; row < rows; row += LANES) {
            const int64_t at = column * rows + row;
            vector probability = vector_exp(vector_load(tile->scores + at) - vector_load(workspace->logsumexp + row));
            vector grad_probability = vector_load(workspace->grad_scores + at);
            if (workspace->dropout) grad_probability *= vector_load(workspace->dropout + at);
            if (!tile->full) {
                vector_mask attended = *(const vector_mask*)(tile->attended + at);
                probability = vector_select(attended, probability, vector_of(0));
                grad_probability = vector_select(attended, grad_probability, vector_of(0));
            }
            vector_store(tile->scores + at, probability);
            vector_store(workspace->grad_scores + at, grad_probability);
        }
    }
}

/* Then: grad_scores becomes ds, the gradient of the scores. */
static void compute_score_gradients(backward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    for (int64_t column = 0; column < tile->columns; column++) {
        for (int64_t row = 0; row < tile->rows; row += LANES) {
            const int64_t at = column * tile->rows + row;
            vector gradient = vector_load(workspace->grad_scores + at) - vector_load(workspace->d_values + row);
            gradient += vector_load(workspace->grad_logsumexp + row);
            gradient *= vector_load(tile->scores + at);
            if (!tile->full) gradient = vector_select(*(const vector_mask*)(tile->attended + at), gradient, vector_of(0));
            vector_store(workspace->grad_scores + at, gradient);
        }
    }
}

/* Then: grad_scores becomes dc, the gradient of the capped dot products' arguments. */
static void apply_cap_slopes(backward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    if (!tile->cap_slopes) return;
    for (int64_t column = 0; column < tile->columns; column++) {
        for (int64_t row = 0; row < tile->rows; row += LANES) {
            const int64_t at = column * tile->rows + row;
            vector gradient = vector_load(workspace->grad_scores + at) * vector_load(tile->cap_slopes + at);
            if (!tile->full) gradient = vector_select(*(const vector_mask*)(tile->attended + at), gradient, vector_of(0));
            vector_store(workspace->grad_scores + at, gradient);
        }
    }
}

/* The operand itself if it is finite, else a copy with 0 for the rest: masked terms must not turn into NaN by a multiplication with 0. */
static const real* finite_operand(backward_workspace* workspace, const real* operand, int64_t pitch, int64_t rows, int64_t channels,
                                  bool* finite) {
    *finite = rows_are_finite(operand, pitch, rows, channels);
    if (*finite) return operand;
    memset(workspace->finite, 0, (size_t)(rows * pitch) * sizeof(real));
    copy_finite(operand, pitch, rows, channels, workspace->finite, pitch);
    return workspace->finite;
}

/* ---- d_values ------------------------------------------------------------------------------------------------------------------------ */

static bool row_is_empty(const cpu_attention* attention, backward_workspace* workspace, int64_t row) {
    score_tile* tile = &workspace->tile;
    column_range range = columns_of_row(attention, &tile->position, tile->first_row + row);
    for (int64_t column = range.first / TILE_COLUMNS * TILE_COLUMNS; column < range.last; column += TILE_COLUMNS) {
        if (!place_score_tile(attention, tile, column, range.last)) continue;
        for (int64_t k = 0; k < tile->columns; k++) {
            bool in_range = k >= tile->limits[row] && k < tile->limits[tile->rows + row];
            if (in_range && !(tile->masked && tile->additions[k * tile->rows + row] == -(real)INFINITY)) return false;
        }
    }
    return true;
}

static void d_values_run(const cpu_attention* attention, int64_t item, void* memory) {
    backward_workspace workspace;
    open_row_tile(attention, item, memory, false, &workspace);
    score_tile* tile = &workspace.tile;
    const head_position* at = &tile->position;
    const int64_t first_row = tile->first_row;
    int64_t statistic = (at->b * attention->num_heads + at->h) * attention->seq_len_q + first_row;

    if (attention->output.data) {
        for (int64_t row = 0; row < tile->valid_rows; row++) {
            load_row(&attention->output, at->b, at->h, first_row + row, attention->head_dim_v, workspace.output);
            const real* grad_output = workspace.grad_output + row * workspace.head_pitch_v;
            real sum = 0;
            for (int64_t channel = 0; channel < attention->head_dim_v; channel++) sum += grad_output[channel] * workspace.output[channel];
            if (sum - sum != 0 && row_is_empty(attention, &workspace, row)) sum = 0;
            set_statistic(attention, attention->d_values, statistic + row, sum);
        }
        return;
    }
    column_range range = columns_of_rows(attention, at, first_row, tile->valid_rows);
    for (int64_t column = range.first / TILE_COLUMNS * TILE_COLUMNS; column < range.last; column += TILE_COLUMNS) {
        if (!place_score_tile(attention, tile, column, range.last)) continue;
        load_key_value_rows(attention, &workspace, column, tile->columns);
        recompute_probabilities(attention, &workspace);
        for (int64_t k = 0; k < tile->columns; k++) {
            for (int64_t row = 0; row < tile->rows; row += LANES) {
                vector product =
                    vector_load(tile->scores + k * tile->rows + row) * vector_load(workspace.grad_scores + k * tile->rows + row);
                vector_store(workspace.d_values + row, vector_load(workspace.d_values + row) + product);
            }
        }
    }
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        set_statistic(attention, attention->d_values, statistic + row, workspace.d_values[row]);
    }
}

/* ---- Gradient of the queries --------------------------------------------------------------------------------------------------------- */

static void poison_grad_query(const cpu_attention* attention, backward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    for (int64_t column = 0; column < tile->columns; column++) {
        for (int64_t channel = 0; channel < attention->head_dim; channel++) {
            real key = workspace->key[column * workspace->head_pitch + channel];
            if (key - key == 0) continue;
            for (int64_t row = 0; row < tile->valid_rows; row++) {
                if (is_attended(tile, column, row)) workspace->grad_query[channel * tile->rows + row] = NAN;
            }
        }
    }
}

static void backward_query_run(const cpu_attention* attention, int64_t item, void* memory) {
    backward_workspace workspace;
    open_row_tile(attention, item, memory, true, &workspace);
    score_tile* tile = &workspace.tile;
    const head_position* at = &tile->position;
    const int64_t first_row = tile->first_row;
    const int64_t rows = tile->rows, head_dim = attention->head_dim;
    memset(workspace.grad_query, 0, (size_t)(head_dim * rows) * sizeof(real));

    column_range range = columns_of_rows(attention, at, first_row, tile->valid_rows);
    for (int64_t column = range.first / TILE_COLUMNS * TILE_COLUMNS; column < range.last; column += TILE_COLUMNS) {
        if (!place_score_tile(attention, tile, column, range.last)) continue;
        load_key_value_rows(attention, &workspace, column, tile->columns);
        recompute_probabilities(attention, &workspace);
        compute_score_gradients(&workspace);
        apply_cap_slopes(&workspace);
        bool finite;
        const real* key = finite_operand(&workspace, workspace.key, workspace.head_pitch, tile->columns, head_dim, &finite);
        multiply(head_dim, rows, tile->columns, key, 1, workspace.head_pitch, workspace.grad_scores, rows, workspace.grad_query, rows,
                 true);
        if (!finite) poison_grad_query(attention, &workspace);
    }
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        for (int64_t channel = 0; channel < head_dim; channel++) {
            workspace.output[channel] = workspace.grad_query[channel * rows + row] * (real)attention->softmax_scale;
        }
        leave_score_space(&attention->query, workspace.output, head_dim);
        store_row(&attention->grad_query, at->b, at->h, first_row + row, head_dim, workspace.output);
    }
}

/* ---- Gradients of keys and values ---------------------------------------------------------------------------------------------------- */

static int64_t backward_key_value_items(const cpu_attention* attention) {
    return attention->batch_size * attention->num_kv_heads * column_tile_count(attention);
}

/* Keys or values that attend a row which is not finite become NaN in its channels. */
static void poison_column_gradient(const score_tile* tile, const real* operand, int64_t pitch, int64_t channels, real* gradient) {
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        for (int64_t channel = 0; channel < channels; channel++) {
            real value = operand[row * pitch + channel];
            if (value - value == 0) continue;
            for (int64_t column = 0; column < tile->columns; column++) {
                if (is_attended(tile, column, row)) gradient[column * pitch + channel] = NAN;
            }
        }
    }
}

/* Adds weights[column][row] x operand[row][channel] to gradient[column][channel]. */
static void accumulate_column_gradient(backward_workspace* workspace, const real* weights, const real* operand, int64_t pitch,
                                       int64_t channels, real* gradient) {
    const score_tile* tile = &workspace->tile;
    bool finite;
    const real* factor = finite_operand(workspace, operand, pitch, tile->valid_rows, channels, &finite);
    multiply(tile->columns, pitch, tile->valid_rows, weights, tile->rows, 1, factor, pitch, gradient, pitch, true);
    if (!finite) poison_column_gradient(tile, operand, pitch, channels, gradient);
}

static void backward_key_value_run(const cpu_attention* attention, int64_t item, void* memory) {
    backward_workspace workspace;
    backward_layout(attention, memory, &workspace);
    score_tile* tile = &workspace.tile;
    const int64_t tiles = column_tile_count(attention), group = attention->num_heads / attention->num_kv_heads;
    const int64_t first_column = item % tiles * TILE_COLUMNS, kv_head = item / tiles % attention->num_kv_heads;
    const int64_t b = item / tiles / attention->num_kv_heads;
    const int64_t pitch = workspace.head_pitch, pitch_v = workspace.head_pitch_v;
    memset(workspace.grad_key, 0, (size_t)(TILE_COLUMNS * pitch) * sizeof(real));
    memset(workspace.grad_value, 0, (size_t)(TILE_COLUMNS * pitch_v) * sizeof(real));

    tile->position = locate_head(attention, b, kv_head * group);
    const int64_t columns = minimum(TILE_COLUMNS, tile->position.keys - first_column);
    if (columns > 0) load_key_value_rows(attention, &workspace, first_column, columns);
    for (int64_t h = kv_head * group; columns > 0 && h < (kv_head + 1) * group; h++) {
        tile->position = locate_head(attention, b, h);
        for (int64_t first_row = 0; first_row < attention->seq_len_q; first_row += tile->rows) {
            tile->first_row = first_row;
            tile->valid_rows = minimum(tile->rows, attention->seq_len_q - first_row);
            if (!place_score_tile(attention, tile, first_column, tile->position.keys)) continue;
            load_query_rows(attention, &workspace, first_row, true);
            recompute_probabilities(attention, &workspace);
            compute_score_gradients(&workspace);
            apply_cap_slopes(&workspace);
            for (int64_t k = 0; k < tile->columns * tile->rows && workspace.dropout; k += LANES) {
                vector_store(tile->scores + k, vector_load(tile->scores + k) * vector_load(workspace.dropout + k));
            }
            accumulate_column_gradient(&workspace, workspace.grad_scores, workspace.query, pitch, attention->head_dim, workspace.grad_key);
            accumulate_column_gradient(&workspace, tile->scores, workspace.grad_output, pitch_v, attention->head_dim_v,
                                       workspace.grad_value);
        }
    }
    const int64_t stored = minimum(TILE_COLUMNS, attention->seq_len_kv - first_column);
    for (int64_t k = 0; k < stored; k++) {
        real* grad_key = workspace.grad_key + k * pitch;
        for (int64_t channel = 0; channel < attention->head_dim; channel++) grad_key[channel] *= (real)attention->softmax_scale;
        leave_score_space(&attention->key, grad_key, attention->head_dim);
        if (attention->grad_key.data) store_row(&attention->grad_key, b, kv_head, first_column + k, attention->head_dim, grad_key);
        if (attention->grad_value.data) {
            store_row(&attention->grad_value, b, kv_head, first_column + k, attention->head_dim_v, workspace.grad_value + k * pitch_v);
        }
    }
}

/* ---- Gradients of mask, slopes and sinks --------------------------------------------------------------------------------------------- */

/* Along each axis of the mask: the tiles or indices that are items of their own, 1 where the mask broadcasts. */
typedef struct {
    int64_t batches, heads, row_tiles, column_tiles;
} mask_items;

static mask_items count_mask_items(const cpu_attention* attention) {
    const int64_t* strides = attention->grad_mask.strides;
    if (!attention->grad_mask.data) return (mask_items){0, 0, 0, 0};
    return (mask_items){strides[0] ? attention->batch_size : 1, strides[1] ? attention->num_heads : 1,
                        strides[2] ? row_tile_count(attention) : 1, strides[3] ? column_tile_count(attention) : 1};
}

static int64_t backward_bias_items(const cpu_attention* attention) {
    mask_items mask = count_mask_items(attention);
    bool by_head = attention->grad_sinks || attention->grad_alibi_slopes;
    return mask.batches * mask.heads * mask.row_tiles * mask.column_tiles + (by_head ? attention->num_heads : 0);
}

/* ds of the tile at (first_row, first_column) of the tile's position, into grad_scores. False if the tile is masked throughout. */
static bool compute_tile_of_score_gradients(const cpu_attention* attention, backward_workspace* workspace, int64_t first_row,
                                            int64_t first_column) {
    score_tile* tile = &workspace->tile;
    tile->first_row = first_row;
    tile->valid_rows = minimum(tile->rows, attention->seq_len_q - first_row);
    if (!place_score_tile(attention, tile, first_column, tile->position.keys)) return false;
    load_query_rows(attention, workspace, first_row, true);
    load_key_value_rows(attention, workspace, first_column, tile->columns);
    recompute_probabilities(attention, workspace);
    compute_score_gradients(workspace);
    return true;
}

static void grad_mask_run(const cpu_attention* attention, const mask_items* items, int64_t item, backward_workspace* workspace) {
    const int64_t* strides = attention->grad_mask.strides;
    score_tile* tile = &workspace->tile;
    const int64_t rows = tile->rows, row_tiles = row_tile_count(attention), column_tiles = column_tile_count(attention);
    const int64_t column_item = item % items->column_tiles, row_item = item / items->column_tiles % items->row_tiles;
    const int64_t head_item = item / items->column_tiles / items->row_tiles % items->heads;
    const int64_t batch_item = item / items->column_tiles / items->row_tiles / items->heads;
    for (int64_t k = 0; k < TILE_COLUMNS * rows; k++) workspace->grad_bias[k] = 0;

    /* Where the mask broadcasts along an axis, all of the axis is summed here, in its order. */
    for (int64_t b = strides[0] ? batch_item : 0; b < (strides[0] ? batch_item + 1 : attention->batch_size); b++) {
        for (int64_t h = strides[1] ? head_item : 0; h < (strides[1] ? head_item + 1 : attention->num_heads); h++) {
            tile->position = locate_head(attention, b, h);
            for (int64_t r = strides[2] ? row_item : 0; r < (strides[2] ? row_item + 1 : row_tiles); r++) {
                for (int64_t c = strides[3] ? column_item : 0; c < (strides[3] ? column_item + 1 : column_tiles); c++) {
                    if (!compute_tile_of_score_gradients(attention, workspace, r * rows, c * TILE_COLUMNS)) continue;
                    for (int64_t k = 0; k < tile->columns; k++) {
                        for (int64_t row = 0; row < tile->valid_rows; row++) {
                            workspace->grad_bias[(strides[3] ? k : 0) * rows + (strides[2] ? row : 0)] +=
                                (double)workspace->grad_scores[k * rows + row];
                        }
                    }
                }
            }
        }
    }
    const int64_t first_row = row_item * rows, first_column = column_item * TILE_COLUMNS;
    const int64_t stored_rows = strides[2] ? minimum(rows, attention->seq_len_q - first_row) : 1;
    const int64_t stored_columns = strides[3] ? minimum(TILE_COLUMNS, attention->seq_len_kv - first_column) : 1;
    cpu_tensor target = attention->grad_mask;
    target.data = (char*)target.data + first_column * strides[3] * element_bytes(target.precision);
    for (int64_t row = 0; row < stored_rows; row++) {
        real line[TILE_COLUMNS];
        for (int64_t k = 0; k < stored_columns; k++) line[k] = (real)workspace->grad_bias[k * rows + row];
        store_row(&target, batch_item, head_item, first_row + row, stored_columns, line);
    }
}

static real grad_sink_of_head(const cpu_attention* attention, int64_t h) {
    real sink = get_statistic(attention, attention->sinks, h);
    double sum = 0;
    if (sink == -(real)INFINITY) return 0;
    for (int64_t b = 0; b < attention->batch_size; b++) {
        int64_t first = (b * attention->num_heads + h) * attention->seq_len_q;
        for (int64_t i = first; i < first + attention->seq_len_q; i++) {
            real grad_logsumexp = attention->grad_logsumexp ? get_statistic(attention, attention->grad_logsumexp, i) : 0;
            real share = real_exp(sink - get_statistic(attention, attention->logsumexp, i));
            sum += (double)share * ((double)grad_logsumexp - (double)get_statistic(attention, attention->d_values, i));
        }
    }
    return (real)sum;
}

static real grad_alibi_slope_of_head(const cpu_attention* attention, int64_t h, backward_workspace* workspace) {
    score_tile* tile = &workspace->tile;
    double sum = 0;
    for (int64_t b = 0; b < attention->batch_size; b++) {
        tile->position = locate_head(attention, b, h);
        for (int64_t first_row = 0; first_row < attention->seq_len_q; first_row += tile->rows) {
            for (int64_t column = 0; column < tile->position.keys; column += TILE_COLUMNS) {
                if (!compute_tile_of_score_gradients(attention, workspace, first_row, column)) continue;
                for (int64_t k = 0; k < tile->columns; k++) {
                    for (int64_t row = 0; row < tile->valid_rows; row++) {
                        if (!is_attended(tile, k, row)) continue;
                        double distance = fabs((double)(first_row + row + tile->position.offset - column - k));
                        sum -= (double)workspace->grad_scores[k * tile->rows + row] * distance;
                    }
                }
            }
        }
    }
    return (real)sum;
}

static void backward_bias_run(const cpu_attention* attention, int64_t item, void* memory) {
    backward_workspace workspace;
    backward_layout(attention, memory, &workspace);
    mask_items items = count_mask_items(attention);
    int64_t mask_count = items.batches * items.heads * items.row_tiles * items.column_tiles;
    if (item < mask_count) {
        grad_mask_run(attention, &items, item, &workspace);
        return;
    }
    int64_t h = item - mask_count;
    if (attention->grad_sinks) set_statistic(attention, attention->grad_sinks, h, grad_sink_of_head(attention, h));
    if (attention->grad_alibi_slopes) {
        set_statistic(attention, attention->grad_alibi_slopes, h, grad_alibi_slope_of_head(attention, h, &workspace));
    }
}
