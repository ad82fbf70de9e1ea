/* Keys and values as decode kernels read them: blocks of rows, in place where they can be. */

/* The keys or values of one head, and the block of them at hand. */
typedef struct {
    cpu_tensor tensor;
    int64_t b, head, channels;
    cpu_precision precision; /* of the rows as they are multiplied */
    int64_t padded;          /* channels of whole steps */
    int64_t steps;
    bool dequantized; /* copied as real numbers: no scale nor zero point is left to apply */
    bool in_place;    /* not copied by elements */
    bool conflicting; /* rows share cache sets: they are copied too, as they are */
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

/* Whether rows can be read where they lie: if they are not dequantised, their channels neighbours and whole steps. */
INLINE bool stays_in_place(const cpu_tensor* tensor, int64_t channels) {
    return multiplied_precision(tensor) == tensor->precision && tensor->strides[3] == 1 &&
           channels == padded_channels(tensor->precision, channels);
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
    operand->in_place = stays_in_place(tensor, channels);
    operand->conflicting = operand->in_place && rows_conflict(tensor, channels, BLOCK_KEYS);
    const bool has_row_scales = has_codes(tensor) && !operand->dequantized && !has_channel_scales(tensor);
    operand->scaled = has_row_scales && tensor->scales;
    operand->shifted = has_row_scales && tensor->zero_points;
    for (int64_t k = 0; k < BLOCK_KEYS; k++) {
        operand->scales[k] = 1;
        operand->zero_points[k] = CODE_BIAS(operand->precision);
    }
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
        const char* elements = row_in_memory(tensor, operand->b, operand->head, s);
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
        operand->rows = row_in_memory(tensor, operand->b, operand->head, first);
        operand->stride = row_stride_bytes(tensor);
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

/* Copies the placed block's rows if they conflict. */
static void gather_block(operand* operand) {
    if (!operand->conflicting) return;
    const int64_t bytes = row_bytes(operand->precision, operand->padded);
    for (int64_t k = 0; k < operand->columns; k++) {
        const char* row = operand->rows + k * operand->stride;
        char* copy = operand->copies + k * bytes;
        int64_t byte = 0;
        for (; byte + (int64_t)sizeof(slice) <= bytes; byte += (int64_t)sizeof(slice)) memcpy(copy + byte, row + byte, sizeof(slice));
        for (; byte < bytes; byte += SLICE) memcpy(copy + byte, row + byte, SLICE); /* a step of codes is one slice of bytes, or more */
    }
    operand->rows = operand->copies;
    operand->stride = bytes;
}

/* Rows first ..< first + rows of `heads` heads side by side, where they are read in place, to be fetched in `times` goes. */
static row_stream stream_operand(const operand* operand, int64_t heads, int64_t first, int64_t rows, int64_t times) {
    if (!operand->in_place) return (row_stream){0};
    return stream_rows(&operand->tensor, operand->b, operand->head, heads * operand->channels, first, rows, times);
}
