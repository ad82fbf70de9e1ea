/* Items of forward kernels that work on panels of query rows: an item is a tile of query rows, cut into panels; blocks of columns are read once
 * for all of them. Before it is included, a kernel defines
 *
 *   forward_workspace      with the members tile (of one panel), statistics (`highest` as binary logarithms), infinite, output
 *                          ([head_dim_v][rows] for each panel), rows (room for a panel's rows, `row_pitch` apart) and upcoming
 *   forward_layout()       lays it out
 *   begin_item()           what comes before an item's panels
 *   select_queries()       makes what the kernel keeps of each row that of a panel
 *   open_queries()         reads a panel's queries
 *   load_block()           reads a block of keys and values
 *   attend_block()         adds what the placed panel attends of the block; it calls fetch_upcoming() after PRODUCT_ROWS columns or fewer. It
 *                          may leave some of that to the next call, for which it returns the panel: it is given what the last call
 *                          returned, and after an item's last panel NULL in place of one; until then the block before stays in memory
 *   channel_scales()       what each channel of the output has to be multiplied by, `stride` apart; NULL: nothing
 *   FARTHEST_SCORE         rows whose highest score, as a binary logarithm, is farther from 0 are computed again
 *   FETCH_NEIGHBOURS       whether rows that follow one another are fetched too, not left to the processor
 *   AGAIN_ROWS             the kernel that computes the rows that this one cannot; AGAIN_FLOAT_STATISTICS says that it is of FP64 arithmetic */

enum { PANELS = TILE_ROWS / PANEL_ROWS }; /* of an item at most */

/* Makes a panel of an item's rows the one that `selected` speaks of, its tile and statistics too. */
static void select_panel(const cpu_attention* attention, const forward_workspace* item, int64_t first_row, int64_t rows, int64_t panel,
                         forward_workspace* selected) {
    const int64_t first = panel * PANEL_ROWS;
    *selected = *item;
    selected->tile.first_row = first_row + first;
    selected->tile.valid_rows = minimum(PANEL_ROWS, rows - first);
    selected->tile.rows = round_up(selected->tile.valid_rows, LANES);
    selected->tile.infinite = item->infinite + first;
    selected->output = item->output + first * attention->head_dim_v;
    selected->statistics.highest += first;
    selected->statistics.sum += first;
    selected->statistics.rescale += first;
    selected->statistics.attended += first;
    selected->statistics.is_nan += first;
    select_queries(attention, selected, first);
}

/* Writes the panel's rows. Returns those (bit by bit) that have to be computed again, since a score or a result was not finite, or all scores
 * are too far from 0. */
static uint64_t close_panel(const cpu_attention* attention, forward_workspace* panel) {
    const score_tile* tile = &panel->tile;
    const head_position* at = &tile->position;
    const row_statistics* statistics = &panel->statistics;
    const int64_t rows = tile->rows, head_dim_v = attention->head_dim_v, pitch = panel->row_pitch;
    const int64_t first_statistic = (at->b * attention->num_heads + at->h) * attention->seq_len_q + tile->first_row;
    real factors[PANEL_ROWS] __attribute__((aligned(64)));
    uint64_t again = 0;
    for (int64_t row = 0; row < rows; row += LANES) {
        const vector_mask attended = *(const vector_mask*)(statistics->attended + row);
        const vector highest = vector_load(statistics->highest + row);
        *(vector_mask*)(tile->infinite + row) |= vector_max(highest, -highest) > FARTHEST_SCORE;
        vector_store(factors + row, vector_select(attended, 1 / vector_load(statistics->sum + row), vector_of(0)));
    }
    for (int64_t row = 0; row < tile->valid_rows && (attention->logsumexp || attention->sinks); row++) {
        real logsumexp;
        const row_place place = place_of_row(attention, at, tile->first_row + row);
        statistics->highest[row] = (real)((double)statistics->highest[row] * LN_2);
        factors[row] = finish_row(attention, place.h, statistics, row, &logsumexp);
        if (attention->logsumexp) set_statistic(attention, attention->logsumexp, first_statistic + row, logsumexp);
        /* All weights are 0 if scores are too far below 0: a sink would hide it. */
        const bool known = logsumexp - logsumexp == 0 && statistics->sum[row] != 0;
        if (statistics->attended[row] && !known) again |= (uint64_t)1 << row;
    }
    int64_t stride;
    const float* scales = channel_scales(attention, at, &stride);
    for (int64_t row = 0; row < rows; row += LANES) {
        const vector_mask attended = *(const vector_mask*)(statistics->attended + row);
        const vector factor = vector_load(factors + row);
        vector probe = factor * 0.0f; /* NaN once a result is not finite */
        for (int64_t channel = 0; channel < head_dim_v; channel++) {
            real* result = panel->output + channel * rows + row;
            vector scaled = vector_load(result) * factor;
            if (scales) scaled *= scales[channel * stride];
            scaled = vector_select(attended, scaled, vector_of(0));
            probe += scaled * 0.0f;
            vector_store(result, scaled);
        }
        const vector_mask failed = attended & (*(const vector_mask*)(tile->infinite + row) | (probe != 0));
        if (!vector_any(failed)) continue;
        for (int64_t lane = 0; lane < LANES && row + lane < tile->valid_rows; lane++) {
            if (failed[lane]) again |= (uint64_t)1 << (row + lane);
        }
    }
    float* in_place = find_tile_rows(attention, tile, &attention->output);
    if (in_place) {
        transpose_floats(panel->output, rows, head_dim_v, tile->valid_rows, in_place, attention->output.strides[2]);
        return again;
    }
    transpose_floats(panel->output, rows, head_dim_v, rows, panel->rows, pitch);
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        const row_place place = place_of_row(attention, at, tile->first_row + row);
        store_row(&attention->output, at->b, place.h, place.i, head_dim_v, panel->rows + row * pitch);
    }
    return again;
}

/* Computes rows once more, by the kernel that can. `rows`: bit by bit. */
static void compute_rows_again(const cpu_attention* attention, const head_position* position, int64_t first_row, uint64_t rows,
                               void* memory) {
    cpu_attention again = *attention;
    again.float_statistics |= AGAIN_FLOAT_STATISTICS;
    for (int64_t row = 0, run; row < PANEL_ROWS; row += run + 1) {
        for (run = 0; row + run < PANEL_ROWS && rows >> (row + run) & 1; run++) {}
        if (run > 0) AGAIN_ROWS(&again, position->b, position->h, first_row + row, run, memory);
    }
}

static row_stream stream_upcoming(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t channels, int64_t first, int64_t rows,
                                  int64_t times) {
    const bool neighbours = row_stride_bytes(tensor) == row_bytes(tensor->precision, channels);
    if (neighbours && !FETCH_NEIGHBOURS) return (row_stream){0};
    return stream_rows(tensor, b, h, channels, first, rows, times);
}

/* What follows the block at `column`: the next one that begins before `last_column`, or else what begins the item that this thread takes next
 * if all take as long. To be fetched in `times` goes. */
static upcoming_rows find_upcoming_rows(const cpu_attention* attention, int64_t item, const head_position* position, int64_t column,
                                        int64_t last_column, int64_t times) {
    upcoming_rows upcoming = {0};
    head_position at = *position;
    column += TILE_COLUMNS;
    if (column >= last_column) {
        item += attention->threads;
        if (item >= forward_tile_items(attention)) return upcoming;
        int64_t first_row, rows;
        at = locate_forward_tile(attention, item, &first_row, &rows);
        const column_range range = columns_of_rows(attention, &at, first_row, rows);
        column = range.first / TILE_COLUMNS * TILE_COLUMNS;
        last_column = range.last;
        const row_place first = place_of_row(attention, &at, first_row);
        rows = minimum(rows, attention->seq_len_q - first.i); /* of one head */
        upcoming.query = stream_upcoming(&attention->query, at.b, first.h, attention->head_dim, first.i, rows, times);
    }
    const int64_t columns = minimum(TILE_COLUMNS, last_column - column);
    upcoming.key = stream_upcoming(&attention->key, at.b, at.kv_head, attention->head_dim, column, columns, times);
    upcoming.value = stream_upcoming(&attention->value, at.b, at.kv_head, attention->head_dim_v, column, columns, times);
    return upcoming;
}

static void forward_run(const cpu_attention* attention, int64_t item, void* memory) {
    forward_workspace workspace;
    forward_layout(attention, memory, &workspace);
    int64_t first_row, rows;
    const head_position position = locate_forward_tile(attention, item, &first_row, &rows);
    workspace.tile.position = position;
    begin_item(attention, &workspace);
    const int64_t panels = divide_up(rows, PANEL_ROWS);
    for (int64_t p = 0; p < panels; p++) {
        forward_workspace panel;
        select_panel(attention, &workspace, first_row, rows, p, &panel);
        open_queries(attention, &panel);
        clear_row_statistics(&panel.statistics, &panel.tile);
        memset(panel.output, 0, (size_t)(attention->head_dim_v * panel.tile.rows) * sizeof(real));
    }
    const column_range range = columns_of_rows(attention, &position, first_row, rows);
    forward_workspace turns[2], *waiting = NULL;
    upcoming_rows upcoming;
    for (int64_t column = range.first / TILE_COLUMNS * TILE_COLUMNS; column < range.last; column += TILE_COLUMNS) {
        const int64_t columns = minimum(TILE_COLUMNS, range.last - column);
        upcoming = find_upcoming_rows(attention, item, &position, column, range.last, panels * divide_up(columns, PRODUCT_ROWS));
        bool loaded = false;
        for (int64_t p = 0; p < panels; p++) {
            forward_workspace* panel = waiting == &turns[0] ? &turns[1] : &turns[0];
            select_panel(attention, &workspace, first_row, rows, p, panel);
            const column_range own = columns_of_rows(attention, &position, panel->tile.first_row, panel->tile.valid_rows);
            if (!place_score_tile(attention, &panel->tile, column, own.last)) continue;
            if (!loaded) load_block(attention, &workspace, column, columns);
            loaded = true;
            panel->block = workspace.block;
            panel->upcoming = &upcoming;
            waiting = attend_block(attention, waiting, panel);
        }
    }
    if (waiting) attend_block(attention, waiting, NULL);
    uint64_t again[PANELS];
    for (int64_t p = 0; p < panels; p++) {
        forward_workspace panel;
        select_panel(attention, &workspace, first_row, rows, p, &panel);
        again[p] = close_panel(attention, &panel);
    }
    /* The workspace is no longer needed: it is given to what computes rows again. */
    for (int64_t p = 0; p < panels; p++) {
        if (again[p]) compute_rows_again(attention, &position, first_row + p * PANEL_ROWS, again[p], memory);
    }
}
