// Written by tools/embed_kernels.py from core/MetalBackend/Kernels. Do not edit.

// swift-format-ignore-file

enum KernelSources {
    static let attentionBackward = #"""
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

        #line 1 "attention.h"
        // What the kernels of attention share: how operands lie in memory, what a pipeline is specialised to, and the rules of scores.

        #line 1 "tensors.h"
        // How tensors lie in memory.

        #include <metal_stdlib>
        #include <metal_simdgroup_matrix>
        using namespace metal;

        // How elements lie in memory: the numbers of mfa.h.
        constant constexpr int FP32 = 0;
        constant constexpr int FP16 = 1;
        constant constexpr int BF16 = 2;
        constant constexpr int INT4 = 4;
        constant constexpr int INT8 = 8;
        constant constexpr int BOOL = 16;

        // A tensor [batch, head, token, channel]; strides in elements (codes of INT4).
        struct TensorView {
            long strides[4];
            long scale_strides[4];
            long mean_strides[2];
            int scale_tokens;    // that share a scale
            int scale_channels;
            int has_zero_points;
            int has_means;
        };

        // Where the rows of a sequence stand among its keys, and how many of these there are.
        struct Sequence {
            long offset;
            long length;
        };

        // An element as it lies in memory: a float, or a code.
        METAL_FUNC float load_plain(const device uchar* data, long index, int type)
        {
            if (type == FP16) { return float(((const device half*)data)[index]); }
            if (type == BF16) { return float(((const device bfloat*)data)[index]); }
            return ((const device float*)data)[index];
        }

        METAL_FUNC int load_code(const device uchar* data, long row, long stride, int channel, int type)
        {
            if (type == INT8) { return ((const device char*)data)[row + channel * stride]; }
            const uchar pair = data[(row + (channel - (channel & 1)) * stride) / 2];
            const int nibble = (channel & 1) ? pair >> 4 : pair & 15;
            return nibble >= 8 ? nibble - 16 : nibble;
        }

        // Where the first channel of a token lies.
        METAL_FUNC long row_of(constant TensorView& view, int batch, int head, int token)
        {
            return batch * view.strides[0] + head * view.strides[1] + token * view.strides[2];
        }

        // Where the scale of an element lies.
        METAL_FUNC long scale_of(constant TensorView& view, int batch, int head, int token, int channel)
        {
            return batch * view.scale_strides[0] + head * view.scale_strides[1] + (token / view.scale_tokens) * view.scale_strides[2]
                + (channel / view.scale_channels) * view.scale_strides[3];
        }

        METAL_FUNC void store(device uchar* data, long index, float value, int type)
        {
            if (type == FP32) {
                ((device float*)data)[index] = value;
            } else if (type == FP16) {
                ((device half*)data)[index] = half(value);
            } else {
                ((device bfloat*)data)[index] = bfloat(value);
            }
        }
        #line 4 "attention.h"

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
        #line 17 "attention_backward.metal"

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

        """#
    static let attentionDecode = #"""
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

        #line 1 "attention.h"
        // What the kernels of attention share: how operands lie in memory, what a pipeline is specialised to, and the rules of scores.

        #line 1 "tensors.h"
        // How tensors lie in memory.

        #include <metal_stdlib>
        #include <metal_simdgroup_matrix>
        using namespace metal;

        // How elements lie in memory: the numbers of mfa.h.
        constant constexpr int FP32 = 0;
        constant constexpr int FP16 = 1;
        constant constexpr int BF16 = 2;
        constant constexpr int INT4 = 4;
        constant constexpr int INT8 = 8;
        constant constexpr int BOOL = 16;

        // A tensor [batch, head, token, channel]; strides in elements (codes of INT4).
        struct TensorView {
            long strides[4];
            long scale_strides[4];
            long mean_strides[2];
            int scale_tokens;    // that share a scale
            int scale_channels;
            int has_zero_points;
            int has_means;
        };

        // Where the rows of a sequence stand among its keys, and how many of these there are.
        struct Sequence {
            long offset;
            long length;
        };

        // An element as it lies in memory: a float, or a code.
        METAL_FUNC float load_plain(const device uchar* data, long index, int type)
        {
            if (type == FP16) { return float(((const device half*)data)[index]); }
            if (type == BF16) { return float(((const device bfloat*)data)[index]); }
            return ((const device float*)data)[index];
        }

        METAL_FUNC int load_code(const device uchar* data, long row, long stride, int channel, int type)
        {
            if (type == INT8) { return ((const device char*)data)[row + channel * stride]; }
            const uchar pair = data[(row + (channel - (channel & 1)) * stride) / 2];
            const int nibble = (channel & 1) ? pair >> 4 : pair & 15;
            return nibble >= 8 ? nibble - 16 : nibble;
        }

        // Where the first channel of a token lies.
        METAL_FUNC long row_of(constant TensorView& view, int batch, int head, int token)
        {
            return batch * view.strides[0] + head * view.strides[1] + token * view.strides[2];
        }

        // Where the scale of an element lies.
        METAL_FUNC long scale_of(constant TensorView& view, int batch, int head, int token, int channel)
        {
            return batch * view.scale_strides[0] + head * view.scale_strides[1] + (token / view.scale_tokens) * view.scale_strides[2]
                + (channel / view.scale_channels) * view.scale_strides[3];
        }

        METAL_FUNC void store(device uchar* data, long index, float value, int type)
        {
            if (type == FP32) {
                ((device float*)data)[index] = value;
            } else if (type == FP16) {
                ((device half*)data)[index] = half(value);
            } else {
                ((device bfloat*)data)[index] = bfloat(value);
            }
        }
        #line 4 "attention.h"

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
        #line 14 "attention_decode.metal"

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

        """#
    static let attentionForward = #"""
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

        #line 1 "attention.h"
        // What the kernels of attention share: how operands lie in memory, what a pipeline is specialised to, and the rules of scores.

        #line 1 "tensors.h"
        // How tensors lie in memory.

        #include <metal_stdlib>
        #include <metal_simdgroup_matrix>
        using namespace metal;

        // How elements lie in memory: the numbers of mfa.h.
        constant constexpr int FP32 = 0;
        constant constexpr int FP16 = 1;
        constant constexpr int BF16 = 2;
        constant constexpr int INT4 = 4;
        constant constexpr int INT8 = 8;
        constant constexpr int BOOL = 16;

        // A tensor [batch, head, token, channel]; strides in elements (codes of INT4).
        struct TensorView {
            long strides[4];
            long scale_strides[4];
            long mean_strides[2];
            int scale_tokens;    // that share a scale
            int scale_channels;
            int has_zero_points;
            int has_means;
        };

        // Where the rows of a sequence stand among its keys, and how many of these there are.
        struct Sequence {
            long offset;
            long length;
        };

        // An element as it lies in memory: a float, or a code.
        METAL_FUNC float load_plain(const device uchar* data, long index, int type)
        {
            if (type == FP16) { return float(((const device half*)data)[index]); }
            if (type == BF16) { return float(((const device bfloat*)data)[index]); }
            return ((const device float*)data)[index];
        }

        METAL_FUNC int load_code(const device uchar* data, long row, long stride, int channel, int type)
        {
            if (type == INT8) { return ((const device char*)data)[row + channel * stride]; }
            const uchar pair = data[(row + (channel - (channel & 1)) * stride) / 2];
            const int nibble = (channel & 1) ? pair >> 4 : pair & 15;
            return nibble >= 8 ? nibble - 16 : nibble;
        }

        // Where the first channel of a token lies.
        METAL_FUNC long row_of(constant TensorView& view, int batch, int head, int token)
        {
            return batch * view.strides[0] + head * view.strides[1] + token * view.strides[2];
        }

        // Where the scale of an element lies.
        METAL_FUNC long scale_of(constant TensorView& view, int batch, int head, int token, int channel)
        {
            return batch * view.scale_strides[0] + head * view.scale_strides[1] + (token / view.scale_tokens) * view.scale_strides[2]
                + (channel / view.scale_channels) * view.scale_strides[3];
        }

        METAL_FUNC void store(device uchar* data, long index, float value, int type)
        {
            if (type == FP32) {
                ((device float*)data)[index] = value;
            } else if (type == FP16) {
                ((device half*)data)[index] = half(value);
            } else {
                ((device bfloat*)data)[index] = bfloat(value);
            }
        }
        #line 4 "attention.h"

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
        #line 14 "attention_forward.metal"

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

        """#
    static let attentionSequences = #"""
        // attention_sequences_metal: where the rows of each sequence stand among its keys, and how many of these there are, from arrays that only the
        // device reads. For calls that the host waits for it computes the same.
        //
        // Contract: lengths are clamped to 0 ... seq_len_kv, and offsets to less than 2^61 in magnitude, so that nobody reads beyond a buffer.

        #include <metal_stdlib>
        using namespace metal;

        struct Parameters {
            long seq_len_q;
            long seq_len_kv;
            int batch_size;
            int has_lengths;
            int num_query_offsets;
            int is_lower_right;
        };

        struct Sequence {
            long offset;
            long length;
        };

        constant constexpr long FARTHEST = (1L << 61) - 1;

        kernel void attention_sequences_metal(
            constant Parameters& p [[buffer(0)]],
            const device long* lengths [[buffer(1)]],
            const device long* offsets [[buffer(2)]],
            device Sequence* sequences [[buffer(3)]],
            uint batch [[thread_position_in_grid]])
        {
            if (int(batch) >= p.batch_size) { return; }
            const long length = p.has_lengths ? clamp(lengths[batch], 0L, p.seq_len_kv) : p.seq_len_kv;
            long offset = 0;
            if (p.num_query_offsets > 0) {
                offset = clamp(offsets[p.num_query_offsets > 1 ? batch : 0], -FARTHEST, FARTHEST);
            } else if (p.is_lower_right) {
                offset = length - p.seq_len_q;
            }
            sequences[batch].offset = offset;
            sequences[batch].length = length;
        }

        """#
    static let quantize = #"""
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

        #line 1 "tensors.h"
        // How tensors lie in memory.

        #include <metal_stdlib>
        #include <metal_simdgroup_matrix>
        using namespace metal;

        // How elements lie in memory: the numbers of mfa.h.
        constant constexpr int FP32 = 0;
        constant constexpr int FP16 = 1;
        constant constexpr int BF16 = 2;
        constant constexpr int INT4 = 4;
        constant constexpr int INT8 = 8;
        constant constexpr int BOOL = 16;

        // A tensor [batch, head, token, channel]; strides in elements (codes of INT4).
        struct TensorView {
            long strides[4];
            long scale_strides[4];
            long mean_strides[2];
            int scale_tokens;    // that share a scale
            int scale_channels;
            int has_zero_points;
            int has_means;
        };

        // Where the rows of a sequence stand among its keys, and how many of these there are.
        struct Sequence {
            long offset;
            long length;
        };

        // An element as it lies in memory: a float, or a code.
        METAL_FUNC float load_plain(const device uchar* data, long index, int type)
        {
            if (type == FP16) { return float(((const device half*)data)[index]); }
            if (type == BF16) { return float(((const device bfloat*)data)[index]); }
            return ((const device float*)data)[index];
        }

        METAL_FUNC int load_code(const device uchar* data, long row, long stride, int channel, int type)
        {
            if (type == INT8) { return ((const device char*)data)[row + channel * stride]; }
            const uchar pair = data[(row + (channel - (channel & 1)) * stride) / 2];
            const int nibble = (channel & 1) ? pair >> 4 : pair & 15;
            return nibble >= 8 ? nibble - 16 : nibble;
        }

        // Where the first channel of a token lies.
        METAL_FUNC long row_of(constant TensorView& view, int batch, int head, int token)
        {
            return batch * view.strides[0] + head * view.strides[1] + token * view.strides[2];
        }

        // Where the scale of an element lies.
        METAL_FUNC long scale_of(constant TensorView& view, int batch, int head, int token, int channel)
        {
            return batch * view.scale_strides[0] + head * view.scale_strides[1] + (token / view.scale_tokens) * view.scale_strides[2]
                + (channel / view.scale_channels) * view.scale_strides[3];
        }

        METAL_FUNC void store(device uchar* data, long index, float value, int type)
        {
            if (type == FP32) {
                ((device float*)data)[index] = value;
            } else if (type == FP16) {
                ((device half*)data)[index] = half(value);
            } else {
                ((device bfloat*)data)[index] = bfloat(value);
            }
        }
        #line 15 "quantize.metal"
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

        """#
}
