/* Keys and values as decode kernels read them: blocks of rows, in place where they can be. */

/* Bytes of `channels` channels. */
INLINE int64_t row_bytes(cpu_precision precision, int64_t channels) {
    return precision == CPU_INT4 ? divide_up(channels, 2) : channels * element_bytes(precision);
}

/* The keys or values of one head, and the block of them at hand. */
typedef struct {
    cpu_tensor tensor;
    int64_t b, head, channels;
    cpu_precision precision; /* of the rows as they are multiplied */
    int64_t padded;          /* channels of whole steps */
    int64_t steps;
    bool dequantized; /* copied as real numbers: no scale nor zero point is left to apply */
    bool in_place;    /* not copied */
    bool shifted;     /* rows have zero points */
    bool scaled;      /* rows have scales */
    char* copies;     /* workspace: BLOCK_KEYS rows, in FP32 at most */

    int64_t columns; /* of the block */
    const char* rows;
    int64_t stride;     /* bytes from row to row */
    float* scales;      /* [BLOCK_KEYS]; 1 where there are none */
    float* zero_points; /* [BLOCK_KEYS]; with the codes' bias; 0 where there are none */
} operand;

/* Whether each channel has one scale for all rows. */
INLINE bool has_channel_scales(const cpu_tensor* tensor) {
    return has_codes(tensor) && tensor->scales && tensor->scale_strides[3] != 0 && tensor->scale_strides[2] == 0 &&
           tensor->scale_channels == 1 && !tensor->zero_points;
}

/* Whether scales and zero points can wait until codes were multiplied. */
INLINE bool multiplies_codes(const cpu_tensor* tensor) {
    return has_codes(tensor) && (tensor->scale_strides[3] == 0 || !(tensor->scales || tensor->zero_points) || has_channel_scales(tensor));
}

/* In what precision rows are multiplied. */
INLINE cpu_precision multiplied_precision(const cpu_tensor* tensor) {
    return has_codes(tensor) && !multiplies_codes(tensor) ? CPU_FP32 : tensor->precision;
}

/* Channels of whole steps. */
INLINE int64_t padded_channels(cpu_precision precision, int64_t channels) {
    return round_up(channels, CHANNEL_STEP(precision));
}

static void take_operand(workspace_cursor* cursor, const cpu_tensor* tensor, int64_t channels, operand* operand) {
    operand->copies = workspace_take(cursor, BLOCK_KEYS * padded_channels(tensor->precision, channels), sizeof(float));
    operand->scales = workspace_take_reals(cursor, BLOCK_KEYS);
    operand->zero_points = workspace_take_reals(cursor, BLOCK_KEYS);
}

static void place_operand(const cpu_tensor* tensor, int64_t b, int64_t head, int64_t channels, operand* operand) {
    operand->tensor = *tensor;
    operand->b = b;
    operand->head = head;
    operand->channels = channels;
    operand->precision = multiplied_precision(tensor);
    operand->padded = padded_channels(operand->precision, channels);
    operand->steps = operand->padded / CHANNEL_STEP(operand->precision);
    operand->dequantized = operand->precision != tensor->precision;
    operand->in_place = !operand->dequantized && tensor->strides[3] == 1 && channels == operand->padded;
    const bool has_row_scales = has_codes(tensor) && !operand->dequantized && !has_channel_scales(tensor);
    operand->scaled = has_row_scales && tensor->scales;
    operand->shifted = has_row_scales && tensor->zero_points;
    for (int64_t k = 0; k < BLOCK_KEYS; k++) {
        operand->scales[k] = 1;
        operand->zero_points[k] = CODE_BIAS(operand->precision);
    }
}

/* Where row `s` begins in the tensor's memory. */
INLINE const char* row_in_memory(const operand* operand, int64_t s) {
    const cpu_tensor* tensor = &operand->tensor;
    return (const char*)tensor->data + row_offset(tensor, operand->b, operand->head, s) * row_bytes(tensor->precision, 2) / 2;
}

/* Row `s` of the tensor as its own elements, neighbours, padded with zeros. */
static void copy_row(const operand* operand, int64_t s, char* copy) {
    const cpu_tensor* tensor = &operand->tensor;
    const int64_t channels = operand->channels, stride = tensor->strides[3];
    memset(copy, 0, (size_t)row_bytes(operand->precision, operand->padded));
    if (operand->dequantized) {
        load_row_float(tensor, operand->b, operand->head, s, channels, (float*)copy);
    } else if (tensor->precision == CPU_INT4) {
        int8_t scratch[CPU_MAX_HEAD_DIM + 1];
        load_codes(tensor, operand->b, operand->head, s, channels, scratch);
        scratch[channels] = 0;
        for (int64_t d = 0; d < channels; d += 2) copy[d / 2] = (char)int4_pair(scratch[d], scratch[d + 1]);
    } else {
        const int64_t size = element_bytes(tensor->precision);
        const char* elements = row_in_memory(operand, s);
        if (stride == 1) {
            memcpy(copy, elements, (size_t)(channels * size));
        } else {
            for (int64_t d = 0; d < channels; d++) memcpy(copy + d * size, elements + d * stride * size, (size_t)size);
        }
    }
}

/* Numbers that rows first ..< first + columns have, one each, where all channels of a row share it. */
#define LOAD_OF_ROWS(out, array)                                                                                   \
    do {                                                                                                           \
        const int64_t* strides = tensor->scale_strides;                                                            \
        const int64_t stride = strides[2], tokens = stride == 0 ? 1 : tensor->scale_tokens;                        \
        const int64_t base = operand->b * strides[0] + operand->head * strides[1];                                 \
        if (tokens == 1 && stride == 1) {                                                                          \
            for (int64_t k = 0; k < columns; k++) (out)[k] = (float)(array)[base + first + k];                     \
        } else {                                                                                                   \
            for (int64_t k = 0; k < columns; k++) (out)[k] = (float)(array)[base + (first + k) / tokens * stride]; \
        }                                                                                                          \
    } while (0)

/* Makes rows first ..< first + columns the block at hand. */
static void place_block(operand* operand, int64_t first, int64_t columns) {
    const cpu_tensor* tensor = &operand->tensor;
    operand->columns = columns;
    if (operand->in_place) {
        operand->rows = row_in_memory(operand, first);
        operand->stride = tensor->strides[2] * row_bytes(operand->precision, 2) / 2;
    } else {
        operand->rows = operand->copies;
        operand->stride = row_bytes(operand->precision, operand->padded);
        for (int64_t k = 0; k < columns; k++) copy_row(operand, first + k, operand->copies + k * operand->stride);
    }
    if (operand->scaled) LOAD_OF_ROWS(operand->scales, tensor->scales);
    if (operand->shifted) {
        LOAD_OF_ROWS(operand->zero_points, tensor->zero_points);
        for (int64_t k = 0; k < columns; k++) operand->zero_points[k] += CODE_BIAS(operand->precision);
    }
}

/* Rows that will be needed, to be fetched a few cache lines at a time while others are computed with. Rows that follow one another are one.
 * Where they are many bytes, a line of each of RUNS runs of rows is fetched before the next of each: with several pages open, memory is read
 * up to 1.4 times as fast (Zen 3). */
typedef struct {
    const char *line, *end; /* of the first run: the next line, and the end of its row */
    int64_t stride, bytes;  /* from row to row; of a row */
    int64_t rows;           /* of a run, behind this one */
    int64_t run_stride;     /* from run to run; 0: there is one */
    int64_t lines_at_once;  /* of a run */
} row_stream;

/* Codes are few bytes, and their kernels wait for products rather than memory. */
enum { RUNS = KERNEL_INTEGER ? 1 : 4, RUN_BYTES = 4096 };

/* Rows first ..< first + rows, where they are read in place, to be fetched in `times` goes. */
static row_stream stream_rows(const operand* operand, int64_t first, int64_t rows, int64_t times) {
    row_stream stream = {0};
    if (!operand->in_place || rows <= 0) return stream;
    stream.bytes = row_bytes(operand->precision, operand->channels);
    stream.stride = operand->tensor.strides[2] * row_bytes(operand->precision, 2) / 2;
    if (RUNS > 1 && rows % RUNS == 0 && rows / RUNS * stream.bytes >= RUN_BYTES) {
        rows /= RUNS;
        stream.run_stride = rows * stream.stride;
    }
    stream.lines_at_once = divide_up(rows * divide_up(stream.bytes, CACHE_LINE), times);
    if (stream.stride == stream.bytes) {
        stream.bytes *= rows;
        rows = 1;
    }
    stream.line = row_in_memory(operand, first);
    stream.end = stream.line + stream.bytes;
    stream.rows = rows - 1;
    return stream;
}

/* A line of each run. */
INLINE void fetch_line(const row_stream* stream, const char* line) {
    __builtin_prefetch(line);
    if (RUNS == 1 || stream->run_stride == 0) return;
    for (int run = 1; run < RUNS; run++) __builtin_prefetch(line + run * stream->run_stride);
}

INLINE void fetch_lines(row_stream* stream) {
    const char *line = stream->line, *end = stream->end;
    const int64_t bytes = stream->lines_at_once * CACHE_LINE;
    if (line && end - line >= bytes) { /* of one row, or of rows that follow one another */
        stream->line = line + bytes;
#pragma clang loop unroll(disable)
        for (; line < stream->line; line += CACHE_LINE) fetch_line(stream, line);
        return;
    }
#pragma clang loop unroll(disable)
    for (int64_t left = stream->lines_at_once; left > 0; left--, line += CACHE_LINE) {
        if (line >= end) {
            if (stream->rows == 0) break;
            stream->rows--;
            line = end + (stream->stride - stream->bytes);
            end += stream->stride;
        }
        fetch_line(stream, line);
    }
    stream->line = line;
    stream->end = end;
}
