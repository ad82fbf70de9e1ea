/* What the products of backward kernels multiply, in integers of 16 bits: codes as they are, and output gradients and gradients of scores
 * rounded to as many bits as sums of products have room for, with a scale for each row or tile. One instruction multiplies pairs of
 * numbers, so an element is a pair: two channels of a row, or one channel (or column) of two rows. */

typedef int32_t element __attribute__((may_alias)); /* a pair of numbers, the first in the low half */
typedef int16_t number __attribute__((may_alias));
typedef int32_t element_vector __attribute__((ext_vector_type(LANES)));
enum { IN_ELEMENT = 2 };

/* Rows against panels of columns: out = sum of products * row_factors[row] * column_factors[column] + addends[row]. */
typedef struct {
    const element* rows;
    int64_t pitch;
    const element* panels; /* [panel of columns][elements of a row][PANEL] */
    real* out;             /* [row][column pitch] */
    const real *row_factors, *column_factors, *addends;
} product;

typedef struct {
    element* key_pairs;              /* [pair of columns][pitch] */
    element* key_panels;             /* [panel of columns][pairs of channels][PANEL] */
    element* value_panels;           /* [panel of columns][pairs of channels][PANEL] */
    real *key_scales, *value_scales; /* [columns], 0 behind the last */

    element* query;           /* [ROW_TILE][pitch / 2] */
    element* query_pairs;     /* [pair of rows][pitch] */
    real* query_scales;       /* [ROW_TILE] */
    real* mean_products;      /* [ROW_TILE]: of queries with the keys' means */
    element* grad_output;     /* [ROW_TILE][pitch_v / 2] */
    real* grad_output_scales; /* [ROW_TILE]: NaN where a row is not finite */
    real* zeros;              /* [ROW_TILE] */

    element* grad_scores;        /* [ROW_TILE][column pitch / 2]: times the keys' scales */
    real* grad_score_scales;     /* [ROW_TILE] */
    element* grad_score_pairs;   /* [pair of rows][column pitch]: times the queries' scales */
    real grad_score_pairs_scale; /* of all of them */
    real* grad_score_sums;       /* [ROW_TILE]: over the columns */
} operands;

static void take_operands(const cpu_attention* attention, workspace_cursor* cursor, operands* operands, int64_t pitch, int64_t pitch_v,
                          int64_t columns, int64_t column_pitch) {
    operands->key_pairs = workspace_take(cursor, columns / 2 * pitch, sizeof(element));
    operands->key_panels = workspace_take(cursor, columns * divide_up(attention->head_dim, 2), sizeof(element));
    operands->value_panels = workspace_take(cursor, columns * divide_up(attention->head_dim_v, 2), sizeof(element));
    operands->key_scales = workspace_take_reals(cursor, columns);
    operands->value_scales = workspace_take_reals(cursor, columns);
    operands->query = workspace_take(cursor, ROW_TILE * pitch / 2, sizeof(element));
    operands->query_pairs = workspace_take(cursor, ROW_TILE / 2 * pitch, sizeof(element));
    operands->query_scales = workspace_take_reals(cursor, ROW_TILE);
    operands->mean_products = workspace_take_reals(cursor, ROW_TILE);
    operands->grad_output = workspace_take(cursor, ROW_TILE * pitch_v / 2, sizeof(element));
    operands->grad_output_scales = workspace_take_reals(cursor, ROW_TILE);
    operands->zeros = workspace_take_reals(cursor, ROW_TILE);
    operands->grad_scores = workspace_take(cursor, ROW_TILE * column_pitch / 2, sizeof(element));
    operands->grad_score_scales = workspace_take_reals(cursor, ROW_TILE);
    operands->grad_score_pairs = workspace_take(cursor, ROW_TILE / 2 * column_pitch, sizeof(element));
    operands->grad_score_sums = workspace_take_reals(cursor, ROW_TILE);
}
