/* Small problems, by the kernels for floats, for integers and for few query rows, against the reference kernels in FP64 on the real numbers
 * that the operands stand for: within what docs/numerics.md allows. */
#include "fuzzing.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Roundoff of a float type, and the distance of its denormal numbers. */
static double unit_of(int32_t precision) {
    return precision == MFA_PRECISION_FP16   ? 0x1p-11
           : precision == MFA_PRECISION_BF16 ? 0x1p-8
           : precision == MFA_PRECISION_FP64 ? 0x1p-53
                                             : 0x1p-24;
}

static double largest(const view* of) {
    double most = 0;
    FOR_EACH_INDEX(of->tensor.shape, index) most = fmax(most, fabs(load_number(&of->tensor, index)));
    return most;
}

/* The largest sum of sizes of a row's products with the keys: what a dot product's roundoff is measured in. */
static double largest_score(const problem* exact) {
    const int64_t *queries = exact->query.tensor.shape, *keys = exact->key.tensor.shape;
    double most = 0;
    for (int64_t b = 0; b < queries[0]; b++) {
        for (int64_t h = 0; h < queries[1]; h++) {
            for (int64_t i = 0; i < queries[2]; i++) {
                for (int64_t j = 0; j < keys[2]; j++) {
                    double sum = 0;
                    for (int64_t d = 0; d < queries[3]; d++) {
                        const int64_t row[4] = {b, h, i, d}, column[4] = {b, h / (queries[1] / keys[1]), j, d};
                        sum += fabs(load_number(&exact->query.tensor, row) * load_number(&exact->key.tensor, column));
                    }
                    most = fmax(most, sum);
                }
            }
        }
    }
    return most * fabs(exact->attention.softmax_scale);
}

static double code_span(const view* of) {
    const mfa_quantization_t* quantization = of->tensor.quantization;
    const double shift = quantization && quantization->zero_points ? 8 : 0;
    return (of->tensor.precision == MFA_PRECISION_INT8 ? 128 : 8) + shift;
}

/* Half a value's step of the largest weight, times the sum of the codes of all columns: what rounding weights to 8 bits can cost, for the
 * largest scale that the values have. */
static double rounded_weights(const problem* made) {
    if (!is_quantized(made->value.tensor.precision)) return 0;
    const mfa_quantization_t* quantization = made->value.tensor.quantization;
    double scale = quantization ? 0 : 1;
    for (int64_t k = 0; quantization && k < scale_count(quantization, made->value.tensor.shape); k++) {
        scale = fmax(scale, (double)quantization->scales[k]);
    }
    return scale * code_span(&made->value) * (double)made->key.tensor.shape[2] / 255;
}

static void check_tensor(const view* got, const view* exact, double allowed, const char* name) {
    FOR_EACH_INDEX(got->tensor.shape, index) {
        const double value = load_number(&got->tensor, index), expected = load_number(&exact->tensor, index);
        const double roundoff = unit_of(got->tensor.precision) * fabs(expected) * 1.01 + 0x1p-24;
        if (fabs(expected) > 65000) continue; /* FP16 may have no such number */
        if (!(fabs(value - expected) <= allowed + roundoff)) {
            fail("%s[%d, %d, %d, %d] is %.9g, not %.9g: off by %.3g, allowed %.3g", name, (int)index[0], (int)index[1], (int)index[2],
                 (int)index[3], value, expected, fabs(value - expected), allowed + roundoff);
        }
    }
    check_gaps(got, name);
}

static void check_statistics(const void* got, const void* exact, bool doubles, int64_t count, double allowed, double relative,
                             const char* name) {
    for (int64_t k = 0; got && k < count; k++) {
        const double value = doubles ? ((const double*)got)[k] : (double)((const float*)got)[k], expected = ((const double*)exact)[k];
        if (value == expected) continue; /* infinite ones too */
        if (!(fabs(value - expected) <= allowed + relative * fabs(expected))) {
            fail("%s[%d] is %.9g, not %.9g: allowed %.3g", name, (int)k, value, expected, allowed + relative * fabs(expected));
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    input from = {data, size};
    arena_reset();
    const int choice = take(&from);
    static const char* const KERNELS[4] = {"", "float", "integer", "reference"};
    mfa_context_t* context = context_of(KERNELS[choice & 3]);
    mfa_context_t* reference = context_of("reference");
    problem made, exact;
    make_problem(&made, &from, false, false);
    copy_problem(&exact, &made, true);
    if (mfa_attention_run_forward(context, &made.attention) != MFA_SUCCESS) fail("forward fails: %s", mfa_last_error(context));
    if (mfa_attention_run_forward(reference, &exact.attention) != MFA_SUCCESS) fail("the reference fails: %s", mfa_last_error(reference));
    if (element_count(&made.query.tensor) == 0) return 0;

    const int64_t keys = made.key.tensor.shape[2], rows = made.query.tensor.shape[2], channels = made.query.tensor.shape[3];
    const bool doubles = made.query.tensor.precision == MFA_PRECISION_FP64 || made.key.tensor.precision == MFA_PRECISION_FP64 ||
                         made.value.tensor.precision == MFA_PRECISION_FP64;
    const char* name = NULL;
    if (mfa_attention_kernel_name(context, &made.attention, MFA_OPERATION_FORWARD, &name) != MFA_SUCCESS) fail("no kernel has a name");
    const bool integers = strstr(name, "_int8_") != NULL, few = strstr(name, "_decode_") != NULL;

    /* Scores are sums of FP32 products; with integers they are exact, but for queries that are rounded to 16 bits where rows are few. */
    const double score = largest_score(&exact), slope = made.attention.alibi_slopes ? 0.25 * 300 : 0;
    double scores_error = 0x1p-24 * (double)(channels + 16) * (score + slope + 2);
    if (few && integers) scores_error += score / 65534 * (double)channels * 8;
    const double value = largest(&exact.value);
    double allowed = value * (expm1(4 * scores_error) + 0x1p-23 * (double)(keys + 16)) + (doubles ? 0 : 1e-7);
    if (made.attention.dropout_p > 0) allowed *= 2;
    if (integers) allowed += few ? rounded_weights(&made) / 128 : rounded_weights(&made);
    check_tensor(&made.output, &exact.output, allowed, "output");
    const double of_logsumexp = integers ? 2e-3 : 1e-5;
    check_statistics(made.attention.logsumexp, exact.attention.logsumexp, doubles, made.rows,
                     of_logsumexp * fmax(1, score + slope) + 2 * scores_error, of_logsumexp, "logsumexp");
    if (!(choice & 4)) return 0;

    /* d_values come from Q, K and V on both sides, since an output has rounded weights, or a narrow type. */
    made.attention.output = exact.attention.output = NULL;
    if (mfa_attention_run_backward(context, &made.attention, &made.gradients) != MFA_SUCCESS)
        fail("backward fails: %s", mfa_last_error(context));
    if (mfa_attention_run_backward(reference, &exact.attention, &exact.gradients) != MFA_SUCCESS)
        fail("the reference fails: %s", mfa_last_error(reference));
    name = NULL;
    if (mfa_attention_kernel_name(context, &made.attention, MFA_OPERATION_BACKWARD_KEY_VALUE, &name) != MFA_SUCCESS)
        fail("no kernel has a name");
    /* Both multiply what is at most so large: a gradient of a weight, of a score. Integers are rounded to 15 bits. */
    const double drop = made.attention.dropout_p > 0 ? 1.34 : 1;
    const double weight = drop * value * (double)made.value.tensor.shape[3];
    double part = expm1(8 * scores_error) + 0x1p-23 * (double)(keys + channels + made.value.tensor.shape[3] + 32);
    if (integers) part += expm1(4 * of_logsumexp * fmax(1, score + slope));
    const bool rounded = strstr(name, "_int8_") != NULL;
    const double step = rounded ? 4.0 / 16383 : 0;
    const double by_scale = fabs(made.attention.softmax_scale), group = (double)(made.heads / made.key.tensor.shape[1]);
    const double of_score = 4 * weight * (part + step);
    check_tensor(&made.grad_query, &exact.grad_query, by_scale * of_score * largest(&exact.key) * (double)(keys < 4 ? 4 : keys) / 2,
                 "grad_query");
    check_tensor(&made.grad_key, &exact.grad_key, by_scale * of_score * largest(&exact.query) * (double)rows * group, "grad_key");
    check_tensor(&made.grad_value, &exact.grad_value, 4 * drop * (part + step) * (double)rows * group, "grad_value");
    const double count = (double)(made.rows * keys);
    if (made.gradients.grad_mask) check_tensor(&made.grad_mask, &exact.grad_mask, of_score * count, "grad_mask");
    check_statistics(made.gradients.d_values, exact.gradients.d_values, doubles, made.rows, of_score, 1e-5, "d_values");
    check_statistics(made.gradients.grad_sinks, exact.gradients.grad_sinks, doubles, made.heads, of_score * (double)made.rows, 1e-5,
                     "grad_sinks");
    check_statistics(made.gradients.grad_alibi_slopes, exact.gradients.grad_alibi_slopes, doubles, made.heads, of_score * count * 300, 1e-5,
                     "grad_alibi_slopes");
    return 0;
}
