/* Runs kernels of core/CPUKernels on drawn problems, one kernel after the other, and holds them to the portable FP64 reference kernels.
 *
 *     check_kernels [--list] [--quick] [--sets SET,SET…] [--kernels NAME,NAME…] [--problems COUNT] [--first NUMBER] [--work PRODUCTS]
 *
 * --sets names the instruction sets whose kernels are run; without it, those that this processor has. A kernel gets exactly the workspace
 * that it asks for, full of garbage and between guards, and so do its results, whose gaps must stay as they are. Floating-point kernels
 * have to be close element by element, kernels of integers in the mean (see docs/numerics.md), and where the table says so two kernels give
 * the same bits. To check a new kernel, add its line to the table. */
#include "cpu_kernels.h"

#include "shared/conversion.h"
#include "problems.h"
#include "quantization.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define HIDE(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define SHOW(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif
#endif
#ifndef HIDE
#define HIDE(address, bytes) ((void)0)
#define SHOW(address, bytes) ((void)0)
#endif

/* ---- The table ----------------------------------------------------------------------------------------------------------------------- */

typedef enum { BASELINE, AVX2, AVXVNNI, AVX512, AVX512VNNI, NEON, DOTPROD, I8MM, SETS } instruction_set;

static const char* const SET_NAMES[SETS] = {"baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "dotprod", "i8mm"};

static bool processor_has(instruction_set set) {
    switch (set) {
    case AVX2: return cpu_has_avx2();
    case AVXVNNI: return cpu_has_avxvnni();
    case AVX512: return cpu_has_avx2() && cpu_has_avx512();
    case AVX512VNNI: return cpu_has_avx512vnni();
    case DOTPROD: return cpu_has_dotprod();
    case I8MM: return cpu_has_i8mm();
    default: return true;
    }
}

/* BACKWARD is that for queries and that for keys and values in one. */
typedef enum { FORWARD, D_VALUES, BACKWARD_QUERY, BACKWARD_KEY_VALUE, BACKWARD_BIAS, BACKWARD, STEPS } step;

/* What a kernel computes in, which says how close it has to be. */
typedef enum { FP32_ARITHMETIC, FP64_ARITHMETIC, INTEGER_ARITHMETIC } arithmetic;

typedef struct {
    const cpu_attention_kernel* kernel;
    step step;
    instruction_set set;
    arithmetic arithmetic;
    const cpu_attention_kernel* same_bits_as; /* NULL: none */
} table_line;

#define REFERENCE_LINES(suffix, set, arithmetic)                                                                                    \
    {&attention_forward_##suffix, FORWARD, set, arithmetic, NULL}, {&attention_d_values_##suffix, D_VALUES, set, arithmetic, NULL}, \
        {&attention_backward_query_##suffix, BACKWARD_QUERY, set, arithmetic, NULL},                                                \
        {&attention_backward_key_value_##suffix, BACKWARD_KEY_VALUE, set, arithmetic, NULL}, {                                      \
        &attention_backward_bias_##suffix, BACKWARD_BIAS, set, arithmetic, NULL                                                     \
    }

static const table_line TABLE[] = {
    REFERENCE_LINES(fp32_reference, BASELINE, FP32_ARITHMETIC),
#if defined(__x86_64__)
    REFERENCE_LINES(fp32_reference_avx2, AVX2, FP32_ARITHMETIC),
    REFERENCE_LINES(fp64_reference_avx2, AVX2, FP64_ARITHMETIC),
    REFERENCE_LINES(fp32_reference_avx512, AVX512, FP32_ARITHMETIC),
    REFERENCE_LINES(fp64_reference_avx512, AVX512, FP64_ARITHMETIC),
    {&attention_forward_float_avx2, FORWARD, AVX2, FP32_ARITHMETIC, NULL},
    {&attention_d_values_float_avx2, D_VALUES, AVX2, FP32_ARITHMETIC, NULL},
    {&attention_backward_float_avx2, BACKWARD, AVX2, FP32_ARITHMETIC, NULL},
    {&attention_forward_float_avx512, FORWARD, AVX512, FP32_ARITHMETIC, NULL},
    {&attention_d_values_float_avx512, D_VALUES, AVX512, FP32_ARITHMETIC, NULL},
    {&attention_backward_float_avx512, BACKWARD, AVX512, FP32_ARITHMETIC, NULL},
    {&attention_d_values_int8_avx2, D_VALUES, AVX2, INTEGER_ARITHMETIC, NULL},
    {&attention_backward_int8_avx2, BACKWARD, AVX2, INTEGER_ARITHMETIC, NULL},
    {&attention_d_values_int8_avxvnni, D_VALUES, AVXVNNI, INTEGER_ARITHMETIC, &attention_d_values_int8_avx2},
    {&attention_backward_int8_avxvnni, BACKWARD, AVXVNNI, INTEGER_ARITHMETIC, &attention_backward_int8_avx2},
    {&attention_d_values_int8_avx512, D_VALUES, AVX512, INTEGER_ARITHMETIC, NULL},
    {&attention_backward_int8_avx512, BACKWARD, AVX512, INTEGER_ARITHMETIC, NULL},
    {&attention_d_values_int8_avx512vnni, D_VALUES, AVX512VNNI, INTEGER_ARITHMETIC, &attention_d_values_int8_avx512},
    {&attention_backward_int8_avx512vnni, BACKWARD, AVX512VNNI, INTEGER_ARITHMETIC, &attention_backward_int8_avx512},
    {&attention_decode_float_avx2, FORWARD, AVX2, FP32_ARITHMETIC, NULL},
    {&attention_decode_float_avx512, FORWARD, AVX512, FP32_ARITHMETIC, NULL},
    {&attention_decode_int8_avx2, FORWARD, AVX2, INTEGER_ARITHMETIC, NULL},
    {&attention_decode_int8_avx512, FORWARD, AVX512, INTEGER_ARITHMETIC, NULL},
    {&attention_decode_int8_avxvnni, FORWARD, AVXVNNI, INTEGER_ARITHMETIC, &attention_decode_int8_avx2},
    {&attention_decode_int8_avx512vnni, FORWARD, AVX512VNNI, INTEGER_ARITHMETIC, &attention_decode_int8_avx512},
    {&attention_forward_int8_avx2, FORWARD, AVX2, INTEGER_ARITHMETIC, NULL},
    {&attention_forward_int4_avx2, FORWARD, AVX2, INTEGER_ARITHMETIC, &attention_forward_int8_avx2},
    {&attention_forward_int8_avxvnni, FORWARD, AVXVNNI, INTEGER_ARITHMETIC, &attention_forward_int8_avx2},
    {&attention_forward_int8_avx512vnni, FORWARD, AVX512VNNI, INTEGER_ARITHMETIC, NULL},
#elif defined(__aarch64__)
    {&attention_forward_float_neon, FORWARD, NEON, FP32_ARITHMETIC, NULL},
    {&attention_d_values_float_neon, D_VALUES, NEON, FP32_ARITHMETIC, NULL},
    {&attention_backward_float_neon, BACKWARD, NEON, FP32_ARITHMETIC, NULL},
    {&attention_decode_float_neon, FORWARD, NEON, FP32_ARITHMETIC, NULL},
    {&attention_forward_int8_dotprod, FORWARD, DOTPROD, INTEGER_ARITHMETIC, NULL},
    {&attention_forward_int8_i8mm, FORWARD, I8MM, INTEGER_ARITHMETIC, &attention_forward_int8_dotprod},
#endif
};

enum { LINES = sizeof TABLE / sizeof TABLE[0] };

/* What all of them must be close to. Where every instruction is emulated and time is short, those for AVX2, themselves checked against the
 * portable ones, stand in for them, and kernels of the reference template, one source for all instruction sets, get every eighth problem. */
#define REFERENCES(suffix)                                                          \
    {                                                                               \
        &attention_forward_##suffix,        &attention_d_values_##suffix,           \
        &attention_backward_query_##suffix, &attention_backward_key_value_##suffix, \
        &attention_backward_bias_##suffix,                                          \
    }

static const cpu_attention_kernel* const PORTABLE[STEPS] = REFERENCES(fp64_reference);
#if defined(__x86_64__)
static const cpu_attention_kernel* const QUICK[STEPS] = REFERENCES(fp64_reference_avx2);
#else
static const cpu_attention_kernel* const QUICK[STEPS] = REFERENCES(fp64_reference);
#endif

static const cpu_attention_kernel* const* references = PORTABLE;

/* ---- Memory between guards ----------------------------------------------------------------------------------------------------------- */

enum { GUARD = 256, ALIGNMENT = 64, GUARD_BYTE = 0xC3, GAP_BYTE = 0x5A };

/* Bytes at an address that is a multiple of 64 and of no larger power of two, with guards before and behind. */
typedef struct {
    char* block;
    char* bytes;
    size_t count;
} guarded;

static guarded take_guarded(size_t count, int filler) {
    guarded made = {.count = count};
    made.block = malloc(count + 2 * GUARD + 2 * ALIGNMENT);
    if (made.block == NULL) abort();
    made.bytes = made.block + GUARD;
    made.bytes += (2 * ALIGNMENT - (uintptr_t)made.bytes % (2 * ALIGNMENT) + ALIGNMENT) % (2 * ALIGNMENT);
    memset(made.bytes - GUARD, GUARD_BYTE, GUARD);
    memset(made.bytes, filler, count);
    memset(made.bytes + count, GUARD_BYTE, GUARD);
    HIDE(made.bytes - GUARD, GUARD);
    HIDE(made.bytes + count, GUARD);
    return made;
}

static bool guards_hold(const guarded* made) {
    SHOW(made->bytes - GUARD, GUARD);
    SHOW(made->bytes + made->count, GUARD);
    for (int k = 0; k < GUARD; k++) {
        if ((uint8_t)made->bytes[k - GUARD] != GUARD_BYTE || (uint8_t)made->bytes[made->count + (size_t)k] != GUARD_BYTE) return false;
    }
    return true;
}

/* ---- Results ------------------------------------------------------------------------------------------------------------------------- */

/* One tensor that a step writes. */
typedef struct {
    const char* name;
    cpu_tensor tensor;
    extent sizes;
    guarded memory;
} result;

enum { MOST_RESULTS = 3 };

typedef struct {
    result results[MOST_RESULTS];
    int count;
} result_set;

static cpu_tensor dense_tensor(cpu_precision precision, extent sizes) {
    cpu_tensor tensor = {.precision = precision, .scale_tokens = 1, .scale_channels = 1};
    int64_t stride = 1;
    for (int axis = 3; axis >= 0; axis--) {
        tensor.strides[axis] = stride;
        stride *= sizes.counts[axis];
    }
    return tensor;
}

/* Takes memory for one result; `layout` without it, or NULL for an array of statistics. The reference's are dense and FP64, so that
 * nothing is rounded; statistics are what `attention` says. */
static result* add_result(result_set* set, const char* name, const cpu_tensor* layout, extent sizes, bool exact) {
    result* added = &set->results[set->count++];
    added->name = name;
    added->sizes = sizes;
    added->tensor = layout == NULL ? dense_tensor(CPU_FP32, sizes) : exact ? dense_tensor(CPU_FP64, sizes) : *layout;
    added->memory = take_guarded(bytes_of_elements(added->tensor.precision, reach_of_tensor(&added->tensor, sizes)), GAP_BYTE);
    added->tensor.data = added->memory.bytes;
    return added;
}

/* Takes memory for what a step writes, and gives it to `attention`. */
static result_set take_results(const problem* made, step step, bool exact, cpu_attention* attention) {
    result_set set = {.count = 0};
    const int64_t batches = attention->batch_size, heads = attention->num_heads, kv_heads = attention->num_kv_heads;
    const int64_t rows = attention->seq_len_q, keys = attention->seq_len_kv;
    const extent statistics = {{1, batches, heads, rows}}, by_head = {{1, 1, 1, heads}};
    const extent outputs = {{batches, heads, rows, attention->head_dim_v}}, queries = {{batches, heads, rows, attention->head_dim}};
    const extent key_sizes = {{batches, kv_heads, keys, attention->head_dim}}, values = {{batches, kv_heads, keys, attention->head_dim_v}};
    switch (step) {
    case FORWARD:
        attention->output = add_result(&set, "output", &attention->output, outputs, exact)->tensor;
        attention->logsumexp = add_result(&set, "logsumexp", NULL, statistics, exact)->tensor.data;
        break;
    case D_VALUES: attention->d_values = add_result(&set, "d_values", NULL, statistics, exact)->tensor.data; break;
    case BACKWARD:
    case BACKWARD_QUERY:
        attention->grad_query = add_result(&set, "grad_query", &attention->grad_query, queries, exact)->tensor;
        if (step == BACKWARD_QUERY) break;
        /* fall through */
    case BACKWARD_KEY_VALUE:
        attention->grad_key = add_result(&set, "grad_key", &attention->grad_key, key_sizes, exact)->tensor;
        attention->grad_value = add_result(&set, "grad_value", &attention->grad_value, values, exact)->tensor;
        break;
    default:
        if (attention->grad_mask.strides[3] != 0) { /* there is one */
            const int64_t strides[4] = {attention->grad_mask.strides[0], attention->grad_mask.strides[1], attention->grad_mask.strides[2],
                                        attention->grad_mask.strides[3]};
            attention->grad_mask = add_result(&set, "grad_mask", &attention->grad_mask, made->mask_extent, exact)->tensor;
            memcpy(attention->grad_mask.strides, strides, sizeof strides);
        }
        if (attention->sinks) attention->grad_sinks = add_result(&set, "grad_sinks", NULL, by_head, exact)->tensor.data;
        if (attention->alibi_slopes) {
            attention->grad_alibi_slopes = add_result(&set, "grad_alibi_slopes", NULL, by_head, exact)->tensor.data;
        }
        break;
    }
    return set;
}

static void free_results(result_set* set) {
    for (int n = 0; n < set->count; n++) free(set->results[n].memory.block);
    set->count = 0;
}

static double element_of(const result* of, const int64_t index[4]) {
    int64_t at = 0;
    for (int axis = 0; axis < 4; axis++) at += index[axis] * of->tensor.strides[axis];
    switch (of->tensor.precision) {
    case CPU_FP64: return ((const double*)of->tensor.data)[at];
    case CPU_FP16: return (double)float_from_half(((const uint16_t*)of->tensor.data)[at]);
    case CPU_BF16: return (double)float_from_bfloat(((const uint16_t*)of->tensor.data)[at]);
    default: return (double)((const float*)of->tensor.data)[at];
    }
}

/* Calls body for each index of a result. */
#define FOR_EACH_INDEX(sizes, index)                                       \
    for (int64_t index[4] = {0}; index[0] < (sizes).counts[0]; index[0]++) \
        for (index[1] = 0; index[1] < (sizes).counts[1]; index[1]++)       \
            for (index[2] = 0; index[2] < (sizes).counts[2]; index[2]++)   \
                for (index[3] = 0; index[3] < (sizes).counts[3]; index[3]++)

/* Whether the gaps between a result's elements are as they were. */
static bool gaps_hold(const result* of) {
    const size_t size = bytes_of_elements(of->tensor.precision, 1);
    uint8_t* written = calloc(of->memory.count > 0 ? of->memory.count : 1, 1);
    if (written == NULL) abort();
    FOR_EACH_INDEX(of->sizes, index) {
        int64_t at = 0;
        for (int axis = 0; axis < 4; axis++) at += index[axis] * of->tensor.strides[axis];
        memset(written + (size_t)at * size, 1, size);
    }
    bool hold = true;
    for (size_t k = 0; k < of->memory.count; k++) hold &= written[k] || (uint8_t)of->memory.bytes[k] == GAP_BYTE;
    free(written);
    return hold;
}

/* ---- Running a kernel ---------------------------------------------------------------------------------------------------------------- */

/* What stands in workspace at first: NaN in every float type, large numbers, small ones, zeros. */
static int filler_of(const problem* made) {
    return (const int[]){0xFF, 0x7E, 0xA5, 0x00}[made->number % 4];
}

/* All of a kernel's work, in the order of its items. False if it left its memory. */
static bool run_kernel(const cpu_attention_kernel* kernel, const problem* made, cpu_attention* attention) {
    guarded workspace = take_guarded(kernel->workspace_bytes(attention), filler_of(made));
    guarded shared = take_guarded(kernel->shared_bytes ? kernel->shared_bytes(attention) : 0, filler_of(made));
    attention->shared = kernel->shared_bytes ? shared.bytes : NULL;
    if (kernel->prepare_items) {
        const int64_t items = kernel->prepare_items(attention);
        for (int64_t item = 0; item < items; item++) kernel->prepare(attention, item, workspace.bytes);
    }
    const int64_t items = kernel->item_count(attention);
    for (int64_t item = 0; item < items; item++) kernel->run(attention, item, workspace.bytes);
    if (kernel->finish_items) {
        const int64_t rest = kernel->finish_items(attention);
        for (int64_t item = 0; item < rest; item++) kernel->finish(attention, item, workspace.bytes);
    }
    attention->shared = NULL;
    const bool hold = guards_hold(&workspace) && guards_hold(&shared);
    free(workspace.block);
    free(shared.block);
    return hold;
}

/* A problem with what the reference makes of it, step by step as it is asked for. */
typedef struct {
    problem* made;
    result_set exact[STEPS];
    bool known[STEPS];
    void* output; /* the exact output as backward is given it */
} case_state;

static const result_set* exact_results(case_state* state, step step);

/* What a step reads besides the problem: results of the steps before it. */
static cpu_attention attention_of(case_state* state, step step) {
    cpu_attention attention = state->made->attention;
    if (step == FORWARD) return attention;
    const result_set* forward = exact_results(state, FORWARD);
    attention.logsumexp = forward->results[1].tensor.data;
    if (state->made->with_output) {
        const extent sizes = forward->results[0].sizes;
        if (state->output == NULL) {
            state->output = malloc(bytes_of_elements(attention.output.precision, reach_of_tensor(&attention.output, sizes)));
            if (state->output == NULL) abort();
            cpu_tensor output = attention.output;
            output.data = state->output;
            const double* exact = forward->results[0].tensor.data;
            for (int64_t row = 0; row < sizes.counts[0] * sizes.counts[1] * sizes.counts[2]; row++) {
                const int64_t i = row % sizes.counts[2], h = row / sizes.counts[2] % sizes.counts[1];
                store_row_double(&output, row / sizes.counts[2] / sizes.counts[1], h, i, sizes.counts[3], exact + row * sizes.counts[3]);
            }
        }
        attention.output.data = state->output;
    }
    if (step != D_VALUES) {
        attention.d_values = exact_results(state, D_VALUES)->results[0].tensor.data;
    }
    return attention;
}

static void run_reference(const problem* made, step step, cpu_attention* attention) {
    if (run_kernel(references[step], made, attention)) return;
    printf("%s wrote beyond its workspace\n", references[step]->name);
    exit(1);
}

static const result_set* exact_results(case_state* state, step step) {
    if (!state->known[step]) {
        cpu_attention attention = attention_of(state, step);
        state->exact[step] = take_results(state->made, step, true, &attention);
        if (step == BACKWARD) run_reference(state->made, BACKWARD_QUERY, &attention);
        run_reference(state->made, step == BACKWARD ? BACKWARD_KEY_VALUE : step, &attention);
        state->known[step] = true;
    }
    return &state->exact[step];
}

static void close_case(case_state* state) {
    for (int step = 0; step < STEPS; step++) free_results(&state->exact[step]);
    free(state->output);
    free_problem(state->made);
}

/* ---- Comparing ----------------------------------------------------------------------------------------------------------------------- */

/* Half the distance of FP16's denormal numbers. */
static const double SMALLEST_HALF = 0x1p-25;

/* Roundoff of the type that a result is written in. */
static double unit_of(cpu_precision precision) {
    switch (precision) {
    case CPU_FP16: return 0x1p-11;
    case CPU_BF16: return 0x1p-8;
    case CPU_FP64: return 0x1p-53;
    default: return 0x1p-24;
    }
}

static bool is_finite(double value) {
    return value - value == 0;
}

/* What the type of a result makes of a number. */
static double held_by(cpu_precision precision, double value) {
    switch (precision) {
    case CPU_FP64: return value;
    case CPU_FP16: return (double)float_from_half(half_from_double(value));
    case CPU_BF16: return (double)float_from_bfloat(bfloat_from_double(value));
    default: return (double)(float)value;
    }
}

/* What is known of a kernel after some problems. */
typedef struct {
    int64_t problems, failures;
    double largest_error; /* of an element, in units of the largest; of integer kernels, relative, of the root of the mean square */
    double largest_logsumexp_error;
} tally;

enum { MOST_MESSAGES = 5 };

static bool complain(tally* counts, const table_line* line, const problem* made, const char* what) {
    if (counts->failures++ < MOST_MESSAGES) {
        printf("%s: %s\n", line->kernel->name, what);
        print_problem(made);
    }
    return false;
}

static bool complain_of_element(tally* counts, const table_line* line, const problem* made, const result* of, const int64_t index[4],
                                double got, double expected) {
    char text[160];
    snprintf(text, sizeof text, "%s[%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "] is %.9g, not %.9g", of->name, index[0], index[1],
             index[2], index[3], got, expected);
    return complain(counts, line, made, text);
}

/* What errors of a result are measured in: its largest numbers. Slopes' gradients are sums over all elements of terms that cancel. */
static double scale_of(const problem* made, const result* exact) {
    const cpu_attention* attention = &made->attention;
    double scale = 1;
    FOR_EACH_INDEX(exact->sizes, index) {
        const double size = fabs(element_of(exact, index));
        if (is_finite(size)) scale = fmax(scale, size);
    }
    if (strcmp(exact->name, "grad_alibi_slopes") != 0) return scale;
    const int64_t rows = attention->batch_size * attention->seq_len_q, distance = attention->seq_len_q + attention->seq_len_kv;
    return fmax(scale, 0.05 * (double)(rows * distance));
}

/* The largest logsumexp of a problem. Its rounding to FP32, and that of scores of its size, is an error of all weights. */
static double largest_logsumexp(const result* logsumexp) {
    double largest = 0;
    FOR_EACH_INDEX(logsumexp->sizes, index) {
        const double size = fabs(element_of(logsumexp, index));
        if (is_finite(size)) largest = fmax(largest, size);
    }
    return largest;
}

/* Compares one result with the exact one; says what is wrong with it. */
static bool compare(tally* counts, const table_line* line, const problem* made, double logsumexp, const result* got, const result* exact) {
    const cpu_precision precision = got->tensor.precision;
    const bool is_logsumexp = strcmp(got->name, "logsumexp") == 0;
    const bool rounds_weights = line->arithmetic == INTEGER_ARITHMETIC && !is_logsumexp;
    const double allowed_fp32 = 2e-5 + 2 * 0x1p-24 * logsumexp;
    const double allowed = line->arithmetic == FP32_ARITHMETIC ? allowed_fp32 : line->arithmetic == FP64_ARITHMETIC ? 1e-11 : 5e-4;
    const double common_scale = is_logsumexp ? 0 : scale_of(made, exact);
    double error_squares = 0, squares = 0, worst = 0;
    FOR_EACH_INDEX(got->sizes, index) {
        const double value = element_of(got, index), expected = element_of(exact, index), held = held_by(precision, expected);
        if (is_finite(value) != is_finite(held) || (is_logsumexp && isinf(value) && isinf(held) && value != held)) {
            return complain_of_element(counts, line, made, got, index, value, expected);
        }
        if (!is_finite(value)) continue;
        const double error = fabs(value - expected), scale = is_logsumexp ? fmax(1, fabs(expected)) : common_scale;
        error_squares += error * error;
        squares += expected * expected;
        if (rounds_weights) continue;
        worst = fmax(worst, fmax(0, error - unit_of(precision) * fabs(expected)) / scale);
        if (error > allowed * scale + 1.01 * unit_of(precision) * fabs(expected) + SMALLEST_HALF) {
            return complain_of_element(counts, line, made, got, index, value, expected);
        }
    }
    if (rounds_weights) {
        worst = squares > 0 ? sqrt(error_squares / squares) : sqrt(error_squares);
        /* Of hundreds of problems the worst are off by 0.016: one weight is large, and many are small. */
        if (worst > 0.02 + unit_of(precision)) {
            char text[100];
            snprintf(text, sizeof text, "%s has a relative error of %.3g in the mean", got->name, worst);
            return complain(counts, line, made, text);
        }
    }
    double* so_far = is_logsumexp ? &counts->largest_logsumexp_error : &counts->largest_error;
    *so_far = fmax(*so_far, worst);
    return true;
}

static bool same_bits(const result* got, const result* expected) {
    bool same = true;
    FOR_EACH_INDEX(got->sizes, index) {
        const double a = element_of(got, index), b = element_of(expected, index);
        same &= a == b || (a != a && b != b);
    }
    return same;
}

/* Whether a problem is one for a kernel of this step and arithmetic. */
static bool suits(const table_line* line, const problem* made) {
    const cpu_attention* attention = &made->attention;
    if (made->has_double_operands && line->arithmetic != FP64_ARITHMETIC) return false;
    if (made->overflows && line->step != FORWARD) return false;
    if (references == QUICK && made->number % 8 != 0 && strstr(line->kernel->name, "_reference") != NULL) return false;
    return line->step != BACKWARD_BIAS || attention->grad_mask.strides[3] != 0 || attention->sinks || attention->alibi_slopes;
}

static void check(const table_line* line, case_state* state, tally* counts) {
    const problem* made = state->made;
    if (!suits(line, made)) return;
    cpu_attention attention = attention_of(state, line->step);
    cpu_attention twin = attention;
    result_set got = take_results(made, line->step, false, &attention);
    if (line->kernel->serves && !line->kernel->serves(&attention)) {
        free_results(&got);
        return;
    }
    counts->problems++;
    const result_set* exact = exact_results(state, line->step);
    const double logsumexp = largest_logsumexp(&exact_results(state, FORWARD)->results[1]);
    bool good = run_kernel(line->kernel, made, &attention) || complain(counts, line, made, "wrote beyond its workspace");
    for (int n = 0; n < got.count; n++) {
        good = good && (guards_hold(&got.results[n].memory) || complain(counts, line, made, "wrote beyond a result"));
        good = good && (gaps_hold(&got.results[n]) || complain(counts, line, made, "wrote between the elements of a result"));
        good = good && compare(counts, line, made, logsumexp, &got.results[n], &exact->results[n]);
    }
    const bool alone = made->number % 4 == 1; /* once more on one thread */
    if (good && (line->same_bits_as || alone)) {
        result_set others = take_results(made, line->step, false, &twin);
        if (alone) twin.threads = 1;
        run_kernel(line->same_bits_as ? line->same_bits_as : line->kernel, made, &twin);
        for (int n = 0; n < got.count && good; n++) {
            good = same_bits(&got.results[n], &others.results[n]) ||
                   complain(counts, line, made, "gives other bits than its twin, or than for one thread");
        }
        free_results(&others);
    }
    free_results(&got);
}

/* ---- The program --------------------------------------------------------------------------------------------------------------------- */

static bool names_set(const char* list, const char* name) {
    const size_t length = strlen(name);
    for (const char* at = strstr(list, name); at != NULL; at = strstr(at + 1, name)) {
        if ((at == list || at[-1] == ',') && (at[length] == ',' || at[length] == '\0')) return true;
    }
    return false;
}

/* Whether a kernel quantises to the bits that it must. */
static bool check_quantization(const cpu_quantization_kernel* kernel) {
    const uint64_t digest = digest_of_quantization(kernel);
    const bool same = digest == EXPECTED_DIGEST;
    printf("%-52s digest %016" PRIx64 "%s\n", kernel->name, digest, same ? "" : ": FAILED");
    return same;
}

int main(int argument_count, char** arguments) {
    const char *sets = NULL, *kernels = NULL;
    int64_t problems = 100, first = 0, work = 1 << 22;
    bool list = false;
    for (int n = 1; n < argument_count; n++) {
        const char* word = arguments[n];
        const char* value = n + 1 < argument_count ? arguments[n + 1] : "";
        if (strcmp(word, "--list") == 0) {
            list = true;
            continue;
        }
        if (strcmp(word, "--quick") == 0) {
            references = QUICK;
            continue;
        }
        if (strcmp(word, "--sets") == 0)
            sets = value;
        else if (strcmp(word, "--kernels") == 0)
            kernels = value;
        else if (strcmp(word, "--problems") == 0)
            problems = strtoll(value, NULL, 10);
        else if (strcmp(word, "--first") == 0)
            first = strtoll(value, NULL, 10);
        else if (strcmp(word, "--work") == 0)
            work = strtoll(value, NULL, 10);
        else {
            fprintf(stderr, "check_kernels: what is %s?\n", word);
            return 2;
        }
        n++;
    }
    bool chosen[LINES];
    tally counts[LINES] = {0};
    for (int n = 0; n < LINES; n++) {
        const char* set = SET_NAMES[TABLE[n].set];
        chosen[n] = (sets ? names_set(sets, set) : processor_has(TABLE[n].set)) && (!kernels || names_set(kernels, TABLE[n].kernel->name));
        if (list) printf("%-52s %-12s %s\n", TABLE[n].kernel->name, set, chosen[n] ? "" : "not run here");
    }
    if (list) return 0;
    for (int64_t number = first; number < first + problems; number++) {
        case_state state = {.made = make_problem(number, work)};
        for (int n = 0; n < LINES; n++) {
            if (chosen[n]) check(&TABLE[n], &state, &counts[n]);
        }
        close_case(&state);
    }
    bool good = true;
    for (int n = 0; n < LINES; n++) {
        if (!chosen[n]) continue;
        const bool passed = counts[n].failures == 0 && counts[n].problems > 0;
        printf("%-52s %4" PRId64 " problems, largest error %.1e", TABLE[n].kernel->name, counts[n].problems, counts[n].largest_error);
        if (TABLE[n].step == FORWARD) printf(", of logsumexp %.1e", counts[n].largest_logsumexp_error);
        printf("%s\n", passed ? "" : counts[n].problems > 0 ? ": FAILED" : ": served none");
        good &= passed;
    }
    if (kernels == NULL) {
        if (!sets || names_set(sets, SET_NAMES[BASELINE])) good &= check_quantization(&quantization_reference);
#if defined(__x86_64__)
        if (sets ? names_set(sets, SET_NAMES[AVX2]) : processor_has(AVX2)) good &= check_quantization(&quantization_reference_avx2);
        if (sets ? names_set(sets, SET_NAMES[AVX512]) : processor_has(AVX512)) good &= check_quantization(&quantization_reference_avx512);
#endif
    }
    return good ? 0 : 1;
}
