/* The one matrix product of the reference kernels, on tiles in workspace. Every product of attention, forward and backward, is
 *
 *     c[row][column] (+)= sum over k of a[row * a_row + k * a_depth] * b[k * b_depth + column]
 *
 * with scalars of `a` broadcast against vectors of `b`. Each element sums over k in order, starting from c when accumulating: its value does
 * not depend on the tile's other rows and columns. `columns` and the strides of b and c are multiples of LANES; b and c are aligned. */

enum { MULTIPLY_ROWS = 6 }; /* 6 x 2 accumulators, 2 vectors of b and a scalar fill the 16 registers of AVX2 */

INLINE void multiply_rows(const int rows, int64_t depth, const real* a, int64_t a_row, int64_t a_depth, const real* b, int64_t b_depth,
                          real* c, int64_t c_row, bool accumulate) {
    vector sums[MULTIPLY_ROWS];
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) sums[row] = accumulate ? vector_load(c + row * c_row) : vector_of(0);
    for (int64_t k = 0; k < depth; k++) {
        vector b_vector = vector_load(b + k * b_depth);
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) sums[row] += a[row * a_row + k * a_depth] * b_vector;
    }
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) vector_store(c + row * c_row, sums[row]);
}

static void multiply(int64_t rows, int64_t columns, int64_t depth, const real* a, int64_t a_row, int64_t a_depth, const real* b,
                     int64_t b_depth, real* c, int64_t c_row, bool accumulate) {
    for (int64_t column = 0; column < columns; column += LANES) {
        const real* b_panel = b + column;
        for (int64_t row = 0; row < rows; row += MULTIPLY_ROWS) {
            const real* a_block = a + row * a_row;
            real* c_block = c + row * c_row + column;
            switch (rows - row) {
            case 1: multiply_rows(1, depth, a_block, a_row, a_depth, b_panel, b_depth, c_block, c_row, accumulate); break;
            case 2: multiply_rows(2, depth, a_block, a_row, a_depth, b_panel, b_depth, c_block, c_row, accumulate); break;
            case 3: multiply_rows(3, depth, a_block, a_row, a_depth, b_panel, b_depth, c_block, c_row, accumulate); break;
            case 4: multiply_rows(4, depth, a_block, a_row, a_depth, b_panel, b_depth, c_block, c_row, accumulate); break;
            case 5: multiply_rows(5, depth, a_block, a_row, a_depth, b_panel, b_depth, c_block, c_row, accumulate); break;
            default: multiply_rows(MULTIPLY_ROWS, depth, a_block, a_row, a_depth, b_panel, b_depth, c_block, c_row, accumulate); break;
            }
        }
    }
}
