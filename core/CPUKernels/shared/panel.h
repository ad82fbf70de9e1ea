/* The matrix product of fast kernels, on a panel of query rows whose lanes lie beside each other:
 *
 *     c[n][lane] = sum over k of a[n * a_row + k * a_depth] * b[k][lane]      (+ rescale[lane] * the old c[n][lane])
 *
 * with scalars of `a` broadcast against vectors of `b`. `b`, `c` and `rescale` are aligned, their rows follow each other. Each element sums
 * over k in order; its value does not depend on the other rows and lanes. Meanwhile `upcoming` rows are fetched, if there are any, and
 * `scans` are made of what results, if they are asked for. */

/* With AVX2, 6 rows by one vector of two registers are 12 accumulators in 16 registers, with NEON 6 by one vector of four registers 24 in 32:
 * as many as there is room for beside the vectors of b and a scalar of a. With AVX-512, 6 by 2 are 12 in 32: as fast as 6 by 4, and panels
 * of fewer rows leave out more of a causal tile. A rest of four rows still hides the latency of two multiply-adds a cycle, fewer do not. */
enum { PRODUCT_ROWS = 6, PRODUCT_REST = 4 };

/* What is found of a vector of lanes while the rows of a product are looked at: of every other row, lest each wait for the one before. */
typedef struct {
    vector largest, largest_odd, probe, probe_odd; /* probes are NaN once a number is not finite */
} scan;

static const scan SCAN_OF_NONE = {.largest = -INFINITY, .largest_odd = -INFINITY};

INLINE void scan_number(vector number, const bool odd, scan* scan) {
    vector *largest = odd ? &scan->largest_odd : &scan->largest, *probe = odd ? &scan->probe_odd : &scan->probe;
    *largest = vector_max(*largest, number);
    *probe += number * 0.0f;
}

/* `rows` and `vectors` are constants wherever this is inlined. */
INLINE void multiply_panel_rows(const int rows, const int vectors, int64_t depth, const real* a, int64_t a_row, int64_t a_depth,
                                const real* b, real* c, const real* rescale, scan* scans) {
    vector sums[PRODUCT_ROWS][KERNEL_PANEL_VECTORS];
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) sums[row][v] = vector_of(0);
    }
    const real* rest = a + PRODUCT_ROWS / 2 * a_row; /* two bases reach all rows by scaled indices */
#pragma clang loop unroll_count(4)
    for (int64_t k = 0; k < depth; k++) {
        vector b_vectors[KERNEL_PANEL_VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) b_vectors[v] = vector_load(b + (k * vectors + v) * LANES);
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) {
            const real* factors = row < PRODUCT_ROWS / 2 ? a + row * a_row : rest + (row - PRODUCT_ROWS / 2) * a_row;
            const vector factor = vector_of(factors[k * a_depth]);
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++) sums[row][v] += factor * b_vectors[v];
        }
    }
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            real* at = c + (row * vectors + v) * LANES;
            if (rescale) sums[row][v] += vector_load(at) * vector_load(rescale + v * LANES);
            vector_store(at, sums[row][v]);
        }
    }
    for (int v = 0; v < vectors && scans; v++) {
        scan found = scans[v];
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) scan_number(sums[row][v], row % 2 != 0, &found);
        scans[v] = found;
    }
}

/* For a panel of a constant number of vectors. */
INLINE void multiply_panel_of(const int vectors, int64_t rows, int64_t depth, const real* a, int64_t a_row, int64_t a_depth, const real* b,
                              real* c, const real* rescale, upcoming_rows* upcoming, scan* scans) {
#define MULTIPLY_ROWS_OF_PANEL(count) \
    multiply_panel_rows(count, vectors, depth, a + row * a_row, a_row, a_depth, b, c + row * vectors * LANES, rescale, scans)
    int64_t row = 0;
    for (; rows - row >= PRODUCT_ROWS && rows - row != 2 * PRODUCT_REST && rows - row != 2 * PRODUCT_REST - 1; row += PRODUCT_ROWS) {
        MULTIPLY_ROWS_OF_PANEL(PRODUCT_ROWS);
        if (upcoming) fetch_upcoming(upcoming);
    }
    for (; rows - row >= PRODUCT_REST; row += PRODUCT_REST) MULTIPLY_ROWS_OF_PANEL(PRODUCT_REST);
    switch (rows - row) {
    case 3: MULTIPLY_ROWS_OF_PANEL(3); break;
    case 2: MULTIPLY_ROWS_OF_PANEL(2); break;
    case 1: MULTIPLY_ROWS_OF_PANEL(1); break;
    default: break;
    }
#undef MULTIPLY_ROWS_OF_PANEL
}

/* `lanes` is a multiple of LANES, at most that of a panel. */
INLINE void multiply_panel(int64_t lanes, int64_t rows, int64_t depth, const real* a, int64_t a_row, int64_t a_depth, const real* b,
                           real* c, const real* rescale, upcoming_rows* upcoming, scan* scans) {
#if KERNEL_PANEL_VECTORS == 2
    if (lanes > LANES) {
        multiply_panel_of(2, rows, depth, a, a_row, a_depth, b, c, rescale, upcoming, scans);
        return;
    }
#endif
    multiply_panel_of(1, rows, depth, a, a_row, a_depth, b, c, rescale, upcoming, scans);
}

/* c[n][lane] = sum over k of a[n][k] * b[k][lane]. `scans`: of each vector of lanes; NULL: not asked for. */
static void multiply_panel_by_rows(int64_t lanes, int64_t rows, int64_t depth, const real* a, int64_t pitch, const real* b, real* c,
                                   upcoming_rows* upcoming, scan* scans) {
    multiply_panel(lanes, rows, depth, a, pitch, 1, b, c, NULL, upcoming, scans);
}

/* c[n][lane] = rescale[lane] * c[n][lane] + sum over k of a[k][n] * b[k][lane]. */
static void multiply_panel_by_columns(int64_t lanes, int64_t rows, int64_t depth, const real* a, int64_t pitch, const real* b, real* c,
                                      const real* rescale) {
    multiply_panel(lanes, rows, depth, a, 1, pitch, b, c, rescale, NULL, NULL);
}
