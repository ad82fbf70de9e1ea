#include "problems.h"

#include "random_numbers.h"

#include "shared/conversion.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- Tensors ------------------------------------------------------------------------------------------------------------------------- */

int64_t reach_of_tensor(const cpu_tensor* tensor, extent sizes) {
    int64_t last = 0;
    for (int axis = 0; axis < 4; axis++) {
        if (sizes.counts[axis] == 0) return 0;
        int64_t index = sizes.counts[axis] - 1;
        if (tensor->precision == CPU_INT4 && axis == 3) index -= index & 1;
        last += index * tensor->strides[axis];
    }
    return tensor->precision == CPU_INT4 ? last + 2 : last + 1;
}

size_t bytes_of_elements(cpu_precision precision, int64_t elements) {
    switch (precision) {
    case CPU_FP64: return (size_t)elements * 8;
    case CPU_FP32: return (size_t)elements * 4;
    case CPU_FP16:
    case CPU_BF16: return (size_t)elements * 2;
    case CPU_INT4: return (size_t)elements / 2;
    default: return (size_t)elements;
    }
}

/* Memory for an input. It ends at a page that nobody may touch, in every other problem it begins right after one, so that a kernel that reads
 * on is stopped. */
static void* take(problem* made, size_t bytes) {
    enum { PAGE = 1 << 16 }; /* no processor here has larger ones */
    if (made->piece_count == MOST_PIECES) abort();
    const size_t room = (bytes + PAGE - 1) / PAGE * PAGE, mapped = room + 2 * PAGE;
    char* memory = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const bool pages = memory != MAP_FAILED;
    if (!pages) memory = malloc(bytes > 0 ? bytes : 1); /* a PC without an operating system */
    if (memory == NULL || (pages && room > 0 && mprotect(memory + PAGE, room, PROT_READ | PROT_WRITE) != 0)) abort();
    made->pieces[made->piece_count].memory = memory;
    made->pieces[made->piece_count++].mapped = pages ? mapped : 0;
    if (!pages) return memory;
    return memory + PAGE + (made->number % 2 ? 0 : room - bytes);
}

/* Gives a tensor one of the layouts: by heads, by tokens, transposed, or with gaps between its rows. */
static void lay_out(generator* random, cpu_tensor* tensor, extent sizes) {
    const int64_t heads = sizes.counts[1], rows = sizes.counts[2], channels = sizes.counts[3];
    const bool nibbles = tensor->precision == CPU_INT4;
    int64_t* strides = tensor->strides;
    int64_t row = nibbles ? (channels + 1) / 2 * 2 : channels;
    switch (draw(random, 0, 5)) {
    case 0: /* batch, tokens, heads, channels */
        strides[3] = 1, strides[1] = row, strides[2] = heads * row, strides[0] = rows * heads * row;
        break;
    case 1: /* batch, heads, channels, tokens */
        strides[2] = nibbles ? 2 : 1, strides[3] = rows, strides[1] = rows * row, strides[0] = heads * rows * row;
        break;
    case 2: row += 2 * draw(random, 1, 9); /* gaps */ /* fall through */
    default: strides[3] = 1, strides[2] = row, strides[1] = rows * row, strides[0] = heads * rows * row; break;
    }
}

static void set_element(const cpu_tensor* tensor, int64_t at, double value) {
    switch (tensor->precision) {
    case CPU_FP64: ((double*)tensor->data)[at] = value; break;
    case CPU_FP32: ((float*)tensor->data)[at] = (float)value; break;
    case CPU_FP16: ((uint16_t*)tensor->data)[at] = half_from_double(value); break;
    case CPU_BF16: ((uint16_t*)tensor->data)[at] = bfloat_from_double(value); break;
    default: break;
    }
}

static bool is_quantized(const cpu_tensor* tensor) {
    return tensor->precision == CPU_INT8 || tensor->precision == CPU_INT4;
}

static int64_t index_of(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t d) {
    return row_offset(tensor, b, h, s) + d * tensor->strides[3];
}

/* Memory for a float tensor whose layout is known, with normal numbers in all of it, gaps too. */
static void fill_floats(problem* made, generator* random, cpu_tensor* tensor, extent sizes) {
    const int64_t count = reach_of_tensor(tensor, sizes);
    tensor->data = take(made, bytes_of_elements(tensor->precision, count));
    for (int64_t at = 0; at < count; at++) set_element(tensor, at, (double)draw_normal(random));
}

/* Scales, and in some problems zero points, of one of the granularities. Numbers come out about as large as normal ones. */
static void fill_scales(problem* made, generator* random, cpu_tensor* tensor, extent sizes) {
    const int64_t batches = sizes.counts[0], heads = sizes.counts[1], rows = sizes.counts[2], channels = sizes.counts[3];
    int64_t* strides = tensor->scale_strides;
    int64_t parts = 1;
    switch (draw(random, 0, 11)) {
    case 0: strides[0] = 0, strides[1] = 0, parts = 1, strides[2] = strides[3] = 0; break;           /* tensor */
    case 1: strides[0] = heads, strides[1] = 1; break;                                               /* head */
    case 2: parts = channels, strides[0] = heads * parts, strides[1] = parts, strides[3] = 1; break; /* channel */
    case 3: {                                                                                        /* group */
        tensor->scale_channels = draw(random, 1, channels);
        const int64_t groups = (channels + tensor->scale_channels - 1) / tensor->scale_channels;
        parts = rows * groups, strides[0] = heads * parts, strides[1] = parts, strides[2] = groups, strides[3] = 1;
        break;
    }
    case 4: /* block */
        tensor->scale_tokens = draw(random, 2, 70);
        parts = (rows + tensor->scale_tokens - 1) / tensor->scale_tokens, strides[0] = heads * parts, strides[1] = parts, strides[2] = 1;
        break;
    default: parts = rows, strides[0] = heads * parts, strides[1] = parts, strides[2] = 1; break; /* token */
    }
    const int64_t count = strides[1] == 0 ? 1 : batches * heads * parts;
    const float step = tensor->precision == CPU_INT8 ? 1.0f / 42 : 1.0f / 3;
    const bool even = chance(random, 30); /* all of them alike, about */
    tensor->scales = take(made, (size_t)count * sizeof(float));
    for (int64_t at = 0; at < count; at++) tensor->scales[at] = step * (even ? 1 : 0.5f + (float)draw_fraction(random));
    if (!chance(random, tensor->precision == CPU_INT4 ? 50 : 10)) return;
    const int64_t largest = tensor->precision == CPU_INT4 ? 4 : 40;
    tensor->zero_points = take(made, (size_t)count * sizeof(int32_t));
    for (int64_t at = 0; at < count; at++) tensor->zero_points[at] = (int32_t)draw(random, -largest, largest);
    /* Beyond what a byte holds, with a scale that keeps the numbers small: kernels of integers leave such a sequence to another one. */
    if (chance(random, 10)) {
        const int64_t at = draw(random, 0, count - 1);
        tensor->zero_points[at] = 300;
        tensor->scales[at] *= 0.01f;
    }
}

static void fill_codes(problem* made, generator* random, cpu_tensor* tensor, extent sizes) {
    const size_t bytes = bytes_of_elements(tensor->precision, reach_of_tensor(tensor, sizes));
    int8_t* codes = tensor->data = take(made, bytes);
    for (size_t at = 0; at < bytes; at++) {
        if (tensor->precision == CPU_INT4) {
            codes[at] = (int8_t)next_bits(random);
            continue;
        }
        const float code = draw_normal(random) * 42;
        codes[at] = (int8_t)(code < -128 ? -128 : code > 127 ? 127 : code);
    }
    fill_scales(made, random, tensor, sizes);
}

/* An operand of a precision, with everything that belongs to it. */
static cpu_tensor make_operand(problem* made, generator* random, cpu_precision precision, extent sizes) {
    cpu_tensor tensor = {.precision = precision, .scale_tokens = 1, .scale_channels = 1};
    lay_out(random, &tensor, sizes);
    if (is_quantized(&tensor)) {
        fill_codes(made, random, &tensor, sizes);
    } else {
        fill_floats(made, random, &tensor, sizes);
    }
    return tensor;
}

/* ---- Sizes and types ----------------------------------------------------------------------------------------------------------------- */

static void draw_sizes(generator* random, int64_t work, cpu_attention* attention) {
    attention->batch_size = DRAW_FROM(random, 1, 1, 2, 3);
    attention->num_kv_heads = DRAW_FROM(random, 1, 1, 2, 3);
    attention->num_heads = attention->num_kv_heads * DRAW_FROM(random, 1, 1, 2, 4, 7);
    attention->head_dim = chance(random, 40) ? DRAW_FROM(random, 32, 64, 64, 128, 256) : draw(random, 1, chance(random, 50) ? 40 : 256);
    attention->head_dim_v = chance(random, 60) ? attention->head_dim : draw(random, 1, chance(random, 50) ? 40 : 256);
    attention->seq_len_q = chance(random, 40) ? draw(random, 1, 4) : draw(random, 1, chance(random, 50) ? 70 : 200);
    attention->seq_len_kv = chance(random, 30) ? draw(random, 1, 20) : draw(random, 1, 400);
    /* The largest are cut down, one size after the other, so that each problem takes about as long at most. */
    while (true) {
        const int64_t products = attention->seq_len_q * attention->seq_len_kv * (attention->head_dim + attention->head_dim_v) / 2;
        if (attention->batch_size * attention->num_heads * products <= work) return;
        if (attention->batch_size > 1) {
            attention->batch_size--;
        } else if (attention->num_heads > attention->num_kv_heads && attention->num_kv_heads > 1) {
            attention->num_heads = attention->num_heads / attention->num_kv_heads;
            attention->num_kv_heads = 1;
        } else if (attention->num_heads > 2) {
            attention->num_heads = attention->num_kv_heads = 2;
        } else if (attention->seq_len_q > 33) {
            attention->seq_len_q = attention->seq_len_q * 3 / 4;
        } else if (attention->seq_len_kv > 40) {
            attention->seq_len_kv = attention->seq_len_kv * 3 / 4;
        } else {
            return;
        }
    }
}

static cpu_precision draw_float(generator* random) {
    return (cpu_precision)DRAW_FROM(random, CPU_FP32, CPU_FP32, CPU_FP16, CPU_BF16);
}

static cpu_precision draw_integer(generator* random) {
    return (cpu_precision)DRAW_FROM(random, CPU_INT8, CPU_INT8, CPU_INT4);
}

static void draw_precisions(generator* random, cpu_precision precisions[3]) {
    const int64_t kind = draw(random, 0, 99);
    for (int n = 0; n < 3; n++) {
        if (kind < 25)
            precisions[n] = CPU_FP32;
        else if (kind < 40)
            precisions[n] = n == 0 ? draw_float(random) : precisions[0];
        else if (kind < 80)
            precisions[n] = draw_integer(random);
        else if (kind < 95)
            precisions[n] = chance(random, 50) ? draw_float(random) : draw_integer(random);
        else
            precisions[n] = chance(random, 70) ? CPU_FP64 : draw_float(random);
    }
}

/* ---- Options ------------------------------------------------------------------------------------------------------------------------- */

static void draw_limits(problem* made, generator* random) {
    cpu_attention* attention = &made->attention;
    attention->window_left = attention->window_right = -1;
    attention->causal = chance(random, 35);
    if (chance(random, 30)) attention->lower_right = true;
    if (!attention->lower_right && chance(random, 20)) {
        attention->query_offset_stride = draw(random, 0, 1);
        int64_t* offsets = take(made, (size_t)attention->batch_size * sizeof(int64_t));
        for (int64_t b = 0; b < attention->batch_size; b++) offsets[b] = draw(random, -20, attention->seq_len_kv);
        attention->query_offsets = offsets;
    }
    if (chance(random, 15)) {
        if (chance(random, 70)) attention->window_left = draw(random, 0, chance(random, 50) ? 8 : 150);
        if (chance(random, 50)) attention->window_right = draw(random, 0, chance(random, 50) ? 8 : 150);
    }
    if (chance(random, 25)) {
        int64_t* lengths = take(made, (size_t)attention->batch_size * sizeof(int64_t));
        for (int64_t b = 0; b < attention->batch_size; b++) lengths[b] = draw(random, 0, attention->seq_len_kv);
        attention->kv_lengths = lengths;
    }
}

static void draw_mask(problem* made, generator* random) {
    cpu_attention* attention = &made->attention;
    cpu_tensor* mask = &attention->mask;
    made->mask_extent = (extent){{attention->batch_size, attention->num_heads, attention->seq_len_q, attention->seq_len_kv}};
    if (!chance(random, 25)) return;
    mask->precision = chance(random, 50) ? CPU_BOOL : chance(random, 15) ? CPU_FP64 : draw_float(random);
    for (int axis = 0; axis < 3; axis++) {
        if (chance(random, 40)) made->mask_extent.counts[axis] = 1;
    }
    int64_t step = 1;
    for (int axis = 3; axis >= 0; axis--) {
        const int64_t count = made->mask_extent.counts[axis];
        const bool broadcasts = axis < 3 && count == 1;
        mask->strides[axis] = broadcasts ? 0 : step;
        step *= count;
    }
    mask->data = take(made, bytes_of_elements(mask->precision, step));
    for (int64_t at = 0; at < step; at++) {
        const bool excluded = chance(random, 20);
        if (mask->precision == CPU_BOOL) {
            ((uint8_t*)mask->data)[at] = !excluded;
        } else {
            set_element(mask, at, excluded ? -(double)INFINITY : (double)draw_normal(random));
        }
    }
}

static float* take_floats(problem* made, int64_t count) {
    return take(made, (size_t)count * sizeof(float));
}

static void draw_options(problem* made, generator* random) {
    cpu_attention* attention = &made->attention;
    attention->softmax_scale = (double)((float)(0.5 + draw_fraction(random)) / sqrtf((float)attention->head_dim));
    if (chance(random, 5)) attention->softmax_scale = -attention->softmax_scale;
    if (chance(random, 50)) { /* half of the problems are plain */
        attention->window_left = attention->window_right = -1;
        attention->causal = chance(random, 30);
        attention->lower_right = chance(random, 30);
        return;
    }
    draw_limits(made, random);
    draw_mask(made, random);
    if (chance(random, 20)) attention->softcap = 2 + 20 * draw_fraction(random);
    if (chance(random, 20)) {
        float* slopes = take_floats(made, attention->num_heads);
        for (int64_t h = 0; h < attention->num_heads; h++) slopes[h] = 0.1f * (float)draw_fraction(random);
        attention->alibi_slopes = slopes;
    }
    if (chance(random, 25)) {
        float* sinks = take_floats(made, attention->num_heads);
        for (int64_t h = 0; h < attention->num_heads; h++) sinks[h] = chance(random, 10) ? -INFINITY : 2 * draw_normal(random);
        attention->sinks = sinks;
    }
    if (chance(random, 12)) {
        attention->dropout_p = chance(random, 10) ? 1 : draw_fraction(random);
        attention->seed = next_bits(random);
        attention->dropout_offset = (uint32_t)draw(random, 0, 3);
    }
}

/* ---- What is not ordinary ------------------------------------------------------------------------------------------------------------ */

/* Sets every channel of a row. */
static void set_row(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s, int64_t channels, double value) {
    for (int64_t d = 0; d < channels; d++) set_element(tensor, index_of(tensor, b, h, s, d), value);
}

/* Excludes a key from every row by the mask, which is boolean or additive. */
static void exclude_key(problem* made, int64_t s) {
    const cpu_tensor* mask = &made->attention.mask;
    const int64_t* counts = made->mask_extent.counts;
    for (int64_t line = 0; line < counts[0] * counts[1] * counts[2]; line++) {
        const int64_t at = line * counts[3] + s;
        if (mask->precision == CPU_BOOL) {
            ((uint8_t*)mask->data)[at] = 0;
        } else {
            set_element(mask, at, -(double)INFINITY);
        }
    }
}

static void draw_special(problem* made, generator* random) {
    cpu_attention* attention = &made->attention;
    const int64_t b = draw(random, 0, attention->batch_size - 1), h = draw(random, 0, attention->num_kv_heads - 1);
    const int64_t s = draw(random, 0, attention->seq_len_kv - 1);
    const double odd = chance(random, 50) ? (double)NAN : (double)INFINITY;
    made->special = "none";
    if (attention->kv_lengths && !is_quantized(&attention->value) && chance(random, 50)) {
        for (int64_t j = attention->kv_lengths[b]; j < attention->seq_len_kv; j++) {
            set_row(&attention->value, b, h, j, attention->head_dim_v, odd);
            if (!is_quantized(&attention->key)) set_row(&attention->key, b, h, j, attention->head_dim, odd);
        }
        made->special = "values behind the length are not finite";
        return;
    }
    if (attention->mask.data && chance(random, 40)) {
        exclude_key(made, s);
        if (!is_quantized(&attention->value)) set_row(&attention->value, b, h, s, attention->head_dim_v, odd);
        if (!is_quantized(&attention->key)) set_row(&attention->key, b, h, s, attention->head_dim, odd);
        made->special = "a masked key is not finite";
        return;
    }
    if (attention->mask.data && attention->mask.precision != CPU_BOOL && chance(random, 15)) {
        set_element(&attention->mask, draw(random, 0, made->mask_extent.counts[3] - 1), odd);
        made->special = "the mask is not finite";
        return;
    }
    if (!is_quantized(&attention->value) && chance(random, 8)) {
        set_element(&attention->value, index_of(&attention->value, b, h, s, draw(random, 0, attention->head_dim_v - 1)), odd);
        made->special = "a value is not finite";
        return;
    }
    if (!is_quantized(&attention->key) && chance(random, 5)) {
        set_element(&attention->key, index_of(&attention->key, b, h, s, draw(random, 0, attention->head_dim - 1)), odd);
        made->special = "a key is not finite";
        return;
    }
    if (attention->key.precision == CPU_FP32 && attention->query.precision == CPU_FP32 && chance(random, 8)) {
        /* In one channel only, so that no score is the small difference of large products. */
        const int64_t i = draw(random, 0, attention->seq_len_q - 1);
        set_element(&attention->query, index_of(&attention->query, b, h * (attention->num_heads / attention->num_kv_heads), i, 0), 1e20);
        set_element(&attention->key, index_of(&attention->key, b, h, s, 0), -1e20);
        made->special = "scores beyond FP32";
        made->overflows = true;
    }
}

/* ---- Problems ------------------------------------------------------------------------------------------------------------------------ */

static cpu_tensor make_result(generator* random, cpu_precision precision, extent sizes) {
    cpu_tensor tensor = {.precision = precision, .scale_tokens = 1, .scale_channels = 1};
    lay_out(random, &tensor, sizes);
    return tensor;
}

problem* make_problem(int64_t number, int64_t work) {
    generator random = {.state = (uint64_t)number * 0xD1342543DE82EF95u + 1};
    problem* made = calloc(1, sizeof *made);
    if (made == NULL) abort();
    made->number = number;
    cpu_attention* attention = &made->attention;
    attention->float_statistics = true;
    attention->threads = (int32_t)draw(&random, 1, 9);
    draw_sizes(&random, work, attention);
    const int64_t batches = attention->batch_size, heads = attention->num_heads, kv_heads = attention->num_kv_heads;
    const extent queries = {{batches, heads, attention->seq_len_q, attention->head_dim}};
    const extent keys = {{batches, kv_heads, attention->seq_len_kv, attention->head_dim}};
    const extent values = {{batches, kv_heads, attention->seq_len_kv, attention->head_dim_v}};
    const extent outputs = {{batches, heads, attention->seq_len_q, attention->head_dim_v}};

    cpu_precision precisions[3];
    draw_precisions(&random, precisions);
    attention->query = make_operand(made, &random, precisions[0], queries);
    attention->key = make_operand(made, &random, precisions[1], keys);
    attention->value = make_operand(made, &random, precisions[2], values);
    for (int n = 0; n < 3; n++) made->has_double_operands |= precisions[n] == CPU_FP64;
    if (is_quantized(&attention->query) && is_quantized(&attention->key)) {
        attention->query.rotated = attention->key.rotated = chance(&random, 25);
    }
    if (is_quantized(&attention->key) && chance(&random, 25)) {
        attention->key.channel_means = take_floats(made, batches * kv_heads * attention->head_dim);
        attention->key.mean_strides[0] = kv_heads * attention->head_dim;
        attention->key.mean_strides[1] = attention->head_dim;
        for (int64_t at = 0; at < batches * kv_heads * attention->head_dim; at++) {
            attention->key.channel_means[at] = 0.3f * draw_normal(&random);
        }
    }
    draw_options(made, &random);
    draw_special(made, &random);

    attention->output = make_result(&random, chance(&random, 15) ? CPU_FP64 : draw_float(&random), outputs);
    made->with_output = chance(&random, 50);
    attention->grad_output = make_operand(made, &random, draw_float(&random), outputs);
    if (chance(&random, 50)) {
        const int64_t count = batches * heads * attention->seq_len_q;
        float* gradients = take_floats(made, count);
        for (int64_t at = 0; at < count; at++) gradients[at] = draw_normal(&random);
        attention->grad_logsumexp = gradients;
    }
    attention->grad_query = make_result(&random, draw_float(&random), queries);
    attention->grad_key = make_result(&random, draw_float(&random), keys);
    attention->grad_value = make_result(&random, draw_float(&random), values);
    if (attention->mask.data && attention->mask.precision != CPU_BOOL) {
        attention->grad_mask = attention->mask;
        attention->grad_mask.data = NULL;
        attention->grad_mask.precision = CPU_FP32;
    }
    return made;
}

void free_problem(problem* made) {
    for (int n = 0; n < made->piece_count; n++) {
        if (made->pieces[n].mapped == 0) {
            free(made->pieces[n].memory);
        } else {
            munmap(made->pieces[n].memory, made->pieces[n].mapped);
        }
    }
    free(made);
}

static const char* name_of_precision(cpu_precision precision) {
    switch (precision) {
    case CPU_FP32: return "fp32";
    case CPU_FP16: return "fp16";
    case CPU_BF16: return "bf16";
    case CPU_FP64: return "fp64";
    case CPU_INT4: return "int4";
    case CPU_INT8: return "int8";
    case CPU_BOOL: return "bool";
    }
    return "?";
}

static void print_operand(const char* name, const cpu_tensor* tensor) {
    printf(", %s %s", name, name_of_precision(tensor->precision));
    printf(" by (%" PRId64 ", %" PRId64 ")", tensor->strides[2], tensor->strides[3]);
    if (!is_quantized(tensor)) return;
    printf(" scales (%" PRId64 ", %" PRId64 ")", tensor->scale_strides[2], tensor->scale_strides[3]);
    printf("%s%s%s", tensor->zero_points ? " zero points" : "", tensor->channel_means ? " means" : "", tensor->rotated ? " rotated" : "");
}

void print_problem(const problem* made) {
    const cpu_attention* attention = &made->attention;
    printf("    problem %" PRId64 ": batch %" PRId64 ", heads %" PRId64 " on %" PRId64, made->number, attention->batch_size,
           attention->num_heads, attention->num_kv_heads);
    printf(", rows %" PRId64 ", keys %" PRId64 ", channels %" PRId64 " and %" PRId64, attention->seq_len_q, attention->seq_len_kv,
           attention->head_dim, attention->head_dim_v);
    print_operand("query", &attention->query);
    print_operand("key", &attention->key);
    print_operand("value", &attention->value);
    if (attention->mask.data) printf(", mask %s", name_of_precision(attention->mask.precision));
    printf("%s%s%s", attention->causal ? ", causal" : "", attention->lower_right ? ", lower right" : "",
           attention->query_offsets ? ", offsets" : "");
    printf("%s%s%s", attention->kv_lengths ? ", lengths" : "", attention->softcap > 0 ? ", softcap" : "",
           attention->alibi_slopes ? ", slopes" : "");
    printf("%s%s", attention->sinks ? ", sinks" : "", attention->dropout_p > 0 ? ", dropout" : "");
    if (attention->window_left >= 0 || attention->window_right >= 0) {
        printf(", window (%" PRId64 ", %" PRId64 ")", attention->window_left, attention->window_right);
    }
    printf(", special: %s\n", made->special);
}
