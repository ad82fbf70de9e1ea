#include "quantization.h"

#include "random_numbers.h"

#include <stdlib.h>
#include <string.h>

const uint64_t EXPECTED_DIGEST = 0xFDB7FFBE43C8A9E2;

enum {
    TENSORS = 160,
    MOST_BATCH = 2,
    MOST_HEADS = 6, /* of all sequences */
    MOST_TOKENS = 70,
    MOST_CHANNELS = 140,
    MOST_PADDING = 20,  /* of a row */
    MOST_MISPLACED = 3, /* bytes */
    MOST = MOST_HEADS * MOST_TOKENS * (MOST_CHANNELS + MOST_PADDING),
};

/* FNV-1a (Fowler, Noll and Vo), by bytes. */
static uint64_t extend_digest(uint64_t digest, const void* memory, size_t bytes) {
    const uint8_t* at = memory;
    for (size_t k = 0; k < bytes; k++) digest = (digest ^ at[k]) * 0x100000001B3u;
    return digest;
}

static void lay_out(cpu_tensor* tensor, int64_t heads, int64_t tokens, int64_t row) {
    tensor->strides[3] = 1, tensor->strides[2] = row, tensor->strides[1] = tokens * row, tensor->strides[0] = heads * tokens * row;
    tensor->scale_tokens = tensor->scale_channels = 1;
}

/* Numbers of one of the float types, in rows that may be padded, lie beside those of other heads, backwards, and at any address. */
static void draw_input(generator* random, cpu_quantization* sizes, char* memory) {
    cpu_tensor* tensor = &sizes->input;
    tensor->precision = (cpu_precision)DRAW_FROM(random, CPU_FP32, CPU_FP32, CPU_FP32, CPU_FP16, CPU_BF16);
    const int64_t size = tensor->precision == CPU_FP32 ? 4 : 2, heads = sizes->num_heads, tokens = sizes->seq_len;
    const int64_t row = sizes->head_dim + (chance(random, 30) ? draw(random, 1, MOST_PADDING) : 0);
    const int64_t count = sizes->batch_size * heads * tokens * row;
    lay_out(tensor, heads, tokens, row);
    if (chance(random, 30)) tensor->strides[2] = heads * row, tensor->strides[1] = row;
    char* first = memory + (chance(random, 20) ? draw(random, 1, MOST_MISPLACED) : 0);
    for (int64_t at = 0; at < count; at++) {
        const float number = draw_normal(random) * (chance(random, 2) ? 20 : 1);
        uint32_t bits;
        memcpy(&bits, &number, sizeof bits);
        uint16_t half = (uint16_t)(bits >> 16);
        if (tensor->precision == CPU_FP16) half = (uint16_t)(draw(random, 0, 1) << 15 | draw(random, 0, 18) << 10 | draw(random, 0, 1023));
        memcpy(first + at * size, size == 4 ? (const void*)&bits : &half, (size_t)size);
    }
    tensor->data = first;
    if (chance(random, 20)) tensor->data = first + (tokens - 1) * tensor->strides[2] * size, tensor->strides[2] *= -1;
}

/* Strides of one of the granularities; how many scales there are. */
static int64_t draw_scales(generator* random, cpu_tensor* tensor, const cpu_quantization* sizes, bool* per_tensor) {
    int64_t* strides = tensor->scale_strides;
    int64_t parts = 1;
    *per_tensor = false;
    switch (draw(random, 0, 5)) {
    case 0: *per_tensor = true; return 1;
    case 1: break;                                         /* head */
    case 2: parts = sizes->seq_len, strides[2] = 1; break; /* token */
    case 3:                                                /* block */
        tensor->scale_tokens = draw(random, 2, 20);
        parts = (sizes->seq_len + tensor->scale_tokens - 1) / tensor->scale_tokens, strides[2] = 1;
        break;
    case 4: parts = sizes->head_dim, strides[3] = 1; break; /* channel */
    default: {                                              /* group */
        tensor->scale_channels = draw(random, 1, sizes->head_dim);
        const int64_t groups = (sizes->head_dim + tensor->scale_channels - 1) / tensor->scale_channels;
        parts = sizes->seq_len * groups, strides[2] = groups, strides[3] = 1;
        break;
    }
    }
    strides[0] = sizes->num_heads * parts, strides[1] = parts;
    return sizes->batch_size * sizes->num_heads * parts;
}

uint64_t digest_of_quantization(const cpu_quantization_kernel* kernel) {
    char* input = malloc(MOST * sizeof(float) + MOST_MISPLACED);
    float *real = malloc(MOST * sizeof(float)), *scales = malloc(MOST * sizeof(float));
    int32_t* zero_points = malloc(MOST * sizeof(int32_t));
    int8_t* codes = malloc(2 * MOST);
    float means[MOST_HEADS * MOST_CHANNELS], extremes[2 * MOST_HEADS];
    if (!input || !real || !scales || !zero_points || !codes) abort();
    uint64_t digest = 0xCBF29CE484222325u;
    for (int n = 0; n < TENSORS; n++) {
        generator random = {.state = (uint64_t)n};
        cpu_quantization work = {.batch_size = draw(&random, 1, MOST_BATCH), .num_heads = draw(&random, 1, MOST_HEADS / MOST_BATCH)};
        work.seq_len = draw(&random, 1, MOST_TOKENS);
        work.head_dim = chance(&random, 60) ? DRAW_FROM(&random, 16, 32, 64, 128) : draw(&random, 1, MOST_CHANNELS);
        const int64_t heads = work.num_heads, tokens = work.seq_len, channels = work.head_dim, items = work.batch_size * heads;
        draw_input(&random, &work, input);
        int64_t lengths[MOST_BATCH];
        for (int64_t b = 0; b < work.batch_size; b++) lengths[b] = draw(&random, 0, tokens);
        if (chance(&random, 30)) work.lengths = lengths;
        work.output.data = codes, work.output.precision = chance(&random, 50) ? CPU_INT8 : CPU_INT4;
        const bool nibbles = work.output.precision == CPU_INT4;
        lay_out(&work.output, heads, tokens, nibbles ? (channels + 1) / 2 * 2 : channels);
        const int64_t count = draw_scales(&random, &work.output, &work, &work.per_tensor);
        work.output.scales = scales, work.output.zero_points = chance(&random, 50) ? zero_points : NULL;
        work.output.rotated = chance(&random, 40), work.output.channel_means = chance(&random, 40) ? means : NULL;
        work.output.mean_strides[0] = heads * channels, work.output.mean_strides[1] = channels;
        work.extremes = extremes;
        memset(codes, 0, 2 * MOST); /* what lies past the lengths is not written */
        memset(real, 0, MOST * sizeof(float));

        void* workspace = aligned_alloc(64, (kernel->workspace_bytes(&work) + 127) / 64 * 64);
        if (workspace == NULL) abort();
        for (int64_t item = 0; item < items; item++) kernel->scan(&work, item, workspace);
        for (int64_t item = 0; item < items; item++) kernel->write(&work, item, workspace);
        digest = extend_digest(digest, codes, (size_t)(items * work.output.strides[1]) / (nibbles ? 2 : 1));
        digest = extend_digest(digest, scales, (size_t)count * sizeof(float));
        if (work.output.zero_points) digest = extend_digest(digest, zero_points, (size_t)count * sizeof(int32_t));
        if (work.output.channel_means) digest = extend_digest(digest, means, (size_t)(items * channels) * sizeof(float));
        free(workspace);

        cpu_quantization back = work;
        back.input = work.output, back.output = (cpu_tensor){.data = real, .precision = CPU_FP32};
        lay_out(&back.output, heads, tokens, channels);
        workspace = aligned_alloc(64, (kernel->workspace_bytes(&back) + 127) / 64 * 64);
        if (workspace == NULL) abort();
        for (int64_t item = 0; item < items; item++) kernel->dequantize(&back, item, workspace);
        digest = extend_digest(digest, real, (size_t)(items * tokens * channels) * sizeof(float));
        free(workspace);
    }
    free(input), free(real), free(scales), free(zero_points), free(codes);
    return digest;
}
