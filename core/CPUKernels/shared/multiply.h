/* The one matrix product of the reference kernels, on tiles in workspace. Every product of attention, forward and backward, is
 *
 *     c[row][column] (+)= sum over k of a[row * a_row + k * a_depth] * b[k * b_depth + column]
 *
 * with scalars of `a` broadcast against vectors of `b`. Each element sums over k in order, then is added to c when accumulating: rounding
 * errors of long sequences grow with their tiles, not with their keys, and its value does not depend on the tile's other rows and columns.
 * `columns` and the strides of b and c are multiples of LANES; b and c are aligned. */

/* A block of accumulators, which the instruction set's registers hold beside the vectors of b and a scalar of a:
 *   AVX2     6 rows x 1 vector of two registers: 12 of 16 registers
 *   AVX-512  8 rows x 2 vectors: 16 of 32, twice what the latency of two multiply-adds a cycle needs; 8 divides the usual head sizes */
#if defined(KERNEL_AVX512)
enum { MULTIPLY_ROWS = 8, MULTIPLY_REST = 4, MULTIPLY_VECTORS = 2 };
#else
enum { MULTIPLY_ROWS = 6, MULTIPLY_REST = 4, MULTIPLY_VECTORS = 1 };
#endif

/* `rows` and `vectors` are constants wherever this is inlined, so the accumulators stay in registers. */
INLINE void multiply_block(const int rows, const int vectors, int64_t depth, const real* a, int64_t a_row, int64_t a_depth, const real* b,
                           int64_t b_depth, real* c, int64_t c_row, bool accumulate) {
    vector sums[MULTIPLY_ROWS][MULTIPLY_VECTORS];
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) sums[row][v] = vector_of(0);
    }
    for (int64_t k = 0; k < depth; k++) {
        vector b_vectors[MULTIPLY_VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) b_vectors[v] = vector_load(b + k * b_depth + v * LANES);
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) {
            vector factor = vector_of(a[row * a_row + k * a_depth]);
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++) sums[row][v] += factor * b_vectors[v];
        }
    }
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) {
            real* at = c + row * c_row + v * LANES;
            vector_store(at, accumulate ? vector_load(at) + sums[row][v] : sums[row][v]);
        }
    }
}

/* A panel of `vectors` vectors of columns: whole blocks, then a smaller one, then single rows. */
INLINE void multiply_panel(const int vectors, int64_t rows, int64_t depth, const real* a, int64_t a_row, int64_t a_depth, const real* b,
                           int64_t b_depth, real* c, int64_t c_row, bool accumulate) {
    int64_t row = 0;
    for (; row + MULTIPLY_ROWS <= rows; row += MULTIPLY_ROWS) {
        multiply_block(MULTIPLY_ROWS, vectors, depth, a + row * a_row, a_row, a_depth, b, b_depth, c + row * c_row, c_row, accumulate);
    }
    for (; row + MULTIPLY_REST <= rows; row += MULTIPLY_REST) {
        multiply_block(MULTIPLY_REST, vectors, depth, a + row * a_row, a_row, a_depth, b, b_depth, c + row * c_row, c_row, accumulate);
    }
    for (; row < rows; row++) {
        multiply_block(1, vectors, depth, a + row * a_row, a_row, a_depth, b, b_depth, c + row * c_row, c_row, accumulate);
    }
}

static void multiply(int64_t rows, int64_t columns, int64_t depth, const real* a, int64_t a_row, int64_t a_depth, const real* b,
                     int64_t b_depth, real* c, int64_t c_row, bool accumulate) {
    int64_t column = 0;
    for (; column + MULTIPLY_VECTORS * LANES <= columns; column += MULTIPLY_VECTORS * LANES) {
        multiply_panel(MULTIPLY_VECTORS, rows, depth, a, a_row, a_depth, b + column, b_depth, c + column, c_row, accumulate);
    }
    for (; column < columns; column += LANES) {
        multiply_panel(1, rows, depth, a, a_row, a_depth, b + column, b_depth, c + column, c_row, accumulate);
    }
}
