/* Attention of a small decoder, exact and with an INT8 key/value cache, and how far the two are apart. */
#include <mfa.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH_SIZE = 1, NUM_HEADS = 8, NUM_KV_HEADS = 2, SEQ_LEN_Q = 16, SEQ_LEN_KV = 256, HEAD_DIM = 64 };
enum {
    QUERY_ELEMENTS = BATCH_SIZE * NUM_HEADS * SEQ_LEN_Q * HEAD_DIM,
    CACHE_ROWS = BATCH_SIZE * NUM_KV_HEADS * SEQ_LEN_KV,
    CACHE_ELEMENTS = CACHE_ROWS * HEAD_DIM,
};

static float query[QUERY_ELEMENTS], key[CACHE_ELEMENTS], value[CACHE_ELEMENTS];
static float exact[QUERY_ELEMENTS], approximate[QUERY_ELEMENTS];
static int8_t key_codes[CACHE_ELEMENTS], value_codes[CACHE_ELEMENTS];
static float key_scales[CACHE_ROWS], value_scales[CACHE_ROWS];

/* Ends the program with the library's own words if a call failed. */
static void check(mfa_context_t* context, int32_t status) {
    if (status == MFA_SUCCESS) return;
    fprintf(stderr, "%s: %s\n", mfa_status_string(status), mfa_last_error(context));
    exit(1);
}

/* A contiguous tensor [batch, heads, tokens, channels]. */
static mfa_tensor_t tensor(void* data, int32_t precision, int64_t heads, int64_t tokens) {
    mfa_tensor_t view = {.struct_size = sizeof view, .precision = precision, .data = data};
    const int64_t shape[4] = {BATCH_SIZE, heads, tokens, HEAD_DIM};
    int64_t stride = 1;
    for (int axis = 3; axis >= 0; --axis) {
        view.shape[axis] = shape[axis];
        view.strides[axis] = stride;
        stride *= shape[axis];
    }
    return view;
}

/* Quantises `from` into `codes`, with a scale for each row, and returns the tensor of codes. */
static mfa_tensor_t quantized(mfa_context_t* context, const mfa_tensor_t* from, int8_t* codes, mfa_quantization_t* quantization) {
    mfa_tensor_t to = tensor(codes, MFA_PRECISION_INT8, from->shape[1], from->shape[2]);
    quantization->struct_size = sizeof *quantization;
    quantization->granularity = MFA_GRANULARITY_TOKEN;
    to.quantization = quantization;
    check(context, mfa_quantize(context, from, &to));
    return to;
}

static void fill_with_noise(float* elements, int count) {
    static uint32_t state = 1;
    for (int index = 0; index < count; ++index) {
        state = state * 1664525u + 1013904223u;
        elements[index] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
}

int main(void) {
    fill_with_noise(query, QUERY_ELEMENTS);
    fill_with_noise(key, CACHE_ELEMENTS);
    fill_with_noise(value, CACHE_ELEMENTS);

    mfa_context_t* context = NULL;
    check(NULL, mfa_create_context_with_options(NULL, &context));

    mfa_tensor_t q = tensor(query, MFA_PRECISION_FP32, NUM_HEADS, SEQ_LEN_Q);
    mfa_tensor_t k = tensor(key, MFA_PRECISION_FP32, NUM_KV_HEADS, SEQ_LEN_KV);
    mfa_tensor_t v = tensor(value, MFA_PRECISION_FP32, NUM_KV_HEADS, SEQ_LEN_KV);
    mfa_tensor_t output = tensor(exact, MFA_PRECISION_FP32, NUM_HEADS, SEQ_LEN_Q);

    mfa_attention_t attention;
    check(NULL, mfa_attention_initialize(&attention, sizeof attention));
    attention.softmax_scale = 1.0f / sqrtf(HEAD_DIM);
    attention.query = &q;
    attention.key = &k;
    attention.value = &v;
    attention.output = &output;
    attention.causal = 1;
    attention.alignment = MFA_ALIGNMENT_LOWER_RIGHT; /* the queries are the last tokens of the sequence */

    const char* kernel = NULL;
    check(context, mfa_attention_kernel_name(context, &attention, MFA_OPERATION_FORWARD, &kernel));
    check(context, mfa_attention_run_forward(context, &attention));

    mfa_quantization_t of_key = {.scales = key_scales}, of_value = {.scales = value_scales};
    mfa_tensor_t quantized_key = quantized(context, &k, key_codes, &of_key);
    mfa_tensor_t quantized_value = quantized(context, &v, value_codes, &of_value);
    attention.key = &quantized_key;
    attention.value = &quantized_value;
    output.data = approximate;
    check(context, mfa_attention_run_forward(context, &attention));
    check(NULL, mfa_destroy_context(context));

    double error = 0, size = 0;
    for (int index = 0; index < QUERY_ELEMENTS; ++index) {
        error += pow(approximate[index] - exact[index], 2);
        size += pow(exact[index], 2);
    }
    printf("libmfa %s, kernel %s\n", mfa_version_string(), kernel);
    printf("keys and values: %zu bytes in FP32, %zu in INT8\n", sizeof key + sizeof value,
           sizeof key_codes + sizeof value_codes + sizeof key_scales + sizeof value_scales);
    printf("relative error of the output: %.2f %%\n", 100 * sqrt(error / size));
    return 0;
}
