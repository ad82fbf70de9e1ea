/* What online softmax knows of each query row, and how a row ends. */

static const double LN_2 = 0.693147180559945309417;

typedef struct {
    real* highest;       /* the highest score so far, or a little above it: the reference of exponentials */
    real* sum;           /* of exp(score - highest) */
    real* rescale;       /* exp(old highest - new highest), of the last tile */
    real_bits* attended; /* whether any column was attended */
    real_bits* is_nan;   /* whether any score was NaN */
} row_statistics;

static void take_row_statistics(workspace_cursor* cursor, int64_t rows, row_statistics* statistics) {
    statistics->highest = workspace_take_reals(cursor, rows);
    statistics->sum = workspace_take_reals(cursor, rows);
    statistics->rescale = workspace_take_reals(cursor, rows);
    statistics->attended = workspace_take(cursor, rows, sizeof(real_bits));
    statistics->is_nan = workspace_take(cursor, rows, sizeof(real_bits));
}

/* Those of rows that have met no column yet. */
static void clear_row_statistics(row_statistics* statistics, score_tile* tile) {
    for (int64_t row = 0; row < tile->rows; row++) {
        statistics->highest[row] = -(real)INFINITY;
        statistics->sum[row] = 0;
        statistics->attended[row] = 0;
        statistics->is_nan[row] = 0;
        tile->infinite[row] = 0;
    }
}

/* The factor of a row's accumulated output that makes it the result, and the row's logsumexp. */
static real finish_row(const cpu_attention* attention, int64_t h, const row_statistics* statistics, int64_t row, real* logsumexp) {
    const real infinity = (real)INFINITY;
    real highest = statistics->highest[row], sum = statistics->sum[row];
    real sink = attention->sinks ? get_statistic(attention, attention->sinks, h) : -infinity;
    bool has_sink = !(sink == -infinity);
    if (!statistics->attended[row]) {
        *logsumexp = sink;
        return 0;
    }
    if (highest == infinity) { /* inf - inf made the sum NaN, but the formula's logsumexp is infinite */
        *logsumexp = statistics->is_nan[row] || sink != sink ? (real)NAN : infinity;
        return (real)NAN;
    }
    if (!has_sink) {
        *logsumexp = (real)((double)highest + log((double)sum));
        return highest == -infinity ? (real)NAN : 1 / sum;
    }
    real reference = sink > highest ? sink : highest;
    real weight = real_exp(highest - reference);
    real total = sum * weight + (sink == reference ? 1 : real_exp(sink - reference));
    *logsumexp = (real)((double)reference + log((double)total));
    return weight / total;
}

static bool is_of_one_head(const cpu_attention* attention, const score_tile* tile) {
    return place_of_row(attention, &tile->position, tile->first_row).i + tile->valid_rows <= attention->seq_len_q;
}

/* Where the tile's rows of a query or output begin in the caller's memory, if they lie there as FP32 numbers, `strides[2]` apart. Else NULL. */
static float* find_tile_rows(const cpu_attention* attention, const score_tile* tile, const cpu_tensor* tensor) {
    const row_place first = place_of_row(attention, &tile->position, tile->first_row);
    const bool stays = is_of_one_head(attention, tile) && has_aligned_float_rows(tensor);
    return stays ? (float*)tensor->data + row_offset(tensor, tile->position.b, first.h, first.i) : NULL;
}

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

/* Whether a tile holds the rows of all heads that share keys: where there are few rows, as in decoding. A row's result is the same in any
 * tile, so this may depend on the number of heads. */
static int64_t heads_in_tile(const cpu_attention* attention) {
    return attention->seq_len_q <= TILE_ROWS / 2 ? attention->num_heads / attention->num_kv_heads : 1;
}

/* Rows of a forward tile, a multiple of LANES: as many as TILE_ROWS if that leaves some tiles for each thread. */
static int64_t forward_tile_rows(const cpu_attention* attention) {
    enum { FEWEST_ROWS = 64, TILES_PER_THREAD = 4 };
    const int64_t heads = heads_in_tile(attention), groups = attention->batch_size * (attention->num_heads / heads);
    const int64_t rows = round_up(attention->seq_len_q * heads, LANES);
    int64_t tile = TILE_ROWS;
    while (tile > FEWEST_ROWS && groups * divide_up(rows, tile) < TILES_PER_THREAD * attention->threads) tile /= 2;
    return maximum(LANES, minimum(tile, rows));
}

static int64_t forward_tile_count(const cpu_attention* attention) {
    return divide_up(attention->seq_len_q * heads_in_tile(attention), forward_tile_rows(attention));
}

static int64_t forward_tile_items(const cpu_attention* attention) {
    return attention->batch_size * (attention->num_heads / heads_in_tile(attention)) * forward_tile_count(attention);
}

/* Item -> first head and rows of a forward tile. The last tiles come first: causal ones have the most columns. */
static head_position locate_forward_tile(const cpu_attention* attention, int64_t item, int64_t* first_row, int64_t* rows) {
    const int64_t tiles = forward_tile_count(attention), heads = heads_in_tile(attention);
    const int64_t groups = attention->num_heads / heads, group = item / tiles;
    *first_row = (tiles - 1 - item % tiles) * forward_tile_rows(attention);
    *rows = minimum(forward_tile_rows(attention), attention->seq_len_q * heads - *first_row);
    return locate_head(attention, group / groups, group % groups * heads);
}

static int64_t row_tile_items(const cpu_attention* attention) {
    return attention->batch_size * attention->num_heads * row_tile_count(attention);
}

/* Item -> head and first row. The last tiles come first: causal ones have the most columns. */
static head_position locate_row_tile(const cpu_attention* attention, int64_t item, int64_t* first_row) {
    int64_t tiles = row_tile_count(attention);
    int64_t head = item / tiles;
    *first_row = (tiles - 1 - item % tiles) * tile_rows(attention);
    return locate_head(attention, head / attention->num_heads, head % attention->num_heads);
}
