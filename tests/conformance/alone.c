/* Functions of mfa.h that make a call for each sequence of a batch instead of one for all: put before libmfa by LD_PRELOAD, it shows whether a
 * sequence's results depend on what else is in its batch. By the rules they do in dropout, scales of a whole tensor that the call finds,
 * and gradients that are sums over the batch; such calls are left as they are, as are those that are refused. At the end of the process a line on
 * standard error says how many calls were divided. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "../precision_bytes.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long divided, left;

static void* library(const char* function) {
    static void* handle;
    if (!handle) handle = dlopen("libmfa.so", RTLD_NOLOAD | RTLD_NOW);
    void* found = handle ? dlsym(handle, function) : NULL;
    if (!found) abort();
    return found;
}

/* The function of the library itself, with its type. */
#define ORIGINAL(function) ((__typeof__(&function))library(#function))

__attribute__((destructor)) static void end_process(void) {
    fprintf(stderr, "alone: %ld calls divided, %ld left\n", divided, left);
}

/* ---- One sequence of everything -------------------------------------------------------------------------------------------------------- */

typedef struct {
    mfa_tensor_t tensor;
    mfa_quantization_t quantization;
} part;

static int64_t bytes_of(int32_t precision, int64_t elements) {
    return precision == MFA_PRECISION_INT4 ? elements / 2 : elements * (int64_t)precision_bytes(precision);
}

static const void* moved(const void* array, int64_t bytes) {
    return array ? (const char*)array + bytes : NULL;
}

/* How many scales one sequence has. */
static int64_t scales_of_one(const mfa_tensor_t* tensor, const mfa_quantization_t* quantization) {
    const int64_t *shape = tensor->shape, block = quantization->block_size, group = quantization->group_size;
    switch (quantization->granularity) {
    case MFA_GRANULARITY_TENSOR: return 0; /* all sequences share it */
    case MFA_GRANULARITY_HEAD: return shape[1];
    case MFA_GRANULARITY_BLOCK: return shape[1] * ((shape[2] + block - 1) / block);
    case MFA_GRANULARITY_CHANNEL: return shape[1] * shape[3];
    case MFA_GRANULARITY_GROUP: return shape[1] * shape[2] * ((shape[3] + group - 1) / group);
    default: return shape[1] * shape[2];
    }
}

/* Sequence `b` of a tensor; the whole of a mask that all sequences share. */
static const mfa_tensor_t* one_of(const mfa_tensor_t* tensor, int64_t b, part* to) {
    if (!tensor) return NULL;
    to->tensor = *tensor;
    if (tensor->shape[0] == 1) return &to->tensor;
    to->tensor.shape[0] = 1;
    const int64_t bytes = bytes_of(tensor->precision, b * tensor->strides[0]);
    if (tensor->buffer) {
        to->tensor.buffer_offset += (uint64_t)bytes;
    } else {
        to->tensor.data = (void*)moved(tensor->data, bytes);
    }
    const bool codes = tensor->precision == MFA_PRECISION_INT8 || tensor->precision == MFA_PRECISION_INT4;
    if (!codes || !tensor->quantization) return &to->tensor;
    to->quantization = *tensor->quantization;
    const int64_t scales = scales_of_one(tensor, tensor->quantization), means = tensor->shape[1] * tensor->shape[3];
    to->quantization.scales = (float*)moved(to->quantization.scales, 4 * b * scales);
    to->quantization.zero_points = (int32_t*)moved(to->quantization.zero_points, 4 * b * scales);
    to->quantization.channel_means = (float*)moved(to->quantization.channel_means, 4 * b * means);
    to->tensor.quantization = &to->quantization;
    return &to->tensor;
}

static int64_t batch_of(const mfa_tensor_t* tensor) {
    return tensor && tensor->struct_size == sizeof *tensor ? tensor->shape[0] : 0;
}

/* ---- Attention ------------------------------------------------------------------------------------------------------------------------- */

static int64_t statistic_size(const mfa_attention_t* attention) {
    const bool wide = attention->query->precision == MFA_PRECISION_FP64 || attention->key->precision == MFA_PRECISION_FP64 ||
                      attention->value->precision == MFA_PRECISION_FP64;
    return wide ? 8 : 4;
}

static bool is_of_tensor(const mfa_quantization_scheme_t* scheme) {
    return scheme && scheme->granularity == MFA_GRANULARITY_TENSOR;
}

/* Whether the results of a sequence are to depend on nothing else in the batch. */
static bool is_divisible(mfa_context_t* context, const mfa_attention_t* attention, const mfa_attention_gradients_t* gradients) {
    uint64_t size;
    if (mfa_attention_workspace_size(context, attention, gradients, &size)) return false;
    if (attention->struct_size != sizeof *attention || batch_of(attention->query) < 2 || attention->dropout_p > 0) return false;
    if (is_of_tensor(attention->quantize_query) || is_of_tensor(attention->quantize_key) || is_of_tensor(attention->quantize_value))
        return false;
    for (int64_t b = 0; attention->kv_lengths && b < attention->query->shape[0]; b++) {
        if (attention->kv_lengths[b] < 0 || attention->kv_lengths[b] > attention->key->shape[2]) return false;
    }
    if (!gradients) return true;
    const bool summed = gradients->grad_sinks || gradients->grad_alibi_slopes ||
                        (gradients->grad_mask && gradients->grad_mask->shape[0] != attention->query->shape[0]);
    return gradients->struct_size == sizeof *gradients && !summed;
}

typedef struct {
    part query, key, value, output, mask;
    mfa_attention_t attention;
} sequence;

static const mfa_attention_t* sequence_of(const mfa_attention_t* attention, int64_t b, sequence* to) {
    const int64_t *shape = attention->query->shape, rows = b * shape[1] * shape[2];
    to->attention = *attention;
    to->attention.query = one_of(attention->query, b, &to->query);
    to->attention.key = one_of(attention->key, b, &to->key);
    to->attention.value = one_of(attention->value, b, &to->value);
    to->attention.output = one_of(attention->output, b, &to->output);
    to->attention.mask = one_of(attention->mask, b, &to->mask);
    to->attention.logsumexp = (void*)moved(attention->logsumexp, rows * statistic_size(attention));
    to->attention.kv_lengths = moved(attention->kv_lengths, 8 * b);
    if (attention->num_query_offsets > 1) {
        to->attention.query_offsets = moved(attention->query_offsets, 8 * b);
        to->attention.num_query_offsets = 1;
    }
    return &to->attention;
}

int32_t mfa_attention_run_forward(mfa_context_t* context, const mfa_attention_t* attention) {
    if (!is_divisible(context, attention, NULL)) {
        left++;
        return ORIGINAL(mfa_attention_run_forward)(context, attention);
    }
    divided++;
    int32_t status = MFA_SUCCESS;
    for (int64_t b = attention->query->shape[0] - 1; b >= 0 && !status; b--) {
        sequence alone;
        status = ORIGINAL(mfa_attention_run_forward)(context, sequence_of(attention, b, &alone));
    }
    return status;
}

int32_t mfa_attention_run_backward(mfa_context_t* context, const mfa_attention_t* attention, const mfa_attention_gradients_t* gradients) {
    if (!is_divisible(context, attention, gradients)) {
        left++;
        return ORIGINAL(mfa_attention_run_backward)(context, attention, gradients);
    }
    divided++;
    int32_t status = MFA_SUCCESS;
    for (int64_t b = attention->query->shape[0] - 1; b >= 0 && !status; b--) {
        sequence alone;
        part grad_output, grad_query, grad_key, grad_value, grad_mask;
        const int64_t rows = b * attention->query->shape[1] * attention->query->shape[2] * statistic_size(attention);
        mfa_attention_gradients_t wanted = *gradients;
        wanted.grad_output = one_of(gradients->grad_output, b, &grad_output);
        wanted.grad_query = one_of(gradients->grad_query, b, &grad_query);
        wanted.grad_key = one_of(gradients->grad_key, b, &grad_key);
        wanted.grad_value = one_of(gradients->grad_value, b, &grad_value);
        wanted.grad_mask = one_of(gradients->grad_mask, b, &grad_mask);
        wanted.grad_logsumexp = moved(gradients->grad_logsumexp, rows);
        wanted.d_values = (void*)moved(gradients->d_values, rows);
        status = ORIGINAL(mfa_attention_run_backward)(context, sequence_of(attention, b, &alone), &wanted);
    }
    return status;
}

/* ---- Quantisation, merging ------------------------------------------------------------------------------------------------------------- */

typedef int32_t conversion(mfa_context_t* context, const mfa_tensor_t* input, const mfa_tensor_t* output);

/* Quantises or dequantises, sequence by sequence where that is possible. */
static int32_t convert(conversion* original, bool is_possible, mfa_context_t* context, const mfa_tensor_t* input,
                       const mfa_tensor_t* output) {
    if (!is_possible) {
        left++;
        return original(context, input, output);
    }
    divided++;
    int32_t status = MFA_SUCCESS;
    for (int64_t b = batch_of(input) - 1; b >= 0 && !status; b--) {
        part from, to;
        status = original(context, one_of(input, b, &from), one_of(output, b, &to));
    }
    return status;
}

int32_t mfa_quantize(mfa_context_t* context, const mfa_tensor_t* input, const mfa_tensor_t* output) {
    const int64_t batch = batch_of(input);
    const mfa_quantization_t* scheme = batch > 1 && batch_of(output) == batch ? output->quantization : NULL;
    return convert(ORIGINAL(mfa_quantize), scheme && scheme->granularity != MFA_GRANULARITY_TENSOR, context, input, output);
}

int32_t mfa_dequantize(mfa_context_t* context, const mfa_tensor_t* input, const mfa_tensor_t* output) {
    const int64_t batch = batch_of(input);
    return convert(ORIGINAL(mfa_dequantize), batch > 1 && batch_of(output) == batch, context, input, output);
}

int32_t mfa_attention_merge(mfa_context_t* context, const mfa_tensor_t* output_a, const void* logsumexp_a, const mfa_tensor_t* output_b,
                            const void* logsumexp_b, const mfa_tensor_t* output, void* logsumexp, int32_t statistics_precision) {
    const int64_t batch = batch_of(output);
    if (batch < 2 || batch_of(output_a) != batch || batch_of(output_b) != batch) {
        left++;
        return ORIGINAL(mfa_attention_merge)(context, output_a, logsumexp_a, output_b, logsumexp_b, output, logsumexp,
                                             statistics_precision);
    }
    divided++;
    int32_t status = MFA_SUCCESS;
    for (int64_t b = batch - 1; b >= 0 && !status; b--) {
        part a, other, to;
        const int64_t rows = bytes_of(statistics_precision, b * output->shape[1] * output->shape[2]);
        status = ORIGINAL(mfa_attention_merge)(context, one_of(output_a, b, &a), moved(logsumexp_a, rows), one_of(output_b, b, &other),
                                               moved(logsumexp_b, rows), one_of(output, b, &to), (void*)moved(logsumexp, rows),
                                               statistics_precision);
    }
    return status;
}
