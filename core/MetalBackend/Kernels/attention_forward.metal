// Forward attention: attention_forward_metal_32x32 and its like, for as many channels of the output as the first number says, and in the
// widest for blocks of them; the second number is the columns of a tile of keys and values.
//
// A threadgroup of four simdgroups computes 32 query rows of one head, 8 a simdgroup. Keys and values pass through threadgroup memory in tiles,
// converted to float on the way; those of FP16 or BF16 keep their type where all three operands have it (_fp16_, _bf16_), which changes no
// result: products are exact, and all sums float. Scores, weights and output stay in 8x8 matrices in registers. A row's maximum and sum run
// along with it, so no row of scores is ever whole. Columns that no row of the tile attends are not computed.
//
// Contract: scores, softmax and output are float. A column that a row does not attend has no part in it, not even by a NaN in its key or
// value: scores are selected, and values that are not finite are left out of the products and counted for the rows that attend them. Where an
// attended score, or a sum, is not finite, flags say for which row: its results mean nothing, and the caller computes it in a wider type.

#include "attention.h"

template <typename T, int CHANNELS, int TILE>
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void attention_forward(
    constant Parameters& p [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    const device uchar* query [[buffer(2)]],
    const device uchar* key [[buffer(3)]],
    const device uchar* value [[buffer(4)]],
    device uchar* output [[buffer(5)]],
    device float* logsumexp [[buffer(6), function_constant(has_logsumexp)]],
    const device uchar* mask [[buffer(7), function_constant(has_mask)]],
    const device float* slopes [[buffer(8), function_constant(has_slopes)]],
    const device float* sinks [[buffer(9), function_constant(has_sinks)]],
    const device float* query_scales [[buffer(10), function_constant(has_query_codes)]],
    const device int* query_zero_points [[buffer(11), function_constant(has_query_codes)]],
    const device float* key_scales [[buffer(12), function_constant(has_key_codes)]],
    const device int* key_zero_points [[buffer(13), function_constant(has_key_codes)]],
    const device float* key_means [[buffer(14), function_constant(has_key_codes)]],
    const device float* value_scales [[buffer(15), function_constant(has_value_codes)]],
    const device int* value_zero_points [[buffer(16), function_constant(has_value_codes)]],
    device atomic_uint* flags [[buffer(27)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]])
{
    constexpr int STRIDE = CHANNELS + 4;  // keeps neighbouring rows out of the same banks
    threadgroup T tile[TILE * STRIDE];
    threadgroup int votes[SIMDGROUPS];

    if (is_refused(p, flags)) { return; }
    const int value_blocks = (p.head_dim_v + CHANNELS - 1) / CHANNELS;
    const int batch = int(group.z);
    const int head = int(group.y) / value_blocks;
    const int first_value_channel = int(group.y) % value_blocks * CHANNELS;
    const int kv_head = head / (p.num_heads / p.num_kv_heads);
    const int first_row = int(group.x) * ROWS;
    const int tile_channel = int(index) % CHANNELS;  // that this thread loads of every tile

    // The row and the first of the two columns of an 8x8 matrix that this lane holds.
    const int quad = lane / 4;
    const int matrix_row = (quad & 4) + lane / 2 % 4;
    const int matrix_column = (quad & 2) * 2 + lane % 2 * 2;
    const int row = first_row + simdgroup * 8 + matrix_row;
    const bool has_row = row < p.seq_len_q;

    // The columns that this row attends, masks apart, and those of the threadgroup.
    const Sequence sequence = sequences[batch];
    const long length = sequence.length;
    const long position = row + sequence.offset;
    const ColumnRange columns = columns_of_rows(p, sequence, row, 1);
    const ColumnRange tile_columns = columns_of_rows(p, sequence, first_row, ROWS);
    const long start = tile_columns.first / TILE * TILE;

    const int channel_blocks = (p.head_dim + CHANNELS - 1) / CHANNELS;
    const bool holds_query = channel_blocks == 1;
    bool has_query = false;
    simdgroup_matrix<T, 8, 8> query_matrices[CHANNELS / 8];
    simdgroup_float8x8 sums[CHANNELS / 8];
    for (int block = 0; block < CHANNELS / 8; block++) { sums[block] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }

    float largest = -INFINITY;
    float total = 0.0f;  // of this lane's columns; the lanes of a row are summed at the end
    bool is_safe = true;
    uint poisoned = 0;  // a bit for each of this lane's elements of the output
    if (has_sinks && sinks[head] != -INFINITY) {
        largest = sinks[head];
        total = matrix_column == 0 ? 1.0f : 0.0f;
        is_safe = isfinite(largest);
    }
    const float slope = has_slopes ? slopes[head] : 0.0f;

    for (long first = start; first < tile_columns.end; first += TILE) {
        // Which of its 8 columns this row attends, and what the mask adds to their scores.
        bool kept[TILE / 8 * 2];
        float bias[TILE / 8 * 2];
        bool any = false;
        for (int element = 0; element < TILE / 8 * 2; element++) {
            const long column = first + element / 2 * 8 + matrix_column + element % 2;
            bool keep = has_row && column >= columns.first && column < columns.end;
            bias[element] = 0.0f;
            if (has_mask && keep) { keep = mask_keeps(p, mask, batch, head, row, column, bias[element]); }
            kept[element] = keep;
            any = any || keep;
        }
        if (has_mask) {
            // A tile that the mask excludes as a whole costs no more than this.
            const bool simdgroup_attends = simd_any(any);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (lane == 0) { votes[simdgroup] = simdgroup_attends; }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if ((votes[0] | votes[1] | votes[2] | votes[3]) == 0) { continue; }
        }

        simdgroup_float8x8 scores[TILE / 8];
        for (int block = 0; block < TILE / 8; block++) { scores[block] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }
        for (int channel_block = 0; channel_block < channel_blocks; channel_block++) {
            const int first_channel = channel_block * CHANNELS;
            if (!holds_query || !has_query) {
                has_query = true;
                for (int block = 0; block < CHANNELS / 8; block++) {
                    for (int side = 0; side < 2; side++) {
                        const int channel = first_channel + block * 8 + matrix_column + side;
                        const float real = has_row && channel < p.head_dim
                            ? load_real(query, query_scales, query_zero_points, query_scales, p.query, batch, head, row, channel, query_type)
                            : 0.0f;
                        query_matrices[block].thread_elements()[side] = T(real);
                    }
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const int key_channel = first_channel + tile_channel;
            for (int column = int(index) / CHANNELS; column < TILE; column += THREADS / CHANNELS) {
                const float real = first + column < length && key_channel < p.head_dim
                    ? load_real(key, key_scales, key_zero_points, key_means, p.key, batch, kv_head, int(first) + column, key_channel, key_type)
                    : 0.0f;
                tile[column * STRIDE + tile_channel] = T(real);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int column_block = 0; column_block < TILE / 8; column_block++) {
                for (int block = 0; block < CHANNELS / 8; block++) {
                    simdgroup_matrix<T, 8, 8> keys;
                    simdgroup_load(keys, tile + column_block * 8 * STRIDE + block * 8, STRIDE, ulong2(0, 0), true);
                    simdgroup_multiply_accumulate(scores[column_block], query_matrices[block], keys, scores[column_block]);
                }
            }
        }

        float tile_largest = largest;
        for (int block = 0; block < TILE / 8; block++) {
            for (int side = 0; side < 2; side++) {
                const int element = block * 2 + side;
                float score = scores[block].thread_elements()[side] * p.softmax_scale;
                is_safe = is_safe && (!kept[element] || isfinite(score));
                if (has_softcap) { score = p.softcap * precise::tanh(score / p.softcap); }
                if (has_mask) { score += bias[element]; }
                if (has_slopes) {
                    const long column = first + block * 8 + matrix_column + side;
                    score -= slope * float(abs(position - column));
                }
                is_safe = is_safe && (!kept[element] || isfinite(score));
                score = kept[element] ? score : -INFINITY;
                scores[block].thread_elements()[side] = score;
                tile_largest = max(tile_largest, score);
            }
        }
        // The lanes whose numbers differ in these bits hold the same row.
        tile_largest = max(tile_largest, simd_shuffle_xor(tile_largest, 1));
        tile_largest = max(tile_largest, simd_shuffle_xor(tile_largest, 8));
        const float reference = tile_largest == -INFINITY ? 0.0f : tile_largest;
        // Arguments of exponentials are at most 0 here, where the fast ones are good to a few units in the last place.
        const float change = fast::exp2((largest - reference) * M_LOG2E_F);
        largest = tile_largest;
        float tile_total = 0.0f;
        for (int block = 0; block < TILE / 8; block++) {
            float pair[2];
            for (int side = 0; side < 2; side++) {
                pair[side] = fast::exp2((scores[block].thread_elements()[side] - reference) * M_LOG2E_F);
                tile_total += pair[side];
            }
            if (has_dropout) {
                const float2 factors = dropout_of(p, batch, head, row, first + block * 8 + matrix_column);
                pair[0] *= factors.x;
                pair[1] *= factors.y;
            }
            scores[block].thread_elements() = float2(pair[0], pair[1]);
        }
        total = total * change + tile_total;

        threadgroup_barrier(mem_flags::mem_threadgroup);
        bool is_finite = true;
        const int value_channel = first_value_channel + tile_channel;
        for (int column = int(index) / CHANNELS; column < TILE; column += THREADS / CHANNELS) {
            const float real = first + column < length && value_channel < p.head_dim_v
                ? load_real(value, value_scales, value_zero_points, value_scales, p.value, batch, kv_head, int(first) + column, value_channel,
                            value_type)
                : 0.0f;
            is_finite = is_finite && isfinite(real);
            tile[column * STRIDE + tile_channel] = T(real);
        }
        const bool simdgroup_is_finite = simd_all(is_finite);
        if (lane == 0) { votes[simdgroup] = !simdgroup_is_finite; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const bool is_careful = (votes[0] | votes[1] | votes[2] | votes[3]) != 0;
        for (int first_block = 0; first_block < CHANNELS / 8; first_block += TOGETHER) {
            // Of this tile alone: fewer numbers are added to a long sum, so it loses less.
            simdgroup_float8x8 tile_sums[TOGETHER];
            simdgroup_float8x8 poison[TOGETHER];
            for (int part = 0; part < TOGETHER; part++) {
                tile_sums[part] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
                poison[part] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
                for (int column_block = 0; column_block < TILE / 8; column_block++) {
                    simdgroup_matrix<T, 8, 8> values;
                    simdgroup_load(values, tile + column_block * 8 * STRIDE + (first_block + part) * 8, STRIDE);
                    if (is_careful) {
                        simdgroup_float8x8 attended;
                        simdgroup_float8x8 wrong;
                        for (int side = 0; side < 2; side++) {
                            const float real = float(values.thread_elements()[side]);
                            attended.thread_elements()[side] = kept[column_block * 2 + side] ? 1.0f : 0.0f;
                            wrong.thread_elements()[side] = isfinite(real) ? 0.0f : 1.0f;
                            values.thread_elements()[side] = T(isfinite(real) ? real : 0.0f);
                        }
                        simdgroup_multiply_accumulate(poison[part], attended, wrong, poison[part]);
                    }
                    simdgroup_multiply_accumulate(tile_sums[part], scores[column_block], values, tile_sums[part]);
                }
            }
            for (int part = 0; part < TOGETHER; part++) {
                const int block = first_block + part;
                sums[block].thread_elements() = sums[block].thread_elements() * change + tile_sums[part].thread_elements();
                for (int side = 0; side < 2; side++) {
                    if (is_careful && poison[part].thread_elements()[side] > 0.0f) { poisoned |= 1u << (block * 2 + side); }
                }
            }
        }
    }

    total += simd_shuffle_xor(total, 1);
    total += simd_shuffle_xor(total, 8);
    // A row with a score that is not finite is NaN as a whole, whichever lane saw it.
    uint row_is_safe = is_safe ? 1 : 0;
    row_is_safe &= simd_shuffle_xor(row_is_safe, 1);
    row_is_safe &= simd_shuffle_xor(row_is_safe, 8);
    if (!has_row) { return; }
    const float factor = row_is_safe == 0 ? NAN : total == 0.0f ? 0.0f : 1.0f / total;
    const long output_row = batch * p.output.strides[0] + head * p.output.strides[1] + row * p.output.strides[2];
    for (int block = 0; block < CHANNELS / 8; block++) {
        for (int side = 0; side < 2; side++) {
            const int channel = first_value_channel + block * 8 + matrix_column + side;
            if (channel < p.head_dim_v) {
                const float sum = sums[block].thread_elements()[side];
                is_safe = is_safe && isfinite(sum);
                const bool is_poisoned = (poisoned >> (block * 2 + side) & 1) != 0;
                store(output, output_row + channel * p.output.strides[3], is_poisoned ? NAN : sum * factor, output_type);
            }
        }
    }
    if (has_logsumexp && first_value_channel == 0 && matrix_column == 0) {
        const long place = (long(batch) * p.num_heads + head) * p.seq_len_q + row;
        logsumexp[place] = row_is_safe == 0 ? NAN : total == 0.0f ? -INFINITY : largest + precise::log(total);
    }
    if (!is_safe) { ask_for_care(p, flags, batch, head, row); }
}

template [[host_name("attention_forward_metal_32x32")]] [[kernel]] decltype(attention_forward<float, 32, 32>) attention_forward<float, 32, 32>;
template [[host_name("attention_forward_metal_64x32")]] [[kernel]] decltype(attention_forward<float, 64, 32>) attention_forward<float, 64, 32>;
template [[host_name("attention_forward_metal_128x16")]] [[kernel]] decltype(attention_forward<float, 128, 16>) attention_forward<float, 128, 16>;
template [[host_name("attention_forward_metal_128x32")]] [[kernel]] decltype(attention_forward<float, 128, 32>) attention_forward<float, 128, 32>;
template [[host_name("attention_forward_fp16_metal_32x32")]] [[kernel]] decltype(attention_forward<half, 32, 32>) attention_forward<half, 32, 32>;
template [[host_name("attention_forward_fp16_metal_64x32")]] [[kernel]] decltype(attention_forward<half, 64, 32>) attention_forward<half, 64, 32>;
template [[host_name("attention_forward_fp16_metal_128x32")]] [[kernel]] decltype(attention_forward<half, 128, 32>) attention_forward<half, 128, 32>;
template [[host_name("attention_forward_bf16_metal_32x32")]] [[kernel]] decltype(attention_forward<bfloat, 32, 32>) attention_forward<bfloat, 32, 32>;
template [[host_name("attention_forward_bf16_metal_64x32")]] [[kernel]] decltype(attention_forward<bfloat, 64, 32>) attention_forward<bfloat, 64, 32>;
template [[host_name("attention_forward_bf16_metal_128x32")]] [[kernel]] decltype(attention_forward<bfloat, 128, 32>) attention_forward<bfloat, 128, 32>;
