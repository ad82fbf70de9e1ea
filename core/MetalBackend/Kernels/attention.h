// What the kernels of attention share: how operands lie in memory, what a pipeline is specialised to, and the rules of scores.

#include "tensors.h"

constant int query_type [[function_constant(0)]];
constant int key_type [[function_constant(1)]];
constant int value_type [[function_constant(2)]];
constant int output_type [[function_constant(3)]];
constant bool has_logsumexp [[function_constant(4)]];
constant bool is_causal [[function_constant(5)]];
constant bool has_left_window [[function_constant(6)]];
constant bool has_right_window [[function_constant(7)]];
constant int mask_type [[function_constant(8)]];  // -1: no mask
constant bool has_softcap [[function_constant(9)]];
constant bool has_slopes [[function_constant(10)]];
constant bool has_sinks [[function_constant(11)]];
constant bool has_dropout [[function_constant(12)]];
constant bool is_deferred [[function_constant(30)]];  // nobody has checked the scales, and nobody will look for what needs care

constant bool has_mask = mask_type >= 0;
constant bool has_query_codes = query_type == INT8 || query_type == INT4;
constant bool has_key_codes = key_type == INT8 || key_type == INT4;
constant bool has_value_codes = value_type == INT8 || value_type == INT4;

constant constexpr int ROWS = 32;     // of a threadgroup
constant constexpr int COLUMNS = 32;  // of a tile
constant constexpr int THREADS = 128;
constant constexpr int SIMDGROUPS = 4;
constant constexpr int TOGETHER = 4;  // 8x8 blocks of the output whose products do not wait for each other

struct Parameters {
    TensorView query;
    TensorView key;
    TensorView value;
    TensorView output;
    long mask_strides[4];
    long window_left;
    long window_right;
    int batch_size;
    int num_heads;
    int num_kv_heads;
    int seq_len_q;
    int seq_len_kv;
    int head_dim;
    int head_dim_v;
    float softmax_scale;
    float softcap;
    float kept_scale;      // 1 / (1 - dropout_p), 0 if everything is dropped
    uint drop_threshold;   // a word below it drops its weight
    uint drops_all;
    uint seed_low;
    uint seed_high;
    uint dropout_offset;
    uint heeds_refusal;  // write nothing if an operand could not be quantised
};

// What kernels find that makes results mean nothing: CARE, that float is too narrow; the others, that an operand could not be quantised.
constant constexpr int CARE = 0;
constant constexpr int REFUSED_QUERY = 1;
constant constexpr int REFUSED_KEY = 2;
constant constexpr int REFUSED_VALUE = 3;
constant constexpr int CARE_OF_ROWS = 4;  // from here on: whether it is for this row that float is too narrow

METAL_FUNC bool is_refused(constant Parameters& p, const device atomic_uint* flags)
{
    if (!p.heeds_refusal) { return false; }
    return (atomic_load_explicit(&flags[REFUSED_QUERY], memory_order_relaxed) | atomic_load_explicit(&flags[REFUSED_KEY], memory_order_relaxed)
        | atomic_load_explicit(&flags[REFUSED_VALUE], memory_order_relaxed)) != 0;
}

// An element of a query, key or value as the real number that it stands for.
METAL_FUNC float load_real(
    const device uchar* data, const device float* scales, const device int* zero_points, const device float* means,
    constant TensorView& view, int batch, int head, int token, int channel, int type)
{
    const long row = row_of(view, batch, head, token);
    if (type != INT8 && type != INT4) { return load_plain(data, row + channel * view.strides[3], type); }
    const long code = load_code(data, row, view.strides[3], channel, type);
    const long scale = scale_of(view, batch, head, token, channel);
    const long zero_point = view.has_zero_points ? zero_points[scale] : 0;
    const float unit = scales[scale];
    if (is_deferred && !(unit > 0.0f && unit < INFINITY)) { return NAN; }
    const float real = unit * float(code - zero_point);
    return view.has_means ? real + means[batch * view.mean_strides[0] + head * view.mean_strides[1] + channel] : real;
}

// An operand and what its codes mean.
struct Operand {
    const device uchar* data;
    const device float* scales;
    const device int* zero_points;
    const device float* means;
    int type;
};

METAL_FUNC float load_element(const thread Operand& operand, constant TensorView& view, int batch, int head, int token, int channel)
{
    return load_real(
        operand.data, operand.scales, operand.zero_points, operand.means, view, batch, head, token, channel, operand.type);
}

// Where a lane's two elements of an 8x8 matrix are: the row, and the first of the columns.
struct Place {
    int row;
    int column;
};

METAL_FUNC Place place_in_matrix(int lane)
{
    const int quad = lane / 4;
    return {(quad & 4) + lane / 2 % 4, (quad & 2) * 2 + lane % 2 * 2};
}

// Adds up what the four lanes of a row of a matrix hold.
METAL_FUNC float sum_of_row(float value)
{
    value += simd_shuffle_xor(value, 1);
    return value + simd_shuffle_xor(value, 8);
}

// Where a row's logsumexp, and the like, lies.
METAL_FUNC long statistic_of(constant Parameters& p, int batch, int head, int row)
{
    return (long(batch) * p.num_heads + head) * p.seq_len_q + row;
}

METAL_FUNC void ask_for_care(constant Parameters& p, device atomic_uint* flags, int batch, int head, int row)
{
    atomic_store_explicit(&flags[CARE], 1u, memory_order_relaxed);
    atomic_store_explicit(&flags[CARE_OF_ROWS + statistic_of(p, batch, head, row)], 1u, memory_order_relaxed);
}

// Columns first <= j < end.
struct ColumnRange {
    long first;
    long end;
};

// The columns that at least one of some rows attends, masks apart.
METAL_FUNC ColumnRange columns_of_rows(constant Parameters& p, Sequence sequence, int first_row, int rows)
{
    const long position = first_row + sequence.offset;
    ColumnRange range = {0, sequence.length};
    if (is_causal) { range.end = min(range.end, position + rows); }
    if (has_right_window) { range.end = min(range.end, position + p.window_right + rows); }
    if (has_left_window) { range.first = max(range.first, position - p.window_left); }
    return range;
}

// Whether the mask lets a row attend a column, and what it adds to the score.
METAL_FUNC bool mask_keeps(
    constant Parameters& p, const device uchar* mask, int batch, int head, int row, long column, thread float& bias)
{
    const long place = batch * p.mask_strides[0] + head * p.mask_strides[1] + row * p.mask_strides[2] + column * p.mask_strides[3];
    if (mask_type == BOOL) { return mask[place] != 0; }
    bias = load_plain(mask, place, mask_type);
    return bias != -INFINITY;
}

// Four random words: Philox4x32-10.
METAL_FUNC uint4 philox(uint4 counter, uint2 key)
{
    for (int round = 0; round < 10; round++) {
        const uint high0 = mulhi(0xD2511F53u, counter.x);
        const uint low0 = 0xD2511F53u * counter.x;
        const uint high1 = mulhi(0xCD9E8D57u, counter.z);
        const uint low1 = 0xCD9E8D57u * counter.z;
        counter = uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key += uint2(0x9E3779B9u, 0xBB67AE85u);
    }
    return counter;
}

// What dropout multiplies the weights of two neighbouring columns with, the first of them even.
METAL_FUNC float2 dropout_of(constant Parameters& p, int batch, int head, int row, long column)
{
    const uint stream = uint(batch) * uint(p.num_heads) + uint(head);
    const uint4 words = philox(uint4(uint(column >> 2), uint(row), stream, p.dropout_offset), uint2(p.seed_low, p.seed_high));
    const int first = column & 3;
    return float2(p.drops_all || words[first] < p.drop_threshold ? 0.0f : p.kept_scale,
                  p.drops_all || words[first + 1] < p.drop_threshold ? 0.0f : p.kept_scale);
}
