/* Forward attention on INT8 and INT4 operands by integer dot products, for AVX-512 with VNNI.
 *
 * A vector's lanes are query rows, as in the reference kernels. Both products use vpdpbusd, whose first factor is unsigned and whose second
 * is signed: the register of lanes is the unsigned one (queries + 128, then the weights), the broadcast four bytes the signed one (keys,
 * values).
 *
 *     scores[key][row]     = sum over d of (query[row][d] + 128) * key[d] - 128 * sum over d of key[d]
 *     weights[key][row]    = round(255 * exp(score) * value scale of the key / the largest such product of the row in this block of keys)
 *     output[channel][row] = sum over keys of weights * value
 *
 * Scores carry the logarithm of their value's scale from the start. The largest weight is that of a block of TILE_COLUMNS keys, so each
 * block uses all of the 8 bits; blocks are joined in FP32. Small weights are rounded up or down by an offset of their column, evenly spread
 * over the columns: to the nearest, many keys of little weight would all be lost (or all be doubled). Keys whose value is 0 take part in
 * the sum alone. Keys, values and their sums are prepared once for each head of keys, INT4 codes unpacked with their zero points
 * subtracted: all of them before the first tile where several tiles of rows use them, else (decoding) block by block on the way.
 *
 * Numerical contract: codes and dot products are exact; scores, statistics and the output are FP32; a weight has an error of at most 1/510
 * of its block's largest, one below 8/255 of it at most 1/255, without bias; the sum, and so logsumexp, is that of unrounded exponentials
 * within 1e-5. Rows whose scores are not finite, and sequences with zero points beyond a byte or extreme scales, are left to the reference
 * kernels. */
#if defined(__x86_64__)

#include "../shared/naming.h"
#include "cpu_kernels.h"

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define KERNEL_FP64 0
#define KERNEL_TILE_COLUMNS 128

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpsabi"           /* every function that takes or returns a vector is inlined */
#pragma clang diagnostic ignored "-Wunused-function" /* the headers serve other kernels too */
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)

/* clang-format off: each file needs those before it */
#include "../shared/conversion.h"
#include "../shared/real.h"
#include "../shared/tile.h"
#include "../shared/rows.h"
/* clang-format on */

void attention_forward_rows_fp32_reference_avx512(const cpu_attention* attention, int64_t b, int64_t h, int64_t first_row, int64_t rows,
                                                  void* memory);
size_t attention_forward_rows_bytes_fp32_reference_avx512(const cpu_attention* attention);

enum {
    VECTORS = TILE_ROWS / LANES, /* of query rows in a full tile */
    STEP = 4,                    /* bytes that one vpdpbusd sums */
    PREPARED_TOKENS = 1024,      /* of an item of preparation */
};

/* ---- What is served ------------------------------------------------------------------------------------------------------------------ */

static bool is_integer(const cpu_tensor* tensor) {
    return tensor->precision == CPU_INT8 || tensor->precision == CPU_INT4;
}

/* Whether all channels of a row share a scale. */
static bool has_row_scales(const cpu_tensor* tensor) {
    return tensor->scale_strides[3] == 0;
}

/* Whether the difference of code and zero point can be a byte: INT4's can, if its zero points are as small as its codes. */
static bool has_byte_codes(const cpu_tensor* tensor) {
    return tensor->precision == CPU_INT4 || tensor->zero_points == NULL;
}

static bool forward_serves(const cpu_attention* attention) {
    const cpu_tensor *query = &attention->query, *key = &attention->key, *value = &attention->value;
    if (!is_integer(query) || !is_integer(key) || !is_integer(value)) return false;
    if (!has_byte_codes(query) || !has_byte_codes(key) || !has_byte_codes(value)) return false;
    bool channel_values = value->scale_channels == 1 && value->scale_strides[2] == 0;
    return has_row_scales(query) && has_row_scales(key) && (has_row_scales(value) || channel_values) && attention->dropout_p == 0;
}

/* ---- Prepared keys and values -------------------------------------------------------------------------------------------------------- */

/* Tokens of one head of keys and values, from `first` on. Arrays over tokens are padded to STEP. */
typedef struct {
    int64_t first;
    int32_t* key_offsets;  /* [tokens]: -128 * sum of the key's bytes */
    float* key_scales;     /* [tokens] */
    float* value_logs;     /* [tokens]: log2 of the value's scale; 0 where values have a scale a channel */
    float* value_inverses; /* [tokens]: 1 / that scale */
    int8_t* values;        /* [tokens / STEP][head_dim_v][STEP] */
    int8_t* keys;          /* [tokens][key_stride] */
    int64_t key_stride;    /* bytes */
    uint8_t* zero;         /* [tokens]: whether the value is 0 in all channels */
} prepared_head;

static int64_t prepared_chunks(const cpu_attention* attention) {
    return divide_up(attention->seq_len_kv, PREPARED_TOKENS);
}

/* Whether keys are used where they lie. */
static bool keys_stay(const cpu_attention* attention) {
    return attention->key.precision == CPU_INT8 && attention->key.strides[3] == 1 && attention->head_dim % STEP == 0;
}

/* Whether only one tile of rows uses each head of keys. */
static bool prepares_blocks(const cpu_attention* attention) {
    return forward_tile_count(attention) == 1;
}

static size_t prepared_layout(const cpu_attention* attention, int64_t tokens, char* memory, prepared_head* head) {
    workspace_cursor cursor = {memory, 0};
    tokens = round_up(tokens, STEP);
    head->first = 0;
    head->key_offsets = workspace_take(&cursor, tokens, sizeof(int32_t));
    head->key_scales = workspace_take(&cursor, tokens, sizeof(float));
    head->value_logs = workspace_take(&cursor, tokens, sizeof(float));
    head->value_inverses = workspace_take(&cursor, tokens, sizeof(float));
    head->values = workspace_take(&cursor, tokens * attention->head_dim_v, 1);
    head->key_stride = round_up(attention->head_dim, STEP);
    head->keys = keys_stay(attention) ? NULL : workspace_take(&cursor, tokens * head->key_stride, 1);
    head->zero = workspace_take(&cursor, tokens, 1);
    return cursor.used;
}

/* Where keys stay in the caller's memory: finds them there. */
static void find_keys(const cpu_attention* attention, int64_t b, int64_t kv_head, prepared_head* head) {
    if (!keys_stay(attention)) return;
    head->keys = (int8_t*)attention->key.data + row_offset(&attention->key, b, kv_head, head->first);
    head->key_stride = attention->key.strides[2];
}

/* What preparation found of each sequence lies before the prepared heads. */
static size_t regular_bytes(const cpu_attention* attention) {
    return (size_t)round_up(attention->batch_size, WORKSPACE_ALIGNMENT);
}

static size_t shared_bytes(const cpu_attention* attention) {
    if (prepares_blocks(attention)) return regular_bytes(attention);
    size_t bytes = prepared_layout(attention, attention->seq_len_kv, NULL, &(prepared_head){0});
    return regular_bytes(attention) + bytes * (size_t)(attention->batch_size * attention->num_kv_heads);
}

/* A head that was prepared as a whole. */
static prepared_head find_prepared_head(const cpu_attention* attention, int64_t b, int64_t kv_head) {
    prepared_head head;
    size_t bytes = prepared_layout(attention, attention->seq_len_kv, NULL, &head);
    char* memory = (char*)attention->shared + regular_bytes(attention) + bytes * (size_t)(b * attention->num_kv_heads + kv_head);
    prepared_layout(attention, attention->seq_len_kv, memory, &head);
    find_keys(attention, b, kv_head, &head);
    return head;
}

static int64_t scale_index(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s) {
    return b * tensor->scale_strides[0] + h * tensor->scale_strides[1] + s / tensor->scale_tokens * tensor->scale_strides[2];
}

/* Codes of a row without their zero point, as bytes. */
static void load_differences(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, int8_t* differences) {
    int8_t scratch[CPU_MAX_HEAD_DIM];
    const int8_t* codes = load_codes(tensor, b, h, s, channels, scratch);
    if (tensor->zero_points == NULL) {
        memcpy(differences, codes, (size_t)channels);
        return;
    }
    const int64_t stride = tensor->scale_strides[3]; /* 0: one zero point a row */
    const int32_t* zero_points = tensor->zero_points + scale_index(tensor, b, h, s);
    for (int64_t d = 0; d < channels; d++) differences[d] = (int8_t)((uint32_t)codes[d] - (uint32_t)zero_points[d * stride]);
}

/* ---- Regular sequences --------------------------------------------------------------------------------------------------------------- */

/* Whether every difference of an INT4 code and its zero point is a byte, and no scale (where `with_scales`) is so extreme that the weights
 * of one block would be too far apart for FP32. */
static bool tensor_is_regular(const cpu_tensor* tensor, int64_t b, int64_t heads, int64_t tokens, int64_t channels, bool with_scales) {
    const int64_t step = tensor->scale_strides[2] ? tensor->scale_tokens : maximum(tokens, 1);
    const int64_t stride = tensor->scale_strides[3], count = stride ? channels : 1;
    bool regular = true;
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t s = 0; s < tokens; s += step) {
            const int64_t first = scale_index(tensor, b, h, s);
            for (int64_t d = 0; d < count && tensor->zero_points; d++) {
                const int32_t zero_point = tensor->zero_points[first + d * stride];
                regular &= zero_point >= -119 && zero_point <= 119; /* codes are -8 ... 7 */
            }
            if (with_scales && tensor->scales) regular &= tensor->scales[first] > 1e-15f && tensor->scales[first] < 1e15f;
        }
    }
    return regular;
}

/* Whether this kernel computes a sequence. All of it or nothing, so that no row's bits depend on which rows share its tile. */
static bool sequence_is_regular(const cpu_attention* attention, int64_t b) {
    const int64_t keys = attention->kv_lengths ? attention->kv_lengths[b] : attention->seq_len_kv;
    const int64_t heads = attention->num_heads, kv_heads = attention->num_kv_heads;
    return tensor_is_regular(&attention->query, b, heads, attention->seq_len_q, attention->head_dim, false) &&
           tensor_is_regular(&attention->key, b, kv_heads, keys, attention->head_dim, false) &&
           tensor_is_regular(&attention->value, b, kv_heads, keys, attention->head_dim_v, has_row_scales(&attention->value));
}

static bool is_regular(const cpu_attention* attention, int64_t b) {
    return ((const uint8_t*)attention->shared)[b] != 0;
}

/* ---- Preparation --------------------------------------------------------------------------------------------------------------------- */

static int64_t prepare_items(const cpu_attention* attention) {
    const int64_t heads = prepares_blocks(attention) ? 0 : attention->batch_size * attention->num_kv_heads;
    return attention->batch_size + heads * prepared_chunks(attention);
}

/* Writes four rows of bytes as [channel][4]. */
static void interleave_rows(const int8_t* rows, int64_t pitch, int64_t channels, int8_t* out) {
    int64_t d = 0;
    for (; d + 16 <= channels; d += 16) {
        __m128i r0 = _mm_loadu_si128((const __m128i*)(rows + d)), r1 = _mm_loadu_si128((const __m128i*)(rows + pitch + d));
        __m128i r2 = _mm_loadu_si128((const __m128i*)(rows + 2 * pitch + d)), r3 = _mm_loadu_si128((const __m128i*)(rows + 3 * pitch + d));
        __m128i low01 = _mm_unpacklo_epi8(r0, r1), high01 = _mm_unpackhi_epi8(r0, r1);
        __m128i low23 = _mm_unpacklo_epi8(r2, r3), high23 = _mm_unpackhi_epi8(r2, r3);
        __m128i* target = (__m128i*)(out + d * STEP);
        _mm_storeu_si128(target, _mm_unpacklo_epi16(low01, low23));
        _mm_storeu_si128(target + 1, _mm_unpackhi_epi16(low01, low23));
        _mm_storeu_si128(target + 2, _mm_unpacklo_epi16(high01, high23));
        _mm_storeu_si128(target + 3, _mm_unpackhi_epi16(high01, high23));
    }
    for (; d < channels; d++) {
        for (int64_t k = 0; k < STEP; k++) out[d * STEP + k] = rows[k * pitch + d];
    }
}

static int32_t sum_of_bytes(const int8_t* bytes, int64_t count) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums = _mm512_setzero_si512();
    for (int64_t d = 0; d < count; d += 64) {
        __mmask64 present = count - d >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (count - d)) - 1;
        sums = _mm512_dpbusd_epi32(sums, ones, _mm512_maskz_loadu_epi8(present, bytes + d));
    }
    return _mm512_reduce_add_epi32(sums);
}

static void prepare_keys(const cpu_attention* attention, const prepared_head* head, int64_t b, int64_t kv_head, int64_t first,
                         int64_t last) {
    const cpu_tensor* key = &attention->key;
    for (int64_t s = first; s < last; s++) {
        const int64_t at = s - head->first;
        int8_t* bytes = head->keys + at * head->key_stride;
        if (!keys_stay(attention)) {
            load_differences(key, b, kv_head, s, attention->head_dim, bytes);
            memset(bytes + attention->head_dim, 0, (size_t)(head->key_stride - attention->head_dim));
        }
        head->key_offsets[at] = -128 * sum_of_bytes(bytes, attention->head_dim);
        head->key_scales[at] = key->scales ? key->scales[scale_index(key, b, kv_head, s)] : 1;
    }
}

static bool is_zero(const int8_t* bytes, int64_t count) {
    int8_t any = 0;
    for (int64_t d = 0; d < count; d++) any |= bytes[d];
    return any == 0;
}

static void prepare_values(const cpu_attention* attention, const prepared_head* head, int64_t b, int64_t kv_head, int64_t first,
                           int64_t last) {
    const cpu_tensor* value = &attention->value;
    const int64_t channels = attention->head_dim_v;
    const bool stay = value->precision == CPU_INT8 && value->strides[3] == 1;
    const bool scaled = value->scales != NULL && has_row_scales(value);
    int8_t rows[STEP * CPU_MAX_HEAD_DIM];
    for (int64_t s = first; s < last; s += STEP) {
        const int8_t* source = rows;
        int64_t pitch = channels;
        if (stay && s + STEP <= last) {
            source = (const int8_t*)value->data + row_offset(value, b, kv_head, s);
            pitch = value->strides[2];
        } else {
            memset(rows, 0, (size_t)(STEP * channels));
            for (int64_t k = 0; k < STEP && s + k < last; k++) {
                load_differences(value, b, kv_head, s + k, channels, rows + k * channels);
            }
        }
        interleave_rows(source, pitch, channels, head->values + (s - head->first) * channels);
        for (int64_t k = 0; k < STEP && s + k < last; k++) {
            const int64_t at = s + k - head->first;
            head->zero[at] = is_zero(source + k * pitch, channels);
            float scale = scaled && !head->zero[at] ? value->scales[scale_index(value, b, kv_head, s + k)] : 1;
            head->value_logs[at] = log2f(scale);
            head->value_inverses[at] = 1 / scale;
        }
    }
}

static void prepare_run(const cpu_attention* attention, int64_t item, void* memory) {
    (void)memory;
    if (item < attention->batch_size) {
        ((uint8_t*)attention->shared)[item] = sequence_is_regular(attention, item);
        return;
    }
    item -= attention->batch_size;
    const int64_t chunks = prepared_chunks(attention), chunk = item % chunks;
    const int64_t kv_head = item / chunks % attention->num_kv_heads, b = item / chunks / attention->num_kv_heads;
    prepared_head head = find_prepared_head(attention, b, kv_head);
    const int64_t keys = attention->kv_lengths ? attention->kv_lengths[b] : attention->seq_len_kv;
    const int64_t first = chunk * PREPARED_TOKENS, last = minimum(first + PREPARED_TOKENS, keys);
    prepare_keys(attention, &head, b, kv_head, first, last);
    prepare_values(attention, &head, b, kv_head, first, last);
}

/* ---- Workspace of a tile ------------------------------------------------------------------------------------------------------------- */

typedef struct {
    score_tile tile;      /* scores: int32 dot products first, then FP32 */
    uint8_t* query;       /* [head_dim / STEP][rows][STEP]: differences + 128 */
    float* query_scales;  /* [rows] */
    float* mean_scores;   /* [rows]: dot(query, channel means of the keys), 0 without smoothing */
    uint8_t* weights;     /* [TILE_COLUMNS / STEP][rows][STEP] */
    float* offsets;       /* [TILE_COLUMNS]: what is added to a small weight before it is rounded to the nearest */
    float* block_factors; /* [rows]: what a block's integer sums are multiplied by */
    float* row;           /* a row of numbers */
    prepared_head block;  /* keys and values of one block, where they are prepared on the way */
    char* block_memory;
    float* output; /* [head_dim_v][rows] */
    row_statistics statistics;
} forward_workspace;

static size_t forward_layout(const cpu_attention* attention, void* memory, forward_workspace* workspace) {
    workspace_cursor cursor = {memory, 0};
    int64_t rows = forward_tile_rows(attention);
    take_score_tile(&cursor, attention, rows, false, &workspace->tile);
    workspace->query = workspace_take(&cursor, round_up(attention->head_dim, STEP) * rows, 1);
    workspace->query_scales = workspace_take_reals(&cursor, rows);
    workspace->mean_scores = workspace_take_reals(&cursor, rows);
    workspace->weights = workspace_take(&cursor, TILE_COLUMNS * rows, 1);
    workspace->offsets = workspace_take_reals(&cursor, TILE_COLUMNS);
    workspace->block_factors = workspace_take_reals(&cursor, rows);
    workspace->row = workspace_take_reals(&cursor, maximum(attention->head_dim, attention->head_dim_v));
    workspace->output = workspace_take_reals(&cursor, attention->head_dim_v * rows);
    take_row_statistics(&cursor, rows, &workspace->statistics);
    if (prepares_blocks(attention)) {
        size_t bytes = prepared_layout(attention, TILE_COLUMNS, NULL, &workspace->block);
        workspace->block_memory = workspace_take(&cursor, (int64_t)bytes, 1);
    }
    return cursor.used;
}

static size_t forward_workspace_bytes(const cpu_attention* attention) {
    size_t bytes = forward_layout(attention, NULL, &(forward_workspace){0});
    size_t reference = attention_forward_rows_bytes_fp32_reference_avx512(attention);
    return bytes > reference ? bytes : reference;
}

/* Reads the tile's queries. */
static void load_queries(const cpu_attention* attention, forward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    const head_position* at = &tile->position;
    const cpu_tensor *query = &attention->query, *key = &attention->key;
    const float* means = key->channel_means;
    if (means) means += at->b * key->mean_strides[0] + at->kv_head * key->mean_strides[1];
    const int64_t head_dim = attention->head_dim, steps = divide_up(head_dim, STEP), rows = tile->rows;
    int8_t differences[CPU_MAX_HEAD_DIM + STEP];
    memset(workspace->query, 0, (size_t)(steps * STEP * rows));
    for (int64_t row = 0; row < rows; row++) {
        workspace->query_scales[row] = 0;
        workspace->mean_scores[row] = 0;
    }
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        const row_place place = place_of_row(attention, at, tile->first_row + row);
        load_differences(query, at->b, place.h, place.i, head_dim, differences);
        float scale = query->scales ? query->scales[scale_index(query, at->b, place.h, place.i)] : 1;
        workspace->query_scales[row] = scale;
        float sum = 0;
        for (int64_t d = 0; d < head_dim && means; d++) sum += (scale * (float)differences[d]) * means[d];
        workspace->mean_scores[row] = sum;
        for (int64_t d = head_dim; d < steps * STEP; d++) differences[d] = 0;
        for (int64_t step = 0; step < steps; step++) {
            uint32_t bytes;
            memcpy(&bytes, differences + step * STEP, STEP);
            bytes ^= 0x80808080u; /* + 128 */
            memcpy(workspace->query + (step * rows + row) * STEP, &bytes, STEP);
        }
    }
}

/* ---- Products ------------------------------------------------------------------------------------------------------------------------ */

/* Four signed bytes in every lane. In a register, lest the compiler load them anew for each product. */
INLINE __m512i broadcast_step(const int8_t* bytes) {
    int32_t step;
    memcpy(&step, bytes, STEP);
    __m512i vector_of_steps = _mm512_set1_epi32(step);
    __asm__("" : "+v"(vector_of_steps));
    return vector_of_steps;
}

/* Adds to sums[n][v], for n < count and v < vectors, the products of all steps: unsigned lanes [step][rows][STEP] with the signed bytes of n
 * at signed_bytes + step * step_stride + n * stride. */
INLINE void accumulate_products(const int vectors, const int count, int64_t steps, const uint8_t* lane_bytes, int64_t rows,
                                const int8_t* signed_bytes, int64_t step_stride, int64_t stride, __m512i sums[STEP][VECTORS]) {
    for (int64_t step = 0; step < steps; step++) {
        __m512i lanes[VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) lanes[v] = _mm512_load_si512(lane_bytes + (step * rows + v * LANES) * STEP);
#pragma clang loop unroll(full)
        for (int n = 0; n < count; n++) {
            __m512i factor = broadcast_step(signed_bytes + step * step_stride + n * stride);
#pragma clang loop unroll(full)
            for (int v = 0; v < vectors; v++) sums[n][v] = _mm512_dpbusd_epi32(sums[n][v], lanes[v], factor);
        }
    }
}

/* Scores of STEP keys against `vectors` vectors of rows. */
INLINE void multiply_keys(const int vectors, int64_t steps, const int8_t* keys, int64_t key_stride, const int32_t* offsets,
                          const uint8_t* query, int64_t rows, int32_t* scores) {
    __m512i sums[STEP][VECTORS];
#pragma clang loop unroll(full)
    for (int k = 0; k < STEP; k++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) sums[k][v] = _mm512_set1_epi32(offsets[k]);
    }
    accumulate_products(vectors, STEP, steps, query, rows, keys, STEP, key_stride, sums);
#pragma clang loop unroll(full)
    for (int k = 0; k < STEP; k++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) _mm512_store_si512(scores + k * rows + v * LANES, sums[k][v]);
    }
}

/* Adds `channels` (at most STEP) channels of a block's weighted values to the output. */
INLINE void multiply_values(const int vectors, const int channels, int64_t steps, const int8_t* values, int64_t value_stride,
                            const uint8_t* weights, int64_t rows, const float* rescale, const float* factors, float* output) {
    __m512i sums[STEP][VECTORS];
#pragma clang loop unroll(full)
    for (int d = 0; d < channels; d++) {
#pragma clang loop unroll(full)
        for (int v = 0; v < vectors; v++) sums[d][v] = _mm512_setzero_si512();
    }
    accumulate_products(vectors, channels, steps, weights, rows, values, value_stride, STEP, sums);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
        __m512 old = _mm512_load_ps(rescale + v * LANES), new = _mm512_load_ps(factors + v * LANES);
#pragma clang loop unroll(full)
        for (int d = 0; d < channels; d++) {
            float* at = output + d * rows + v * LANES;
            __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[d][v]), new);
            _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), old, sum));
        }
    }
}

/* Calls body with the number of vectors of a tile as a constant. */
#define WITH_VECTORS(count, body)  \
    switch (count) {               \
    case 1: body(1); break;        \
    case 2: body(2); break;        \
    case 3: body(3); break;        \
    default: body(VECTORS); break; \
    }

static void compute_dot_products(const cpu_attention* attention, const prepared_head* head, forward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    const int64_t steps = divide_up(attention->head_dim, STEP), rows = tile->rows;
    int32_t* scores = (int32_t*)tile->scores;
    for (int64_t column = 0; column < tile->columns; column += STEP) {
        const int64_t s = tile->first_column + column - head->first;
        const int8_t* keys = head->keys + s * head->key_stride;
        int64_t stride = head->key_stride;
        int32_t offsets[STEP] = {0};
        /* Behind the last key its own row is taken again: what comes of it is not used. */
        int64_t present = minimum(STEP, tile->columns - column);
        for (int64_t k = 0; k < present; k++) offsets[k] = head->key_offsets[s + k];
        if (present == STEP) {
#define MULTIPLY_KEYS(vectors) multiply_keys(vectors, steps, keys, stride, offsets, workspace->query, rows, scores + column * rows)
            WITH_VECTORS(rows / LANES, MULTIPLY_KEYS)
        } else {
            for (int64_t k = 0; k < present; k++) {
                int32_t alone[STEP] = {offsets[k]};
                int32_t discarded[STEP * TILE_ROWS] __attribute__((aligned(64)));
#define MULTIPLY_KEY(vectors) multiply_keys(vectors, steps, keys + k * stride, 0, alone, workspace->query, rows, discarded)
                WITH_VECTORS(rows / LANES, MULTIPLY_KEY)
                memcpy(scores + (column + k) * rows, discarded, (size_t)rows * sizeof(int32_t));
            }
        }
    }
}

static void accumulate_output(const cpu_attention* attention, const prepared_head* head, forward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    const int64_t steps = divide_up(tile->columns, STEP), rows = tile->rows, channels = attention->head_dim_v;
    const int8_t* values = head->values + (tile->first_column - head->first) * channels;
    int64_t d = 0;
    for (; d + STEP <= channels; d += STEP) {
#define MULTIPLY_VALUES(vectors)                                                                                                       \
    multiply_values(vectors, STEP, steps, values + d * STEP, channels * STEP, workspace->weights, rows, workspace->statistics.rescale, \
                    workspace->block_factors, workspace->output + d * rows)
        WITH_VECTORS(rows / LANES, MULTIPLY_VALUES)
    }
    for (; d < channels; d++) {
#define MULTIPLY_VALUE(vectors)                                                                                                     \
    multiply_values(vectors, 1, steps, values + d * STEP, channels * STEP, workspace->weights, rows, workspace->statistics.rescale, \
                    workspace->block_factors, workspace->output + d * rows)
        WITH_VECTORS(rows / LANES, MULTIPLY_VALUE)
    }
}

/* ---- Softmax ------------------------------------------------------------------------------------------------------------------------- */

/* 2^x within 3e-6: 2^floor(x) from the exponent, the rest from the polynomial of least relative error on 0 ... 1. -inf gives NaN. */
INLINE __m512 exp2_of(__m512 x) {
    __m512 rest = _mm512_reduce_ps(x, 0x09); /* x - floor(x) */
    __m512 power = _mm512_set1_ps(0.013534167781472206f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.05201146379113197f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.2414427548646927f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.6930038332939148f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0000026226043701f));
    return _mm512_scalef_ps(power, x);
}

/* Four vectors of integers 0 ... 255 as [lane][4] bytes. */
INLINE __m512i pack_weights(__m512i w0, __m512i w1, __m512i w2, __m512i w3) {
    __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(w0, w1), _mm512_packs_epi32(w2, w3));
    return _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400));
}

/* The block's scores in natural units, with everything that options do to them. */
static void compute_scores(const cpu_attention* attention, const prepared_head* head, forward_workspace* workspace) {
    score_tile* tile = &workspace->tile;
    for (int64_t column = 0; column < tile->columns; column++) {
        __m512 key_scale = _mm512_set1_ps(head->key_scales[tile->first_column - head->first + column]);
        for (int64_t row = 0; row < tile->rows; row += LANES) {
            float* at = tile->scores + column * tile->rows + row;
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(at)), key_scale);
            __m512 mean = _mm512_load_ps(workspace->mean_scores + row);
            _mm512_store_ps(at, _mm512_fmadd_ps(product, _mm512_load_ps(workspace->query_scales + row), mean));
        }
    }
    finish_scores(attention, tile);
}

static const float LOG2_E = 1.44269504088896341f, LOG2_255 = 7.99435343685885791f, LN_2 = 0.693147180559945309f;

/* Offsets -1/2 ..< 1/2 of a block's columns, as evenly spread over any run of columns as can be: multiples of the golden ratio. */
static void spread_offsets(float* offsets) {
    for (int64_t column = 0; column < TILE_COLUMNS; column++) {
        float multiple = (float)column * 0.6180339887f;
        offsets[column] = multiple - floorf(multiple) - 0.5f;
    }
}

/* The highest score of a vector of rows among keys whose value is 0, as a binary logarithm, and the sum of their exponentials over that of
 * it. */
typedef struct {
    __m512 highest, sum;
} zero_values;

/* Takes keys whose value is 0 out of tile.scores. */
INLINE zero_values take_zero_values(const prepared_head* head, const score_tile* tile, int64_t row) {
    const uint8_t* zero = head->zero + (tile->first_column - head->first);
    const __m512 minus_infinity = _mm512_set1_ps(-INFINITY);
    zero_values taken = {.highest = minus_infinity, .sum = _mm512_setzero_ps()};
    for (int64_t column = 0; column < tile->columns; column++) {
        if (!zero[column]) continue;
        taken.highest = _mm512_max_ps(taken.highest, _mm512_load_ps(tile->scores + column * tile->rows + row));
    }
    for (int64_t column = 0; column < tile->columns; column++) {
        if (!zero[column]) continue;
        float* at = tile->scores + column * tile->rows + row;
        __m512 logarithm = _mm512_load_ps(at);
        __mmask16 attended = _mm512_cmp_ps_mask(logarithm, minus_infinity, _CMP_NEQ_UQ);
        taken.sum = _mm512_mask_add_ps(taken.sum, attended, taken.sum, exp2_of(_mm512_sub_ps(logarithm, taken.highest)));
        _mm512_store_ps(at, minus_infinity);
    }
    return taken;
}

static bool has_zero_values(const prepared_head* head, const score_tile* tile) {
    uint8_t any = 0;
    for (int64_t column = 0; column < tile->columns; column++) any |= head->zero[tile->first_column - head->first + column];
    return any;
}

/* Natural score of a binary logarithm; that of nothing is -inf. */
INLINE vector natural_score(__m512 logarithm, __m512 offset) {
    vector natural = (vector)_mm512_fmadd_ps(logarithm, _mm512_set1_ps(LN_2), offset);
    return vector_select((vector)logarithm == -INFINITY, vector_of(-INFINITY), natural);
}

/* Rounds the weights of a vector of rows and joins the block with what came before. tile.scores holds the weights' binary logarithms, -inf
 * where there is none (`some_excluded`), of which `highest` is the largest; `offset` is what natural scores have in addition. */
INLINE void weigh_block(const prepared_head* head, forward_workspace* workspace, int64_t row, __m512 highest, __m512 offset,
                        zero_values zeros, bool some_excluded) {
    const score_tile* tile = &workspace->tile;
    row_statistics* statistics = &workspace->statistics;
    const float* inverses = head->value_inverses + (tile->first_column - head->first);
    const __m512 minus_infinity = _mm512_set1_ps(-INFINITY), zero = _mm512_setzero_ps(), small = _mm512_set1_ps(8);
    const __m512 finite_highest = _mm512_mask_mov_ps(highest, _mm512_cmp_ps_mask(highest, minus_infinity, _CMP_EQ_OQ), zero);
    const __m512 reference = _mm512_sub_ps(finite_highest, _mm512_set1_ps(LOG2_255));

    __m512 sum = zero;
    for (int64_t column = 0; column < tile->columns; column += STEP) {
        __m512i weights[STEP];
#pragma clang loop unroll(full)
        for (int k = 0; k < STEP; k++) {
            weights[k] = _mm512_setzero_si512();
            if (column + k >= tile->columns) continue;
            __m512 logarithm = _mm512_load_ps(tile->scores + (column + k) * tile->rows + row);
            __m512 weight = exp2_of(_mm512_sub_ps(logarithm, reference));
            if (some_excluded) weight = _mm512_mask_mov_ps(weight, _mm512_cmp_ps_mask(logarithm, minus_infinity, _CMP_EQ_OQ), zero);
            sum = _mm512_fmadd_ps(weight, _mm512_set1_ps(inverses[column + k]), sum);
            __mmask16 spread = _mm512_cmp_ps_mask(weight, small, _CMP_LT_OQ);
            weights[k] = _mm512_cvtps_epi32(_mm512_mask_add_ps(weight, spread, weight, _mm512_set1_ps(workspace->offsets[column + k])));
        }
        __m512i packed = pack_weights(weights[0], weights[1], weights[2], weights[3]);
        _mm512_store_si512(workspace->weights + (column * tile->rows + row * STEP), packed);
    }

    const vector old = vector_load(statistics->highest + row);
    const vector block = natural_score(highest, offset), zero_block = natural_score(zeros.highest, offset);
    const vector joined = vector_max(vector_max(old, block), zero_block);
    const vector origin = vector_select(joined == -INFINITY, vector_of(0), joined);
    const vector rescale = vector_exp(old - origin);
    const vector factor = vector_exp(block - origin) * (1.0f / 255.0f);
    vector total = vector_load(statistics->sum + row) * rescale + (vector)sum * factor;
    total += (vector)zeros.sum * vector_exp(zero_block - origin);
    vector_store(statistics->highest + row, joined);
    vector_store(statistics->rescale + row, rescale);
    vector_store(statistics->sum + row, total);
    vector_store(workspace->block_factors + row, factor);
}

/* The highest of a vector of rows in tile.scores. */
INLINE __m512 highest_of_block(const score_tile* tile, int64_t row) {
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (int64_t column = 0; column < tile->columns; column++) {
        highest = _mm512_max_ps(highest, _mm512_load_ps(tile->scores + column * tile->rows + row));
    }
    return highest;
}

/* A block whose scores are nothing but scaled dot products; limits may exclude some of them. */
static void weigh_plain_block(const cpu_attention* attention, const prepared_head* head, forward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    const float* key_scales = head->key_scales + (tile->first_column - head->first);
    const float* value_logs = head->value_logs + (tile->first_column - head->first);
    const float scale = (float)attention->softmax_scale;
    const bool zeros = has_zero_values(head, tile), some_excluded = !tile->full || zeros;
    for (int64_t row = 0; row < tile->rows; row += LANES) {
        const __m512 factor = _mm512_mul_ps(_mm512_load_ps(workspace->query_scales + row), _mm512_set1_ps(scale * LOG2_E));
        const __m512i first = _mm512_load_si512(tile->limits + row), last = _mm512_load_si512(tile->limits + tile->rows + row);
        const __mmask16 any = tile->full ? 0xFFFF : _mm512_cmplt_epi32_mask(first, last);
        __m512 highest = _mm512_set1_ps(-INFINITY);
        for (int64_t column = 0; column < tile->columns; column++) {
            float* at = tile->scores + column * tile->rows + row;
            __m512 number = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(at)), _mm512_set1_ps(key_scales[column]));
            __m512 logarithm = _mm512_fmadd_ps(number, factor, _mm512_set1_ps(value_logs[column]));
            if (!tile->full) {
                __m512i here = _mm512_set1_epi32((int32_t)column);
                __mmask16 attended = _mm512_cmple_epi32_mask(first, here) & _mm512_cmplt_epi32_mask(here, last);
                logarithm = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), attended, logarithm);
            }
            highest = _mm512_max_ps(highest, logarithm);
            _mm512_store_ps(at, logarithm);
        }
        const __m512 offset = _mm512_mul_ps(_mm512_load_ps(workspace->mean_scores + row), _mm512_set1_ps(scale));
        const vector size = (vector)_mm512_add_ps(highest, offset);
        const vector_mask attended = (vector_mask)_mm512_movm_epi32(any);
        *(vector_mask*)(tile->infinite + row) |= (size - size != 0) & attended;
        *(vector_mask*)(workspace->statistics.attended + row) |= attended;
        zero_values taken = {.highest = _mm512_set1_ps(-INFINITY), .sum = _mm512_setzero_ps()};
        if (zeros) {
            taken = take_zero_values(head, tile, row);
            highest = highest_of_block(tile, row);
        }
        weigh_block(head, workspace, row, highest, offset, taken, some_excluded);
    }
}

static void weigh_general_block(const cpu_attention* attention, const prepared_head* head, forward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    const float* value_logs = head->value_logs + (tile->first_column - head->first);
    compute_scores(attention, head, workspace);
    for (int64_t row = 0; row < tile->rows; row += LANES) {
        vector_mask attended = *(vector_mask*)(workspace->statistics.attended + row);
        for (int64_t column = 0; column < tile->columns; column++) {
            float* at = tile->scores + column * tile->rows + row;
            attended |= tile->full ? (vector_mask)(real_bits)-1 : *(vector_mask*)(tile->attended + column * tile->rows + row);
            vector_store(at, vector_load(at) * LOG2_E + value_logs[column]);
        }
        *(vector_mask*)(workspace->statistics.attended + row) = attended;
        zero_values taken = take_zero_values(head, tile, row);
        weigh_block(head, workspace, row, highest_of_block(tile, row), _mm512_setzero_ps(), taken, true);
    }
}

/* ---- Tiles --------------------------------------------------------------------------------------------------------------------------- */

/* Whether scores are nothing but scaled dot products. */
static bool is_plain(const cpu_attention* attention) {
    return attention->mask.data == NULL && attention->softcap == 0 && attention->alibi_slopes == NULL &&
           fabs(attention->softmax_scale) < 1e30;
}

/* Prepares the keys and values of the placed tile's block. */
static void prepare_block(const cpu_attention* attention, forward_workspace* workspace) {
    const head_position* at = &workspace->tile.position;
    const int64_t first = workspace->tile.first_column, last = minimum(first + TILE_COLUMNS, at->keys);
    prepared_head* block = &workspace->block;
    prepared_layout(attention, TILE_COLUMNS, workspace->block_memory, block);
    block->first = first;
    find_keys(attention, at->b, at->kv_head, block);
    prepare_keys(attention, block, at->b, at->kv_head, first, last);
    prepare_values(attention, block, at->b, at->kv_head, first, last);
}

static void store_rows(const cpu_attention* attention, forward_workspace* workspace) {
    const score_tile* tile = &workspace->tile;
    const head_position* at = &tile->position;
    const cpu_tensor* value = &attention->value;
    const float* channel_scales =
        has_row_scales(value) || !value->scales ? NULL : value->scales + scale_index(value, at->b, at->kv_head, 0);
    const int64_t first_statistic = (at->b * attention->num_heads + at->h) * attention->seq_len_q + tile->first_row;
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        real logsumexp;
        row_place place = place_of_row(attention, at, tile->first_row + row);
        real factor = finish_row(attention, place.h, &workspace->statistics, row, &logsumexp);
        bool attended = workspace->statistics.attended[row];
        for (int64_t d = 0; d < attention->head_dim_v; d++) {
            real result = attended ? workspace->output[d * tile->rows + row] * factor : 0;
            workspace->row[d] = channel_scales ? result * channel_scales[d * value->scale_strides[3]] : result;
        }
        store_row(&attention->output, at->b, place.h, place.i, attention->head_dim_v, workspace->row);
        if (attention->logsumexp) set_statistic(attention, attention->logsumexp, first_statistic + row, logsumexp);
    }
}

static void forward_run(const cpu_attention* attention, int64_t item, void* memory) {
    forward_workspace workspace;
    forward_layout(attention, memory, &workspace);
    score_tile* tile = &workspace.tile;
    int64_t first_row;
    tile->position = locate_forward_tile(attention, item, &first_row, &tile->valid_rows);
    const head_position* at = &tile->position;
    tile->first_row = first_row;
    tile->rows = round_up(tile->valid_rows, LANES);

    const bool blocks = prepares_blocks(attention);
    prepared_head* head = &workspace.block;
    if (!is_regular(attention, at->b)) {
        attention_forward_rows_fp32_reference_avx512(attention, at->b, at->h, first_row, tile->valid_rows, memory);
        return;
    }
    load_queries(attention, &workspace);
    if (!blocks) {
        *head = find_prepared_head(attention, at->b, at->kv_head);
    }
    clear_row_statistics(&workspace.statistics, tile);
    spread_offsets(workspace.offsets);
    memset(workspace.output, 0, (size_t)(attention->head_dim_v * tile->rows) * sizeof(real));

    const bool plain = is_plain(attention);
    column_range range = columns_of_rows(attention, at, first_row, tile->valid_rows);
    for (int64_t column = range.first / TILE_COLUMNS * TILE_COLUMNS; column < range.last; column += TILE_COLUMNS) {
        if (!place_score_tile(attention, tile, column, range.last)) continue;
        if (blocks) prepare_block(attention, &workspace);
        compute_dot_products(attention, head, &workspace);
        if (plain) {
            weigh_plain_block(attention, head, &workspace);
        } else {
            weigh_general_block(attention, head, &workspace);
        }
        accumulate_output(attention, head, &workspace);
    }
    store_rows(attention, &workspace);

    /* Rows that met a score which is not finite: the reference kernel says what becomes of them. */
    uint64_t infinite = 0;
    for (int64_t row = 0; row < tile->valid_rows; row++) {
        if (workspace.statistics.attended[row] && tile->infinite[row]) infinite |= (uint64_t)1 << row;
    }
    const int64_t b = at->b, h = at->h, valid_rows = tile->valid_rows;
    for (int64_t row = 0, run; row < valid_rows; row += run + 1) {
        for (run = 0; row + run < valid_rows && infinite >> (row + run) & 1; run++) {}
        if (run > 0) attention_forward_rows_fp32_reference_avx512(attention, b, h, first_row + row, run, memory);
    }
}

#pragma clang attribute pop
#pragma clang diagnostic pop

const cpu_attention_kernel attention_forward_int8_avx512vnni = {
    .name = "attention_forward_int8_avx512vnni",
    .serves = forward_serves,
    .shared_bytes = shared_bytes,
    .prepare_items = prepare_items,
    .prepare = prepare_run,
    .item_count = forward_tile_items,
    .workspace_bytes = forward_workspace_bytes,
    .run = forward_run,
};

#endif /* x86-64 */
