// Quantising and dequantising; docs/numerics.md defines the results bit by bit.
//
//   quantize_means_metal              each channel's mean over the tokens, for smoothing
//   quantize_scan_metal_128, _1024    the extremes of what shares a scale, and whether all values are finite
//   quantize_write_metal_128, _1024   scales, zero points and codes
//   dequantize_metal_128, _1024       real values of codes; of floats, the rotation undone
//
// A simdgroup works on one token at a time, whose channels lie in threadgroup memory while they are rotated and smoothed; the number in a name
// is how many these can be. Extremes are gathered as bits, whose largest does not depend on the order in which they come. Where a scale
// belongs to a single token, the scan is not needed: the pass that writes has the extremes at hand.
//
// Contract: every operation on floats is one rounding. The mean is that of a sum in double, which GPUs do not have: integers make it up.

#include "tensors.h"
#pragma METAL fp contract(off)

constant int input_type [[function_constant(0)]];
constant int output_type [[function_constant(1)]];
constant bool is_rotated [[function_constant(2)]];
constant bool is_smoothed [[function_constant(3)]];
constant bool is_asymmetric [[function_constant(4)]];
constant bool is_by_token [[function_constant(5)]];  // a scale belongs to a single token

constant bool has_codes = input_type == INT8 || input_type == INT4;
constant bool needs_extremes = !is_by_token;

constant constexpr int TOKENS = 8;  // of a simdgroup
constant constexpr int SIMDGROUPS = 4;
constant constexpr int LANES = 32;

struct QuantizeParameters {
    TensorView input;
    TensorView output;
    int num_heads;
    int seq_len;
    int head_dim;
    int rotation;  // channels that are rotated together
    float rotation_factor;
    int heeds_refusal;  // write nothing if the scan has found a value that is not finite
};

// ---- Sums in double ---------------------------------------------------------------------------------------------------------------------

// magnitude * 2^exponent, magnitude 0 or of exactly 53 bits. Sums of floats are far from the ends of the range of double.
struct Double {
    ulong magnitude;
    int exponent;
    bool is_negative;
};

METAL_FUNC int bit_count(ulong value)
{
    const uint high = uint(value >> 32);
    return high != 0 ? 64 - int(clz(high)) : 32 - int(clz(uint(value)));
}

// value >> shift, to nearest, ties to even. The shift is 1 or more.
METAL_FUNC ulong shift_to_nearest(ulong value, int shift)
{
    if (shift > 63) { return 0; }
    const ulong rest = value & ((1ul << shift) - 1);
    const ulong middle = 1ul << (shift - 1);
    const ulong shifted = value >> shift;
    return rest > middle || (rest == middle && (shifted & 1) != 0) ? shifted + 1 : shifted;
}

METAL_FUNC Double round_to_double(ulong magnitude, int exponent, bool is_negative)
{
    if (magnitude == 0) { return {0, 0, false}; }
    const int shift = bit_count(magnitude) - 53;
    if (shift <= 0) { return {magnitude << -shift, exponent + shift, is_negative}; }
    const ulong rounded = shift_to_nearest(magnitude, shift);
    // Rounding up may have carried into a 54th bit.
    const int carry = int(rounded >> 53);
    return {rounded >> carry, exponent + shift + carry, is_negative};
}

METAL_FUNC Double double_from_float(float value)
{
    const uint bits = as_type<uint>(value);
    const int biased = int(bits >> 23 & 0xff);
    const uint fraction = bits & 0x7fffff;
    return round_to_double(biased == 0 ? fraction : fraction | 0x800000, max(biased, 1) - 150, bits >> 31 != 0);
}

METAL_FUNC Double add(Double a, Double b)
{
    if (a.magnitude == 0) { return b; }
    if (b.magnitude == 0) { return a; }
    if (a.exponent < b.exponent) {
        const Double other = a;
        a = b;
        b = other;
    }
    // Nine more bits than the result keeps, and one for all that lies below: that is enough to round as if all bits were there.
    const int distance = a.exponent - b.exponent;
    const int room = min(distance, 9);
    const ulong large = a.magnitude << room;
    const int beyond = distance - room;
    ulong small = b.magnitude;
    if (beyond > 0) {
        const bool is_exact = beyond < 64 && (small & ((1ul << beyond) - 1)) == 0;
        small = (beyond < 64 ? small >> beyond : 0) | (is_exact ? 0ul : 1ul);
    }
    const int exponent = a.exponent - room;
    if (a.is_negative == b.is_negative) { return round_to_double(large + small, exponent, a.is_negative); }
    if (large >= small) { return round_to_double(large - small, exponent, a.is_negative); }
    return round_to_double(small - large, exponent, b.is_negative);
}

// The float nearest to the double nearest to sum / count.
METAL_FUNC float divide(Double sum, int count)
{
    if (sum.magnitude == 0) { return 0.0f; }
    ulong quotient = sum.magnitude / ulong(count);
    ulong rest = sum.magnitude % ulong(count);
    int exponent = sum.exponent;
    for (int bits = bit_count(quotient); bits < 62; bits++) {
        rest *= 2;
        quotient = quotient * 2 + (rest >= ulong(count) ? 1 : 0);
        if (rest >= ulong(count)) { rest -= ulong(count); }
        exponent -= 1;
    }
    const Double mean = round_to_double(quotient | (rest != 0 ? 1ul : 0ul), exponent, sum.is_negative);
    // 24 bits, or as many as a denormal number has.
    const int biased = mean.exponent + 52 + 127;
    const uint fraction = uint(shift_to_nearest(mean.magnitude, 29 + max(1 - biased, 0)));
    // A fraction that was rounded up to 2^24 carries into the exponent, as it should.
    const uint bits = biased > 0 ? (uint(biased - 1) << 23) + fraction : fraction;
    return as_type<float>(bits | (mean.is_negative ? 0x80000000u : 0u));
}

// ---- Rows -------------------------------------------------------------------------------------------------------------------------------

// The Walsh-Hadamard transform of each block of channels, by the `threads` threads that share the row. WAIT waits for them.
#define ROTATE(row, parameters, index, threads, WAIT)                                             \
    for (int distance = 1; distance < parameters.rotation; distance *= 2) {                       \
        WAIT;                                                                                     \
        for (int pair = index; pair < parameters.head_dim / 2; pair += threads) {                 \
            const int first = pair / distance * 2 * distance + pair % distance;                   \
            const float low = row[first];                                                         \
            const float high = row[first + distance];                                             \
            row[first] = low + high;                                                              \
            row[first + distance] = low - high;                                                   \
        }                                                                                         \
    }                                                                                             \
    WAIT;                                                                                         \
    for (int channel = index; channel < parameters.head_dim; channel += threads) { row[channel] *= parameters.rotation_factor; }

METAL_FUNC void rotate(threadgroup float* row, constant QuantizeParameters& p, int lane)
{
    ROTATE(row, p, lane, LANES, simdgroup_barrier(mem_flags::mem_threadgroup))
}

// Puts a token into threadgroup memory, rotated and smoothed. A lane gets the channels whose number is its own, modulo 32.
METAL_FUNC void load_row(
    threadgroup float* row, constant QuantizeParameters& p, const device uchar* input, const device float* means, int batch, int head,
    int token, int lane)
{
    const long start = row_of(p.input, batch, head, token);
    for (int channel = lane; channel < p.head_dim; channel += LANES) {
        row[channel] = load_plain(input, start + channel * p.input.strides[3], input_type);
    }
    if (is_rotated) { rotate(row, p, lane); }
    if (is_smoothed) {
        const device float* mean = means + batch * p.output.mean_strides[0] + head * p.output.mean_strides[1];
        for (int channel = lane; channel < p.head_dim; channel += LANES) { row[channel] -= mean[channel]; }
    }
}

[[kernel, max_total_threads_per_threadgroup(128)]] void quantize_means_metal(
    constant QuantizeParameters& p [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    const device uchar* input [[buffer(2)]],
    device float* means [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]])
{
    constexpr int THREADS = 128;
    constexpr int SHARE = 1024 / THREADS;  // channels of a thread
    threadgroup float row[1024];
    const int batch = int(group.y);
    const int head = int(group.x);
    const int count = int(sequences[batch].length);
    Double sums[SHARE];
    bool is_finite = true;
    for (int part = 0; part < SHARE; part++) { sums[part] = {0, 0, false}; }
    for (int token = 0; token < count; token++) {
        const long start = row_of(p.input, batch, head, token);
        for (int channel = int(index); channel < p.head_dim; channel += THREADS) {
            row[channel] = load_plain(input, start + channel * p.input.strides[3], input_type);
        }
        if (is_rotated) { ROTATE(row, p, int(index), THREADS, threadgroup_barrier(mem_flags::mem_threadgroup)) }
        for (int part = 0; part < SHARE; part++) {
            const int channel = int(index) + part * THREADS;
            if (channel < p.head_dim) {
                is_finite = is_finite && isfinite(row[channel]);
                sums[part] = add(sums[part], double_from_float(row[channel]));
            }
        }
    }
    device float* mean = means + batch * p.output.mean_strides[0] + head * p.output.mean_strides[1];
    for (int part = 0; part < SHARE; part++) {
        const int channel = int(index) + part * THREADS;
        if (channel < p.head_dim) { mean[channel] = !is_finite ? NAN : count > 0 ? divide(sums[part], count) : 0.0f; }
    }
}

// ---- Extremes and scales ----------------------------------------------------------------------------------------------------------------

// As bits: as unsigned integers those of positive numbers order like the numbers, those of negative numbers like their magnitudes and above
// all others. 0 stands for no number.
struct Extremes {
    uint highest;
    uint lowest;
};

METAL_FUNC Extremes extremes_of(float value)
{
    const uint bits = as_type<uint>(value);
    return {bits >> 31 != 0 ? 0u : bits, bits >> 31 != 0 ? bits : 0u};
}

struct Scale {
    float scale;
    float zero_point;
};

METAL_FUNC float lowest_code()
{
    return output_type == INT8 ? (is_asymmetric ? -128.0f : -127.0f) : (is_asymmetric ? -8.0f : -7.0f);
}

METAL_FUNC float highest_code()
{
    return output_type == INT8 ? 127.0f : 7.0f;
}

// NaN where an extreme is not finite.
METAL_FUNC Scale scale_for(Extremes extremes)
{
    constexpr float SMALLEST = 0x1p-126f;
    const float highest = as_type<float>(extremes.highest);
    const float lowest = as_type<float>(extremes.lowest);
    if (!isfinite(highest) || !isfinite(lowest)) { return {NAN, 0.0f}; }
    if (!is_asymmetric) {
        const float scale = max(-lowest, highest) / highest_code();
        return {scale >= SMALLEST ? scale : 1.0f, 0.0f};
    }
    const float steps = highest_code() - lowest_code();
    const float above = highest / steps;
    const float below = lowest / steps;
    const float scale = above - below;
    if (!(scale >= SMALLEST)) { return {1.0f, 0.0f}; }
    return {scale, clamp(lowest_code() - rint(lowest / scale), lowest_code(), highest_code())};
}

template <int CHANNELS>
[[kernel, max_total_threads_per_threadgroup(128)]] void quantize_scan(
    constant QuantizeParameters& p [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    const device uchar* input [[buffer(2)]],
    const device float* means [[buffer(6), function_constant(is_smoothed)]],
    device atomic_uint* extremes [[buffer(7), function_constant(needs_extremes)]],
    device atomic_uint* refused [[buffer(8)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]])
{
    threadgroup float rows[SIMDGROUPS * CHANNELS];
    threadgroup float* row = rows + simdgroup * CHANNELS;
    const int batch = int(group.z);
    const int head = int(group.y);
    const int count = int(sequences[batch].length);
    const bool has_scales_of_channels = p.output.scale_strides[3] != 0;
    bool is_finite = true;
    for (int step = 0; step < TOKENS; step++) {
        const int token = (int(group.x) * TOKENS + step) * SIMDGROUPS + simdgroup;
        if (token >= count) { break; }
        load_row(row, p, input, means, batch, head, token, lane);
        Extremes of_row = {0, 0};
        for (int channel = lane; channel < p.head_dim; channel += LANES) {
            is_finite = is_finite && isfinite(row[channel]);
            const Extremes found = extremes_of(row[channel]);
            of_row.highest = max(of_row.highest, found.highest);
            of_row.lowest = max(of_row.lowest, found.lowest);
            if (needs_extremes && has_scales_of_channels) {
                const long scale = scale_of(p.output, batch, head, token, channel);
                atomic_fetch_max_explicit(&extremes[2 * scale], found.highest, memory_order_relaxed);
                atomic_fetch_max_explicit(&extremes[2 * scale + 1], found.lowest, memory_order_relaxed);
            }
        }
        if (needs_extremes && !has_scales_of_channels) {
            const uint highest = simd_max(of_row.highest);
            const uint lowest = simd_max(of_row.lowest);
            if (lane == 0) {
                const long scale = scale_of(p.output, batch, head, token, 0);
                atomic_fetch_max_explicit(&extremes[2 * scale], highest, memory_order_relaxed);
                atomic_fetch_max_explicit(&extremes[2 * scale + 1], lowest, memory_order_relaxed);
            }
        }
    }
    if (!is_finite) { atomic_store_explicit(refused, 1u, memory_order_relaxed); }
}

template [[host_name("quantize_scan_metal_128")]] [[kernel]] decltype(quantize_scan<128>) quantize_scan<128>;
template [[host_name("quantize_scan_metal_1024")]] [[kernel]] decltype(quantize_scan<1024>) quantize_scan<1024>;

// Whether an element is the first of those that share its scale.
METAL_FUNC bool is_first_of_scale(constant TensorView& view, int batch, int head, int token, int channel)
{
    return (view.scale_strides[0] != 0 || batch == 0) && (view.scale_strides[1] != 0 || head == 0)
        && (view.scale_strides[2] != 0 ? token % view.scale_tokens == 0 : token == 0)
        && (view.scale_strides[3] != 0 ? channel % view.scale_channels == 0 : channel == 0);
}

METAL_FUNC int encode(float value, Scale scale)
{
    const float code = rint(value / scale.scale) + scale.zero_point;
    // What NaN becomes is not seen: its scale is NaN.
    return isnan(code) ? 0 : int(clamp(code, lowest_code(), highest_code()));
}

template <int CHANNELS>
[[kernel, max_total_threads_per_threadgroup(128)]] void quantize_write(
    constant QuantizeParameters& p [[buffer(0)]],
    const device Sequence* sequences [[buffer(1)]],
    const device uchar* input [[buffer(2)]],
    device uchar* output [[buffer(3)]],
    device float* scales [[buffer(4)]],
    device int* zero_points [[buffer(5), function_constant(is_asymmetric)]],
    const device float* means [[buffer(6), function_constant(is_smoothed)]],
    const device uint* extremes [[buffer(7), function_constant(needs_extremes)]],
    device atomic_uint* refused [[buffer(8)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]])
{
    threadgroup float rows[SIMDGROUPS * CHANNELS];
    threadgroup float* row = rows + simdgroup * CHANNELS;
    if (p.heeds_refusal && atomic_load_explicit(refused, memory_order_relaxed) != 0) { return; }
    const int batch = int(group.z);
    const int head = int(group.y);
    const int count = int(sequences[batch].length);
    for (int step = 0; step < TOKENS; step++) {
        const int token = (int(group.x) * TOKENS + step) * SIMDGROUPS + simdgroup;
        if (token >= p.seq_len) { break; }
        const bool takes_part = token < count;
        Extremes of_row = {0, 0};
        if (takes_part) {
            load_row(row, p, input, means, batch, head, token, lane);
            if (is_by_token) {
                for (int channel = lane; channel < p.head_dim; channel += LANES) {
                    const Extremes found = extremes_of(row[channel]);
                    of_row.highest = max(of_row.highest, found.highest);
                    of_row.lowest = max(of_row.lowest, found.lowest);
                }
                of_row.highest = simd_max(of_row.highest);
                of_row.lowest = simd_max(of_row.lowest);
            }
        }
        // A lane quantises channels with the scales that it makes for them. Those of a pair of INT4 codes are written by one lane.
        const int width = output_type == INT4 ? 2 : 1;
        const long start = row_of(p.output, batch, head, token);
        if (output_type == INT4 && takes_part) { simdgroup_barrier(mem_flags::mem_threadgroup); }
        for (int first = lane * width; first < p.head_dim; first += LANES * width) {
            int codes[2] = {0, 0};
            for (int side = 0; side < width && first + side < p.head_dim; side++) {
                const int channel = first + side;
                const long place = scale_of(p.output, batch, head, token, channel);
                if (needs_extremes) { of_row = {extremes[2 * place], extremes[2 * place + 1]}; }
                const Scale scale = scale_for(of_row);
                if (is_first_of_scale(p.output, batch, head, token, channel)) {
                    scales[place] = scale.scale;
                    if (is_asymmetric) { zero_points[place] = int(scale.zero_point); }
                    if (isnan(scale.scale)) { atomic_store_explicit(refused, 1u, memory_order_relaxed); }
                }
                if (takes_part) { codes[side] = encode(row[channel], scale); }
            }
            if (!takes_part) { continue; }
            if (output_type == INT4) {
                output[(start + first * p.output.strides[3]) / 2] = uchar((codes[0] & 15) | (codes[1] & 15) << 4);
            } else {
                ((device char*)output)[start + first * p.output.strides[3]] = static_cast<char>(codes[0]);
            }
        }
        if (output_type == INT4) { simdgroup_barrier(mem_flags::mem_threadgroup); }
    }
}

template [[host_name("quantize_write_metal_128")]] [[kernel]] decltype(quantize_write<128>) quantize_write<128>;
template [[host_name("quantize_write_metal_1024")]] [[kernel]] decltype(quantize_write<1024>) quantize_write<1024>;

template <int CHANNELS>
[[kernel, max_total_threads_per_threadgroup(128)]] void dequantize(
    constant QuantizeParameters& p [[buffer(0)]],
    const device uchar* input [[buffer(2)]],
    device uchar* output [[buffer(3)]],
    const device float* scales [[buffer(4), function_constant(has_codes)]],
    const device int* zero_points [[buffer(5), function_constant(has_codes)]],
    const device float* means [[buffer(6), function_constant(has_codes)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]])
{
    threadgroup float rows[SIMDGROUPS * CHANNELS];
    threadgroup float* row = rows + simdgroup * CHANNELS;
    const int batch = int(group.z);
    const int head = int(group.y);
    for (int step = 0; step < TOKENS; step++) {
        const int token = (int(group.x) * TOKENS + step) * SIMDGROUPS + simdgroup;
        if (token >= p.seq_len) { break; }
        const long start = row_of(p.input, batch, head, token);
        for (int channel = lane; channel < p.head_dim; channel += LANES) {
            float real;
            if (has_codes) {
                const long code = load_code(input, start, p.input.strides[3], channel, input_type);
                const long scale = scale_of(p.input, batch, head, token, channel);
                const long zero_point = p.input.has_zero_points ? zero_points[scale] : 0;
                real = scales[scale] * float(code - zero_point);
                if (p.input.has_means) { real += means[batch * p.input.mean_strides[0] + head * p.input.mean_strides[1] + channel]; }
            } else {
                real = load_plain(input, start + channel * p.input.strides[3], input_type);
            }
            row[channel] = real;
        }
        if (is_rotated) { rotate(row, p, lane); }
        const long target = row_of(p.output, batch, head, token);
        for (int channel = lane; channel < p.head_dim; channel += LANES) {
            store(output, target + channel * p.output.strides[3], row[channel], output_type);
        }
    }
}

template [[host_name("dequantize_metal_128")]] [[kernel]] decltype(dequantize<128>) dequantize<128>;
template [[host_name("dequantize_metal_1024")]] [[kernel]] decltype(dequantize<1024>) dequantize<1024>;
