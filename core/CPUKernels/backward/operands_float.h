/* What the products of backward kernels multiply, in FP32. */

typedef real element;
enum { IN_ELEMENT = 1 }; /* channels, columns or rows of an element */

/* Rows against panels of columns. */
typedef struct {
    const element* rows;
    int64_t pitch;
    const element* panels; /* [panel of columns][elements of a row][PANEL] */
    real* out;             /* [row][column pitch] */
} product;

typedef struct {
    bool keys_finite;      /* else `key` has 0 in place of what is not finite */
    bool query_finite;     /* of the tile's rows */
    element* key;          /* [columns][pitch] */
    element* key_panels;   /* [panel of columns][head_dim][PANEL] */
    element* value_panels; /* [panel of columns][head_dim_v][PANEL] */
    element* query;        /* [ROW_TILE][pitch] */
} operands;

static void take_operands(const cpu_attention* attention, workspace_cursor* cursor, operands* operands, int64_t pitch, int64_t pitch_v,
                          int64_t columns, int64_t column_pitch) {
    (void)pitch_v, (void)column_pitch;
    operands->key = workspace_take_reals(cursor, columns * pitch);
    operands->key_panels = workspace_take_reals(cursor, columns * attention->head_dim);
    operands->value_panels = workspace_take_reals(cursor, columns * attention->head_dim_v);
    operands->query = workspace_take_reals(cursor, ROW_TILE * pitch);
}
