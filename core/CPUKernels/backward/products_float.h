/* The products of backward kernels in FP32, on operands that are dequantised to FP32. Sums over channels run in their order. */

static bool backward_serves(const cpu_attention* attention) {
    (void)attention;
    return true;
}

static void load_keys_and_values(const cpu_attention* attention, backward_workspace* workspace) {
    const head_position* at = &workspace->position;
    const int64_t columns = workspace->columns;
    operands* operands = &workspace->operands;
    const cpu_tensor key = score_operand(&attention->key);
    /* Values are needed transposed only, so they may lie where their gradients will. */
    load_tile(&attention->value, at->b, at->kv_head, workspace->first_column, columns, attention->head_dim_v, workspace->grad_value,
              workspace->pitch_v);
    transpose_into_panels(workspace->grad_value, workspace->pitch_v, columns, attention->head_dim_v, operands->value_panels);
    operands->keys_finite =
        load_tile(&key, at->b, at->kv_head, workspace->first_column, columns, attention->head_dim, operands->key, workspace->pitch);
    transpose_into_panels(operands->key, workspace->pitch, columns, attention->head_dim, operands->key_panels);
    if (!operands->keys_finite) clear_what_is_not_finite(operands->key, workspace->pitch, columns, attention->head_dim);
}

/* Output gradients are multiplied as they are. */
static void round_grad_output(const real* row, int64_t channels) {
    (void)row, (void)channels;
}

/* Queries and output gradients of the tile's rows. */
static void load_rows_of_tile(const cpu_attention* attention, backward_workspace* workspace) {
    const head_position* at = &workspace->position;
    const cpu_tensor query = score_operand(&attention->query);
    workspace->operands.query_finite = load_tile(&query, at->b, at->h, workspace->first_row, workspace->rows, attention->head_dim,
                                                 workspace->operands.query, workspace->pitch);
    workspace->grad_output_finite = load_tile(&attention->grad_output, at->b, at->h, workspace->first_row, workspace->rows,
                                              attention->head_dim_v, workspace->grad_output, workspace->pitch_v);
}

static void multiply_panel(const product* product, int64_t rows, int64_t depth, int64_t row, int64_t column, int64_t column_pitch) {
    multiply_rows(rows, depth, product->rows + row * product->pitch, product->pitch, product->panels + column * depth, PANEL,
                  product->out + row * column_pitch + column, column_pitch);
}

/* The dot products of the tile's queries with its keys, and of its output gradients with its values. */
static void multiply_rows_of_tile(const cpu_attention* attention, backward_workspace* workspace) {
    const operands* operands = &workspace->operands;
    const product scores = {operands->query, workspace->pitch, operands->key_panels, workspace->weights};
    const product grad_weights = {workspace->grad_output, workspace->pitch_v, operands->value_panels, workspace->grad_scores};
    multiply_by_panels(workspace, attention->head_dim, &scores, &workspace->upcoming.query);
    multiply_by_panels(workspace, attention->head_dim_v, &grad_weights, &workspace->upcoming.grad_output);
}

/* Gradients of scores are multiplied as they are. */
static void place_grad_scores(const cpu_attention* attention, backward_workspace* workspace) {
    (void)attention, (void)workspace;
}

static void accumulate_grad_key(const cpu_attention* attention, backward_workspace* workspace) {
    const int64_t channels = attention->head_dim, pitch = workspace->pitch;
    element* query = workspace->operands.query;
    if (!workspace->operands.query_finite) poison_columns(workspace, query, pitch, channels, workspace->grad_key);
    accumulate_over_rows(workspace, channels, workspace->grad_scores, query, pitch, workspace->grad_key);
}

/* Share of columns first ..< last in the query gradients of a block of rows, from `channel` on. */
static void multiply_key_rows(const backward_workspace* workspace, int64_t rows, int64_t row, int64_t first, int64_t last,
                              int64_t channel) {
    const int64_t pitch = workspace->pitch, column_pitch = workspace->column_pitch;
    multiply_rows(rows, last - first, workspace->grad_scores + row * column_pitch + first, column_pitch,
                  workspace->operands.key + first * pitch + channel, pitch, workspace->grad_query + row * pitch + channel, pitch);
}

/* Queries whose keys are not finite become NaN in those channels; the panels still have the keys as they were. */
static void complete_grad_query(const cpu_attention* attention, backward_workspace* workspace) {
    const int64_t head_dim = attention->head_dim;
    for (int64_t column = 0; column < workspace->columns && !workspace->operands.keys_finite; column++) {
        const real* key = workspace->operands.key_panels + column / PANEL * PANEL * head_dim + column % PANEL;
        for (int64_t channel = 0; channel < head_dim; channel++) {
            if (key[channel * PANEL] - key[channel * PANEL] == 0) continue;
            for (int64_t row = 0; row < workspace->rows; row++) {
                if (is_attended_at(workspace, row, column)) workspace->grad_query[row * workspace->pitch + channel] = NAN;
            }
        }
    }
}
