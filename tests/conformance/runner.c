/* Runs conformance cases through the C interface: cases on standard input, one line each, to results on standard output, one line each.
 *
 *     runner DEVICE THREADS
 *
 * What a case says and what a result says is in docs/conformance.md. Compiled against mfa.h alone. */
#include "../precision_bytes.h"
#include "inputs.h"

#include <mfa.h>

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- A case: one line of JSON without nesting, in which no text contains a quotation mark ---------------------------------------------- */

static const char* line;

/* Where the value of a field begins; NULL: it is not there. */
static const char* find(const char* name) {
    char pattern[80];
    snprintf(pattern, sizeof pattern, "\"%s\": ", name);
    const char* at = strstr(line, pattern);
    return at ? at + strlen(pattern) : NULL;
}

static int64_t integer_field(const char* name, int64_t otherwise) {
    const char* at = find(name);
    if (!at) return otherwise;
    if (*at == 't' || *at == 'f') return *at == 't';
    return *at == '-' ? strtoll(at, NULL, 10) : (int64_t)strtoull(at, NULL, 10);
}

static double real_field(const char* name, double otherwise) {
    const char* at = find(name);
    if (!at) return otherwise;
    return strtod(*at == '"' ? at + 1 : at, NULL); /* "nan" and "inf" are texts */
}

/* The text of a field, "" where there is none; valid until the fourth call from now. */
static const char* text_field(const char* name) {
    static char texts[4][128];
    static unsigned next;
    char* text = texts[next++ % 4];
    const char* at = find(name);
    size_t length = 0;
    if (at && *at == '"') {
        length = strcspn(at + 1, "\"");
        if (length >= sizeof texts[0]) length = sizeof texts[0] - 1;
        memcpy(text, at + 1, length);
    }
    text[length] = 0;
    return text;
}

/* Reads a list of integers; returns how many. */
static int list_field(const char* name, int64_t* numbers, int most) {
    const char* at = find(name);
    int count = 0;
    if (!at) return 0;
    for (at++; *at != ']' && count < most; count++) {
        char* end;
        numbers[count] = strtoll(at, &end, 10);
        at = end + strspn(end, ", ");
    }
    return count;
}

/* Whether a list of words separated by commas has a word. */
static bool lists(const char* list, const char* word) {
    const size_t length = strlen(word);
    for (const char* at = list; (at = strstr(at, word)); at += length) {
        if ((at == list || at[-1] == ',') && (at[length] == 0 || at[length] == ',')) return true;
    }
    return false;
}

/* ---- Memory ---------------------------------------------------------------------------------------------------------------------------- */

enum { MOST_ELEMENTS = 1 << 22, MOST_ALLOCATIONS = 64 };

static void* allocations[MOST_ALLOCATIONS];
static int allocated;

/* Memory until the case's end. Cases with more elements than that are to be refused, so nothing reads or writes them. */
static void* take(int64_t elements, size_t size) {
    if (elements < 0 || elements > MOST_ELEMENTS) elements = 64;
    void* memory = malloc((size_t)elements * size + 8);
    if (!memory || allocated == MOST_ALLOCATIONS) exit(3);
    return allocations[allocated++] = memory;
}

static int64_t product(const int64_t* sizes, int count) {
    int64_t elements = 1;
    for (int k = 0; k < count; k++) {
        if (sizes[k] == 0) return 0;
    }
    for (int k = 0; k < count; k++) {
        if (__builtin_mul_overflow(elements, sizes[k], &elements)) return -1;
    }
    return elements;
}

/* ---- Inputs ---------------------------------------------------------------------------------------------------------------------------- */

static uint64_t seed;

static int32_t precision_of(const char* name) {
    static const struct {
        const char* name;
        int32_t code;
    } table[] = {{"float32", MFA_PRECISION_FP32}, {"float16", MFA_PRECISION_FP16}, {"bfloat16", MFA_PRECISION_BF16},
                 {"float64", MFA_PRECISION_FP64}, {"int8", MFA_PRECISION_INT8},    {"int4", MFA_PRECISION_INT4},
                 {"bool", MFA_PRECISION_BOOL}};
    for (size_t k = 0; k < sizeof table / sizeof table[0]; k++) {
        if (strcmp(table[k].name, name) == 0) return table[k].code;
    }
    return -1;
}

/* The place of index `n` of [batch, heads, tokens, channels] in memory. */
static int64_t place_of(int64_t n, const int64_t shape[4], const int64_t strides[4]) {
    const int64_t d = n % shape[3], s = n / shape[3] % shape[2], h = n / shape[3] / shape[2] % shape[1];
    return n / shape[3] / shape[2] / shape[1] * strides[0] + h * strides[1] + s * strides[2] + d * strides[3];
}

static void write_real(void* memory, int32_t precision, int64_t at, uint64_t word) {
    switch (precision) {
    case MFA_PRECISION_FP64: ((double*)memory)[at] = (double)input_real(word); break;
    case MFA_PRECISION_FP16: ((uint16_t*)memory)[at] = bits_of_half(input_short_real(word)); break;
    case MFA_PRECISION_BF16: ((uint16_t*)memory)[at] = bits_of_bfloat(input_short_real(word)); break;
    default: ((float*)memory)[at] = input_real(word); break;
    }
}

/* A contiguous tensor in the case's layout, filled from `stream`; stream below 0: for results, filled with 0xA5. */
static mfa_tensor_t make_tensor(const char* precision, int64_t heads, int64_t tokens, int64_t channels, int stream) {
    mfa_tensor_t tensor = {.struct_size = sizeof tensor, .precision = precision_of(precision)};
    const int64_t shape[4] = {integer_field("batch_size", 1), heads, tokens, channels};
    const bool tokens_first = strcmp(text_field("layout"), "bshd") == 0;
    const int64_t packed = tensor.precision == MFA_PRECISION_INT4 ? channels + (channels & 1) : channels;
    tensor.strides[3] = 1;
    tensor.strides[2] = (int64_t)((uint64_t)packed * (tokens_first ? (uint64_t)heads : 1));
    tensor.strides[1] = (int64_t)((uint64_t)packed * (tokens_first ? 1 : (uint64_t)tokens));
    tensor.strides[0] = (int64_t)((uint64_t)packed * (uint64_t)heads * (uint64_t)tokens);
    memcpy(tensor.shape, shape, sizeof shape);
    int64_t in_memory[4] = {shape[0], heads, tokens, packed};
    const int64_t elements = product(shape, 4), all = product(in_memory, 4);
    tensor.data = take(all, precision_bytes(tensor.precision));
    if (elements < 0 || elements > MOST_ELEMENTS) return tensor;
    const bool codes = tensor.precision == MFA_PRECISION_INT4 || tensor.precision == MFA_PRECISION_INT8;
    const size_t bytes = tensor.precision == MFA_PRECISION_INT4 ? (size_t)all / 2 : (size_t)all * precision_bytes(tensor.precision);
    memset(tensor.data, stream < 0 ? 0xA5 : 0, bytes);
    for (int64_t n = 0; n < elements && stream >= 0; n++) {
        const int64_t at = place_of(n, shape, tensor.strides);
        const uint64_t word = input_word(seed, stream, (uint64_t)n);
        if (tensor.precision == MFA_PRECISION_INT4) {
            ((uint8_t*)tensor.data)[at / 2] |= (uint8_t)((input_int4(word) & 15) << (at & 1) * 4);
        } else if (codes) {
            ((int8_t*)tensor.data)[at] = input_int8(word);
        } else {
            write_real(tensor.data, tensor.precision, at, word);
        }
    }
    return tensor;
}

/* A field of an operand, such as "key_granularity". */
static const char* of(const char* operand, const char* what) {
    static char names[4][80];
    static unsigned next;
    char* name = names[next++ % 4];
    snprintf(name, sizeof names[0], "%s_%s", operand, what);
    return name;
}

static int32_t granularity_of(const char* name) {
    static const char* const names[] = {"tensor", "head", "token", "block", "channel", "group"};
    for (int32_t k = 0; k < 6; k++) {
        if (strcmp(names[k], name) == 0) return k;
    }
    return MFA_GRANULARITY_TOKEN;
}

static int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* Scales that a tensor has. */
static int64_t scale_count(const mfa_tensor_t* tensor, const mfa_quantization_t* quantization) {
    const int64_t *shape = tensor->shape, heads = shape[0] * shape[1];
    switch (quantization->granularity) {
    case MFA_GRANULARITY_TENSOR: return 1;
    case MFA_GRANULARITY_HEAD: return heads;
    case MFA_GRANULARITY_BLOCK: return heads * divide_up(shape[2], quantization->block_size);
    case MFA_GRANULARITY_CHANNEL: return heads * shape[3];
    case MFA_GRANULARITY_GROUP: return heads * shape[2] * divide_up(shape[3], quantization->group_size);
    default: return heads * shape[2];
    }
}

/* What the codes of an operand stand for; `stream` below 0: to be written. */
static void quantize_tensor(mfa_tensor_t* tensor, mfa_quantization_t* quantization, const char* operand, int number) {
    memset(quantization, 0, sizeof *quantization);
    quantization->struct_size = sizeof *quantization;
    quantization->granularity = granularity_of(text_field(of(operand, "granularity")));
    quantization->block_size = (uint32_t)integer_field(of(operand, "block_size"), 1);
    quantization->group_size = (uint32_t)integer_field(of(operand, "group_size"), 1);
    quantization->rotated = (int32_t)integer_field(of(operand, "rotated"), 0);
    const int64_t count = scale_count(tensor, quantization), means = tensor->shape[0] * tensor->shape[1] * tensor->shape[3];
    quantization->scales = take(count, sizeof(float));
    if (integer_field(of(operand, "zero_points"), 0)) quantization->zero_points = take(count, sizeof(int32_t));
    if (integer_field(of(operand, "channel_means"), 0)) quantization->channel_means = take(means, sizeof(float));
    for (int64_t n = 0; n < count && count <= MOST_ELEMENTS; n++) {
        const int is_int8 = tensor->precision == MFA_PRECISION_INT8;
        quantization->scales[n] = number < 0 ? 0 : input_scale(input_word(seed, STREAM_SCALES + number, (uint64_t)n), is_int8);
        if (!quantization->zero_points) continue;
        quantization->zero_points[n] = number < 0 ? 0 : input_zero_point(input_word(seed, STREAM_ZERO_POINTS + number, (uint64_t)n));
    }
    for (int64_t n = 0; n < means && quantization->channel_means; n++) {
        quantization->channel_means[n] = number < 0 ? 0 : input_real(input_word(seed, STREAM_CHANNEL_MEANS + number, (uint64_t)n));
    }
    tensor->quantization = quantization;
}

/* Numbers of statistics, from `stream`; below 0: for results. */
static void* make_statistics(int64_t count, bool wide, int stream) {
    void* memory = take(count, wide ? sizeof(double) : sizeof(float));
    if (count < 0 || count > MOST_ELEMENTS) return memory;
    memset(memory, 0xA5, (size_t)count * (wide ? sizeof(double) : sizeof(float)));
    for (int64_t n = 0; n < count && stream >= 0; n++) {
        const uint64_t word = input_word(seed, stream, (uint64_t)n);
        const float number = stream == STREAM_ALIBI_SLOPES ? input_slope(word) : input_real(word);
        if (wide) {
            ((double*)memory)[n] = (double)number;
        } else {
            ((float*)memory)[n] = number;
        }
    }
    return memory;
}

/* ---- Results --------------------------------------------------------------------------------------------------------------------------- */

static bool first_result;

static void begin_results(void) {
    char id[128];
    snprintf(id, sizeof id, "%s", text_field("id"));
    printf("{\"id\": \"%s\", \"outputs\": {", id);
    first_result = true;
}

static void print_memory(const char* name, const void* memory, int64_t elements, size_t size) {
    if (elements < 0 || elements > MOST_ELEMENTS) return;
    printf("%s\"%s\": \"%016" PRIx64 "\"", first_result ? "" : ", ", name, hash_of(memory, (size_t)elements * size));
    first_result = false;
}

static void print_tensor(const char* name, const mfa_tensor_t* tensor) {
    int64_t sizes[4];
    memcpy(sizes, tensor->shape, sizeof sizes);
    if (tensor->precision == MFA_PRECISION_INT4) sizes[3] = (sizes[3] + 1) / 2;
    print_memory(name, tensor->data, product(sizes, 4), precision_bytes(tensor->precision));
}

/* The message, if the call failed, with what JSON escapes left out: messages have none of it. */
static void end_results(mfa_context_t* context, int32_t status, const char* kernel) {
    printf("}, \"status\": %d, \"message\": \"%s\"", status, status ? mfa_last_error(context) : "");
    if (kernel) printf(", \"kernel\": \"%s\"", kernel);
    printf("}\n");
}

/* ---- Attention ------------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t batch, heads, kv_heads, rows, columns, channels, channels_v;
} sizes;

static sizes read_sizes(void) {
    sizes all = {integer_field("batch_size", 1), integer_field("num_heads", 1), 0, integer_field("seq_len_q", 1),
                 integer_field("seq_len_kv", 1), integer_field("head_dim", 1),  0};
    all.kv_heads = integer_field("num_kv_heads", all.heads);
    all.channels_v = integer_field("head_dim_v", all.channels);
    return all;
}

static mfa_tensor_t make_operand(const char* name, int64_t heads, int64_t tokens, int64_t channels, int number,
                                 mfa_quantization_t* quantization) {
    mfa_tensor_t tensor = make_tensor(text_field(name), heads, tokens, channels, number);
    if (find(of(name, "granularity"))) quantize_tensor(&tensor, quantization, name, number);
    tensor.precision = (int32_t)integer_field(of(name, "precision_code"), tensor.precision);
    return tensor;
}

/* How a float operand is to be quantised; NULL: it is not. */
static const mfa_quantization_scheme_t* read_scheme(const char* name, mfa_quantization_scheme_t* scheme) {
    char operand[32];
    snprintf(operand, sizeof operand, "quantize_%s", name);
    if (!find(operand)) return NULL;
    *scheme = (mfa_quantization_scheme_t){.struct_size = sizeof *scheme, .precision = precision_of(text_field(operand))};
    scheme->granularity = granularity_of(text_field(of(operand, "granularity")));
    scheme->block_size = (uint32_t)integer_field(of(operand, "block_size"), 0);
    scheme->group_size = (uint32_t)integer_field(of(operand, "group_size"), 0);
    scheme->asymmetric = (int32_t)integer_field(of(operand, "asymmetric"), 0);
    scheme->smooth = (int32_t)integer_field(of(operand, "smooth"), 0);
    scheme->rotate = (int32_t)integer_field(of(operand, "rotate"), 0);
    return scheme;
}

static mfa_tensor_t make_mask(void) {
    mfa_tensor_t mask = {.struct_size = sizeof mask, .precision = precision_of(text_field("mask"))};
    list_field("mask_shape", mask.shape, 4);
    int64_t stride = 1;
    for (int axis = 3; axis >= 0; axis--) {
        mask.strides[axis] = mask.shape[axis] == 1 ? 0 : stride;
        stride *= mask.shape[axis];
    }
    mask.data = take(stride, precision_bytes(mask.precision));
    for (int64_t n = 0; n < stride; n++) {
        const uint64_t word = input_word(seed, STREAM_MASK, (uint64_t)n);
        if (mask.precision == MFA_PRECISION_BOOL) {
            ((uint8_t*)mask.data)[n] = input_bool(word);
        } else if (word >> 61 == 0) {
            static const uint16_t half = 0xFC00, bfloat = 0xFF80;
            static const float single = -__builtin_inff();
            static const double wide = -__builtin_inf();
            const void* infinity = mask.precision == MFA_PRECISION_FP16   ? (const void*)&half
                                   : mask.precision == MFA_PRECISION_BF16 ? (const void*)&bfloat
                                   : mask.precision == MFA_PRECISION_FP64 ? (const void*)&wide
                                                                          : (const void*)&single;
            memcpy((char*)mask.data + (size_t)n * precision_bytes(mask.precision), infinity, precision_bytes(mask.precision));
        } else {
            write_real(mask.data, mask.precision, n, word);
        }
    }
    return mask;
}

static void run_attention(mfa_context_t* context, bool backward) {
    static mfa_quantization_t quantizations[3];
    static mfa_quantization_scheme_t schemes[3];
    static int64_t lengths[64], offsets[64];
    const sizes all = read_sizes();
    const char* null = text_field("null");
    char nulls[128], wanted[128];
    snprintf(nulls, sizeof nulls, "%s", null);
    snprintf(wanted, sizeof wanted, "%s", text_field("gradients"));
    mfa_tensor_t query = make_operand("query", all.heads, all.rows, all.channels, 0, &quantizations[0]);
    mfa_tensor_t key = make_operand("key", all.kv_heads, all.columns, all.channels, 1, &quantizations[1]);
    mfa_tensor_t value = make_operand("value", all.kv_heads, all.columns, all.channels_v, 2, &quantizations[2]);
    mfa_tensor_t output = make_tensor(text_field("output"), all.heads, all.rows, all.channels_v, -1);
    mfa_tensor_t mask;
    const bool wide = query.precision == MFA_PRECISION_FP64 || key.precision == MFA_PRECISION_FP64 || value.precision == MFA_PRECISION_FP64;
    const int64_t row_sizes[3] = {all.batch, all.heads, all.rows}, rows = product(row_sizes, 3);
    const size_t statistic = wide ? sizeof(double) : sizeof(float);

    mfa_attention_t attention;
    mfa_attention_initialize(&attention, sizeof attention);
    attention.query = &query;
    attention.key = &key;
    attention.value = &value;
    attention.output = lists(nulls, "output") ? NULL : &output;
    if (lists(nulls, "query")) attention.query = NULL;
    if (lists(nulls, "key_data")) key.data = NULL;
    attention.logsumexp = make_statistics(rows, wide, -1);
    attention.softmax_scale = real_field("softmax_scale", 1);
    attention.softcap = real_field("softcap", 0);
    attention.causal = (int32_t)integer_field("causal", 0);
    attention.alignment = (int32_t)integer_field("alignment", MFA_ALIGNMENT_UPPER_LEFT);
    attention.window_left = integer_field("window_left", -1);
    attention.window_right = integer_field("window_right", -1);
    if (find("mask")) {
        mask = make_mask();
        attention.mask = &mask;
    }
    if (list_field("kv_lengths", lengths, 64)) attention.kv_lengths = lengths;
    attention.num_query_offsets = (uint32_t)list_field("query_offsets", offsets, 64);
    if (attention.num_query_offsets) attention.query_offsets = offsets;
    if (integer_field("alibi_slopes", 0)) attention.alibi_slopes = make_statistics(all.heads, wide, STREAM_ALIBI_SLOPES);
    if (integer_field("sinks", 0)) attention.sinks = make_statistics(all.heads, wide, STREAM_SINKS);
    attention.dropout_p = real_field("dropout_p", 0);
    attention.seed = (uint64_t)integer_field("seed", 0);
    attention.dropout_offset = (uint32_t)integer_field("dropout_offset", 0);
    attention.quantize_query = read_scheme("query", &schemes[0]);
    attention.quantize_key = read_scheme("key", &schemes[1]);
    attention.quantize_value = read_scheme("value", &schemes[2]);

    const char* kernel = NULL;
    int32_t status = mfa_attention_run_forward(context, &attention);
    if (!backward) {
        if (!status) mfa_attention_kernel_name(context, &attention, MFA_OPERATION_FORWARD, &kernel);
        begin_results();
        print_tensor("output", &output);
        print_memory("logsumexp", attention.logsumexp, rows, statistic);
        end_results(context, status, kernel);
        return;
    }
    mfa_tensor_t grad_output = make_tensor(text_field("output"), all.heads, all.rows, all.channels_v, STREAM_GRAD_OUTPUT);
    const char* gradient = text_field("gradient");
    mfa_tensor_t grad_query = make_tensor(gradient, all.heads, all.rows, all.channels, -1);
    mfa_tensor_t grad_key = make_tensor(gradient, all.kv_heads, all.columns, all.channels, -1);
    mfa_tensor_t grad_value = make_tensor(gradient, all.kv_heads, all.columns, all.channels_v, -1);
    mfa_tensor_t grad_mask;
    mfa_attention_gradients_t gradients = {.struct_size = sizeof gradients, .grad_output = &grad_output};
    if (integer_field("grad_logsumexp", 0)) gradients.grad_logsumexp = make_statistics(rows, wide, STREAM_GRAD_LOGSUMEXP);
    if (lists(wanted, "query")) gradients.grad_query = &grad_query;
    if (lists(wanted, "key")) gradients.grad_key = &grad_key;
    if (lists(wanted, "value")) gradients.grad_value = &grad_value;
    if (lists(wanted, "mask")) {
        grad_mask = mask;
        grad_mask.data = take(product(mask.shape, 4), precision_bytes(mask.precision));
        int64_t stride = 1; /* contiguous, broadcast axes having one element */
        for (int axis = 3; axis >= 0; axis--) {
            grad_mask.strides[axis] = stride;
            stride *= mask.shape[axis];
        }
        memset(grad_mask.data, 0xA5, (size_t)product(mask.shape, 4) * precision_bytes(mask.precision));
        gradients.grad_mask = &grad_mask;
    }
    if (lists(wanted, "sinks")) gradients.grad_sinks = make_statistics(all.heads, wide, -1);
    if (lists(wanted, "alibi_slopes")) gradients.grad_alibi_slopes = make_statistics(all.heads, wide, -1);
    if (integer_field("without_output", 0)) attention.output = NULL;
    if (!status) status = mfa_attention_run_backward(context, &attention, &gradients);
    if (!status) mfa_attention_kernel_name(context, &attention, MFA_OPERATION_BACKWARD_QUERY, &kernel);
    begin_results();
    if (gradients.grad_query) print_tensor("query", &grad_query);
    if (gradients.grad_key) print_tensor("key", &grad_key);
    if (gradients.grad_value) print_tensor("value", &grad_value);
    if (gradients.grad_mask) print_tensor("mask", &grad_mask);
    if (gradients.grad_sinks) print_memory("sinks", gradients.grad_sinks, all.heads, statistic);
    if (gradients.grad_alibi_slopes) print_memory("alibi_slopes", gradients.grad_alibi_slopes, all.heads, statistic);
    end_results(context, status, kernel);
}

/* ---- Quantisation ---------------------------------------------------------------------------------------------------------------------- */

static void run_quantization(mfa_context_t* context, bool back) {
    mfa_quantization_t quantization;
    const sizes all = read_sizes();
    mfa_tensor_t codes = make_tensor(text_field("codes"), all.heads, all.rows, all.channels, back ? 0 : -1);
    quantize_tensor(&codes, &quantization, "codes", back ? 0 : -1);
    begin_results();
    if (back) {
        mfa_tensor_t output = make_tensor(text_field("output"), all.heads, all.rows, all.channels, -1);
        const int32_t status = mfa_dequantize(context, &codes, &output);
        print_tensor("output", &output);
        end_results(context, status, NULL);
        return;
    }
    mfa_tensor_t input = make_tensor(text_field("query"), all.heads, all.rows, all.channels, STREAM_QUERY);
    const int32_t status = mfa_quantize(context, &input, &codes);
    print_tensor("codes", &codes);
    print_memory("scales", quantization.scales, scale_count(&codes, &quantization), sizeof(float));
    if (quantization.zero_points)
        print_memory("zero_points", quantization.zero_points, scale_count(&codes, &quantization), sizeof(int32_t));
    if (quantization.channel_means) {
        print_memory("channel_means", quantization.channel_means, all.batch * all.heads * all.channels, sizeof(float));
    }
    end_results(context, status, NULL);
}

/* ---- Merging --------------------------------------------------------------------------------------------------------------------------- */

static void run_merge(mfa_context_t* context) {
    const sizes all = read_sizes();
    const int64_t row_sizes[3] = {all.batch, all.heads, all.rows}, rows = product(row_sizes, 3);
    mfa_tensor_t a = make_tensor(text_field("query"), all.heads, all.rows, all.channels, STREAM_QUERY);
    mfa_tensor_t b = make_tensor(text_field("key"), all.heads, all.rows, all.channels, STREAM_KEY);
    mfa_tensor_t output = make_tensor(text_field("output"), all.heads, all.rows, all.channels, -1);
    void *lse_a = make_statistics(rows, false, STREAM_GRAD_LOGSUMEXP), *lse_b = make_statistics(rows, false, STREAM_MASK);
    void* lse = make_statistics(rows, false, -1);
    const int32_t status = mfa_attention_merge(context, &a, lse_a, &b, lse_b, &output, lse, MFA_PRECISION_FP32);
    begin_results();
    print_tensor("output", &output);
    print_memory("logsumexp", lse, rows, sizeof(float));
    end_results(context, status, NULL);
}

/* ---- The flat functions ---------------------------------------------------------------------------------------------------------------- */

/* An operand as it lies for a flat function: [batch, tokens, heads, channels], or transposed [batch, heads, channels, tokens]. */
static void* make_flat(const char* precision, int64_t heads, int64_t tokens, int64_t channels, bool transposed, int stream) {
    const int64_t shape[4] = {integer_field("batch_size", 1), heads, tokens, channels};
    const int32_t code = precision_of(precision);
    const int64_t rows = code == MFA_PRECISION_INT4 ? (channels + 1) / 2 : channels; /* bytes of INT4 */
    const int64_t in_memory[4] = {shape[0], heads, tokens, rows};
    const int64_t elements = product(shape, 4), all = product(in_memory, 4);
    void* memory = take(all, precision_bytes(code));
    if (elements < 0 || elements > MOST_ELEMENTS) return memory;
    memset(memory, stream < 0 ? 0xA5 : 0, (size_t)all * precision_bytes(code));
    for (int64_t n = 0; n < elements && stream >= 0; n++) {
        const int64_t d = n % channels, s = n / channels % tokens, h = n / channels / tokens % heads, b = n / channels / tokens / heads;
        const int64_t row = code == MFA_PRECISION_INT4 ? d / 2 : d;
        const int64_t at = transposed ? ((b * heads + h) * rows + row) * tokens + s : ((b * tokens + s) * heads + h) * rows + row;
        const uint64_t word = input_word(seed, stream, (uint64_t)n);
        if (code == MFA_PRECISION_INT4) {
            ((uint8_t*)memory)[at] |= (uint8_t)((input_int4(word) & 15) << (d & 1) * 4);
        } else if (code == MFA_PRECISION_INT8) {
            ((int8_t*)memory)[at] = input_int8(word);
        } else {
            write_real(memory, code, at, word);
        }
    }
    return memory;
}

static void run_flat(mfa_context_t* context, bool backward) {
    const sizes all = read_sizes();
    char query[16], key[16], value[16], nulls[128];
    snprintf(query, sizeof query, "%s", text_field("query"));
    snprintf(key, sizeof key, "%s", text_field("key"));
    snprintf(value, sizeof value, "%s", text_field("value"));
    snprintf(nulls, sizeof nulls, "%s", text_field("null"));
    const bool tq = integer_field("transpose_q", 0), tk = integer_field("transpose_k", 0), tv = integer_field("transpose_v", 0);
    const bool to = integer_field("transpose_o", 0), scaled = find("q_scale") != NULL;
    void* q = make_flat(query, all.heads, all.rows, all.channels, tq, STREAM_QUERY);
    void* k = make_flat(key, all.heads, all.columns, all.channels, tk, STREAM_KEY);
    void* v = make_flat(value, all.heads, all.columns, all.channels, tv, STREAM_VALUE);
    const char* type = text_field("output");
    void* output = make_flat(type, all.heads, all.rows, all.channels, to, -1);
    const int64_t counts[4] = {all.batch, all.heads, all.rows, all.channels}, rows = product(counts, 3), elements = product(counts, 4);
    const int64_t kv_counts[4] = {all.batch, all.heads, all.columns, all.channels}, kv_elements = product(kv_counts, 4);
    const size_t size = precision_bytes(precision_of(type));
    float* lse = make_statistics(rows, false, -1);
    if (lists(nulls, "query")) q = NULL;
    if (lists(nulls, "output")) output = NULL;
    const float scale = (float)real_field("softmax_scale", 1), q_scale = (float)real_field("q_scale", 1);
    const float k_scale = (float)real_field("k_scale", 1), v_scale = (float)real_field("v_scale", 1);
    const int32_t q_zero = (int32_t)integer_field("q_zero_point", 0), k_zero = (int32_t)integer_field("k_zero_point", 0);
    const int32_t v_zero = (int32_t)integer_field("v_zero_point", 0);
    const int32_t pq = (int32_t)integer_field("query_precision_code", precision_of(query)), pk = precision_of(key),
                  pv = precision_of(value);
    const uint32_t b = (uint32_t)all.batch, sq = (uint32_t)all.rows, sk = (uint32_t)all.columns, h = (uint32_t)all.heads;
    const uint16_t d = (uint16_t)all.channels;
    const bool causal = integer_field("causal", 0);
    int32_t status;
    if (scaled || backward) {
        status = mfa_attention_forward_quantized(context, q, k, v, output, lse, b, sq, sk, h, d, scale, causal, pq, pk, pv, q_scale, q_zero,
                                                 k_scale, k_zero, v_scale, v_zero, tq, tk, tv, to);
    } else {
        status = mfa_attention_forward(context, q, k, v, output, b, sq, sk, h, d, scale, causal, pq, pk, pv, tq, tk, tv, to);
    }
    if (!backward) {
        begin_results();
        if (output) print_memory("output", output, elements, size);
        if (scaled) print_memory("logsumexp", lse, rows, sizeof(float));
        end_results(context, status, NULL);
        return;
    }
    void* grad_output = make_flat("float32", all.heads, all.rows, all.channels, false, STREAM_GRAD_OUTPUT);
    void* grad_query = make_flat("float32", all.heads, all.rows, all.channels, false, -1);
    void* grad_key = make_flat("float32", all.heads, all.columns, all.channels, false, -1);
    void* grad_value = make_flat("float32", all.heads, all.columns, all.channels, false, -1);
    void* d_values = make_statistics(rows, false, -1);
    if (!status && !lists(nulls, "record")) {
        status = mfa_attention_backward_query_quantized(context, q, k, v, grad_output, lse, grad_query, d_values, b, sq, sk, h, d, q_scale,
                                                        q_zero);
    } else if (!status) { /* another address than that of the record, and of any before */
        status = mfa_attention_backward_query_quantized(context, q, k, v, grad_output, lse + 1, grad_query, d_values, b, sq, sk, h, d,
                                                        q_scale, q_zero);
    }
    if (!status) {
        const float given = (float)real_field("backward_k_scale", (double)k_scale);
        status = mfa_attention_backward_kv_quantized(context, q, k, v, grad_output, lse, d_values, grad_key, grad_value, b, sq, sk, h, d,
                                                     q_scale, q_zero, given, k_zero, v_scale, v_zero);
    }
    begin_results();
    print_memory("query", grad_query, elements, sizeof(float));
    print_memory("key", grad_key, kv_elements, sizeof(float));
    print_memory("value", grad_value, kv_elements, sizeof(float));
    print_memory("d_values", d_values, rows, sizeof(float));
    end_results(context, status, NULL);
}

/* ---- The program ----------------------------------------------------------------------------------------------------------------------- */

int main(int argc, char** argv) {
    mfa_context_options_t options = {.struct_size = sizeof options, .device = MFA_DEVICE_CPU};
    if (argc > 1 && strcmp(argv[1], "metal") == 0) options.device = MFA_DEVICE_METAL;
    if (argc > 1 && strcmp(argv[1], "softmetal") == 0) options.device = MFA_DEVICE_SOFTMETAL;
    if (argc > 2) options.num_threads = (uint32_t)atoi(argv[2]);
    mfa_context_t* context;
    if (mfa_create_context_with_options(&options, &context)) {
        fprintf(stderr, "%s\n", mfa_last_error(NULL));
        return 2;
    }
    static char text[1 << 14];
    while (fgets(text, sizeof text, stdin)) {
        line = text;
        seed = (uint64_t)integer_field("input_seed", 0);
        const char* operation = text_field("operation");
        if (strcmp(operation, "forward") == 0) run_attention(context, false);
        if (strcmp(operation, "backward") == 0) run_attention(context, true);
        if (strcmp(operation, "quantize") == 0) run_quantization(context, false);
        if (strcmp(operation, "dequantize") == 0) run_quantization(context, true);
        if (strcmp(operation, "merge") == 0) run_merge(context);
        if (strcmp(operation, "flat_forward") == 0) run_flat(context, false);
        if (strcmp(operation, "flat_backward") == 0) run_flat(context, true);
        for (int k = 0; k < allocated; k++) free(allocations[k]);
        allocated = 0;
    }
    return mfa_destroy_context(context);
}
