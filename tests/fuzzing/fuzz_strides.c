/* A legal problem of any strides, broadcast masks and options gives the bits of the same problem in compact memory, forward and backward,
 * and touches nothing but elements. */
#include "fuzzing.h"

#include <string.h>

static void same_elements(const view* one, const view* other, const char* name) {
    FOR_EACH_INDEX(one->tensor.shape, index) {
        if (load_bits(&one->tensor, index) != load_bits(&other->tensor, index)) {
            fail("%s[%d, %d, %d, %d] is %.9g with strides, %.9g in compact memory", name, (int)index[0], (int)index[1], (int)index[2],
                 (int)index[3], load_number(&one->tensor, index), load_number(&other->tensor, index));
        }
    }
    check_gaps(one, name);
}

static void same_statistics(const void* one, const void* other, int64_t count, size_t size, const char* name) {
    if (one && memcmp(one, other, (size_t)count * size) != 0) fail("%s differs between strided and compact memory", name);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    input from = {data, size};
    arena_reset();
    const int choice = take(&from);
    static const char* const KERNELS[4] = {"", "float", "reference", "baseline"};
    mfa_context_t* context = context_of(KERNELS[choice & 3]);
    problem strided, compact;
    make_problem(&strided, &from, true, true);
    copy_problem(&compact, &strided, false);
    const bool doubles = strided.query.tensor.precision == MFA_PRECISION_FP64 || strided.key.tensor.precision == MFA_PRECISION_FP64 ||
                         strided.value.tensor.precision == MFA_PRECISION_FP64;
    const size_t statistic = doubles ? 8 : 4;

    const int32_t status = mfa_attention_run_forward(context, &strided.attention);
    const int32_t expected = mfa_attention_run_forward(context, &compact.attention);
    if (status != expected)
        fail("forward gives status %d with strides (%s), %d in compact memory", status, mfa_last_error(context), expected);
    /* Only values that cannot be quantised make such a problem illegal. */
    const bool fused = strided.attention.quantize_query || strided.attention.quantize_key || strided.attention.quantize_value;
    if (status != MFA_SUCCESS && !(status == MFA_ERROR_INVALID_ARGUMENT && fused && strided.special)) {
        fail("a legal problem gives status %d: %s", status, mfa_last_error(context));
    }
    same_elements(&strided.output, &compact.output, "output");
    same_statistics(strided.attention.logsumexp, compact.attention.logsumexp, strided.rows, statistic, "logsumexp");
    if (status != MFA_SUCCESS || !(choice & 4)) return 0;

    if (choice & 8) strided.attention.output = compact.attention.output = NULL; /* d_values are then recomputed */
    const int32_t after = mfa_attention_run_backward(context, &strided.attention, &strided.gradients);
    if (after != MFA_SUCCESS) fail("backward gives status %d after forward succeeded: %s", after, mfa_last_error(context));
    if (mfa_attention_run_backward(context, &compact.attention, &compact.gradients) != MFA_SUCCESS) {
        fail("backward fails in compact memory only: %s", mfa_last_error(context));
    }
    same_elements(&strided.grad_query, &compact.grad_query, "grad_query");
    same_elements(&strided.grad_key, &compact.grad_key, "grad_key");
    same_elements(&strided.grad_value, &compact.grad_value, "grad_value");
    if (strided.gradients.grad_mask) same_elements(&strided.grad_mask, &compact.grad_mask, "grad_mask");
    same_statistics(strided.gradients.d_values, compact.gradients.d_values, strided.rows, statistic, "d_values");
    same_statistics(strided.gradients.grad_sinks, compact.gradients.grad_sinks, strided.heads, statistic, "grad_sinks");
    same_statistics(strided.gradients.grad_alibi_slopes, compact.gradients.grad_alibi_slopes, strided.heads, statistic,
                    "grad_alibi_slopes");
    return 0;
}
