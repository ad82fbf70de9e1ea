/* The products of decode kernels: of queries with a block of keys, and of weights with a block of values. numbers_*.h says in what
 * arithmetic. */

/* Calls body(precision, shifted) with both as constants; without codes nothing is shifted. */
#if KERNEL_INTEGER
#define WITH_PRECISION(precision, shifted, body) \
    if ((precision) == CPU_INT8) {               \
        body(CPU_INT8, false);                   \
    } else {                                     \
        body(CPU_INT4, false);                   \
    }
#else
#define WITH_PRECISION(precision, shifted, body) \
    switch (precision) {                         \
    case CPU_FP16: body(CPU_FP16, false); break; \
    case CPU_BF16: body(CPU_BF16, false); break; \
    case CPU_INT8:                               \
        if (shifted) {                           \
            body(CPU_INT8, true);                \
        } else {                                 \
            body(CPU_INT8, false);               \
        }                                        \
        break;                                   \
    case CPU_INT4:                               \
        if (shifted) {                           \
            body(CPU_INT4, true);                \
        } else {                                 \
            body(CPU_INT4, false);               \
        }                                        \
        break;                                   \
    default: body(CPU_FP32, false); break;       \
    }
#endif

/* Keys that are multiplied together with `rows` rows, and slices of values that are: their sums fill most registers, and are as many as the
 * latency of multiply-adds asks for. */
#define KEYS_AT_ONCE(rows) (((rows) > 2 ? 2 : 4) * (KERNEL_REGISTERS / 16))
#define SLICES_AT_ONCE(rows) ((rows) > 2 && KERNEL_REGISTERS == 16 ? 2 : 4)

enum { MOST_KEYS_AT_ONCE = KEYS_AT_ONCE(1), MOST_SUMS = KEYS_AT_ONCE(ROWS) * ROWS, KEYS_BETWEEN_FETCHES = 8 };

/* The sums of the lanes of SLICE accumulators, each by the same tree: integers as such for as long as 32 bits hold them. */
INLINE slice add_lanes(const accumulator totals[SLICE]) {
    slice groups[SLICE / 4];
#pragma clang loop unroll(full)
    for (int group = 0; group < SLICE / 4; group++) {
        const accumulator* four = totals + group * 4;
        const accumulator first = ADD_HALVES(four[0], four[1]), second = ADD_HALVES(four[2], four[3]);
#if KERNEL_SLICE == 16
        groups[group] = slice_of_sums(ADD_QUARTERS(first, second));
#else
        groups[group] = ADD_QUARTERS(slice_of_sums(first), slice_of_sums(second));
#endif
    }
#if KERNEL_SLICE == 4
    return groups[0];
#elif KERNEL_SLICE == 8
    return add_groups(groups[0], groups[1]);
#else
    return add_groups(add_groups(groups[0], groups[1]), add_groups(groups[2], groups[3]));
#endif
}

/* Dot products of `rows` queries with the block's keys: scores[row][BLOCK_KEYS]. */
INLINE void multiply_keys(const cpu_precision precision, const bool shifted, const int rows, const operand* key, const number* query,
                          float* scores, row_queue* queue) {
    const int keys = KEYS_AT_ONCE(rows);
    const int64_t step_bytes = row_bytes(precision, CHANNEL_STEP(precision));
    const int lanes = (int)(sizeof(numbers) / sizeof(number)), turns = CHANNEL_STEP(precision) / lanes;
    for (int64_t column = 0; column < key->columns; column += keys) {
        const char* at[MOST_KEYS_AT_ONCE];
        slice zero_points[MOST_KEYS_AT_ONCE];
        accumulator totals[MOST_SUMS];
        fetch_queue(queue);
        const char* first = key->rows + column * key->stride;
        const int64_t last = key->columns - 1 - column; /* behind the block's end: the last one again */
        if (last >= keys - 1) {
#pragma clang loop unroll(full)
            for (int k = 0; k < keys; k++) at[k] = first + k * key->stride;
        } else {
#pragma clang loop unroll(full)
            for (int k = 0; k < keys; k++) at[k] = first + minimum(k, last) * key->stride;
        }
#pragma clang loop unroll(full)
        for (int k = 0; k < keys; k++) zero_points[k] = slice_of(key->zero_points[column + minimum(k, last)]);
#pragma clang loop unroll(full)
        for (int n = 0; n < MOST_SUMS; n++) totals[n] = (accumulator){0};
        for (int64_t step = 0; step < key->steps; step++) {
#pragma clang loop unroll(full)
            for (int turn = 0; turn < turns; turn++) {
                numbers multiplied[MOST_KEYS_AT_ONCE];
#pragma clang loop unroll(full)
                for (int k = 0; k < keys; k++) {
                    multiplied[k] = load_key(precision, shifted, at[k] + step * step_bytes, turn, zero_points[k]);
                }
#pragma clang loop unroll(full)
                for (int row = 0; row < rows; row++) {
                    const numbers factor = numbers_load(query + row * key->padded + (step * turns + turn) * lanes);
#pragma clang loop unroll(full)
                    for (int k = 0; k < keys; k++) {
                        totals[row * keys + k] = add_products(totals[row * keys + k], factor, multiplied[k]);
                    }
                }
            }
        }
        float products[MOST_SUMS];
#pragma clang loop unroll(full)
        for (int n = 0; n < rows * keys; n += SLICE) slice_store(products + n, add_lanes(totals + n));
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) {
            memcpy(scores + row * BLOCK_KEYS + column, products + row * keys, (size_t)keys * sizeof(float));
        }
    }
}

/* Slices of values in a step. */
#define VALUE_SLICES(precision) (CHANNEL_STEP(precision) / SLICE)

/* Adds some slices of the values of KEYS_IN_SUM keys, from slice `first` of a step on, to the sums of `rows` rows. The keys' steps are at `at`
 * and `next`, and the weights of the rows BLOCK_KEYS apart. */
INLINE void add_values_of_keys(const cpu_precision precision, const bool shifted, const int rows, const int first, const int slices,
                               const char* at, const char* next, const number* weights, float zero_point, accumulator totals[ROWS][4]) {
    const int64_t step_bytes = row_bytes(precision, CHANNEL_STEP(precision));
    numbers channels[4];
#pragma clang loop unroll(full)
    for (int n = 0; n < slices; n++) {
        const int64_t bytes = (first + n) / VALUE_SLICES(precision) * step_bytes;
        const int turn = (first + n) % VALUE_SLICES(precision);
        channels[n] = load_values(precision, shifted, at + bytes, next + bytes, turn, slice_of(zero_point));
    }
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
        const numbers weight = numbers_of_keys(weights + row * BLOCK_KEYS);
#pragma clang loop unroll(full)
        for (int n = 0; n < slices; n++) totals[row][n] = add_products(totals[row][n], weight, channels[n]);
    }
}

/* The weighted sum of some slices of the block's values for `rows` rows, from slice `first` of a step on: output[row][slice]. Returns 0 if
 * all of it is finite, else NaN in some lane. */
INLINE slice multiply_values(const cpu_precision precision, const bool shifted, const int rows, const int first, const int slices,
                             const operand* value, int64_t step, const number* weights, float* output, row_queue* queue) {
    const int64_t step_bytes = row_bytes(precision, CHANNEL_STEP(precision));
    const char* values = value->rows + step * step_bytes;
    accumulator totals[ROWS][4];
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int n = 0; n < slices; n++) totals[row][n] = (accumulator){0};
    }
    const int64_t stride = value->stride, columns = value->columns, whole = columns / KEYS_IN_SUM * KEYS_IN_SUM;
#define ADD_KEYS(k, at, next) \
    add_values_of_keys(precision, shifted, rows, first, slices, at, next, weights + (k), value->zero_points[k], totals)
    int64_t column = 0;
    for (; column + KEYS_BETWEEN_FETCHES <= columns; column += KEYS_BETWEEN_FETCHES) {
        fetch_queue(queue);
        const char* at = values + column * stride;
#pragma clang loop unroll_count(4)
        for (int k = 0; k < KEYS_BETWEEN_FETCHES; k += KEYS_IN_SUM, at += KEYS_IN_SUM * stride) ADD_KEYS(column + k, at, at + stride);
    }
    if (column < columns) fetch_queue(queue);
    for (; column < whole; column += KEYS_IN_SUM) {
        const char* at = values + column * stride;
        ADD_KEYS(column, at, at + stride);
    }
    if (column < columns) { /* a lone key beside itself has a weight of 0 */
        const char* at = values + column * stride;
        ADD_KEYS(column, at, at);
    }
#undef ADD_KEYS
    slice excess = slice_of(0); /* x - x is 0 for a finite x, else NaN */
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
        for (int n = 0; n < slices; n++) {
            const slice result = slice_of_sums(totals[row][n]);
            excess += result - result;
            slice_store(output + row * value->padded + (step * VALUE_SLICES(precision) + first + n) * SLICE, result);
        }
    }
    return excess;
}

static void multiply_key_block(const operand* key, int64_t rows, const number* query, float* scores, row_queue* queue) {
#define MULTIPLY(precision, shifted)                                                    \
    switch (rows) {                                                                     \
    case 1: multiply_keys(precision, shifted, 1, key, query, scores, queue); break;     \
    case 2: multiply_keys(precision, shifted, 2, key, query, scores, queue); break;     \
    case 3: multiply_keys(precision, shifted, 3, key, query, scores, queue); break;     \
    default: multiply_keys(precision, shifted, ROWS, key, query, scores, queue); break; \
    }
    WITH_PRECISION(key->precision, key->shifted, MULTIPLY)
#undef MULTIPLY
}

/* All slices for `rows` rows. */
INLINE bool multiply_all_values(const cpu_precision precision, const bool shifted, const int rows, const operand* value,
                                const number* weights, float* output, row_queue* queue) {
    const int at_once = SLICES_AT_ONCE(rows), of_step = VALUE_SLICES(precision), together = at_once > of_step ? at_once / of_step : 1;
    slice excess = slice_of(0);
    int64_t step = 0;
    for (; step + together <= value->steps; step += together) {
#pragma clang loop unroll(full)
        for (int first = 0; first < together * of_step; first += at_once) {
            excess += multiply_values(precision, shifted, rows, first, at_once, value, step, weights, output, queue);
        }
    }
    for (; together > 1 && step < value->steps; step++) {
        excess += multiply_values(precision, shifted, rows, 0, of_step < at_once ? of_step : at_once, value, step, weights, output, queue);
    }
    float sum = 0;
    for (int lane = 0; lane < SLICE; lane++) sum += excess[lane];
    return sum == 0;
}

/* The weighted sums of the block's values. False if one is not finite. */
static bool multiply_value_block(const operand* value, int64_t rows, const number* weights, float* output, row_queue* queue) {
#define MULTIPLY(precision, shifted)                                                              \
    switch (rows) {                                                                               \
    case 1: return multiply_all_values(precision, shifted, 1, value, weights, output, queue);     \
    case 2: return multiply_all_values(precision, shifted, 2, value, weights, output, queue);     \
    case 3: return multiply_all_values(precision, shifted, 3, value, weights, output, queue);     \
    default: return multiply_all_values(precision, shifted, ROWS, value, weights, output, queue); \
    }
    WITH_PRECISION(value->precision, value->shifted, MULTIPLY)
#undef MULTIPLY
}
