/* What online softmax knows of each query row, and how a row ends. */

typedef struct {
    real* highest;       /* the highest score so far */
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
static real finish_row(const cpu_attention* attention, const head_position* position, const row_statistics* statistics, int64_t row,
                       real* logsumexp) {
    const real infinity = (real)INFINITY;
    real highest = statistics->highest[row], sum = statistics->sum[row];
    real sink = attention->sinks ? get_statistic(attention, attention->sinks, position->h) : -infinity;
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

/* ---- Items --------------------------------------------------------------------------------------------------------------------------- */

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
