// Backward attention. Scores are recomputed tile by tile from queries, keys and logsumexp.
//
//   attention_backward_query_metal_32, _64, _128      d_values, gradients of queries, and each row's part of the slope's
//   attention_backward_key_value_metal_32, _64, _128  gradients of keys and values
//   attention_backward_mask_metal                     gradient of an additive mask
//   attention_backward_heads_metal                    gradients of sinks and slopes
//
// A threadgroup of four simdgroups owns what it writes: 32 query rows of a head, 32 columns of a key/value head, or 32 x 32 elements of the mask's
// gradient. It walks over all that contributes to them in one order, so there are no atomics, and results have the same bits each time. The
// number in a name is how many channels of a gradient a threadgroup computes, and how wide the tiles are that pass through threadgroup memory.
//
// Contract: what a row does not attend has no part in its gradients, not even by a NaN: scores and their gradients are selected, and elements
// that are not finite are left out of the products and make those NaN that attend them. Gradients of codes are those of the real numbers that
// they stand for; of rotated codes, those in the rotated space.

#include "attention.h"

constant int grad_output_type [[function_constant(13)]];
constant int grad_query_type [[function_constant(14)]];  // -1, here and below: not wanted
constant int grad_key_type [[function_constant(15)]];
constant int grad_value_type [[function_constant(16)]];
constant int grad_mask_type [[function_constant(17)]];
constant int d_values_source [[function_constant(18)]];
constant bool has_grad_logsumexp [[function_constant(19)]];
constant bool wants_grad_slopes [[function_constant(20)]];
constant bool wants_grad_sinks [[function_constant(21)]];

// Where d_values come from.
constant constexpr int GIVEN = 0;
constant constexpr int FROM_OUTPUT = 1;  // the product of output and its gradient
constant constexpr int RECOMPUTED = 2;   // from the operands

constant bool has_output = d_values_source == FROM_OUTPUT;
constant bool wants_grad_query = grad_query_type >= 0;
constant bool wants_grad_key = grad_key_type >= 0;
constant bool wants_grad_value = grad_value_type >= 0;

constant constexpr int ELEMENTS = COLUMNS / 8 * 2;  // of a row of scores, in one lane

struct BackwardParameters {
    Parameters attention;
    TensorView grad_output;
    TensorView grad_query;
    TensorView grad_key;
    TensorView grad_value;
    long grad_mask_strides[4];  // 0 where the mask broadcasts
};

// A sum that keeps what rounding takes from it.
struct Sum {
    float high;
    float low;
};

METAL_FUNC void add(thread Sum& sum, float value)
{
    const float total = sum.high + value;
    const float part = total - sum.high;
    const float lost = (sum.high - (total - part)) + (value - part);
    sum.high = total;
    sum.low += lost;
}

// Eight tokens of an operand as matrices, from a channel on; 0 where there is none.
template <int CHANNELS>
METAL_FUNC void load_matrices(
    thread simdgroup_float8x8* matrices, const thread Operand& operand, constant TensorView& view, int batch, int head, int token,
    bool has_token, int first_channel, int channels, Place place)
{
    for (int block = 0; block < CHANNELS / 8; block++) {
        float pair[2];
        for (int side = 0; side < 2; side++) {
            const int channel = first_channel + block * 8 + place.column + side;
            pair[side] = has_token && channel < channels ? load_element(operand, view, batch, head, token, channel) : 0.0f;
        }
        matrices[block].thread_elements() = float2(pair[0], pair[1]);
    }
}

// Loads 32 tokens of an operand into threadgroup memory, from a channel on; 0 where there is none. Whether those that this thread loads are
// finite.
template <int CHANNELS>
METAL_FUNC bool load_tile(
    threadgroup float* tile, const thread Operand& operand, constant TensorView& view, int batch, int head, long first_token, long tokens,
    int first_channel, int channels, uint index)
{
    bool is_finite = true;
    for (int element = int(index); element < 32 * CHANNELS; element += THREADS) {
        const int token = element / CHANNELS;
        const int channel = element % CHANNELS;
        const bool exists = first_token + token < tokens && first_channel + channel < channels;
        const float real =
            exists ? load_element(operand, view, batch, head, int(first_token) + token, first_channel + channel) : 0.0f;
        is_finite = is_finite && isfinite(real);
        tile[token * (CHANNELS + 4) + channel] = real;
    }
    return is_finite;
}

// Adds the products of eight tokens with the 32 of a tile.
template <int CHANNELS>
METAL_FUNC void multiply_transposed(
    thread simdgroup_float8x8* products, const thread simdgroup_float8x8* matrices, const threadgroup float* tile)
{
    constexpr int STRIDE = CHANNELS + 4;
    for (int part = 0; part < 4; part++) {
        for (int block = 0; block < CHANNELS / 8; block++) {
            simdgroup_float8x8 others;
            simdgroup_load(others, tile + part * 8 * STRIDE + block * 8, STRIDE, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(products[part], matrices[block], others, products[part]);
        }
    }
}

// Adds the tile's tokens, weighted. Where the tile is not finite, what is not makes those sums NaN that attend it.
template <int CHANNELS>
METAL_FUNC void accumulate(
    thread simdgroup_float8x8* sums, thread simdgroup_float8x8* weights, const thread bool* kept, const threadgroup float* tile,
    bool is_careful)
{
    constexpr int STRIDE = CHANNELS + 4;
    for (int first_block = 0; first_block < CHANNELS / 8; first_block += TOGETHER) {
        for (int part = 0; part < 4; part++) {
            for (int block = first_block; block < first_block + TOGETHER; block++) {
                simdgroup_float8x8 tokens;
                simdgroup_load(tokens, tile + part * 8 * STRIDE + block * 8, STRIDE);
                if (is_careful) {
                    simdgroup_float8x8 attended;
                    simdgroup_float8x8 wrong;
                    simdgroup_float8x8 poison = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
                    for (int side = 0; side < 2; side++) {
                        const float real = tokens.thread_elements()[side];
                        attended.thread_elements()[side] = kept[part * 2 + side] ? 1.0f : 0.0f;
                        wrong.thread_elements()[side] = isfinite(real) ? 0.0f : 1.0f;
                        tokens.thread_elements()[side] = isfinite(real) ? real : 0.0f;
                    }
                    simdgroup_multiply_accumulate(poison, attended, wrong, poison);
                    for (int side = 0; side < 2; side++) {
                        if (poison.thread_elements()[side] > 0.0f) { sums[block].thread_elements()[side] = NAN; }
                    }
                }
                simdgroup_multiply_accumulate(sums[block], weights[part], tokens, sums[block]);
            }
        }
    }
}

// A score's weight and gradient.
struct Score {
    float probability;
    float gradient;   // of the score
    float argument;   // gradient of what softcap caps
};

METAL_FUNC Score differentiate(
    constant Parameters& p, float product, float grad_product, float bias, float slope, float distance, float dropped, float logsumexp,
    float d_value, float grad_logsumexp)
{
    float score = product * p.softmax_scale;
    float cap_slope = 1.0f;
    if (has_softcap) {
        const float capped = precise::tanh(score / p.softcap);
        cap_slope = 1.0f - capped * capped;
        score = p.softcap * capped;
    }
    if (has_mask) { score += bias; }
    if (has_slopes) { score -= slope * distance; }
    Score result;
    result.probability = fast::exp2((score - logsumexp) * M_LOG2E_F);
    result.gradient = result.probability * (grad_product * dropped - d_value + grad_logsumexp);
    result.argument = result.gradient * cap_slope;
    return result;
}

// What row tiles compute with: the rows' place, and what their gradients need.
struct RowTile {
    int batch;
    int head;
    int kv_head;
    int first_row;
    int row;
    bool has_row;
    long position;
    ColumnRange columns;
    float slope;
    float logsumexp;
    float d_value;
    float grad_logsumexp;
};

METAL_FUNC RowTile place_rows(
    constant Parameters& p, const device Sequence* sequences, const device float* slopes, int batch, int head, int first_row, int row)
{
    RowTile tile;
    tile.batch = batch;
    tile.head = head;
    tile.kv_head = head / (p.num_heads / p.num_kv_heads);
    tile.first_row = first_row;
    tile.row = row;
    tile.has_row = row < p.seq_len_q;
    tile.position = row + sequences[batch].offset;
    tile.columns = columns_of_rows(p, sequences[batch], row, 1);
    tile.slope = has_slopes ? slopes[head] : 0.0f;
    return tile;
}

// Which of a tile's columns a row attends, what the mask adds to their scores, and whether there is one.
METAL_FUNC bool keep_columns(
    constant Parameters& p, const device uchar* mask, const thread RowTile& rows, long first, int matrix_column, thread bool* kept,
    thread float* bias)
{
    bool any = false;
    for (int element = 0; element < ELEMENTS; element++) {
        const long column = first + element / 2 * 8 + matrix_column + element % 2;
        bool keep = rows.has_row && column >= rows.columns.first && column < rows.columns.end;
        bias[element] = 0.0f;
        if (has_mask && keep) { keep = mask_keeps(p, mask, rows.batch, rows.head, rows.row, column, bias[element]); }
        kept[element] = keep;
        any = any || keep;
    }
    return any;
}

// Turns a row tile's products into gradients: `products` become those of what softcap caps, `grad_products` those of the scores.
// `d_value` receives what the columns add to d_values, `slope` what they add to minus the gradient of the slope.
METAL_FUNC void differentiate_rows(
    constant Parameters& p, const thread RowTile& rows, long first, int matrix_column, const thread bool* kept, const thread float* bias,
    thread simdgroup_float8x8* products, thread simdgroup_float8x8* grad_products, thread float& d_value, thread Sum& slope)
{
    for (int part = 0; part < 4; part++) {
        const long column = first + part * 8 + matrix_column;
        float2 dropped = float2(1.0f, 1.0f);
        if (has_dropout) { dropped = dropout_of(p, rows.batch, rows.head, rows.row, column); }
        for (int side = 0; side < 2; side++) {
            const float distance = float(abs(rows.position - column - side));
            const float grad_product = grad_products[part].thread_elements()[side];
            const Score score = differentiate(
                p, products[part].thread_elements()[side], grad_product, bias[part * 2 + side], rows.slope, distance, dropped[side],
                rows.logsumexp, rows.d_value, rows.grad_logsumexp);
            const bool keep = kept[part * 2 + side];
            products[part].thread_elements()[side] = keep ? score.argument : 0.0f;
            grad_products[part].thread_elements()[side] = keep ? score.gradient : 0.0f;
            if (keep) {
                d_value += score.probability * (grad_product * dropped[side]);
                if (wants_grad_slopes) { add(slope, score.gradient * distance); }
            }
        }
    }
}

METAL_FUNC void clear(thread simdgroup_float8x8* matrices, int count)
{
    for (int index = 0; index < count; index++) { matrices[index] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }
}

template <int CHANNELS>
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void attention_backward_query(
    constant BackwardParameters& parameters [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    const device uchar* query_data [[buffer(2)]],
    const device uchar* key_data [[buffer(3)]],
    const device uchar* value_data [[buffer(4)]],
    const device uchar* output [[buffer(5), function_constant(has_output)]],
    const device float* logsumexp [[buffer(6)]],
    const device uchar* mask [[buffer(7), function_constant(has_mask)]],
    const device float* slopes [[buffer(8), function_constant(has_slopes)]],
    const device float* query_scales [[buffer(10), function_constant(has_query_codes)]],
    const device int* query_zero_points [[buffer(11), function_constant(has_query_codes)]],
    const device float* key_scales [[buffer(12), function_constant(has_key_codes)]],
    const device int* key_zero_points [[buffer(13), function_constant(has_key_codes)]],
    const device float* key_means [[buffer(14), function_constant(has_key_codes)]],
    const device float* value_scales [[buffer(15), function_constant(has_value_codes)]],
    const device int* value_zero_points [[buffer(16), function_constant(has_value_codes)]],
    const device uchar* grad_output_data [[buffer(17)]],
    const device float* grad_logsumexp [[buffer(18), function_constant(has_grad_logsumexp)]],
    device float* d_values [[buffer(19)]],
    device uchar* grad_query [[buffer(20), function_constant(wants_grad_query)]],
    device float* slope_parts [[buffer(21), function_constant(wants_grad_slopes)]],
    const device atomic_uint* flags [[buffer(27)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]])
{
    constexpr bool HOLDS = CHANNELS <= 64;  // the rows' operands in registers, while they last
    threadgroup float tile[COLUMNS * (CHANNELS + 4)];
    threadgroup int votes[SIMDGROUPS];

    constant Parameters& p = parameters.attention;
    if (is_refused(p, flags)) { return; }
    const Operand query = {query_data, query_scales, query_zero_points, query_scales, query_type};
    const Operand key = {key_data, key_scales, key_zero_points, key_means, key_type};
    const Operand value = {value_data, value_scales, value_zero_points, value_scales, value_type};
    const Operand grad_output = {grad_output_data, query_scales, query_zero_points, query_scales, grad_output_type};

    const int channel_blocks = (p.head_dim + CHANNELS - 1) / CHANNELS;
    const int value_blocks = (p.head_dim_v + CHANNELS - 1) / CHANNELS;
    const int batch = int(group.z);
    const int head = int(group.y) / channel_blocks;
    const int own_block = int(group.y) % channel_blocks;
    const int first_row = int(group.x) * ROWS;
    const Place place = place_in_matrix(lane);
    RowTile rows = place_rows(p, sequences, slopes, batch, head, first_row, first_row + simdgroup * 8 + place.row);
    const ColumnRange columns = columns_of_rows(p, sequences[batch], first_row, ROWS);
    const long length = sequences[batch].length;
    const long statistic = statistic_of(p, batch, head, rows.row);
    rows.logsumexp = rows.has_row ? logsumexp[statistic] : 0.0f;
    rows.grad_logsumexp = has_grad_logsumexp && rows.has_row ? grad_logsumexp[statistic] : 0.0f;
    rows.d_value = 0.0f;
    if (d_values_source == GIVEN && rows.has_row) { rows.d_value = d_values[statistic]; }
    if (d_values_source == FROM_OUTPUT) {
        float part = 0.0f;
        for (int channel = place.column / 2; rows.has_row && channel < p.head_dim_v; channel += 4) {
            part += load_plain(output, row_of(p.output, batch, head, rows.row) + channel * p.output.strides[3], output_type)
                * load_element(grad_output, parameters.grad_output, batch, head, rows.row, channel);
        }
        rows.d_value = sum_of_row(part);
    }

    simdgroup_float8x8 query_matrices[CHANNELS / 8];
    simdgroup_float8x8 grad_output_matrices[CHANNELS / 8];
    simdgroup_float8x8 sums[CHANNELS / 8];
    clear(sums, CHANNELS / 8);
    Sum slope = {0.0f, 0.0f};
    bool attends = false;

    // Recomputing d_values takes a walk of its own.
    for (int walk = d_values_source == RECOMPUTED ? 0 : 1; walk < 2; walk++) {
        float d_value = 0.0f;
        bool is_first = true;
        slope.high = 0.0f;
        slope.low = 0.0f;
        for (long first = columns.first / COLUMNS * COLUMNS; first < columns.end; first += COLUMNS) {
            bool kept[ELEMENTS];
            float bias[ELEMENTS];
            const bool any = keep_columns(p, mask, rows, first, place.column, kept, bias);
            attends = attends || any;
            if (has_mask) {
                const bool simdgroup_attends = simd_any(any);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (lane == 0) { votes[simdgroup] = simdgroup_attends; }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if ((votes[0] | votes[1] | votes[2] | votes[3]) == 0) { continue; }
            }

            simdgroup_float8x8 products[4];
            simdgroup_float8x8 grad_products[4];
            clear(products, 4);
            clear(grad_products, 4);
            for (int block = 0; block < value_blocks; block++) {
                if (is_first || !HOLDS || value_blocks > 1) {
                    load_matrices<CHANNELS>(grad_output_matrices, grad_output, parameters.grad_output, batch, head, rows.row, rows.has_row,
                                            block * CHANNELS, p.head_dim_v, place);
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                load_tile<CHANNELS>(tile, value, p.value, batch, rows.kv_head, first, length, block * CHANNELS, p.head_dim_v, index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                multiply_transposed<CHANNELS>(grad_products, grad_output_matrices, tile);
            }
            // The block whose gradient is computed here comes last, and stays in the tile.
            for (int step = 1; step <= channel_blocks; step++) {
                const int block = (own_block + step) % channel_blocks;
                if (is_first || !HOLDS || channel_blocks > 1) {
                    load_matrices<CHANNELS>(query_matrices, query, p.query, batch, head, rows.row, rows.has_row, block * CHANNELS,
                                            p.head_dim, place);
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                const bool is_finite =
                    load_tile<CHANNELS>(tile, key, p.key, batch, rows.kv_head, first, length, block * CHANNELS, p.head_dim, index);
                const bool simdgroup_is_finite = simd_all(is_finite);
                if (lane == 0) { votes[simdgroup] = !simdgroup_is_finite; }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                multiply_transposed<CHANNELS>(products, query_matrices, tile);
            }
            is_first = false;
            differentiate_rows(p, rows, first, place.column, kept, bias, products, grad_products, d_value, slope);
            if (wants_grad_query && walk == 1) {
                const bool is_careful = (votes[0] | votes[1] | votes[2] | votes[3]) != 0;
                accumulate<CHANNELS>(sums, products, kept, tile, is_careful);
            }
        }
        if (walk == 0) { rows.d_value = sum_of_row(d_value); }
    }

    // Of an empty row, output is 0 by rule, whatever its gradient is.
    const bool row_attends = sum_of_row(attends ? 1.0f : 0.0f) > 0.0f;
    if (d_values_source == FROM_OUTPUT && !row_attends && !isfinite(rows.d_value)) { rows.d_value = 0.0f; }
    if (wants_grad_slopes) { slope.high = sum_of_row(slope.high + slope.low); }
    if (!rows.has_row) { return; }
    if (own_block == 0 && place.column == 0) {
        if (d_values_source != GIVEN) { d_values[statistic] = rows.d_value; }
        if (wants_grad_slopes) { slope_parts[statistic] = slope.high; }
    }
    if (!wants_grad_query) { return; }
    const long row = row_of(parameters.grad_query, batch, head, rows.row);
    for (int block = 0; block < CHANNELS / 8; block++) {
        for (int side = 0; side < 2; side++) {
            const int channel = own_block * CHANNELS + block * 8 + place.column + side;
            const float gradient = sums[block].thread_elements()[side] * p.softmax_scale;
            if (channel < p.head_dim) { store(grad_query, row + channel * parameters.grad_query.strides[3], gradient, grad_query_type); }
        }
    }
}

template [[host_name("attention_backward_query_metal_32")]] [[kernel]] decltype(attention_backward_query<32>) attention_backward_query<32>;
template [[host_name("attention_backward_query_metal_64")]] [[kernel]] decltype(attention_backward_query<64>) attention_backward_query<64>;
template [[host_name("attention_backward_query_metal_128")]] [[kernel]] decltype(attention_backward_query<128>) attention_backward_query<128>;

template <int CHANNELS>
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void attention_backward_key_value(
    constant BackwardParameters& parameters [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    const device uchar* query_data [[buffer(2)]],
    const device uchar* key_data [[buffer(3)]],
    const device uchar* value_data [[buffer(4)]],
    const device float* logsumexp [[buffer(6)]],
    const device uchar* mask [[buffer(7), function_constant(has_mask)]],
    const device float* slopes [[buffer(8), function_constant(has_slopes)]],
    const device float* query_scales [[buffer(10), function_constant(has_query_codes)]],
    const device int* query_zero_points [[buffer(11), function_constant(has_query_codes)]],
    const device float* key_scales [[buffer(12), function_constant(has_key_codes)]],
    const device int* key_zero_points [[buffer(13), function_constant(has_key_codes)]],
    const device float* key_means [[buffer(14), function_constant(has_key_codes)]],
    const device float* value_scales [[buffer(15), function_constant(has_value_codes)]],
    const device int* value_zero_points [[buffer(16), function_constant(has_value_codes)]],
    const device uchar* grad_output_data [[buffer(17)]],
    const device float* grad_logsumexp [[buffer(18), function_constant(has_grad_logsumexp)]],
    const device float* d_values [[buffer(19)]],
    device uchar* grad_key [[buffer(22), function_constant(wants_grad_key)]],
    device uchar* grad_value [[buffer(23), function_constant(wants_grad_value)]],
    const device atomic_uint* flags [[buffer(27)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]])
{
    constexpr bool HOLDS = CHANNELS <= 64;  // the columns' operands in registers, while they last
    threadgroup float tile[ROWS * (CHANNELS + 4)];
    threadgroup int votes[SIMDGROUPS];

    constant Parameters& p = parameters.attention;
    if (is_refused(p, flags)) { return; }
    const Operand query = {query_data, query_scales, query_zero_points, query_scales, query_type};
    const Operand key = {key_data, key_scales, key_zero_points, key_means, key_type};
    const Operand value = {value_data, value_scales, value_zero_points, value_scales, value_type};
    const Operand grad_output = {grad_output_data, query_scales, query_zero_points, query_scales, grad_output_type};

    const int channel_blocks = (p.head_dim + CHANNELS - 1) / CHANNELS;
    const int value_blocks = (p.head_dim_v + CHANNELS - 1) / CHANNELS;
    const int blocks = max(channel_blocks, value_blocks);
    const int batch = int(group.z);
    const int kv_head = int(group.y) / blocks;
    const int own_block = int(group.y) % blocks;
    const int first_column = int(group.x) * COLUMNS;
    const Place place = place_in_matrix(lane);
    // Matrices have columns as their rows here, and query rows as their columns.
    const int column = first_column + simdgroup * 8 + place.row;
    const Sequence sequence = sequences[batch];
    const bool has_column = column < sequence.length;
    const int group_size = p.num_heads / p.num_kv_heads;

    simdgroup_float8x8 key_matrices[CHANNELS / 8];
    simdgroup_float8x8 value_matrices[CHANNELS / 8];
    simdgroup_float8x8 key_sums[CHANNELS / 8];
    simdgroup_float8x8 value_sums[CHANNELS / 8];
    clear(key_sums, CHANNELS / 8);
    clear(value_sums, CHANNELS / 8);
    bool is_first = true;

    for (int head = kv_head * group_size; head < (kv_head + 1) * group_size; head++) {
        const float slope = has_slopes ? slopes[head] : 0.0f;
        for (int first_row = 0; first_row < p.seq_len_q; first_row += ROWS) {
            const ColumnRange columns = columns_of_rows(p, sequence, first_row, ROWS);
            if (columns.first >= first_column + COLUMNS || columns.end <= first_column) { continue; }
            bool kept[ELEMENTS];
            float bias[ELEMENTS];
            bool any = false;
            for (int element = 0; element < ELEMENTS; element++) {
                const int row = first_row + element / 2 * 8 + place.column + element % 2;
                const ColumnRange attended = columns_of_rows(p, sequence, row, 1);
                bool keep = has_column && row < p.seq_len_q && column >= attended.first && column < attended.end;
                bias[element] = 0.0f;
                if (has_mask && keep) { keep = mask_keeps(p, mask, batch, head, row, column, bias[element]); }
                kept[element] = keep;
                any = any || keep;
            }
            if (has_mask) {
                const bool simdgroup_attends = simd_any(any);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (lane == 0) { votes[simdgroup] = simdgroup_attends; }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if ((votes[0] | votes[1] | votes[2] | votes[3]) == 0) { continue; }
            }

            simdgroup_float8x8 products[4];
            simdgroup_float8x8 grad_products[4];
            clear(products, 4);
            clear(grad_products, 4);
            for (int block = 0; block < value_blocks; block++) {
                if (is_first || !HOLDS || value_blocks > 1) {
                    load_matrices<CHANNELS>(
                        value_matrices, value, p.value, batch, kv_head, column, has_column, block * CHANNELS, p.head_dim_v, place);
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                load_tile<CHANNELS>(tile, grad_output, parameters.grad_output, batch, head, first_row, p.seq_len_q, block * CHANNELS,
                                    p.head_dim_v, index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                multiply_transposed<CHANNELS>(grad_products, value_matrices, tile);
            }
            // The block whose gradient is computed here comes last, and stays in the tile.
            for (int step = 1; step <= channel_blocks; step++) {
                const int block = (own_block + step) % channel_blocks;
                if (is_first || !HOLDS || channel_blocks > 1) {
                    load_matrices<CHANNELS>(
                        key_matrices, key, p.key, batch, kv_head, column, has_column, block * CHANNELS, p.head_dim, place);
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                const bool is_finite =
                    load_tile<CHANNELS>(tile, query, p.query, batch, head, first_row, p.seq_len_q, block * CHANNELS, p.head_dim, index);
                const bool simdgroup_is_finite = simd_all(is_finite);
                if (lane == 0) { votes[simdgroup] = !simdgroup_is_finite; }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                multiply_transposed<CHANNELS>(products, key_matrices, tile);
            }
            is_first = false;

            // From here on products are gradients of what softcap caps, and grad_products weights of values.
            for (int part = 0; part < 4; part++) {
                for (int side = 0; side < 2; side++) {
                    const int row = first_row + part * 8 + place.column + side;
                    const bool keep = kept[part * 2 + side];
                    const long statistic = statistic_of(p, batch, head, row);
                    float dropped = 1.0f;
                    if (has_dropout) { dropped = dropout_of(p, batch, head, row, column & ~1)[column & 1]; }
                    const Score score = differentiate(
                        p, products[part].thread_elements()[side], grad_products[part].thread_elements()[side], bias[part * 2 + side],
                        slope, float(abs(row + sequence.offset - column)), dropped, keep ? logsumexp[statistic] : 0.0f,
                        keep ? d_values[statistic] : 0.0f, has_grad_logsumexp && keep ? grad_logsumexp[statistic] : 0.0f);
                    products[part].thread_elements()[side] = keep ? score.argument : 0.0f;
                    grad_products[part].thread_elements()[side] = keep ? score.probability * dropped : 0.0f;
                }
            }
            if (wants_grad_key && own_block < channel_blocks) {
                const bool is_careful = (votes[0] | votes[1] | votes[2] | votes[3]) != 0;
                accumulate<CHANNELS>(key_sums, products, kept, tile, is_careful);
            }
            if (wants_grad_value && own_block < value_blocks) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                const bool is_finite = load_tile<CHANNELS>(tile, grad_output, parameters.grad_output, batch, head, first_row, p.seq_len_q,
                                                           own_block * CHANNELS, p.head_dim_v, index);
                const bool simdgroup_is_finite = simd_all(is_finite);
                if (lane == 0) { votes[simdgroup] = !simdgroup_is_finite; }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                const bool is_careful = (votes[0] | votes[1] | votes[2] | votes[3]) != 0;
                accumulate<CHANNELS>(value_sums, grad_products, kept, tile, is_careful);
            }
        }
    }

    if (column >= p.seq_len_kv) { return; }
    const long key_row = row_of(parameters.grad_key, batch, kv_head, column);
    const long value_row = row_of(parameters.grad_value, batch, kv_head, column);
    for (int block = 0; block < CHANNELS / 8; block++) {
        for (int side = 0; side < 2; side++) {
            const int channel = own_block * CHANNELS + block * 8 + place.column + side;
            const float key_sum = key_sums[block].thread_elements()[side];
            const float value_sum = value_sums[block].thread_elements()[side];
            if (wants_grad_key && channel < p.head_dim) {
                store(grad_key, key_row + channel * parameters.grad_key.strides[3], key_sum * p.softmax_scale, grad_key_type);
            }
            if (wants_grad_value && channel < p.head_dim_v) {
                store(grad_value, value_row + channel * parameters.grad_value.strides[3], value_sum, grad_value_type);
            }
        }
    }
}

template [[host_name("attention_backward_key_value_metal_32")]] [[kernel]]
decltype(attention_backward_key_value<32>) attention_backward_key_value<32>;
template [[host_name("attention_backward_key_value_metal_64")]] [[kernel]]
decltype(attention_backward_key_value<64>) attention_backward_key_value<64>;
template [[host_name("attention_backward_key_value_metal_128")]] [[kernel]]
decltype(attention_backward_key_value<128>) attention_backward_key_value<128>;

// Where the mask broadcasts along an axis, all of the axis is summed by one threadgroup, in its order.
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void attention_backward_mask_metal(
    constant BackwardParameters& parameters [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    const device uchar* query_data [[buffer(2)]],
    const device uchar* key_data [[buffer(3)]],
    const device uchar* value_data [[buffer(4)]],
    const device float* logsumexp [[buffer(6)]],
    const device uchar* mask [[buffer(7), function_constant(has_mask)]],
    const device float* slopes [[buffer(8), function_constant(has_slopes)]],
    const device float* query_scales [[buffer(10), function_constant(has_query_codes)]],
    const device int* query_zero_points [[buffer(11), function_constant(has_query_codes)]],
    const device float* key_scales [[buffer(12), function_constant(has_key_codes)]],
    const device int* key_zero_points [[buffer(13), function_constant(has_key_codes)]],
    const device float* key_means [[buffer(14), function_constant(has_key_codes)]],
    const device float* value_scales [[buffer(15), function_constant(has_value_codes)]],
    const device int* value_zero_points [[buffer(16), function_constant(has_value_codes)]],
    const device uchar* grad_output_data [[buffer(17)]],
    const device float* grad_logsumexp [[buffer(18), function_constant(has_grad_logsumexp)]],
    const device float* d_values [[buffer(19)]],
    device uchar* grad_mask [[buffer(24)]],
    const device atomic_uint* flags [[buffer(27)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]])
{
    constexpr int CHANNELS = 64;
    threadgroup float tile[COLUMNS * (CHANNELS + 4)];

    constant Parameters& p = parameters.attention;
    if (is_refused(p, flags)) { return; }
    const Operand query = {query_data, query_scales, query_zero_points, query_scales, query_type};
    const Operand key = {key_data, key_scales, key_zero_points, key_means, key_type};
    const Operand value = {value_data, value_scales, value_zero_points, value_scales, value_type};
    const Operand grad_output = {grad_output_data, query_scales, query_zero_points, query_scales, grad_output_type};
    const Place place = place_in_matrix(lane);

    constant long* strides = parameters.grad_mask_strides;
    const int head_items = strides[1] != 0 ? p.num_heads : 1;
    const int first_batch = int(group.z) / head_items;
    const int end_batch = strides[0] != 0 ? first_batch + 1 : p.batch_size;
    const int first_head = int(group.z) % head_items;
    const int end_head = strides[1] != 0 ? first_head + 1 : p.num_heads;
    const int own_row = int(group.y) * ROWS;
    const int end_row = strides[2] != 0 ? min(own_row + ROWS, p.seq_len_q) : p.seq_len_q;
    const int own_column = int(group.x) * COLUMNS;
    const int end_column = strides[3] != 0 ? min(own_column + COLUMNS, p.seq_len_kv) : p.seq_len_kv;

    Sum sums[ELEMENTS];
    for (int element = 0; element < ELEMENTS; element++) { sums[element] = {0.0f, 0.0f}; }
    for (int batch = first_batch; batch < end_batch; batch++) {
        const long length = sequences[batch].length;
        for (int head = first_head; head < end_head; head++) {
            for (int first_row = own_row; first_row < end_row; first_row += ROWS) {
                RowTile rows = place_rows(p, sequences, slopes, batch, head, first_row, first_row + simdgroup * 8 + place.row);
                const long statistic = statistic_of(p, batch, head, rows.row);
                rows.logsumexp = rows.has_row ? logsumexp[statistic] : 0.0f;
                rows.grad_logsumexp = has_grad_logsumexp && rows.has_row ? grad_logsumexp[statistic] : 0.0f;
                rows.d_value = rows.has_row ? d_values[statistic] : 0.0f;
                const ColumnRange columns = columns_of_rows(p, sequences[batch], first_row, ROWS);
                for (long first = own_column; first < end_column; first += COLUMNS) {
                    if (columns.first >= first + COLUMNS || columns.end <= first) { continue; }
                    bool kept[ELEMENTS];
                    float bias[ELEMENTS];
                    keep_columns(p, mask, rows, first, place.column, kept, bias);
                    simdgroup_float8x8 matrices[CHANNELS / 8];
                    simdgroup_float8x8 products[4];
                    simdgroup_float8x8 grad_products[4];
                    clear(products, 4);
                    clear(grad_products, 4);
                    for (int channel = 0; channel < p.head_dim_v; channel += CHANNELS) {
                        load_matrices<CHANNELS>(matrices, grad_output, parameters.grad_output, batch, head, rows.row, rows.has_row, channel,
                                                p.head_dim_v, place);
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        load_tile<CHANNELS>(tile, value, p.value, batch, rows.kv_head, first, length, channel, p.head_dim_v, index);
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        multiply_transposed<CHANNELS>(grad_products, matrices, tile);
                    }
                    for (int channel = 0; channel < p.head_dim; channel += CHANNELS) {
                        load_matrices<CHANNELS>(
                            matrices, query, p.query, batch, head, rows.row, rows.has_row, channel, p.head_dim, place);
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        load_tile<CHANNELS>(tile, key, p.key, batch, rows.kv_head, first, length, channel, p.head_dim, index);
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        multiply_transposed<CHANNELS>(products, matrices, tile);
                    }
                    float unused_d_value = 0.0f;
                    Sum unused_slope = {0.0f, 0.0f};
                    differentiate_rows(
                        p, rows, first, place.column, kept, bias, products, grad_products, unused_d_value, unused_slope);
                    for (int element = 0; element < ELEMENTS; element++) {
                        add(sums[element], grad_products[element / 2].thread_elements()[element % 2]);
                    }
                }
            }
        }
    }

    // One thread adds up what one element of the gradient is made of.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int element = 0; element < ELEMENTS; element++) {
        const int column = element / 2 * 8 + place.column + element % 2;
        tile[(simdgroup * 8 + place.row) * COLUMNS + column] = sums[element].high + sums[element].low;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int row_count = strides[2] != 0 ? ROWS : 1;
    const int column_count = strides[3] != 0 ? COLUMNS : 1;
    for (int element = int(index); element < row_count * column_count; element += THREADS) {
        const int row = element / column_count;
        const int column = element % column_count;
        if (strides[2] != 0 && own_row + row >= p.seq_len_q) { continue; }
        if (strides[3] != 0 && own_column + column >= p.seq_len_kv) { continue; }
        Sum sum = {0.0f, 0.0f};
        for (int other_row = row; other_row < (strides[2] != 0 ? row + 1 : ROWS); other_row++) {
            for (int other = column; other < (strides[3] != 0 ? column + 1 : COLUMNS); other++) {
                add(sum, tile[other_row * COLUMNS + other]);
            }
        }
        const long at = first_batch * strides[0] + first_head * strides[1] + (own_row + row) * strides[2] + (own_column + column) * strides[3];
        store(grad_mask, at, sum.high + sum.low, grad_mask_type);
    }
}

// Gradients of a head's sink and slope, by one simdgroup.
[[kernel, max_total_threads_per_threadgroup(32)]] void attention_backward_heads_metal(
    constant BackwardParameters& parameters [[buffer(0)]],
    const device float* logsumexp [[buffer(6)]],
    const device float* sinks [[buffer(9), function_constant(wants_grad_sinks)]],
    const device float* grad_logsumexp [[buffer(18), function_constant(has_grad_logsumexp)]],
    const device float* d_values [[buffer(19)]],
    const device float* slope_parts [[buffer(21), function_constant(wants_grad_slopes)]],
    device float* grad_sinks [[buffer(25), function_constant(wants_grad_sinks)]],
    device float* grad_slopes [[buffer(26), function_constant(wants_grad_slopes)]],
    const device atomic_uint* flags [[buffer(27)]],
    uint head [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]])
{
    constant Parameters& p = parameters.attention;
    if (is_refused(p, flags)) { return; }
    Sum sink_sum = {0.0f, 0.0f};
    Sum slope_sum = {0.0f, 0.0f};
    for (int batch = 0; batch < p.batch_size; batch++) {
        for (int row = lane; row < p.seq_len_q; row += 32) {
            const long statistic = statistic_of(p, batch, int(head), row);
            if (wants_grad_sinks && sinks[head] != -INFINITY) {
                const float share = precise::exp(sinks[head] - logsumexp[statistic]);
                const float gradient = has_grad_logsumexp ? grad_logsumexp[statistic] : 0.0f;
                add(sink_sum, share * (gradient - d_values[statistic]));
            }
            if (wants_grad_slopes) { add(slope_sum, -slope_parts[statistic]); }
        }
    }
    for (ushort distance = 16; distance > 0; distance /= 2) {
        const float sink_low = simd_shuffle_xor(sink_sum.low, distance);
        add(sink_sum, simd_shuffle_xor(sink_sum.high, distance));
        sink_sum.low += sink_low;
        const float slope_low = simd_shuffle_xor(slope_sum.low, distance);
        add(slope_sum, simd_shuffle_xor(slope_sum.high, distance));
        slope_sum.low += slope_low;
    }
    if (lane != 0) { return; }
    if (wants_grad_sinks) { grad_sinks[head] = sink_sum.high + sink_sum.low; }
    if (wants_grad_slopes) { grad_slopes[head] = slope_sum.high + slope_sum.low; }
}
