/* The flat functions and their training records: calls in any order, with wrong, forged and forgotten records, bad codes and sizes. A model
 * of the records says which status has to come; gradients are those of the general functions, bit by bit. */
#include "fuzzing.h"

#include <math.h>
#include <string.h>

typedef struct {
    uint32_t batches, rows, keys, heads, channels; /* all of one type, so that they can be compared as bytes */
} sizes;

typedef struct {
    int32_t precision, zero_point;
    float scale;
    bool transposed;
} operand;

/* What a forward call was told: what its record should hold. */
typedef struct {
    bool known;
    sizes sizes;
    operand operands[3];
    float softmax_scale;
    bool causal;
} record;

enum { SLOTS = 3, MOST_STATISTICS = 2 * 2 * 3, MOST_CALLS = 6 };

typedef struct {
    mfa_context_t* context;
    record records[SLOTS];
    float* logsumexp[SLOTS];
    numbers values;
} session;

static bool is_float(int32_t precision) {
    return precision >= MFA_PRECISION_FP32 && precision <= MFA_PRECISION_FP64;
}

static bool has_rows(const sizes* of) {
    return of->batches > 0 && of->rows > 0;
}

static bool bad_sizes(const sizes* of) {
    return of->heads == 0 || of->channels == 0 || of->channels > 1024;
}

static size_t elements(const sizes* of, uint32_t tokens) {
    return (size_t)of->batches * of->heads * tokens * of->channels;
}

/* Memory for an operand, as much as it needs. */
static void* make_operand(session* in, const sizes* of, uint32_t tokens, int32_t precision) {
    const size_t rows = (size_t)of->batches * of->heads * tokens;
    const size_t bytes =
        precision == MFA_PRECISION_INT4 ? rows * ((of->channels + 1u) / 2) : rows * of->channels * precision_bytes(precision);
    uint8_t* made = arena_take(bytes);
    for (size_t k = 0; k < bytes; k++) made[k] = (uint8_t)draw(&in->values);
    /* Floats from -1 to 1 of whatever size: the exponent's first bits are set right. */
    if (is_float(precision)) {
        const size_t unit = precision_bytes(precision);
        for (size_t k = unit - 1; k < bytes; k += unit) made[k] = (made[k] & 0x80) | (precision == MFA_PRECISION_FP16 ? 0x38 : 0x3E);
    }
    return bytes ? made : NULL;
}

static float* make_floats(session* in, size_t count) {
    float* made = arena_take(count * sizeof(float));
    for (size_t k = 0; k < count; k++) made[k] = (float)draw_value(&in->values);
    return made;
}

static void check_untouched(const void* memory, size_t bytes, const char* name) {
    for (size_t k = 0; k < bytes; k++) {
        if (((const uint8_t*)memory)[k] != 0xFF) fail("a refused call wrote %s", name);
    }
}

static void expect(int32_t status, int32_t expected, mfa_context_t* context, const char* call) {
    if (status != expected) fail("%s gives status %d, not %d: %s", call, status, expected, mfa_last_error(context));
}

static const float SCALES[8] = {1, 0.5f, 0.01f, 2, 0, -1, NAN, INFINITY};

static void forward(session* in, input* from) {
    record told = {.known = true};
    told.sizes = (sizes){(uint32_t)take_upto(from, 2), (uint32_t)take_upto(from, 3), (uint32_t)take_upto(from, 4), 0, 0};
    const int more = take(from), flags = take(from), wrong = take(from), slot = take_upto(from, SLOTS);
    told.sizes.heads = 1 + (more & 1);
    told.sizes.channels = 1 + (more >> 1) % 7;
    if (wrong == 1) told.sizes.heads = 0;
    if (wrong == 2) told.sizes.channels = 0;
    if (wrong == 3) told.sizes.channels = 1025, told.sizes.batches = 1;
    static const int32_t PRECISIONS[8] = {MFA_PRECISION_FP32, MFA_PRECISION_FP16, MFA_PRECISION_BF16, MFA_PRECISION_INT8,
                                          MFA_PRECISION_INT4, MFA_PRECISION_INT8, MFA_PRECISION_INT4, MFA_PRECISION_FP32};
    bool bad_code = false, bad_scale = false, unsupported = false;
    const uint32_t tokens[3] = {told.sizes.rows, told.sizes.keys, told.sizes.keys};
    void* memory[3];
    for (int n = 0; n < 3; n++) {
        const int choice = take(from), number = take(from);
        operand* made = &told.operands[n];
        *made = (operand){PRECISIONS[choice & 7], (int8_t)number, SCALES[choice >> 3 & 7], choice >> 6 & 1};
        if (choice >> 6 == 3) made->zero_point = 0;
        if (wrong == 4 + n) made->precision = number ? number : 16; /* any code, mostly unknown */
        const bool known = is_float(made->precision) || is_quantized(made->precision);
        bad_code |= !known;
        bad_scale |= known && is_quantized(made->precision) && !(made->scale > 0 && isfinite(made->scale));
        unsupported |= made->precision == MFA_PRECISION_FP64;
        memory[n] = bad_sizes(&told.sizes) ? &told : make_operand(in, &told.sizes, tokens[n], known ? made->precision : MFA_PRECISION_FP64);
    }
    told.causal = flags & 1;
    told.softmax_scale = flags & 2 ? 0.5f : 1;
    if (wrong == 7) told.softmax_scale = NAN;
    const bool plain = flags & 4;
    const size_t count = bad_sizes(&told.sizes) ? 0 : elements(&told.sizes, told.sizes.rows);
    const int32_t query = told.operands[0].precision;
    const size_t unit = is_float(query) && query != MFA_PRECISION_FP64 ? precision_bytes(query) : 4;
    uint8_t* output = arena_take(count * unit);
    bool missing = false;
    if (wrong >= 8 && wrong < 11) missing |= memory[wrong - 8] != NULL, memory[wrong - 8] = NULL;
    void* place = output;
    if (wrong == 11) missing |= count > 0, place = NULL;
    float* logsumexp = slot < SLOTS && !plain ? in->logsumexp[slot] : NULL;
    /* An operand that is the output overlaps it, where both have elements. */
    const bool overlaps = wrong == 12 && count > 0 && memory[0] && !missing;
    if (overlaps) place = memory[0];

    const sizes* s = &told.sizes;
    const operand *q = &told.operands[0], *k = &told.operands[1], *v = &told.operands[2];
    if (plain) {
        bad_scale = false; /* there are none */
        const int32_t status =
            mfa_attention_forward(in->context, memory[0], memory[1], memory[2], place, s->batches, s->rows, s->keys, s->heads,
                                  (uint16_t)s->channels, told.softmax_scale, told.causal, q->precision, k->precision, v->precision,
                                  q->transposed, k->transposed, v->transposed, flags >> 3 & 1);
        if (status == MFA_SUCCESS && (bad_sizes(s) || missing || bad_code || overlaps || unsupported || !isfinite(told.softmax_scale))) {
            fail("a bad plain call succeeds");
        }
        if (status != MFA_SUCCESS && status != MFA_ERROR_INVALID_ARGUMENT && status != MFA_ERROR_INVALID_DIMENSIONS &&
            status != MFA_ERROR_UNSUPPORTED) {
            fail("a plain call gives status %d: %s", status, mfa_last_error(in->context));
        }
        if (status != MFA_SUCCESS) check_untouched(output, count * unit, "output");
        return;
    }
    const int32_t status = mfa_attention_forward_quantized(
        in->context, memory[0], memory[1], memory[2], place, logsumexp, s->batches, s->rows, s->keys, s->heads, (uint16_t)s->channels,
        told.softmax_scale, told.causal, q->precision, k->precision, v->precision, q->scale, q->zero_point, k->scale, k->zero_point,
        v->scale, v->zero_point, q->transposed, k->transposed, v->transposed, flags >> 3 & 1);
    const int32_t expected = bad_sizes(s)                                                                    ? MFA_ERROR_INVALID_DIMENSIONS
                             : missing || bad_code || bad_scale || !isfinite(told.softmax_scale) || overlaps ? MFA_ERROR_INVALID_ARGUMENT
                             : unsupported                                                                   ? MFA_ERROR_UNSUPPORTED
                                                                                                             : MFA_SUCCESS;
    /* FP64 stands for FP32 in the checks before, so that an overlap of it may be missed or found. */
    if (!(unsupported && overlaps)) expect(status, expected, in->context, "forward");
    if (status != MFA_SUCCESS) check_untouched(output, count * unit, "output");
    if (status == MFA_SUCCESS && logsumexp) in->records[slot] = told;
}

/* A tensor of a flat call in the general functions' words. */
static mfa_tensor_t tensor_of(const sizes* of, uint32_t tokens, void* data, const operand* like) {
    const int64_t heads = of->heads, channels = of->channels, count = tokens;
    const int64_t padded = like->precision == MFA_PRECISION_INT4 ? channels + (channels & 1) : channels;
    mfa_tensor_t made = {
        .struct_size = sizeof made, .precision = like->precision, .data = data, .shape = {of->batches, heads, count, channels}};
    const int64_t plain[4] = {count * heads * padded, padded, heads * padded, 1};
    const int64_t turned[4] = {heads * padded * count, padded * count, like->precision == MFA_PRECISION_INT4 ? 2 : 1, count};
    memcpy(made.strides, like->transposed ? turned : plain, sizeof plain);
    return made;
}

static void backward(session* in, input* from, bool of_query) {
    const int slot = take_upto(from, SLOTS), wrong = take(from), number = take(from);
    record told = {.sizes = {1, 2, 3, 1, 4}, .operands = {{0, 0, 1, 0}, {0, 0, 1, 0}, {0, 0, 1, 0}}};
    const bool forged = slot == SLOTS || wrong == 1;
    if (slot < SLOTS && in->records[slot].known) told = in->records[slot];
    const record kept = slot < SLOTS && !forged ? in->records[slot] : (record){.known = false};
    sizes* s = &told.sizes;
    switch (wrong) {
    case 2: s->batches = (uint32_t)number % 3; break;
    case 3: s->rows = (uint32_t)number % 4; break;
    case 4: s->keys = (uint32_t)number % 5; break;
    case 5: s->heads = (uint32_t)number % 3; break;
    case 6: s->channels = number < 8 ? (uint32_t)number : 1025; break;
    default: break;
    }
    bool other_scale = false;
    for (int n = 0; n < (of_query ? 1 : 3); n++) {
        operand* of = &told.operands[n];
        if (wrong == 7 + n) of->scale = SCALES[number & 7];
        if (wrong == 10 + n) of->zero_point += number;
        const operand* was = &kept.operands[n];
        other_scale |=
            is_quantized(was->precision) && (memcmp(&of->scale, &was->scale, sizeof of->scale) != 0 || of->zero_point != was->zero_point);
    }
    const bool bad = bad_sizes(s);
    const sizes none = {0, 0, 0, 1, 1}, *real = bad ? &none : s;
    void* memory[3];
    for (int n = 0; n < 3; n++) memory[n] = make_operand(in, real, n ? real->keys : real->rows, told.operands[n].precision);
    const size_t rows = (size_t)real->batches * real->heads * real->rows;
    float* grad_output = make_floats(in, elements(real, real->rows));
    const size_t counts[2] = {elements(real, of_query ? real->rows : real->keys), of_query ? rows : elements(real, real->keys)};
    float *first = arena_take(counts[0] * 4), *second = arena_take(counts[1] * 4);
    float* d_values = of_query ? second : make_floats(in, rows);
    /* A forged record: an address within one, or of nothing. */
    float* logsumexp = forged ? in->logsumexp[0] + 1 : in->logsumexp[slot];
    const bool missing = wrong == 13 && !bad && has_rows(s);
    if (missing) grad_output = NULL;

    int32_t status;
    const operand *q = &told.operands[0], *k = &told.operands[1], *v = &told.operands[2];
    if (of_query) {
        status =
            mfa_attention_backward_query_quantized(in->context, memory[0], memory[1], memory[2], grad_output, logsumexp, first, second,
                                                   s->batches, s->rows, s->keys, s->heads, (uint16_t)s->channels, q->scale, q->zero_point);
    } else {
        status = mfa_attention_backward_kv_quantized(in->context, memory[0], memory[1], memory[2], grad_output, logsumexp, d_values, first,
                                                     second, s->batches, s->rows, s->keys, s->heads, (uint16_t)s->channels, q->scale,
                                                     q->zero_point, k->scale, k->zero_point, v->scale, v->zero_point);
    }
    const bool matches = kept.known && memcmp(&kept.sizes, s, sizeof *s) == 0;
    const int32_t expected = bad            ? MFA_ERROR_INVALID_DIMENSIONS
                             : missing      ? MFA_ERROR_INVALID_ARGUMENT
                             : !has_rows(s) ? MFA_SUCCESS
                             : !matches     ? MFA_ERROR_INVALID_DIMENSIONS
                             : other_scale  ? MFA_ERROR_INVALID_ARGUMENT
                                            : MFA_SUCCESS;
    expect(status, expected, in->context, of_query ? "backward_query" : "backward_kv");
    if (status != MFA_SUCCESS) {
        check_untouched(first, counts[0] * 4, "a gradient");
        check_untouched(second, counts[1] * 4, "a gradient or d_values");
        return;
    }
    if (!has_rows(s)) return;
    mfa_tensor_t tensors[3];
    mfa_quantization_t quantizations[3];
    for (int n = 0; n < 3; n++) {
        tensors[n] = tensor_of(s, n ? s->keys : s->rows, memory[n], &kept.operands[n]);
        quantizations[n] = (mfa_quantization_t){.struct_size = sizeof *quantizations};
        quantizations[n].scales = (float*)&kept.operands[n].scale;
        if (kept.operands[n].zero_point != 0) quantizations[n].zero_points = (int32_t*)&kept.operands[n].zero_point;
        tensors[n].quantization = &quantizations[n];
    }
    mfa_attention_t attention;
    mfa_attention_initialize(&attention, sizeof attention);
    attention.softmax_scale = (double)kept.softmax_scale;
    attention.causal = kept.causal;
    attention.query = &tensors[0], attention.key = &tensors[1], attention.value = &tensors[2];
    attention.logsumexp = logsumexp;
    const operand plain = {MFA_PRECISION_FP32, 0, 1, false};
    float *one = arena_take(counts[0] * 4), *other = arena_take(counts[1] * 4);
    const mfa_tensor_t of_output = tensor_of(s, s->rows, grad_output, &plain);
    const mfa_tensor_t one_tensor = tensor_of(s, of_query ? s->rows : s->keys, one, &plain),
                       other_tensor = tensor_of(s, s->keys, other, &plain);
    mfa_attention_gradients_t gradients = {
        .struct_size = sizeof gradients, .grad_output = &of_output, .d_values = of_query ? other : d_values};
    gradients.d_values_given = !of_query;
    if (of_query)
        gradients.grad_query = &one_tensor;
    else
        gradients.grad_key = &one_tensor, gradients.grad_value = &other_tensor;
    expect(mfa_attention_run_backward(in->context, &attention, &gradients), MFA_SUCCESS, in->context, "the general backward call");
    if (memcmp(one, first, counts[0] * 4) != 0 || memcmp(other, second, counts[1] * 4) != 0) {
        fail("gradients of the flat call are not those of the general one");
    }
}

/* Handles that are no contexts. */
static void call_foreign(const session* in, mfa_context_t* destroyed, input* from) {
    float value = 1;
    void* const handles[4] = {NULL, destroyed, &value, (char*)in->context + take(from) % 255 + 1};
    void* handle = handles[take_upto(from, 3)];
    if (handle == in->context) return;
    const int32_t status = mfa_attention_forward(handle, &value, &value, &value, &value, 1, 1, 1, 1, 1, 1, false, 0, 0, 0, 0, 0, 0, 0);
    if (status == MFA_SUCCESS) fail("a handle that is no context of this target was taken for one");
    expect(status, MFA_ERROR_INVALID_CONTEXT, NULL, "a call without a context");
}

static mfa_context_t* new_context(void) {
    const mfa_context_options_t options = {.struct_size = sizeof options, .device = MFA_DEVICE_CPU, .num_threads = 1};
    mfa_context_t* made = NULL;
    if (mfa_create_context_with_options(&options, &made) != MFA_SUCCESS) fail("a context cannot be made: %s", mfa_last_error(NULL));
    return made;
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    input from = {data, size};
    arena_reset();
    session in = {.context = new_context(), .values = {take(&from)}};
    mfa_context_t* destroyed = NULL;
    for (int slot = 0; slot < SLOTS; slot++) in.logsumexp[slot] = arena_take(MOST_STATISTICS * sizeof(float));
    for (int call = 0; call < MOST_CALLS && from.left > 0; call++) {
        switch (take_upto(&from, 7)) {
        case 0:
        case 1:
        case 2: forward(&in, &from); break;
        case 3:
        case 4: backward(&in, &from, true); break;
        case 5:
        case 6: backward(&in, &from, false); break;
        default:
            if (take_bool(&from)) { /* records go with their context */
                destroyed = in.context;
                mfa_destroy_context(destroyed);
                in.context = new_context();
                memset(in.records, 0, sizeof in.records);
            }
            call_foreign(&in, destroyed, &from);
            break;
        }
    }
    if (mfa_destroy_context(in.context) != MFA_SUCCESS) fail("the context cannot be destroyed");
    return 0;
}
