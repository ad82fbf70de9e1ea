/* The products of backward kernels in integers of 16 bits, where queries, keys and values are codes with one scale a row and no zero points.
 * Scores are exact but for one rounding of each. An output gradient is rounded by at most 1/65534 of the largest of its row (twice that
 * beyond 512 channels, for room in the sums), a gradient of a score by as much of the largest of its row where it is multiplied with keys,
 * and of its tile where it is multiplied with queries. Gradients of values are sums in FP32. */

#include "../shared/pairs.h"

/* Below this the factor that makes a number the largest integer would overflow: 2^-112. */
#define SMALLEST_NUMBER 0x1p-112f

enum { LARGEST_NUMBER = 32767, LARGEST_CODE = 128 };

static bool has_row_codes(const cpu_tensor* tensor) {
    return has_codes(tensor) && !tensor->zero_points && (!tensor->scales || tensor->scale_strides[3] == 0);
}

static bool backward_serves(const cpu_attention* attention) {
    return has_row_codes(&attention->query) && has_row_codes(&attention->key) && has_row_codes(&attention->value);
}

/* ---- Loading ------------------------------------------------------------------------------------------------------------------------- */

/* Codes of row s as numbers, with 0 behind them. Returns their scale. */
static real load_numbers(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, number* out, int64_t padded) {
    int8_t scratch[CPU_MAX_HEAD_DIM];
    const int8_t* codes = load_codes(tensor, b, h, s, channels, scratch);
    for (int64_t d = 0; d < channels; d++) out[d] = codes[d];
    for (int64_t d = channels; d < padded; d++) out[d] = 0;
    return tensor->scales ? tensor->scales[scale_index(tensor, b, h, s)] : 1;
}

/* Rows of codes as pairs of channels, [rows][pitch / 2], and their scales. */
static void load_number_rows(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t channels, element* out,
                             int64_t pitch, real* scales) {
    for (int64_t row = 0; row < rows; row++) {
        scales[row] = load_numbers(tensor, b, h, first + row, channels, (number*)(out + row * pitch / 2), pitch);
    }
}

/* out[pair of rows][channel] from [rows][pitch / 2] pairs of channels; what lies behind the last row is 0. */
static void pair_rows(const element* rows, int64_t count, int64_t channels, int64_t pitch, element* out) {
    for (int64_t row = 0; row < count; row += 2) {
        const number* first = (const number*)(rows + row * pitch / 2);
        const number* second = (const number*)(rows + (row + 1) * pitch / 2);
        element* pairs = out + row / 2 * pitch;
        if (row + 1 < count) {
            for (int64_t d = 0; d < channels; d++) pairs[d] = (uint16_t)first[d] | (int32_t)((uint32_t)(uint16_t)second[d] << 16);
        } else {
            for (int64_t d = 0; d < channels; d++) pairs[d] = (uint16_t)first[d];
        }
        for (int64_t d = channels; d < round_up(channels, PANEL); d++) pairs[d] = 0;
    }
}

static void load_keys_and_values(const cpu_attention* attention, backward_workspace* workspace) {
    const head_position* at = &workspace->position;
    const int64_t columns = workspace->columns, first = workspace->first_column;
    const int64_t pitch = workspace->pitch, pitch_v = workspace->pitch_v;
    operands* operands = &workspace->operands;
    /* Rows are needed in other orders only, so they may lie where their gradients will. */
    element *keys = (element*)workspace->grad_key, *values = (element*)workspace->grad_value;
    for (int64_t k = columns; k < round_up(columns, PANEL); k++) operands->key_scales[k] = operands->value_scales[k] = 0;
    load_number_rows(&attention->value, at->b, at->kv_head, first, columns, attention->head_dim_v, values, pitch_v, operands->value_scales);
    transpose_into_panels((const real*)values, pitch_v / 2, columns, divide_up(attention->head_dim_v, 2), (real*)operands->value_panels);
    load_number_rows(&attention->key, at->b, at->kv_head, first, columns, attention->head_dim, keys, pitch, operands->key_scales);
    transpose_into_panels((const real*)keys, pitch / 2, columns, divide_up(attention->head_dim, 2), (real*)operands->key_panels);
    pair_rows(keys, columns, attention->head_dim, pitch, operands->key_pairs);
}

/* Puts LANES numbers, rounded to integers, into 16 bits each. */
INLINE void store_numbers(number* address, vector numbers) {
    typedef int16_t halves __attribute__((ext_vector_type(2 * LANES)));
    typedef int16_t low_halves __attribute__((ext_vector_type(LANES)));
    const vector shifted = numbers + ROUND_TO_INTEGER; /* leaves the integer in the low half */
    const halves all = *(const halves*)&shifted;
    *(low_halves*)address = __builtin_shufflevector(all, all, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

/* The factor that takes numbers up to `largest` to integers up to `limit`; 0 where all of them are to become 0. */
static real factor_of(real largest, real limit) {
    return largest >= SMALLEST_NUMBER ? limit / largest : 0;
}

/* The bits of magnitudes are integers of the same order, and those of what is not finite come last. */
INLINE element_vector magnitude_bits(vector x) {
    return *(const element_vector*)&x & 0x7FFFFFFF;
}

INLINE element_vector larger_bits(element_vector a, element_vector b) {
    return a > b ? a : b;
}

/* The largest of all lanes: infinity or NaN where one is not finite. */
static real largest_magnitude(element_vector bits) {
    int32_t largest = 0;
    for (int lane = 0; lane < LANES; lane++) largest = bits[lane] > largest ? bits[lane] : largest;
    return float_from_bits((uint32_t)largest);
}

/* A row of `padded` numbers, whole vectors, as integers up to `limit`. Returns their scale: NaN where a number is not finite. */
static real round_row(const real* row, int64_t padded, real limit, number* out) {
    element_vector highest = (element_vector)0;
    for (int64_t d = 0; d < padded; d += LANES) highest = larger_bits(highest, magnitude_bits(vector_load(row + d)));
    const real largest = largest_magnitude(highest);
    const bool finite = largest - largest == 0;
    const vector factor = vector_of(finite ? factor_of(largest, limit) : 0);
    for (int64_t d = 0; d < padded; d += LANES) store_numbers(out + d, finite ? vector_load(row + d) * factor : vector_of(0));
    return finite ? largest / limit : NAN;
}

/* The largest integer that an output gradient becomes: sums of products with codes fit into 32 bits. */
INLINE real grad_output_limit(int64_t channels) {
    return minimum(LARGEST_NUMBER, INT32_MAX / (LARGEST_CODE * channels));
}

/* Makes a row of output gradients what they are multiplied with values as, so that what is taken from these products has the same error:
 * where one weight is near 1, nearly all of both cancels. */
static void round_grad_output(real* row, int64_t channels) {
    _Alignas(CACHE_LINE) number numbers[CPU_MAX_HEAD_DIM]; /* whole vectors are stored */
    const real scale = round_row(row, round_up(channels, LANES), grad_output_limit(channels), numbers);
    for (int64_t d = 0; d < channels; d++) row[d] = numbers[d] * scale;
}

/* What the keys' codes are short of, [head_dim]; NULL: nothing. */
static const float* means_of_keys(const cpu_attention* attention, const head_position* at) {
    const cpu_tensor* key = &attention->key;
    return key->channel_means ? key->channel_means + at->b * key->mean_strides[0] + at->kv_head * key->mean_strides[1] : NULL;
}

/* Queries and output gradients of the tile's rows. */
static void load_rows_of_tile(const cpu_attention* attention, backward_workspace* workspace) {
    const head_position* at = &workspace->position;
    const int64_t rows = workspace->rows, pitch = workspace->pitch, pitch_v = workspace->pitch_v;
    const int64_t head_dim = attention->head_dim, head_dim_v = attention->head_dim_v;
    operands* operands = &workspace->operands;
    const float* means = means_of_keys(attention, at);
    load_number_rows(&attention->query, at->b, at->h, workspace->first_row, rows, head_dim, operands->query, pitch, operands->query_scales);
    if (attention->grad_key.data) pair_rows(operands->query, rows, head_dim, pitch, operands->query_pairs);
    workspace->grad_output_finite =
        load_tile(&attention->grad_output, at->b, at->h, workspace->first_row, rows, head_dim_v, workspace->grad_output, pitch_v);
    const real limit = grad_output_limit(head_dim_v);
    for (int64_t row = 0; row < rows; row++) {
        operands->grad_output_scales[row] = round_row(workspace->grad_output + row * pitch_v, round_up(head_dim_v, LANES), limit,
                                                      (number*)(operands->grad_output + row * pitch_v / 2));
        real sum = 0;
        const number* query = (const number*)(operands->query + row * pitch / 2);
        for (int64_t d = 0; means && d < head_dim; d++) sum += query[d] * means[d];
        operands->mean_products[row] = sum * operands->query_scales[row];
        operands->zeros[row] = 0;
    }
}

/* ---- Products ------------------------------------------------------------------------------------------------------------------------ */

INLINE element_vector add_products(element_vector sums, element_vector a, element_vector b) {
#if defined(KERNEL_AVX512)
    return (element_vector)add_pairs((pairs)sums, (pairs)a, (pairs)b);
#else
    typedef int32_t half_vector __attribute__((ext_vector_type(LANES / 2)));
    const half_vector low = (half_vector)add_pairs((pairs)sums.lo, (pairs)a.lo, (pairs)b.lo);
    const half_vector high = (half_vector)add_pairs((pairs)sums.hi, (pairs)a.hi, (pairs)b.hi);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
}

INLINE element_vector broadcast_element(element few) {
#if KERNEL_PANEL_VECTORS == 2
    return (element_vector)few;
#else
    typedef int32_t half_vector __attribute__((ext_vector_type(LANES / 2)));
    half_vector half = (half_vector)few;
    __asm__("" : "+x"(half)); /* in a register, lest it be loaded anew for each product */
    return __builtin_shufflevector(half, half, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
}

/* What becomes of a block of sums. */
enum { SCORES, SHARES, TOTALS };

/* Sums over k of a[row * a_row + k * a_depth] * b[k * b_pitch + lane], pairs of numbers, then
 *   SCORES: c = sum * row_factors[row] * column_factors[lane] + addends[row]
 *   SHARES: c = sum * row_factors[row]
 *   TOTALS: c += sum * row_factors[0]
 * for PANEL lanes. `rows` and `wanted` are constants wherever this is inlined. */
INLINE void multiply_elements(const int rows, const int wanted, int64_t depth, const element* a, int64_t a_row, int64_t a_depth,
                              const element* b, int64_t b_pitch, real* c, int64_t c_pitch, const real* row_factors,
                              const real* column_factors, const real* addends) {
    element_vector sums[BLOCK_ROWS][BLOCK_VECTORS];
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < BLOCK_VECTORS; v++) sums[row][v] = (element_vector)0;
    }
    const element* rest = a + BLOCK_ROWS / 2 * a_row; /* two bases reach all rows by scaled indices */
#pragma clang loop unroll(disable)
    for (int64_t k = 0; k < depth; k++) {
        element_vector vectors[BLOCK_VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < BLOCK_VECTORS; v++) vectors[v] = *(const element_vector*)(b + k * b_pitch + v * LANES);
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) {
            const element* factors = row < BLOCK_ROWS / 2 ? a + row * a_row : rest + (row - BLOCK_ROWS / 2) * a_row;
            const element_vector factor = broadcast_element(factors[k * a_depth]);
#pragma clang loop unroll(full)
            for (int v = 0; v < BLOCK_VECTORS; v++) sums[row][v] = add_products(sums[row][v], factor, vectors[v]);
        }
    }
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < BLOCK_VECTORS; v++) {
            real* at = c + row * c_pitch + v * LANES;
            vector result = __builtin_convertvector(sums[row][v], vector) * row_factors[wanted == TOTALS ? 0 : row];
            if (wanted == SCORES) result = result * vector_load(column_factors + v * LANES) + addends[row];
            if (wanted == TOTALS) result += vector_load(at);
            vector_store(at, result);
        }
    }
}

/* Calls multiply_elements() with `rows` as a constant; out of line, so that the loops have all registers. */
#define DEFINE_MULTIPLY(name, wanted)                                                                                                      \
    __attribute__((noinline)) static void name(int64_t rows, int64_t depth, const element* a, int64_t a_row, int64_t a_depth,              \
                                               const element* b, int64_t b_pitch, real* c, int64_t c_pitch, const real* row_factors,       \
                                               const real* column_factors, const real* addends) {                                          \
        switch (rows) {                                                                                                                    \
        case BLOCK_ROWS:                                                                                                                   \
            multiply_elements(BLOCK_ROWS, wanted, depth, a, a_row, a_depth, b, b_pitch, c, c_pitch, row_factors, column_factors, addends); \
            break;                                                                                                                         \
        case BLOCK_REST:                                                                                                                   \
            multiply_elements(BLOCK_REST, wanted, depth, a, a_row, a_depth, b, b_pitch, c, c_pitch, row_factors, column_factors, addends); \
            break;                                                                                                                         \
        default:                                                                                                                           \
            multiply_elements(1, wanted, depth, a, a_row, a_depth, b, b_pitch, c, c_pitch, row_factors, column_factors, addends);          \
            break;                                                                                                                         \
        }                                                                                                                                  \
    }

DEFINE_MULTIPLY(multiply_scores, SCORES)
DEFINE_MULTIPLY(multiply_shares, SHARES)
DEFINE_MULTIPLY(multiply_totals, TOTALS)

static void multiply_panel(const product* product, int64_t rows, int64_t depth, int64_t row, int64_t column, int64_t column_pitch) {
    multiply_scores(rows, depth, product->rows + row * product->pitch, product->pitch, 1, product->panels + column * depth, PANEL,
                    product->out + row * column_pitch + column, column_pitch, product->row_factors + row, product->column_factors + column,
                    product->addends + row);
}

/* The dot products of the tile's queries with its keys, and of its output gradients with its values. */
static void multiply_rows_of_tile(const cpu_attention* attention, backward_workspace* workspace) {
    const operands* operands = &workspace->operands;
    const product scores = {operands->query,        workspace->pitch / 2, operands->key_panels,   workspace->weights,
                            operands->query_scales, operands->key_scales, operands->mean_products};
    const product grad_weights = {operands->grad_output,        workspace->pitch_v / 2, operands->value_panels, workspace->grad_scores,
                                  operands->grad_output_scales, operands->value_scales, operands->zeros};
    multiply_by_panels(workspace, attention->head_dim, &scores, &workspace->upcoming.query);
    multiply_by_panels(workspace, attention->head_dim_v, &grad_weights, &workspace->upcoming.grad_output);
}

/* ---- Gradients of scores as integers ------------------------------------------------------------------------------------------------- */

/* Takes what is not finite in a row out of the tile: the gradients that it reaches become NaN, it becomes 0. */
static void take_out_of_tile(const cpu_attention* attention, backward_workspace* workspace, int64_t row) {
    real* grad_scores = workspace->grad_scores + row * workspace->column_pitch;
    for (int64_t column = 0; column < workspace->columns; column++) {
        if (grad_scores[column] - grad_scores[column] == 0) continue;
        grad_scores[column] = 0;
        workspace->operands.grad_score_sums[row] = NAN;
        real* grad_key = workspace->grad_key + column * workspace->pitch;
        for (int64_t channel = 0; channel < attention->head_dim; channel++) grad_key[channel] = NAN;
    }
}

/* The largest magnitudes of a row of gradients, as they are and times the keys' scales. */
typedef struct {
    real plain, scaled;
} largest_gradients;

static largest_gradients find_largest(const real* grad_scores, const real* key_scales, int64_t padded) {
    element_vector plain = (element_vector)0, scaled = (element_vector)0;
    for (int64_t column = 0; column < padded; column += LANES) {
        const vector gradients = vector_load(grad_scores + column);
        plain = larger_bits(plain, magnitude_bits(gradients));
        scaled = larger_bits(scaled, magnitude_bits(gradients * vector_load(key_scales + column)));
    }
    return (largest_gradients){largest_magnitude(plain), largest_magnitude(scaled)};
}

/* Gradients of scores, [row][column], as pairs of columns for the keys and as pairs of rows for the queries. */
static void place_grad_scores(const cpu_attention* attention, backward_workspace* workspace) {
    operands* operands = &workspace->operands;
    const int64_t columns = workspace->columns, padded = round_up(columns, LANES), column_pitch = workspace->column_pitch;
    const bool has_means = attention->key.channel_means != NULL;
    real tile_largest = 0;
    for (int64_t row = 0; row < workspace->rows; row++) {
        real* grad_scores = workspace->grad_scores + row * column_pitch;
        for (int64_t column = columns; column < padded; column++) grad_scores[column] = 0;
        operands->grad_score_sums[row] = 0;
        largest_gradients largest = find_largest(grad_scores, operands->key_scales, padded);
        if (largest.scaled - largest.scaled != 0) {
            take_out_of_tile(attention, workspace, row);
            largest = find_largest(grad_scores, operands->key_scales, padded);
        }
        for (int64_t column = 0; column < columns && has_means; column++) operands->grad_score_sums[row] += grad_scores[column];
        const real in_tile = largest.plain * operands->query_scales[row];
        if (in_tile > tile_largest) tile_largest = in_tile;
        const vector factor = vector_of(factor_of(largest.scaled, LARGEST_NUMBER));
        operands->grad_score_scales[row] = largest.scaled / LARGEST_NUMBER;
        number* numbers = (number*)(operands->grad_scores + row * column_pitch / 2);
        for (int64_t column = 0; column < padded; column += LANES) {
            store_numbers(numbers + column, vector_load(grad_scores + column) * vector_load(operands->key_scales + column) * factor);
        }
    }
    if (!attention->grad_key.data) return;
    const real factor = factor_of(tile_largest, LARGEST_NUMBER);
    operands->grad_score_pairs_scale = tile_largest / LARGEST_NUMBER;
    for (int64_t row = 0; row < workspace->rows; row += 2) {
        const bool paired = row + 1 < workspace->rows;
        const real* first = workspace->grad_scores + row * column_pitch;
        const real* second = paired ? first + column_pitch : first;
        const real first_factor = operands->query_scales[row] * factor;
        const real second_factor = paired ? operands->query_scales[row + 1] * factor : 0;
        for (int64_t column = 0; column < padded; column += LANES) {
            const vector low = vector_load(first + column) * first_factor + ROUND_TO_INTEGER; /* leaves the integer in the low half */
            const vector high = vector_load(second + column) * second_factor + ROUND_TO_INTEGER;
            *(element_vector*)(operands->grad_score_pairs + row / 2 * column_pitch + column) =
                (*(const element_vector*)&low & 0xFFFF) | (*(const element_vector*)&high << 16);
        }
    }
}

/* Adds the tile's share of the gradients of keys, in groups of columns as accumulate_over_rows() does. */
static void accumulate_grad_key(const cpu_attention* attention, backward_workspace* workspace) {
    const operands* operands = &workspace->operands;
    const int64_t pitch = workspace->pitch, column_pitch = workspace->column_pitch;
    for (int64_t group = 0; group < workspace->columns; group += GROUP) {
        const int64_t end = minimum(group + GROUP, workspace->columns);
        for (int64_t channel = 0; channel < attention->head_dim; channel += PANEL) {
            for (int64_t column = group, count; column < end; column += count) {
                count = block_rows(end - column);
                const span rows = rows_of_block(workspace, column, count);
                if (rows.first >= rows.last) continue;
                const int64_t first = rows.first / 2, last = divide_up(rows.last, 2);
                multiply_totals(count, last - first, operands->grad_score_pairs + first * column_pitch + column, 1, column_pitch,
                                operands->query_pairs + first * pitch + channel, pitch, workspace->grad_key + column * pitch + channel,
                                pitch, &operands->grad_score_pairs_scale, NULL, NULL);
            }
        }
    }
}

/* Share of columns first ..< last in the query gradients of a block of rows, from `channel` on. */
static void multiply_key_rows(const backward_workspace* workspace, int64_t rows, int64_t row, int64_t first, int64_t last,
                              int64_t channel) {
    const operands* operands = &workspace->operands;
    const int64_t pitch = workspace->pitch, pair_pitch = workspace->column_pitch / 2;
    multiply_shares(rows, divide_up(last, 2) - first / 2, operands->grad_scores + row * pair_pitch + first / 2, pair_pitch, 1,
                    operands->key_pairs + first / 2 * pitch + channel, pitch, workspace->grad_query + row * pitch + channel, pitch,
                    operands->grad_score_scales + row, NULL, NULL);
}

/* Adds the means' share, and that of what was not finite. */
static void complete_grad_query(const cpu_attention* attention, backward_workspace* workspace) {
    const float* means = means_of_keys(attention, &workspace->position);
    for (int64_t row = 0; row < workspace->rows; row++) {
        const real sum = workspace->operands.grad_score_sums[row];
        real* grad_query = workspace->grad_query + row * workspace->pitch;
        for (int64_t channel = 0; means && channel < attention->head_dim; channel++) {
            grad_query[channel] += sum * means[channel];
        }
        for (int64_t channel = 0; sum - sum != 0 && channel < attention->head_dim; channel++) grad_query[channel] = NAN;
    }
}
