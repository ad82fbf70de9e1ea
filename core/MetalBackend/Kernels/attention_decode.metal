// Forward attention of few query rows over many keys, in two passes.
//
//   attention_decode_metal_64x8, _64x32, _128x8, _128x32  for each part of the columns, its output, largest score and sum of weights
//   attention_decode_merge_metal                          the output over all parts
//
// A simdgroup has a part of 128 columns to itself, for all rows that share a key/value head: the rows of the heads of a group are the rows of its
// matrices, 8 or 32 as the second number of a name says; the first is how many channels there can be. So each byte of keys and values is read
// once for a group. It goes from memory into matrices without passing through threadgroup memory, which holds the queries. Where a part begins
// depends on nothing, so a padded sequence has the bits of the unpadded one.
//
// Contract: that of attention_forward.metal.

#include "attention.h"

constant constexpr int PART = 128;     // columns of a simdgroup
constant constexpr int TILE = 32;      // columns that are computed with together
constant constexpr int BLOCKS = TILE / 8;

// What a part knows of a row.
struct PartStatistics {
    float largest;
    float total;  // 0: nothing is attended; NaN: a score is not finite
};

// Where a row's first part lies in the arrays of parts.
METAL_FUNC long first_part(constant Parameters& p, int batch, int head, int row)
{
    return statistic_of(p, batch, head, row) * ((p.seq_len_kv + PART - 1) / PART);
}

template <int CHANNELS, int ROW_BLOCKS>
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void attention_decode(
    constant Parameters& p [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    const device uchar* query_data [[buffer(2)]],
    const device uchar* key_data [[buffer(3)]],
    const device uchar* value_data [[buffer(4)]],
    const device uchar* mask [[buffer(7), function_constant(has_mask)]],
    const device float* slopes [[buffer(8), function_constant(has_slopes)]],
    const device float* query_scales [[buffer(10), function_constant(has_query_codes)]],
    const device int* query_zero_points [[buffer(11), function_constant(has_query_codes)]],
    const device float* key_scales [[buffer(12), function_constant(has_key_codes)]],
    const device int* key_zero_points [[buffer(13), function_constant(has_key_codes)]],
    const device float* key_means [[buffer(14), function_constant(has_key_codes)]],
    const device float* value_scales [[buffer(15), function_constant(has_value_codes)]],
    const device int* value_zero_points [[buffer(16), function_constant(has_value_codes)]],
    device atomic_uint* flags [[buffer(27)]],
    device float* part_outputs [[buffer(28)]],
    device PartStatistics* part_statistics [[buffer(29)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]])
{
    constexpr int STRIDE = CHANNELS + 4;  // keeps neighbouring rows out of the same banks
    constexpr int PACK = ROW_BLOCKS * 8;  // rows of a threadgroup
    threadgroup float queries[PACK * STRIDE];

    if (is_refused(p, flags)) { return; }
    const Operand query = {query_data, query_scales, query_zero_points, query_scales, query_type};
    const Operand key = {key_data, key_scales, key_zero_points, key_means, key_type};
    const Operand value = {value_data, value_scales, value_zero_points, value_scales, value_type};
    const int group_size = p.num_heads / p.num_kv_heads;
    const int row_count = group_size * p.seq_len_q;
    const int packs = (row_count + PACK - 1) / PACK;
    const int batch = int(group.z);
    const int kv_head = int(group.y) / packs;
    const int first_row = int(group.y) % packs * PACK;
    const Sequence sequence = sequences[batch];
    const Place place = place_in_matrix(lane);

    for (int element = int(index); element < PACK * CHANNELS; element += THREADS) {
        const int packed = first_row + element / CHANNELS;
        const int channel = element % CHANNELS;
        const int head = kv_head * group_size + packed / p.seq_len_q;
        queries[element / CHANNELS * STRIDE + channel] = packed < row_count && channel < p.head_dim
            ? load_element(query, p.query, batch, head, packed % p.seq_len_q, channel)
            : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int part = int(group.x) * SIMDGROUPS + simdgroup;
    const long start = long(part) * PART;
    const long end = min(start + PART, sequence.length);

    simdgroup_float8x8 sums[ROW_BLOCKS * (CHANNELS / 8)];
    uint poisoned[ROW_BLOCKS];  // a bit for each of this lane's elements of the output
    float largest[ROW_BLOCKS];
    float total[ROW_BLOCKS];
    bool is_safe[ROW_BLOCKS];
    for (int index = 0; index < ROW_BLOCKS * (CHANNELS / 8); index++) { sums[index] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }
    for (int rows = 0; rows < ROW_BLOCKS; rows++) {
        poisoned[rows] = 0;
        largest[rows] = -INFINITY;
        total[rows] = 0.0f;
        is_safe[rows] = true;
    }

    for (long first = start; first < end; first += TILE) {
        bool kept[ROW_BLOCKS * BLOCKS * 2];
        float bias[ROW_BLOCKS * BLOCKS * 2];
        bool any = false;
        for (int element = 0; element < ROW_BLOCKS * BLOCKS * 2; element++) {
            const int packed = first_row + element / (BLOCKS * 2) * 8 + place.row;
            const int row = packed % p.seq_len_q;
            const long column = first + element % (BLOCKS * 2) / 2 * 8 + place.column + element % 2;
            const ColumnRange columns = columns_of_rows(p, sequence, row, 1);
            bool keep = packed < row_count && column >= columns.first && column < columns.end;
            bias[element] = 0.0f;
            if (has_mask && keep) {
                keep = mask_keeps(p, mask, batch, kv_head * group_size + packed / p.seq_len_q, row, column, bias[element]);
            }
            kept[element] = keep;
            any = any || keep;
        }
        if (!simd_any(any)) { continue; }

        simdgroup_float8x8 scores[ROW_BLOCKS * BLOCKS];
        for (int index = 0; index < ROW_BLOCKS * BLOCKS; index++) { scores[index] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }
        for (int block = 0; block < CHANNELS / 8; block++) {
            for (int columns = 0; columns < BLOCKS; columns++) {
                float pair[2];
                for (int side = 0; side < 2; side++) {
                    const long column = first + columns * 8 + place.column + side;
                    const int channel = block * 8 + place.row;
                    pair[side] = column < end && channel < p.head_dim
                        ? load_element(key, p.key, batch, kv_head, int(column), channel)
                        : 0.0f;
                }
                simdgroup_float8x8 keys;
                keys.thread_elements() = float2(pair[0], pair[1]);
                for (int rows = 0; rows < ROW_BLOCKS; rows++) {
                    simdgroup_float8x8 query_matrix;
                    simdgroup_load(query_matrix, queries + rows * 8 * STRIDE + block * 8, STRIDE);
                    simdgroup_multiply_accumulate(
                        scores[rows * BLOCKS + columns], query_matrix, keys, scores[rows * BLOCKS + columns]);
                }
            }
        }

        float change[ROW_BLOCKS];
        for (int rows = 0; rows < ROW_BLOCKS; rows++) {
            const int packed = first_row + rows * 8 + place.row;
            const int row = packed % p.seq_len_q;
            const int head = kv_head * group_size + packed / p.seq_len_q;
            const float slope = has_slopes && packed < row_count ? slopes[head] : 0.0f;
            float tile_largest = largest[rows];
            for (int columns = 0; columns < BLOCKS; columns++) {
                for (int side = 0; side < 2; side++) {
                    const int element = (rows * BLOCKS + columns) * 2 + side;
                    float score = scores[rows * BLOCKS + columns].thread_elements()[side] * p.softmax_scale;
                    is_safe[rows] = is_safe[rows] && (!kept[element] || isfinite(score));
                    if (has_softcap) { score = p.softcap * precise::tanh(score / p.softcap); }
                    if (has_mask) { score += bias[element]; }
                    if (has_slopes) {
                        const long column = first + columns * 8 + place.column + side;
                        score -= slope * float(abs(row + sequence.offset - column));
                    }
                    is_safe[rows] = is_safe[rows] && (!kept[element] || isfinite(score));
                    score = kept[element] ? score : -INFINITY;
                    scores[rows * BLOCKS + columns].thread_elements()[side] = score;
                    tile_largest = max(tile_largest, score);
                }
            }
            // The lanes whose numbers differ in these bits hold the same row.
            tile_largest = max(tile_largest, simd_shuffle_xor(tile_largest, 1));
            tile_largest = max(tile_largest, simd_shuffle_xor(tile_largest, 8));
            const float reference = tile_largest == -INFINITY ? 0.0f : tile_largest;
            change[rows] = fast::exp2((largest[rows] - reference) * M_LOG2E_F);
            largest[rows] = tile_largest;
            float tile_total = 0.0f;
            for (int columns = 0; columns < BLOCKS; columns++) {
                float2 pair;
                for (int side = 0; side < 2; side++) {
                    const float score = scores[rows * BLOCKS + columns].thread_elements()[side];
                    pair[side] = fast::exp2((score - reference) * M_LOG2E_F);
                    tile_total += pair[side];
                }
                if (has_dropout) { pair *= dropout_of(p, batch, head, row, first + columns * 8 + place.column); }
                scores[rows * BLOCKS + columns].thread_elements() = pair;
            }
            total[rows] = total[rows] * change[rows] + tile_total;
        }

        for (int block = 0; block < CHANNELS / 8; block++) {
            simdgroup_float8x8 values[BLOCKS];
            bool is_finite = true;
            for (int columns = 0; columns < BLOCKS; columns++) {
                float pair[2];
                for (int side = 0; side < 2; side++) {
                    const long column = first + columns * 8 + place.row;
                    const int channel = block * 8 + place.column + side;
                    pair[side] = column < end && channel < p.head_dim_v
                        ? load_element(value, p.value, batch, kv_head, int(column), channel)
                        : 0.0f;
                    is_finite = is_finite && isfinite(pair[side]);
                }
                values[columns].thread_elements() = float2(pair[0], pair[1]);
            }
            const bool is_careful = simd_any(!is_finite);
            simdgroup_float8x8 wrong[BLOCKS];
            if (is_careful) {
                for (int columns = 0; columns < BLOCKS; columns++) {
                    for (int side = 0; side < 2; side++) {
                        const float real = values[columns].thread_elements()[side];
                        wrong[columns].thread_elements()[side] = isfinite(real) ? 0.0f : 1.0f;
                        values[columns].thread_elements()[side] = isfinite(real) ? real : 0.0f;
                    }
                }
            }
            for (int rows = 0; rows < ROW_BLOCKS; rows++) {
                const int at = rows * (CHANNELS / 8) + block;
                sums[at].thread_elements() *= change[rows];
                for (int columns = 0; columns < BLOCKS; columns++) {
                    simdgroup_multiply_accumulate(sums[at], scores[rows * BLOCKS + columns], values[columns], sums[at]);
                }
                if (is_careful) {
                    simdgroup_float8x8 poison = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
                    for (int columns = 0; columns < BLOCKS; columns++) {
                        const int element = (rows * BLOCKS + columns) * 2;
                        simdgroup_float8x8 attended;
                        attended.thread_elements() = float2(kept[element] ? 1.0f : 0.0f, kept[element + 1] ? 1.0f : 0.0f);
                        simdgroup_multiply_accumulate(poison, attended, wrong[columns], poison);
                    }
                    for (int side = 0; side < 2; side++) {
                        if (poison.thread_elements()[side] > 0.0f) { poisoned[rows] |= 1u << (block * 2 + side); }
                    }
                }
            }
        }
    }

    if (start >= end) { return; }
    for (int rows = 0; rows < ROW_BLOCKS; rows++) {
        const int packed = first_row + rows * 8 + place.row;
        const float row_total = sum_of_row(total[rows]);
        const bool row_is_safe = sum_of_row(is_safe[rows] ? 0.0f : 1.0f) == 0.0f;
        if (packed >= row_count) { continue; }
        const int head = kv_head * group_size + packed / p.seq_len_q;
        const long at = first_part(p, batch, head, packed % p.seq_len_q) + part;
        bool is_finite = row_is_safe;
        for (int block = 0; block < CHANNELS / 8; block++) {
            for (int side = 0; side < 2; side++) {
                const int channel = block * 8 + place.column + side;
                const float sum = sums[rows * (CHANNELS / 8) + block].thread_elements()[side];
                is_finite = is_finite && isfinite(sum);
                const bool is_poisoned = (poisoned[rows] >> (block * 2 + side) & 1) != 0;
                if (channel < p.head_dim_v) { part_outputs[at * p.head_dim_v + channel] = is_poisoned ? NAN : sum; }
            }
        }
        if (place.column == 0) { part_statistics[at] = {largest[rows], row_is_safe ? row_total : NAN}; }
        if (!is_finite) { ask_for_care(p, flags, batch, head, packed % p.seq_len_q); }
    }
}

template [[host_name("attention_decode_metal_64x8")]] [[kernel]] decltype(attention_decode<64, 1>) attention_decode<64, 1>;
template [[host_name("attention_decode_metal_64x32")]] [[kernel]] decltype(attention_decode<64, 4>) attention_decode<64, 4>;
template [[host_name("attention_decode_metal_128x8")]] [[kernel]] decltype(attention_decode<128, 1>) attention_decode<128, 1>;
template [[host_name("attention_decode_metal_128x32")]] [[kernel]] decltype(attention_decode<128, 4>) attention_decode<128, 4>;

// A threadgroup for each row; a thread for each channel.
[[kernel, max_total_threads_per_threadgroup(128)]] void attention_decode_merge_metal(
    constant Parameters& p [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    device uchar* output [[buffer(5)]],
    device float* logsumexp [[buffer(6), function_constant(has_logsumexp)]],
    const device float* sinks [[buffer(9), function_constant(has_sinks)]],
    device atomic_uint* flags [[buffer(27)]],
    const device float* part_outputs [[buffer(28)]],
    const device PartStatistics* part_statistics [[buffer(29)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]])
{
    if (is_refused(p, flags)) { return; }
    const int row = int(group.x);
    const int head = int(group.y);
    const int batch = int(group.z);
    const int channel = int(index);
    const int parts = int((sequences[batch].length + PART - 1) / PART);
    const long first = first_part(p, batch, head, row);

    float largest = -INFINITY;
    float total = 0.0f;
    bool is_safe = true;
    if (has_sinks && sinks[head] != -INFINITY) {
        largest = sinks[head];
        total = 1.0f;
        is_safe = isfinite(largest);
    }
    const float sink = largest;
    for (int part = 0; part < parts; part++) { largest = max(largest, part_statistics[first + part].largest); }
    if (total != 0.0f) { total = fast::exp2((sink - largest) * M_LOG2E_F); }
    float sum = 0.0f;
    for (int part = 0; part < parts; part++) {
        const PartStatistics statistics = part_statistics[first + part];
        if (statistics.total == 0.0f) { continue; }
        const float weight = fast::exp2((statistics.largest - largest) * M_LOG2E_F);
        total += statistics.total * weight;
        if (channel < p.head_dim_v) {
            sum += part_outputs[(first + part) * p.head_dim_v + channel] * weight;
            is_safe = is_safe && !isinf(sum);
        }
    }
    if (channel < p.head_dim_v) {
        const float real = total == 0.0f ? 0.0f : sum * (1.0f / total);
        store(output, row_of(p.output, batch, head, row) + channel * p.output.strides[3], is_safe ? real : NAN, output_type);
    }
    if (has_logsumexp && index == 0) {
        logsumexp[statistic_of(p, batch, head, row)] = total == 0.0f ? -INFINITY : largest + precise::log(total);
    }
    if (!is_safe) { ask_for_care(p, flags, batch, head, row); }
}
