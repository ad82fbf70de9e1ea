#include "fuzzing.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("FINDING: ", stderr);
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    va_end(arguments);
    abort();
}

/* ---- Bytes --------------------------------------------------------------------------------------------------------------------------- */

uint8_t take(input* from) {
    if (from->left == 0) return 0;
    from->left--;
    return *from->next++;
}

uint64_t take_bytes(input* from, int count) {
    uint64_t number = 0;
    for (int k = 0; k < count; k++) number |= (uint64_t)take(from) << 8 * k;
    return number;
}

int take_upto(input* from, int most) {
    return take(from) % (most + 1);
}

bool take_bool(input* from) {
    return take(from) & 1;
}

uint64_t draw(numbers* from) { /* splitmix64 */
    uint64_t mixed = from->state += 0x9E3779B97F4A7C15u;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
    return mixed ^ mixed >> 31;
}

double draw_value(numbers* from) {
    return ((double)(draw(from) % 257) - 128) / 128;
}

/* ---- Memory -------------------------------------------------------------------------------------------------------------------------- */

enum { ARENA_BYTES = 1 << 24, RED_ZONE = 64, MOST_ZONES = 256, ZONE_BYTE = 0xA5 };

static _Alignas(4096) uint8_t arena[ARENA_BYTES];
static size_t arena_used = ARENA_BYTES;
static size_t zones[MOST_ZONES]; /* where those between pieces begin */
static int zone_count;

static void check_zone(const uint8_t* zone) {
#ifdef POISONED
    (void)zone; /* nobody can have written there unnoticed */
#else
    for (int k = 0; k < RED_ZONE; k++) {
        if (zone[k] != ZONE_BYTE) fail("a byte was written %d bytes beyond a piece of memory", k + 1);
    }
#endif
}

void arena_reset(void) {
    for (int n = 0; n < zone_count; n++) check_zone(arena + zones[n]);
    zone_count = 0;
    POISON(arena, arena_used);
    arena_used = RED_ZONE;
}

void* arena_take(size_t bytes) {
    const size_t first = arena_used, rounded = (bytes + 7) & ~(size_t)7;
    if (rounded > ARENA_BYTES - RED_ZONE - first || zone_count == MOST_ZONES) fail("the arena is too small");
    arena_used = first + rounded + RED_ZONE;
    SHOW(arena + first, rounded + RED_ZONE);
    memset(arena + first, 0xFF, bytes);
    zones[zone_count++] = first + bytes;
    memset(arena + first + bytes, ZONE_BYTE, rounded - bytes + RED_ZONE);
    POISON(arena + first + bytes, rounded - bytes + RED_ZONE);
    return arena + first;
}

/* ---- Contexts ------------------------------------------------------------------------------------------------------------------------ */

mfa_context_t* context_of(const char* kernels) {
    enum { MOST = 8 };
    static const char* names[MOST];
    static mfa_context_t* made[MOST];
    int place = 0;
    for (; place < MOST && names[place]; place++) {
        if (strcmp(names[place], kernels) == 0) return made[place];
    }
    if (place == MOST) fail("there are too many kinds of contexts: this is an error of the target");
    setenv("MFA_KERNELS", kernels, 1);
    if (kernels[0] == 0) unsetenv("MFA_KERNELS");
    const mfa_context_options_t options = {.struct_size = sizeof options, .device = MFA_DEVICE_CPU, .num_threads = 1};
    const int32_t status = mfa_create_context_with_options(&options, &made[place]);
    if (status != MFA_SUCCESS && status != MFA_ERROR_DEVICE_UNAVAILABLE) fail("a context cannot be made: %s", mfa_last_error(NULL));
    names[place] = kernels;
    return made[place];
}

/* ---- Tensors ------------------------------------------------------------------------------------------------------------------------- */

bool is_quantized(int32_t precision) {
    return precision == MFA_PRECISION_INT8 || precision == MFA_PRECISION_INT4;
}

int64_t element_count(const mfa_tensor_t* tensor) {
    return tensor->shape[0] * tensor->shape[1] * tensor->shape[2] * tensor->shape[3];
}

static int64_t blocks_of(int64_t size, int64_t of) {
    return (size + of - 1) / of;
}

int64_t scale_count(const mfa_quantization_t* quantization, const int64_t shape[4]) {
    const int64_t heads = shape[0] * shape[1];
    switch (quantization->granularity) {
    case MFA_GRANULARITY_HEAD: return heads;
    case MFA_GRANULARITY_TOKEN: return heads * shape[2];
    case MFA_GRANULARITY_BLOCK: return heads * blocks_of(shape[2], quantization->block_size);
    case MFA_GRANULARITY_CHANNEL: return heads * shape[3];
    case MFA_GRANULARITY_GROUP: return heads * shape[2] * blocks_of(shape[3], quantization->group_size);
    default: return 1;
    }
}

int64_t scale_index(const mfa_quantization_t* quantization, const int64_t shape[4], const int64_t index[4]) {
    const int64_t head = index[0] * shape[1] + index[1];
    switch (quantization->granularity) {
    case MFA_GRANULARITY_HEAD: return head;
    case MFA_GRANULARITY_TOKEN: return head * shape[2] + index[2];
    case MFA_GRANULARITY_BLOCK: return head * blocks_of(shape[2], quantization->block_size) + index[2] / quantization->block_size;
    case MFA_GRANULARITY_CHANNEL: return head * shape[3] + index[3];
    case MFA_GRANULARITY_GROUP:
        return (head * shape[2] + index[2]) * blocks_of(shape[3], quantization->group_size) + index[3] / quantization->group_size;
    default: return 0;
    }
}

/* The first byte of an element. */
static uint8_t* byte_of(const mfa_tensor_t* tensor, const int64_t index[4]) {
    const bool nibbles = tensor->precision == MFA_PRECISION_INT4;
    const int64_t channel = nibbles ? index[3] - (index[3] & 1) : index[3];
    const int64_t at =
        index[0] * tensor->strides[0] + index[1] * tensor->strides[1] + index[2] * tensor->strides[2] + channel * tensor->strides[3];
    return (uint8_t*)tensor->data + (nibbles ? at / 2 : at * (int64_t)precision_bytes(tensor->precision));
}

uint64_t load_bits(const mfa_tensor_t* tensor, const int64_t index[4]) {
    const uint8_t* byte = byte_of(tensor, index);
    if (tensor->precision == MFA_PRECISION_INT4) return index[3] & 1 ? *byte >> 4 : *byte & 15;
    uint64_t bits = 0;
    memcpy(&bits, byte, precision_bytes(tensor->precision));
    return bits;
}

void store_bits(const mfa_tensor_t* tensor, const int64_t index[4], uint64_t bits) {
    uint8_t* byte = byte_of(tensor, index);
    if (tensor->precision == MFA_PRECISION_INT4) {
        *byte = (uint8_t)(index[3] & 1 ? (*byte & 15) | (bits & 15) << 4 : (*byte & 0xF0) | (bits & 15));
    } else {
        memcpy(byte, &bits, precision_bytes(tensor->precision));
    }
}

double load_number(const mfa_tensor_t* tensor, const int64_t index[4]) {
    const uint64_t bits = load_bits(tensor, index);
    switch (tensor->precision) {
    case MFA_PRECISION_FP64: {
        double number;
        memcpy(&number, &bits, sizeof number);
        return number;
    }
    case MFA_PRECISION_FP16: {
        _Float16 number;
        memcpy(&number, &bits, sizeof number);
        return (double)number;
    }
    case MFA_PRECISION_INT8: return (int8_t)bits;
    case MFA_PRECISION_INT4: return (int)bits - (bits & 8 ? 16 : 0);
    case MFA_PRECISION_BOOL: return bits != 0;
    default: {
        const uint32_t word = (uint32_t)(tensor->precision == MFA_PRECISION_BF16 ? bits << 16 : bits);
        float number;
        memcpy(&number, &word, sizeof number);
        return (double)number;
    }
    }
}

void store_number(const mfa_tensor_t* tensor, const int64_t index[4], double number) {
    uint64_t bits = 0;
    const float rounded = (float)number;
    switch (tensor->precision) {
    case MFA_PRECISION_FP64: memcpy(&bits, &number, sizeof number); break;
    case MFA_PRECISION_FP16: {
        const _Float16 half = (_Float16)number;
        memcpy(&bits, &half, sizeof half);
        break;
    }
    case MFA_PRECISION_BF16: { /* cut off: contents need not be rounded to the nearest */
        memcpy(&bits, &rounded, sizeof rounded);
        bits >>= 16;
        break;
    }
    case MFA_PRECISION_FP32: memcpy(&bits, &rounded, sizeof rounded); break;
    default: bits = (uint64_t)(int64_t)number; break;
    }
    store_bits(tensor, index, bits);
}

/* The same as units that do not overlap: of INT4, bytes of two codes. */
static void shape_in_units(const mfa_tensor_t* tensor, int64_t shape[4]) {
    memcpy(shape, tensor->shape, 4 * sizeof *shape);
    if (tensor->precision == MFA_PRECISION_INT4) shape[3] = (shape[3] + 1) / 2;
}

/* Takes memory for units at these strides, and sets the tensor's own strides and address. */
static void place(view* made, const int64_t strides[4]) {
    mfa_tensor_t* tensor = &made->tensor;
    int64_t shape[4], below = 0, above = 0;
    shape_in_units(tensor, shape);
    const bool empty = element_count(tensor) == 0;
    for (int axis = 0; axis < 4; axis++) {
        const int64_t span = (shape[axis] - 1) * strides[axis];
        if (span < 0) below -= span;
        if (span > 0) above += span;
        tensor->strides[axis] = strides[axis] * (tensor->precision == MFA_PRECISION_INT4 && axis < 3 ? 2 : 1);
    }
    const size_t unit = precision_bytes(tensor->precision);
    made->bytes = empty ? 0 : (size_t)(below + above + 1) * unit;
    made->memory = arena_take(made->bytes);
    tensor->data = empty ? NULL : made->memory + (size_t)below * unit;
}

static void begin(view* made, int32_t precision, const int64_t shape[4]) {
    memset(made, 0, sizeof *made);
    made->tensor.struct_size = sizeof made->tensor;
    made->tensor.precision = precision;
    memcpy(made->tensor.shape, shape, sizeof made->tensor.shape);
    made->quantization.struct_size = sizeof made->quantization;
    made->quantization.block_size = 1;
    made->quantization.group_size = 1;
}

void make_compact(view* made, int32_t precision, const int64_t shape[4]) {
    begin(made, precision, shape);
    int64_t units[4], strides[4], stride = 1;
    shape_in_units(&made->tensor, units);
    for (int axis = 3; axis >= 0; axis--) {
        strides[axis] = stride;
        stride *= units[axis];
    }
    place(made, strides);
}

void make_strided(view* made, int32_t precision, const int64_t shape[4], bool may_broadcast, input* from) {
    begin(made, precision, shape);
    int64_t units[4], strides[4], stride = 1;
    shape_in_units(&made->tensor, units);
    const int order = take_upto(from, 23), gaps = take(from), turned = take(from);
    int left[4] = {3, 2, 1, 0}, choice = order;
    for (int count = 4; count > 0; count--) {
        const int chosen = choice % count;
        choice /= count;
        const int axis = left[chosen];
        memmove(left + chosen, left + chosen + 1, (size_t)(count - chosen - 1) * sizeof *left);
        strides[axis] = stride;
        if (may_broadcast && (turned >> (axis + 4) & 1)) {
            strides[axis] = 0;
            continue;
        }
        stride = stride * (units[axis] > 0 ? units[axis] : 1) + (gaps >> 2 * axis & 3);
        if (turned >> axis & 1) strides[axis] = -strides[axis];
    }
    place(made, strides);
}

void make_scales(view* made, bool with_zero_points, bool with_means, numbers* from) {
    mfa_quantization_t* quantization = &made->quantization;
    const int64_t* shape = made->tensor.shape;
    const int64_t count = scale_count(quantization, shape), means = shape[0] * shape[1] * shape[3];
    quantization->scales = arena_take((size_t)count * sizeof(float));
    for (int64_t k = 0; k < count; k++) {
        quantization->scales[k] = (float)(1 + draw(from) % 31) / (made->tensor.precision == MFA_PRECISION_INT8 ? 4096 : 256);
    }
    if (with_zero_points) {
        quantization->zero_points = arena_take((size_t)count * sizeof(int32_t));
        for (int64_t k = 0; k < count; k++) quantization->zero_points[k] = (int32_t)(draw(from) % 17) - 8;
    }
    if (with_means) {
        quantization->channel_means = arena_take((size_t)means * sizeof(float));
        for (int64_t k = 0; k < means; k++) quantization->channel_means[k] = (float)draw_value(from);
    }
    made->tensor.quantization = quantization;
}

/* The number that an element stands for, but for a rotation. */
static double real_number(const view* of, const int64_t index[4]) {
    const double number = load_number(&of->tensor, index);
    const mfa_quantization_t* quantization = of->tensor.quantization;
    if (!is_quantized(of->tensor.precision) || quantization == NULL) return number;
    const int64_t* shape = of->tensor.shape;
    const int64_t at = scale_index(quantization, shape, index);
    const double zero_point = quantization->zero_points ? quantization->zero_points[at] : 0;
    const double mean =
        quantization->channel_means ? (double)quantization->channel_means[(index[0] * shape[1] + index[1]) * shape[3] + index[3]] : 0;
    return (double)quantization->scales[at] * (number - zero_point) + mean;
}

void check_gaps(const view* of, const char* name) {
    if (of->bytes == 0) return;
    uint8_t* written = calloc(of->bytes, 1);
    if (written == NULL) fail("no memory");
    FOR_EACH_INDEX(of->tensor.shape, index) {
        memset(written + (byte_of(&of->tensor, index) - of->memory), 1, precision_bytes(of->tensor.precision));
    }
    for (size_t k = 0; k < of->bytes; k++) {
        if (!written[k] && of->memory[k] != 0xFF) fail("byte %zu of %s, between its elements, was written", k, name);
    }
    free(written);
}

/* ---- Problems ------------------------------------------------------------------------------------------------------------------------ */

static const int32_t OPERANDS[8] = {MFA_PRECISION_FP32, MFA_PRECISION_FP16, MFA_PRECISION_BF16, MFA_PRECISION_INT8,
                                    MFA_PRECISION_INT4, MFA_PRECISION_INT8, MFA_PRECISION_FP32, MFA_PRECISION_FP64};
static const int32_t FLOATS[4] = {MFA_PRECISION_FP32, MFA_PRECISION_FP16, MFA_PRECISION_BF16, MFA_PRECISION_FP64};

/* A size that is mostly small, since time is better spent on many problems than on large ones. */
static int64_t take_size(input* from, int small, int large) {
    const int byte = take(from);
    return byte < 248 ? byte % (small + 1) : small + (byte - 247) * (large - small) / 8;
}

static void draw_elements(view* made, bool special, numbers* from) {
    const mfa_tensor_t* tensor = &made->tensor;
    FOR_EACH_INDEX(tensor->shape, index) {
        if (is_quantized(tensor->precision)) {
            store_bits(tensor, index, draw(from) & 255);
            continue;
        }
        const uint64_t choice = special ? draw(from) % 32 : 4;
        store_number(tensor, index,
                     choice == 0   ? NAN
                     : choice == 1 ? INFINITY
                     : choice == 2 ? -INFINITY
                     : choice == 3 ? 1e-40
                                   : draw_value(from));
    }
}

static void make_operand(view* made, int32_t precision, const int64_t shape[4], bool special, bool is_key, input* from, numbers* values) {
    make_strided(made, precision, shape, true, from);
    draw_elements(made, special, values);
    if (!is_quantized(precision)) return;
    mfa_quantization_t* quantization = &made->quantization;
    const int choice = take(from);
    if (choice % 7 == 6) return; /* scale 1, zero point 0 */
    quantization->granularity = choice % 7;
    quantization->block_size = 1 + (uint32_t)(choice >> 3 & 3) * 2;
    quantization->group_size = 1 + (uint32_t)(choice >> 3 & 3) * 2;
    make_scales(made, choice >> 5 & 1, is_key && (choice >> 6 & 1), values);
}

static void make_scheme(mfa_quantization_scheme_t* made, const mfa_quantization_scheme_t** place, bool is_key, input* from) {
    const int choice = take(from);
    *made = (mfa_quantization_scheme_t){
        .struct_size = sizeof *made,
        .precision = choice & 1 ? MFA_PRECISION_INT8 : MFA_PRECISION_INT4,
        .granularity = (choice >> 1) % 6,
        .block_size = 3,
        .group_size = 2,
        .asymmetric = choice >> 5 & 1,
        .smooth = is_key && (choice >> 6 & 1),
    };
    *place = made;
}

/* An array of statistics: float, double where an operand is FP64. */
static void* make_statistics(int64_t count, bool doubles, double scale, numbers* from) {
    void* made = arena_take((size_t)count * (doubles ? 8 : 4));
    for (int64_t k = 0; k < count && from; k++) {
        const double value = scale * draw_value(from);
        if (doubles)
            ((double*)made)[k] = value;
        else
            ((float*)made)[k] = (float)value;
    }
    return made;
}

static bool has_doubles(const problem* made) {
    return made->query.tensor.precision == MFA_PRECISION_FP64 || made->key.tensor.precision == MFA_PRECISION_FP64 ||
           made->value.tensor.precision == MFA_PRECISION_FP64;
}

static bool is_coded(const view* of, const mfa_quantization_scheme_t* scheme) {
    return of->tensor.quantization != NULL || scheme != NULL;
}

static void set_pointers(problem* made) {
    mfa_attention_t* attention = &made->attention;
    attention->query = &made->query.tensor;
    attention->key = &made->key.tensor;
    attention->value = &made->value.tensor;
    attention->output = &made->output.tensor;
    if (attention->mask) attention->mask = &made->mask.tensor;
    if (attention->kv_lengths) attention->kv_lengths = made->lengths;
    if (attention->query_offsets) attention->query_offsets = made->offsets;
    mfa_attention_gradients_t* gradients = &made->gradients;
    gradients->struct_size = sizeof *gradients;
    gradients->grad_output = &made->grad_output.tensor;
    gradients->grad_query = &made->grad_query.tensor;
    gradients->grad_key = &made->grad_key.tensor;
    gradients->grad_value = &made->grad_value.tensor;
    if (gradients->grad_mask) gradients->grad_mask = &made->grad_mask.tensor;
}

void make_problem(problem* made, input* from, bool fused, bool special) {
    memset(made, 0, sizeof *made);
    mfa_attention_t* attention = &made->attention;
    if (mfa_attention_initialize(attention, sizeof *attention) != MFA_SUCCESS) fail("a problem cannot be initialised");
    const int64_t batches = take_upto(from, 2), kv_heads = 1 + take_upto(from, 1), group = 1 + take_upto(from, 2);
    const int64_t rows = take_size(from, 5, 40), keys = take_size(from, 9, 140);
    const int64_t channels = 1 + take_size(from, 8, 40), value_channels = take_bool(from) ? channels : 1 + take_size(from, 8, 40);
    const int types = take(from), more = take(from), extras = take(from), choices = take(from);
    numbers values = {take_bytes(from, 2)};
    made->special = special && (choices & 1);
    made->heads = kv_heads * group;
    made->rows = batches * made->heads * rows;

    const int64_t queries[4] = {batches, made->heads, rows, channels}, key_shape[4] = {batches, kv_heads, keys, channels};
    const int64_t value_shape[4] = {batches, kv_heads, keys, value_channels}, outputs[4] = {batches, made->heads, rows, value_channels};
    make_operand(&made->query, OPERANDS[types & 7], queries, made->special, false, from, &values);
    make_operand(&made->key, OPERANDS[types >> 3 & 7], key_shape, made->special, true, from, &values);
    make_operand(&made->value, OPERANDS[(types >> 6) | (more & 4)], value_shape, made->special, false, from, &values);
    const bool doubles = has_doubles(made);
    make_strided(&made->output, FLOATS[more & 3], outputs, false, from);
    attention->logsumexp = make_statistics(made->rows, doubles, 0, NULL);
    if (fused && (more & 8)) {
        if (!is_quantized(made->query.tensor.precision)) make_scheme(&made->query_scheme, &attention->quantize_query, false, from);
        if (!is_quantized(made->key.tensor.precision)) make_scheme(&made->key_scheme, &attention->quantize_key, true, from);
        if (!is_quantized(made->value.tensor.precision)) make_scheme(&made->value_scheme, &attention->quantize_value, false, from);
    }

    if (fused && is_coded(&made->query, attention->quantize_query) && is_coded(&made->key, attention->quantize_key) && take_bool(from)) {
        made->query.quantization.rotated = made->key.quantization.rotated = 1;
        made->query_scheme.rotate = made->key_scheme.rotate = 1;
    }

    const double scales[4] = {1 / sqrt((double)channels), 1, 0, -0.5};
    attention->softmax_scale = scales[more >> 4 & 3];
    attention->causal = extras & 1;
    attention->alignment = extras >> 1 & 1;
    attention->softcap = extras & 4 ? 1.5 : 0;
    if (extras & 8) attention->window_left = take_upto(from, 12);
    if (extras & 16) attention->window_right = take_upto(from, 12);
    if (extras & 32) attention->alibi_slopes = make_statistics(made->heads, doubles, 0.25, &values);
    if (extras & 64) attention->sinks = make_statistics(made->heads, doubles, 2, &values);
    if (extras & 128) attention->dropout_p = 0.25, attention->seed = take(from);
    if (choices & 2) {
        attention->kv_lengths = made->lengths;
        for (int64_t b = 0; b < batches; b++) made->lengths[b] = take(from) % (keys + 1);
    }
    if ((choices & 4) && attention->alignment == MFA_ALIGNMENT_UPPER_LEFT) {
        attention->query_offsets = made->offsets;
        attention->num_query_offsets = choices & 8 ? (uint32_t)batches : 1;
        if (batches == 0) attention->num_query_offsets = 1;
        for (int k = 0; k < 4; k++) made->offsets[k] = (int8_t)take(from);
    }
    if (choices & 16) {
        const int broadcast = take(from);
        const int64_t whole[4] = {batches, made->heads, rows, keys};
        int64_t shape[4];
        for (int axis = 0; axis < 4; axis++) shape[axis] = broadcast >> axis & 1 ? 1 : whole[axis];
        const bool boolean = broadcast >> 4 & 1;
        make_strided(&made->mask, boolean ? MFA_PRECISION_BOOL : FLOATS[broadcast >> 5 & 3], shape, true, from);
        FOR_EACH_INDEX(shape, index) {
            const uint64_t drawn = draw(&values);
            store_number(&made->mask.tensor, index, boolean ? (double)(drawn & 1) : drawn % 4 == 0 ? -INFINITY : draw_value(&values));
        }
        attention->mask = &made->mask.tensor;
        if (!boolean) {
            make_strided(&made->grad_mask, FLOATS[broadcast >> 7], shape, false, from);
            made->gradients.grad_mask = &made->grad_mask.tensor;
        }
    }
    make_strided(&made->grad_output, FLOATS[choices >> 5 & 1], outputs, true, from);
    draw_elements(&made->grad_output, false, &values);
    make_strided(&made->grad_query, FLOATS[choices >> 6 & 1], queries, false, from);
    make_strided(&made->grad_key, FLOATS[choices >> 7], key_shape, false, from);
    make_strided(&made->grad_value, MFA_PRECISION_FP32, value_shape, false, from);
    made->gradients.d_values = make_statistics(made->rows, doubles, 0, NULL);
    if (attention->sinks) made->gradients.grad_sinks = make_statistics(made->heads, doubles, 0, NULL);
    if (attention->alibi_slopes) made->gradients.grad_alibi_slopes = make_statistics(made->heads, doubles, 0, NULL);
    set_pointers(made);
}

static void copy_view(view* made, const view* from, bool exact, bool with_elements) {
    const bool to_double = exact && from->tensor.precision != MFA_PRECISION_BOOL;
    make_compact(made, to_double ? MFA_PRECISION_FP64 : from->tensor.precision, from->tensor.shape);
    if (!to_double && from->tensor.quantization) {
        made->quantization = from->quantization;
        made->tensor.quantization = &made->quantization;
    }
    if (!with_elements) return;
    FOR_EACH_INDEX(from->tensor.shape, index) {
        if (to_double)
            store_number(&made->tensor, index, real_number(from, index));
        else
            store_bits(&made->tensor, index, load_bits(&from->tensor, index));
    }
}

static const void* copy_statistics(const void* from, int64_t count, bool doubles, bool exact) {
    if (from == NULL) return NULL;
    void* made = make_statistics(count, doubles || exact, 0, NULL);
    for (int64_t k = 0; k < count; k++) {
        if (doubles)
            ((double*)made)[k] = ((const double*)from)[k];
        else if (exact)
            ((double*)made)[k] = (double)((const float*)from)[k];
        else
            ((float*)made)[k] = ((const float*)from)[k];
    }
    return made;
}

void copy_problem(problem* made, const problem* from, bool exact) {
    *made = *from;
    const bool doubles = has_doubles(from);
    copy_view(&made->query, &from->query, exact, true);
    copy_view(&made->key, &from->key, exact, true);
    copy_view(&made->value, &from->value, exact, true);
    copy_view(&made->output, &from->output, exact, false);
    copy_view(&made->grad_output, &from->grad_output, exact, true);
    copy_view(&made->grad_query, &from->grad_query, exact, false);
    copy_view(&made->grad_key, &from->grad_key, exact, false);
    copy_view(&made->grad_value, &from->grad_value, exact, false);
    if (from->attention.mask) copy_view(&made->mask, &from->mask, exact, true);
    if (from->gradients.grad_mask) copy_view(&made->grad_mask, &from->grad_mask, exact, false);
    made->attention.logsumexp = make_statistics(made->rows, doubles || exact, 0, NULL);
    made->attention.alibi_slopes = copy_statistics(from->attention.alibi_slopes, made->heads, doubles, exact);
    made->attention.sinks = copy_statistics(from->attention.sinks, made->heads, doubles, exact);
    made->gradients.d_values = make_statistics(made->rows, doubles || exact, 0, NULL);
    if (from->gradients.grad_sinks) made->gradients.grad_sinks = make_statistics(made->heads, doubles || exact, 0, NULL);
    if (from->gradients.grad_alibi_slopes) {
        made->gradients.grad_alibi_slopes = make_statistics(made->heads, doubles || exact, 0, NULL);
    }
    set_pointers(made);
}
