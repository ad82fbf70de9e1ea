/* Descriptors of any bytes: a small legal problem whose fields are then overwritten. Whatever status comes, nothing but the elements of
 * results may be written, and nothing at all by a call that is refused; and no call succeeds that would have to leave its memory. */
#include "fuzzing.h"

#include <math.h>
#include <string.h>

enum { BLOCK_BYTES = 512, ROOM_BYTES = 4096, BEYOND = 64, RED_ZONE = 64, MOST_WORK = 1 << 15 };

/* Tensors, each with its own block of memory, and descriptors with the room that a later version's might have. */
enum { QUERY, KEY, VALUE, OUTPUT, MASK, GRAD_OUTPUT, GRAD_QUERY, GRAD_KEY, GRAD_VALUE, GRAD_MASK, TENSORS };
enum { ATTENTION = TENSORS, GRADIENTS, SCHEMES, QUANTIZATIONS = SCHEMES + 3, DESCRIPTORS = QUANTIZATIONS + TENSORS };
/* Arrays of a fixed room: beyond the tensors' blocks, which codes' scales and means follow. */
enum {
    LOGSUMEXP = TENSORS,
    D_VALUES,
    GRAD_LOGSUMEXP,
    SINKS,
    SLOPES,
    GRAD_SINKS,
    GRAD_SLOPES,
    LENGTHS,
    OFFSETS,
    SCALES,
    BLOCKS = SCALES + TENSORS
};

static _Alignas(64) uint8_t descriptors[DESCRIPTORS][ROOM_BYTES];
/* What follows a block is poisoned. */
static _Alignas(64) uint8_t memory[BLOCKS][BLOCK_BYTES + RED_ZONE];
static uint8_t before[BLOCKS][BLOCK_BYTES], written[BLOCKS][BLOCK_BYTES];
static mfa_buffer_t* buffers[TENSORS];

/* Of a descriptor, the words of 4 bytes that are no pointers: bit k says that word k may be anything. */
#define WORD(type, field) (1ull << offsetof(type, field) / 4)
#define TWO_WORDS(type, field) (3ull << offsetof(type, field) / 4)
#define TENSOR_WORDS                                                                                            \
    (WORD(mfa_tensor_t, struct_size) | WORD(mfa_tensor_t, precision) | TWO_WORDS(mfa_tensor_t, buffer_offset) | \
     0xFFull << offsetof(mfa_tensor_t, shape) / 4 | 0xFFull << offsetof(mfa_tensor_t, strides) / 4)
#define QUANTIZATION_WORDS 0x3Full
#define SCHEME_WORDS 0xFFull
#define ATTENTION_WORDS                                                                                                    \
    (0x3Full | TWO_WORDS(mfa_attention_t, alignment) | TWO_WORDS(mfa_attention_t, window_left) |                           \
     TWO_WORDS(mfa_attention_t, window_right) | TWO_WORDS(mfa_attention_t, dropout_p) | TWO_WORDS(mfa_attention_t, seed) | \
     TWO_WORDS(mfa_attention_t, dropout_offset))
#define GRADIENTS_WORDS 3ull

static mfa_tensor_t* tensor(int place) {
    return (mfa_tensor_t*)descriptors[place];
}
static mfa_quantization_t* quantization(int place) {
    return (mfa_quantization_t*)descriptors[QUANTIZATIONS + place];
}

static uint64_t words_of(int descriptor) {
    if (descriptor < TENSORS) return TENSOR_WORDS;
    if (descriptor == ATTENTION) return ATTENTION_WORDS;
    if (descriptor == GRADIENTS) return GRADIENTS_WORDS;
    return descriptor < QUANTIZATIONS ? SCHEME_WORDS : QUANTIZATION_WORDS;
}

static size_t size_of(int descriptor) {
    if (descriptor < TENSORS) return sizeof(mfa_tensor_t);
    if (descriptor == ATTENTION) return sizeof(mfa_attention_t);
    if (descriptor == GRADIENTS) return sizeof(mfa_attention_gradients_t);
    return descriptor < QUANTIZATIONS ? sizeof(mfa_quantization_scheme_t) : sizeof(mfa_quantization_t);
}

/* The number of bytes or elements, or more than any limit if it is that. */
typedef __int128 wide;

static void overwrite(input* from) {
    static const uint64_t NUMBERS[] = {
        0, 1, 2, 3, 7, 8, 16, 64, INT32_MAX, 1ull << 31, UINT32_MAX, 1ull << 32, INT64_MAX, 1ull << 63, UINT64_MAX, UINT64_MAX - 1,
    };
    const int descriptor = take_upto(from, DESCRIPTORS - 1), where = take(from), how = take(from);
    const uint64_t number = how & 16 ? take_bytes(from, 8) : NUMBERS[how & 15];
    uint32_t* words = (uint32_t*)descriptors[descriptor];
    const int count = (int)(size_of(descriptor) / 4);
    if (how & 32) { /* beyond what this version knows */
        descriptors[descriptor][size_of(descriptor) + (size_t)where % BEYOND] = (uint8_t)number;
        return;
    }
    const uint64_t free_words = words_of(descriptor);
    const int word = where % count;
    if (!(free_words >> word & 1)) return;
    words[word] = (uint32_t)number;
    /* Both halves of a word of 8 bytes. */
    if ((how & 64) && word % 2 == 0 && (free_words >> (word + 1) & 1)) words[word + 1] = (uint32_t)(number >> 32);
}

static void begin_tensor(int place, int32_t precision, int64_t batches, int64_t heads, int64_t tokens, int64_t channels) {
    mfa_tensor_t* made = tensor(place);
    *made = (mfa_tensor_t){
        .struct_size = sizeof *made, .precision = precision, .data = memory[place], .shape = {batches, heads, tokens, channels}};
    const int64_t padded = channels + (channels & 1);
    const int64_t strides[4] = {heads * tokens * padded, tokens * padded, padded, 1};
    memcpy(made->strides, strides, sizeof strides);
    mfa_quantization_t* scales = quantization(place);
    *scales = (mfa_quantization_t){.struct_size = sizeof *scales, .granularity = MFA_GRANULARITY_TOKEN, .block_size = 2, .group_size = 2};
    scales->scales = (float*)memory[SCALES + place];
    made->quantization = scales;
}

/* How many bytes of its block a tensor needs below and above its address; false if it has no element or is beyond all limits, which every
 * call refuses. */
static bool reach_of(const mfa_tensor_t* of, wide* below, wide* above) {
    *below = 0, *above = 0;
    const bool nibbles = of->precision == MFA_PRECISION_INT4;
    for (int axis = 0; axis < 4; axis++) {
        if (of->shape[axis] <= 0) return false;
        const wide size = nibbles && axis == 3 ? ((wide)of->shape[axis] + 1) / 2 : of->shape[axis];
        const wide span = (size - 1) * (nibbles && axis < 3 ? of->strides[axis] >> 1 : of->strides[axis]);
        if (span < 0)
            *below -= span;
        else
            *above += span;
    }
    const wide unit = (wide)precision_bytes(of->precision);
    *below *= unit;
    *above = *above * unit + unit;
    return true;
}

/* A view that leaves its block is given as one into a buffer, whose bounds the library knows and has to refuse. */
static void keep_within(int place) {
    mfa_tensor_t* of = tensor(place);
    wide below, above;
    if (of->buffer == NULL && reach_of(of, &below, &above) && (below > 0 || above > BLOCK_BYTES)) {
        of->data = NULL;
        of->buffer = buffers[place];
    }
}

/* Sizes as they count for work and arrays: what is refused for certain counts nothing. */
static wide product(const int64_t* shape, int count) {
    wide all = 1;
    for (int axis = 0; axis < count; axis++) {
        if (shape[axis] < 0 || shape[axis] > 0xFFFFFFFFll) return 0;
        all *= shape[axis];
        if (all > (wide)1 << 62) return (wide)1 << 62;
    }
    return all;
}

static void keep_arrays_within(void) {
    mfa_attention_t* attention = (mfa_attention_t*)descriptors[ATTENTION];
    mfa_attention_gradients_t* gradients = (mfa_attention_gradients_t*)descriptors[GRADIENTS];
    const int64_t* queries = tensor(QUERY)->shape;
    const wide room = BLOCK_BYTES / 8;
    if (product(queries, 3) > room) {
        attention->logsumexp = NULL;
        gradients->d_values = NULL;
        gradients->grad_logsumexp = NULL;
    }
    if (queries[1] > room) {
        attention->sinks = attention->alibi_slopes = NULL;
        gradients->grad_sinks = gradients->grad_alibi_slopes = NULL;
    }
    if (queries[0] > room) attention->kv_lengths = NULL;
    if (attention->num_query_offsets > room) attention->query_offsets = NULL;
    for (int place = 0; place < TENSORS; place++) {
        mfa_quantization_t* of = quantization(place);
        const int64_t* shape = tensor(place)->shape;
        const wide tokens = product(shape, 3), channels = product(shape, 2) * (shape[3] > 0 ? shape[3] : 0);
        const wide blocks = of->block_size > 0 ? product(shape, 2) * (shape[2] > 0 ? (shape[2] - 1) / of->block_size + 1 : 0) : 0;
        const wide groups = of->group_size > 0 ? tokens * (shape[3] > 0 ? (shape[3] - 1) / of->group_size + 1 : 0) : 0;
        const wide counts[6] = {1, product(shape, 2), tokens, blocks, channels, groups};
        const bool known = of->granularity >= 0 && of->granularity < 6;
        const wide limit = BLOCK_BYTES / 4 / 3;
        if ((known && counts[of->granularity] > limit) || channels > limit) {
            of->scales = NULL;
            of->zero_points = NULL;
            of->channel_means = NULL;
        }
    }
}

/* About the multiplications of a call; beyond a limit it is asked about, not made. */
static bool is_small(void) {
    wide most = 0;
    for (int place = 0; place < TENSORS; place++) {
        const wide elements = product(tensor(place)->shape, 4);
        if (elements > most) most = elements;
        if (elements == 0 && (product(tensor(place)->shape, 2) > MOST_WORK || tensor(place)->shape[2] > MOST_WORK)) return false;
    }
    const int64_t* queries = tensor(QUERY)->shape;
    return most < MOST_WORK && product(queries, 4) * (tensor(KEY)->shape[2] > 0 ? tensor(KEY)->shape[2] : 1) < MOST_WORK;
}

static void mark(int place) {
    const mfa_tensor_t* of = tensor(place);
    uint8_t* marks = written[place];
    if (product(of->shape, 4) == 0) return;
    mfa_tensor_t there = *of;
    there.data = marks + (of->buffer ? of->buffer_offset : (uint64_t)((uint8_t*)of->data - memory[place]));
    const bool nibbles = of->precision == MFA_PRECISION_INT4;
    const int64_t step = nibbles ? 2 : 1;
    for (int axis = 0; axis < 4; axis++) { /* what stands there means nothing, and might overflow */
        if (there.shape[axis] <= (axis == 3 ? step : 1)) there.strides[axis] = 0;
    }
    FOR_EACH_INDEX(there.shape, index) {
        const int64_t at = index[0] * there.strides[0] + index[1] * there.strides[1] + index[2] * there.strides[2] +
                           (nibbles ? index[3] - (index[3] & 1) : index[3]) * there.strides[3];
        memset((uint8_t*)there.data + (nibbles ? at / 2 : at * (int64_t)precision_bytes(of->precision)), 1, precision_bytes(of->precision));
    }
}

static void mark_array(const void* array, int block) {
    if (array) memset(written[block], 1, BLOCK_BYTES);
}

static void check_memory(int32_t status, const char* call) {
#ifndef POISONED
    for (int block = 0; block < BLOCKS; block++) {
        for (int k = BLOCK_BYTES; k < BLOCK_BYTES + RED_ZONE; k++) {
            if (memory[block][k]) fail("%s wrote beyond block %d", call, block);
        }
    }
#endif
    for (int block = 0; block < BLOCKS; block++) {
        if (memcmp(memory[block], before[block], BLOCK_BYTES) == 0) continue;
        if (status != MFA_SUCCESS && status != MFA_ERROR_EXECUTION_FAILED)
            fail("%s gives status %d and wrote block %d", call, status, block);
        for (int k = 0; k < BLOCK_BYTES; k++) {
            if (memory[block][k] != before[block][k] && !written[block][k]) fail("%s wrote byte %d of block %d", call, k, block);
        }
    }
}

static void begin(input* from) {
    static const int32_t PRECISIONS[4] = {MFA_PRECISION_FP32, MFA_PRECISION_FP16, MFA_PRECISION_INT8, MFA_PRECISION_INT4};
    for (int place = 0; place < DESCRIPTORS; place++) memset(descriptors[place], 0, size_of(place) + BEYOND);
    const int types = take(from), filler = take(from), given = take(from), more = take(from);
    for (int block = 0; block < BLOCKS; block++) {
        float* floats = (float*)memory[block];
        if (filler & 2) { /* NaN, denormals, large numbers, lengths and scales that are none */
            memset(floats, filler, BLOCK_BYTES);
            continue;
        }
        const bool whole = block == LENGTHS || block == OFFSETS;
        for (int k = 0; k < BLOCK_BYTES / 4; k++) floats[k] = whole || !(filler & 1) ? 0 : 0.5f;
        if (!whole && !(filler & 1) && block >= SCALES) floats[0] = 1;
    }
    begin_tensor(QUERY, PRECISIONS[types & 3], 2, 2, 3, 4);
    begin_tensor(KEY, PRECISIONS[types >> 2 & 3], 2, 1, 3, 4);
    begin_tensor(VALUE, PRECISIONS[types >> 4 & 3], 2, 1, 3, 4);
    begin_tensor(OUTPUT, types & 64 ? MFA_PRECISION_FP16 : MFA_PRECISION_FP32, 2, 2, 3, 4);
    begin_tensor(MASK, types & 128 ? MFA_PRECISION_FP32 : MFA_PRECISION_BOOL, 1, 2, 3, 3);
    begin_tensor(GRAD_OUTPUT, MFA_PRECISION_FP32, 2, 2, 3, 4);
    begin_tensor(GRAD_QUERY, MFA_PRECISION_FP32, 2, 2, 3, 4);
    begin_tensor(GRAD_KEY, MFA_PRECISION_FP32, 2, 1, 3, 4);
    begin_tensor(GRAD_VALUE, MFA_PRECISION_FP32, 2, 1, 3, 4);
    begin_tensor(GRAD_MASK, MFA_PRECISION_FP32, 1, 2, 3, 3);
    mfa_attention_t* attention = (mfa_attention_t*)descriptors[ATTENTION];
    mfa_attention_initialize(attention, sizeof *attention);
    attention->query = tensor(QUERY), attention->key = tensor(KEY), attention->value = tensor(VALUE), attention->output = tensor(OUTPUT);
    attention->logsumexp = memory[LOGSUMEXP];
    mfa_attention_gradients_t* gradients = (mfa_attention_gradients_t*)descriptors[GRADIENTS];
    gradients->struct_size = sizeof *gradients;
    gradients->grad_output = tensor(GRAD_OUTPUT);
    gradients->grad_query = tensor(GRAD_QUERY), gradients->grad_key = tensor(GRAD_KEY), gradients->grad_value = tensor(GRAD_VALUE);
    mfa_quantization_scheme_t* schemes[3];
    for (int n = 0; n < 3; n++) {
        schemes[n] = (mfa_quantization_scheme_t*)descriptors[SCHEMES + n];
        *schemes[n] = (mfa_quantization_scheme_t){.struct_size = sizeof *schemes[n],
                                                  .precision = MFA_PRECISION_INT8,
                                                  .granularity = MFA_GRANULARITY_TOKEN,
                                                  .block_size = 2,
                                                  .group_size = 2};
    }
    if (given & 1) attention->mask = tensor(MASK);
    if (given & 2) attention->kv_lengths = (int64_t*)memory[LENGTHS];
    if (given & 4) attention->query_offsets = (int64_t*)memory[OFFSETS], attention->num_query_offsets = 1;
    if (given & 8) attention->sinks = memory[SINKS];
    if (given & 16) attention->alibi_slopes = memory[SLOPES];
    if (given & 32) attention->quantize_query = schemes[0];
    if (given & 64) attention->quantize_key = schemes[1];
    if (given & 128) attention->quantize_value = schemes[2];
    if (more & 1) gradients->d_values = memory[D_VALUES];
    if (more & 2) gradients->grad_logsumexp = memory[GRAD_LOGSUMEXP];
    if (more & 4) gradients->grad_sinks = memory[GRAD_SINKS];
    if (more & 8) gradients->grad_alibi_slopes = memory[GRAD_SLOPES];
    if (more & 16) gradients->grad_mask = tensor(GRAD_MASK);
    for (int place = 0; place < TENSORS; place++) {
        mfa_quantization_t* of = quantization(place);
        float* rest = of->scales + BLOCK_BYTES / 4 / 3;
        if (more & 32) of->zero_points = (int32_t*)rest;
        if (more & 64) of->channel_means = rest + BLOCK_BYTES / 4 / 3;
    }
    if (more & 128) attention->logsumexp = NULL;
}

/* Pointers that are NULL, out of step with their elements' size, one another's, or a buffer's. */
static void misplace(input* from) {
    const int place = take_upto(from, TENSORS - 1), how = take(from);
    mfa_tensor_t* of = tensor(place);
    switch (how % 6) {
    case 0: of->data = NULL; break;
    case 1: of->data = NULL, of->buffer = buffers[place]; break;
    case 2: of->buffer = buffers[place]; break;
    case 3: of->data = NULL, of->buffer = (mfa_buffer_t*)~((uintptr_t)buffers[place] + (uintptr_t)how); break;
    case 4: of->quantization = how & 8 ? NULL : quantization((place + 1) % TENSORS); break;
    default: of->data = NULL, of->buffer = buffers[place], of->buffer_offset = (uint64_t)how * 2; break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const char* const KERNELS[4] = {"", "float", "integer", "reference"};
    input from = {data, size};
    const int call = take(&from);
    mfa_context_t* context = context_of(KERNELS[call & 3]);
    for (int place = 0; place < TENSORS && buffers[place] == NULL; place++) {
        POISON(memory[place] + BLOCK_BYTES, RED_ZONE);
        if (mfa_create_buffer_from_memory(context, memory[place], BLOCK_BYTES, &buffers[place]) != MFA_SUCCESS)
            fail("a buffer cannot be made");
    }
    begin(&from);
    for (int n = 0; n < 12 && from.left > 0; n++) {
        if (take(&from) % 5 == 0)
            misplace(&from);
        else
            overwrite(&from);
    }
    for (int place = 0; place < TENSORS; place++) keep_within(place);
    keep_arrays_within();
    for (int block = 0; block < BLOCKS; block++) memcpy(before[block], memory[block], BLOCK_BYTES);
    memset(written, 0, sizeof written);

    const mfa_attention_t* attention = (const mfa_attention_t*)descriptors[ATTENTION];
    const mfa_attention_gradients_t* gradients = (const mfa_attention_gradients_t*)descriptors[GRADIENTS];
    const int operation = call >> 2 & 7;
    int32_t status = MFA_SUCCESS;
    uint64_t bytes = 0;
    const char* name = "";
    if (operation == 4) {
        status = mfa_attention_kernel_name(context, attention, call >> 5, &name);
        if (status == MFA_SUCCESS && (name == NULL || name[0] == 0)) fail("a kernel has no name");
    } else if (operation < 6) {
        const bool of_backward = operation & 1;
        const int32_t asked = mfa_attention_workspace_size(context, attention, of_backward ? gradients : NULL, &bytes);
        if (!is_small()) {
            status = asked;
        } else if (of_backward) {
            status = mfa_attention_run_backward(context, attention, gradients);
            for (int place = GRAD_QUERY; place <= GRAD_MASK && status == MFA_SUCCESS; place++) {
                if (place < GRAD_MASK || gradients->grad_mask) mark(place);
            }
            if (!gradients->d_values_given) mark_array(gradients->d_values, D_VALUES);
            mark_array(gradients->grad_sinks, GRAD_SINKS);
            mark_array(gradients->grad_alibi_slopes, GRAD_SLOPES);
        } else {
            status = mfa_attention_run_forward(context, attention);
            if (status == MFA_SUCCESS) mark(OUTPUT);
            mark_array(attention->logsumexp, LOGSUMEXP);
        }
        if (status == MFA_SUCCESS && asked != MFA_SUCCESS)
            fail("a call succeeds that has no workspace size: %d, %s", asked, mfa_last_error(context));
    } else if (operation == 6 && is_small()) {
        /* Quantise the query's memory into the key's, or back. */
        memcpy(tensor(KEY)->shape, tensor(QUERY)->shape, call & 128 ? 0 : sizeof tensor(KEY)->shape);
        keep_within(KEY);
        keep_arrays_within();
        status = call & 32 ? mfa_quantize(context, tensor(QUERY), tensor(KEY)) : mfa_dequantize(context, tensor(QUERY), tensor(KEY));
        if (status == MFA_SUCCESS) mark(KEY);
        memset(written[SCALES], 1, (size_t)TENSORS * BLOCK_BYTES);
    } else if (is_small()) {
        const int32_t statistics = call & 32 ? MFA_PRECISION_FP32 : call & 64 ? MFA_PRECISION_FP64 : (int32_t)tensor(MASK)->strides[0];
        const bool roomy = product(tensor(OUTPUT)->shape, 3) <= BLOCK_BYTES / 8;
        status = mfa_attention_merge(context, tensor(OUTPUT), roomy ? memory[LOGSUMEXP] : NULL, tensor(GRAD_OUTPUT), memory[GRAD_LOGSUMEXP],
                                     tensor(GRAD_QUERY), memory[D_VALUES], statistics);
        if (status == MFA_SUCCESS) mark(GRAD_QUERY), mark_array(memory[D_VALUES], D_VALUES);
    }
    if (status < MFA_SUCCESS || status > MFA_ERROR_DEVICE_UNAVAILABLE) fail("there is no status %d", status);
    if (status != MFA_SUCCESS && mfa_last_error(context)[0] == 0) fail("status %d has no words", status);
    check_memory(status, "the call");
    return 0;
}
