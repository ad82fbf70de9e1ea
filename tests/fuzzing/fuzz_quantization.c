/* Any floats are quantised to the same codes by all kernels, and come back within half a step of what they were; or all kernels refuse
 * them, and nothing is written. */
#include "fuzzing.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* A mutator works best on elements that are the input's own bytes. */
static void take_elements(view* made, input* from) {
    const int size = (int)precision_bytes(made->tensor.precision);
    FOR_EACH_INDEX(made->tensor.shape, index) store_bits(&made->tensor, index, take_bytes(from, size));
}

static bool all_finite(const view* of) {
    FOR_EACH_INDEX(of->tensor.shape, index) {
        if (!isfinite((float)load_number(&of->tensor, index))) return false;
    }
    return true;
}

typedef struct {
    view codes, real;
    int32_t status;
} result;

static int64_t mean_count(const view* of) {
    return of->tensor.shape[0] * of->tensor.shape[1] * of->tensor.shape[3];
}

static void quantize(result* made, mfa_context_t* context, const view* floats, const view* like) {
    made->codes = *like;
    view* codes = &made->codes;
    codes->memory = arena_take(like->bytes);
    codes->tensor.data = like->tensor.data ? codes->memory + ((uint8_t*)like->tensor.data - like->memory) : NULL;
    const int64_t count = scale_count(&like->quantization, like->tensor.shape);
    codes->quantization.scales = arena_take((size_t)count * sizeof(float));
    if (like->quantization.zero_points) codes->quantization.zero_points = arena_take((size_t)count * sizeof(int32_t));
    if (like->quantization.channel_means) {
        codes->quantization.channel_means = arena_take((size_t)mean_count(like) * sizeof(float));
    }
    codes->tensor.quantization = &codes->quantization;
    made->status = mfa_quantize(context, &floats->tensor, &codes->tensor);
    if (made->status != MFA_SUCCESS) return;
    make_compact(&made->real, MFA_PRECISION_FP32, floats->tensor.shape);
    const int32_t status = mfa_dequantize(context, &codes->tensor, &made->real.tensor);
    if (status != MFA_SUCCESS) fail("codes that were made are not read: status %d, %s", status, mfa_last_error(context));
}

static void check_untouched(const result* refused) {
    const view* codes = &refused->codes;
    const int64_t count = scale_count(&codes->quantization, codes->tensor.shape);
    const uint8_t* arrays[4] = {codes->memory, (uint8_t*)codes->quantization.scales, (uint8_t*)codes->quantization.zero_points,
                                (uint8_t*)codes->quantization.channel_means};
    const size_t bytes[4] = {codes->bytes, (size_t)count * 4, (size_t)count * 4, (size_t)mean_count(codes) * 4};
    for (int n = 0; n < 4; n++) {
        for (size_t k = 0; arrays[n] && k < bytes[n]; k++) {
            if (arrays[n][k] != 0xFF) fail("a refused call wrote byte %zu of result %d", k, n);
        }
    }
}

/* What dequantising gives is off by half a step, and by what FP32 rounds on the way. Where the scale would be denormal it is 1, and all
 * codes are 0. */
static void check_bound(const result* made, const view* floats) {
    const mfa_quantization_t* quantization = &made->codes.quantization;
    const bool wide = made->codes.tensor.precision == MFA_PRECISION_INT8;
    const int lowest = (wide ? -128 : -8) + (quantization->zero_points == NULL), highest = wide ? 127 : 7;
    const int64_t* shape = floats->tensor.shape;
    FOR_EACH_INDEX(shape, index) {
        const double code = load_number(&made->codes.tensor, index);
        if (code < lowest || code > highest) fail("a code is %g", code);
        const int64_t at = scale_index(quantization, shape, index);
        const double scale = (double)quantization->scales[at];
        if (!(scale >= (double)FLT_MIN) || !isfinite(scale)) fail("a scale is %g", scale);
        if (quantization->rotated) continue;
        const double value = (double)(float)load_number(&floats->tensor, index), got = load_number(&made->real.tensor, index);
        const double mean =
            quantization->channel_means ? (double)quantization->channel_means[(index[0] * shape[1] + index[1]) * shape[3] + index[3]] : 0;
        const double rounding = (fabs(value) + fabs(mean) + 256 * scale) * 0x1p-22;
        const double allowed = scale == 1 && code == 0 ? fmax(0.5, 256 * (double)FLT_MIN) : 0.5 * scale;
        const double largest = fmax(fabs(value), fabs(value - mean)) + allowed + rounding;
        if (!(fabs(value - got) <= allowed + rounding) && largest < (double)FLT_MAX) { /* else it may come back infinite */
            fail("%.9g comes back as %.9g, with scale %.9g", value, got, scale);
        }
    }
}

static void check_same(const result* one, const result* other) {
    const view *a = &one->codes, *b = &other->codes;
    const size_t scales = (size_t)scale_count(&a->quantization, a->tensor.shape) * 4, means = (size_t)mean_count(a) * 4;
    if (memcmp(a->quantization.scales, b->quantization.scales, scales) != 0) fail("scales differ between kernels");
    if (a->quantization.zero_points && memcmp(a->quantization.zero_points, b->quantization.zero_points, scales) != 0) {
        fail("zero points differ between kernels");
    }
    if (a->quantization.channel_means && memcmp(a->quantization.channel_means, b->quantization.channel_means, means) != 0) {
        fail("means differ between kernels");
    }
    if (memcmp(a->memory, b->memory, a->bytes) != 0) fail("codes differ between kernels");
    if (memcmp(one->real.memory, other->real.memory, one->real.bytes) != 0) fail("dequantised numbers differ between kernels");
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    input from = {data, size};
    arena_reset();
    const int types = take(&from), choices = take(&from);
    const int64_t channels = choices & 128 ? 1 + take(&from) % 140 : 1 + take_upto(&from, 16);
    const int64_t shape[4] = {take_upto(&from, 2), 1 + take_upto(&from, 1), take_upto(&from, 6), channels};
    static const int32_t FLOATS[4] = {MFA_PRECISION_FP32, MFA_PRECISION_FP16, MFA_PRECISION_BF16, MFA_PRECISION_FP64};
    view floats, codes;
    make_strided(&floats, FLOATS[types & 3], shape, true, &from);
    make_strided(&codes, types & 4 ? MFA_PRECISION_INT8 : MFA_PRECISION_INT4, shape, false, &from);
    codes.quantization.granularity = (types >> 3) % 6;
    codes.quantization.block_size = codes.quantization.group_size = 1 + (uint32_t)(choices & 7);
    codes.quantization.rotated = choices >> 3 & 1;
    float ask;
    int32_t ask_too;
    if (choices & 16) codes.quantization.zero_points = &ask_too;
    if (choices & 32) codes.quantization.channel_means = &ask;
    take_elements(&floats, &from);

    result portable, vector;
    quantize(&portable, context_of("reference,baseline"), &floats, &codes);
    mfa_context_t* fast = context_of("avx2");
    if (fast == NULL) fast = context_of("");
    quantize(&vector, fast, &floats, &codes);
    if (portable.status != vector.status) fail("kernels give status %d and %d", portable.status, vector.status);
    check_gaps(&portable.codes, "codes");
    if (portable.status != MFA_SUCCESS) {
        if (portable.status != MFA_ERROR_INVALID_ARGUMENT) fail("status %d: %s", portable.status, mfa_last_error(fast));
        /* Sums that overflow after a rotation or for a mean are refused too. */
        if (!(choices & (8 | 32)) && all_finite(&floats)) fail("finite numbers are refused: %s", mfa_last_error(fast));
        check_untouched(&portable);
        check_untouched(&vector);
        return 0;
    }
    if (!all_finite(&floats)) fail("a number that is not finite was quantised");
    check_same(&portable, &vector);
    check_bound(&portable, &floats);
    return 0;
}
