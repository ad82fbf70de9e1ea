/*
 * Computes every case of quantization.jsonl again, from the definitions in docs/numerics.md alone, and compares bit for bit.
 *
 *     cc -std=c11 -O2 -ffp-contract=off verify_quantization.c -lm -o verify_quantization && ./verify_quantization quantization.jsonl
 *
 * Prints a line for each difference, and how many cases there were. Exits with 1 if there was a difference, or no case at all.
 * generate_quantization.py describes the file. Each float operation below is one operation in FP32: the compiler must not contract two.
 */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float expressions must be evaluated in float"
#endif

enum granularity { TENSOR, HEAD, TOKEN, BLOCK, CHANNEL, GROUP };

static const char* const granularity_names[] = {"tensor", "head", "token", "block", "channel", "group"};

/* One line of the file. */
typedef struct {
    char name[128];
    char kind[16];
    char input_type[16];
    size_t batch, heads, tokens, channels;
    int64_t* lengths; /* NULL: all tokens take part */
    bool int4, symmetric, smooth, rotate;
    enum granularity granularity;
    size_t block_size, group_size;
} vector_case;

/* What the definitions give. */
typedef struct {
    bool refused;
    int64_t* codes; /* one an element */
    float* scales;
    int32_t* zero_points;
    float* means;
    float* dequantized;
} outcome;

/* ---- Reading ------------------------------------------------------------------------------------------------------------------------- */

static void* allocate(size_t count, size_t size) {
    void* memory = calloc(count + 1, size);
    if (memory == NULL) {
        fputs("out of memory\n", stderr);
        exit(2);
    }
    return memory;
}

static void malformed(const char* line, const char* field) {
    fprintf(stderr, "malformed line: %s: %.100s\n", field, line);
    exit(2);
}

/* The text of a field's value, or NULL if the line has no such field. */
static const char* value_of(const char* line, const char* field) {
    char pattern[64];
    snprintf(pattern, sizeof pattern, "\"%s\": ", field);
    const char* found = strstr(line, pattern);
    return found == NULL ? NULL : found + strlen(pattern);
}

static const char* needed(const char* line, const char* field) {
    const char* value = value_of(line, field);
    if (value == NULL) malformed(line, field);
    return value;
}

static void read_text(const char* line, const char* field, char* text, size_t size) {
    const char* value = needed(line, field);
    const char* end = *value == '"' ? strchr(value + 1, '"') : NULL;
    if (end == NULL || (size_t)(end - value) > size) malformed(line, field);
    memcpy(text, value + 1, (size_t)(end - value - 1));
    text[end - value - 1] = '\0';
}

static bool read_flag(const char* line, const char* field) {
    const char* value = needed(line, field);
    return strncmp(value, "true", 4) == 0;
}

static size_t read_size(const char* line, const char* field) {
    return (size_t)strtoull(needed(line, field), NULL, 10);
}

/* A list of `count` whole numbers, or NULL for null. */
static int64_t* read_list(const char* line, const char* field, size_t count) {
    const char* value = needed(line, field);
    if (*value == 'n') return NULL;
    int64_t* list = allocate(count, sizeof *list);
    for (size_t index = 0; index < count; index++) {
        if (*value != '[' && *value != ',') malformed(line, field);
        char* end = NULL;
        list[index] = strtoll(value + 1, &end, 10);
        value = end;
    }
    if (*value != ']') malformed(line, field);
    return list;
}

static int nibble_of(char digit) {
    if (digit >= '0' && digit <= '9') return digit - '0';
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

/* The bytes of an array; NULL for null. */
static uint8_t* read_bytes(const char* line, const char* field, size_t* count) {
    const char* value = needed(line, field);
    *count = 0;
    if (*value == 'n') return NULL;
    if (*value++ != '"') malformed(line, field);
    uint8_t* bytes = allocate(strcspn(value, "\"") / 2, 1);
    while (*value != '"') {
        const int high = nibble_of(value[0]);
        const int low = high < 0 ? -1 : nibble_of(value[1]);
        if (low < 0) malformed(line, field);
        bytes[(*count)++] = (uint8_t)(high << 4 | low);
        value += 2;
    }
    return bytes;
}

static uint64_t little_endian(const uint8_t* bytes, size_t size) {
    uint64_t value = 0;
    for (size_t index = 0; index < size; index++) value |= (uint64_t)bytes[index] << (8 * index);
    return value;
}

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* ---- The definitions ----------------------------------------------------------------------------------------------------------------- */

static float float_of_half(uint16_t bits) {
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
    return exponent == 0 ? sign * ldexpf((float)fraction, -24) : sign * ldexpf((float)(1024 + fraction), exponent - 25);
}

/* The elements of an input, rounded to FP32. */
static float* read_input(const char* line, const vector_case* at, size_t elements) {
    const char* type = at->input_type;
    const size_t size = strcmp(type, "float64") == 0 ? 8 : strcmp(type, "float32") == 0 ? 4 : 2;
    size_t count = 0;
    uint8_t* bytes = read_bytes(line, "input", &count);
    if (count != elements * size) malformed(line, "input");
    float* values = allocate(elements, sizeof *values);
    for (size_t index = 0; index < elements; index++) {
        const uint64_t bits = little_endian(bytes + index * size, size);
        if (size == 8) {
            double wide;
            memcpy(&wide, &bits, sizeof wide);
            values[index] = (float)wide;
        } else if (size == 4) {
            values[index] = float_of_bits((uint32_t)bits);
        } else if (strcmp(type, "bfloat16") == 0) {
            values[index] = float_of_bits((uint32_t)bits << 16);
        } else {
            values[index] = float_of_half((uint16_t)bits);
        }
    }
    free(bytes);
    return values;
}

/* The Walsh-Hadamard transform of each block of a row. */
static void rotate_row(float* row, size_t channels) {
    size_t size = 1;
    while (channels % (2 * size) == 0) size *= 2;
    const float factor = (float)(1.0 / sqrt((double)size));
    for (size_t block = 0; block < channels; block += size) {
        for (size_t distance = 1; distance < size; distance *= 2) {
            for (size_t index = 0; index < size; index++) {
                if (index & distance) continue;
                float* first = row + block + index;
                const float a = first[0], b = first[distance];
                first[0] = a + b;
                first[distance] = a - b;
            }
        }
        for (size_t index = 0; index < size; index++) row[block + index] *= factor;
    }
}

static size_t divided_up(size_t count, size_t size) {
    return (count + size - 1) / size;
}

static size_t scale_count(const vector_case* at) {
    const size_t heads = at->batch * at->heads;
    switch (at->granularity) {
    case TENSOR: return 1;
    case HEAD: return heads;
    case TOKEN: return heads * at->tokens;
    case BLOCK: return heads * divided_up(at->tokens, at->block_size);
    case CHANNEL: return heads * at->channels;
    default: return heads * at->tokens * divided_up(at->channels, at->group_size);
    }
}

/* Which scale belongs to an element of head `head`, counted through the batch. */
static size_t scale_index(const vector_case* at, size_t head, size_t token, size_t channel) {
    switch (at->granularity) {
    case TENSOR: return 0;
    case HEAD: return head;
    case TOKEN: return head * at->tokens + token;
    case BLOCK: return head * divided_up(at->tokens, at->block_size) + token / at->block_size;
    case CHANNEL: return head * at->channels + channel;
    default: return (head * at->tokens + token) * divided_up(at->channels, at->group_size) + channel / at->group_size;
    }
}

static size_t tokens_of(const vector_case* at, size_t head) {
    return at->lengths == NULL ? at->tokens : (size_t)at->lengths[head / at->heads];
}

/* Subtracts each channel's mean over a head's tokens. */
static void smooth_head(const vector_case* at, float* rows, size_t tokens, float* means) {
    for (size_t channel = 0; channel < at->channels; channel++) {
        double sum = 0;
        for (size_t token = 0; token < tokens; token++) sum += (double)rows[token * at->channels + channel];
        means[channel] = tokens == 0 ? 0.0f : (float)(sum / (double)tokens);
        for (size_t token = 0; token < tokens; token++) rows[token * at->channels + channel] -= means[channel];
    }
}

/* Scales and zero points of what lies between the lowest and the highest value of each scale. */
static void choose_scales(const vector_case* at, const float* low, const float* high, size_t count, outcome* result) {
    const float range = at->int4 ? 7.0f : 127.0f;
    const float lowest = at->int4 ? -8.0f : -128.0f;
    for (size_t index = 0; index < count; index++) {
        float scale, zero_point = 0.0f;
        if (at->symmetric) {
            scale = fmaxf(-low[index], high[index]) / range;
        } else {
            const float steps = range - lowest;
            const float upper = high[index] / steps, lower = low[index] / steps;
            scale = upper - lower;
        }
        if (scale < FLT_MIN) {
            scale = 0.0f; /* marks codes of 0; becomes 1 below */
        } else if (!at->symmetric) {
            zero_point = fminf(fmaxf(lowest - rintf(low[index] / scale), lowest), range);
        }
        result->scales[index] = scale;
        result->zero_points[index] = (int32_t)zero_point;
    }
}

static void quantize(const vector_case* at, float* values, outcome* result) {
    const size_t heads = at->batch * at->heads, count = scale_count(at);
    float* low = allocate(count, sizeof *low);
    float* high = allocate(count, sizeof *high);
    for (size_t head = 0; head < heads; head++) {
        const size_t tokens = tokens_of(at, head);
        float* rows = values + head * at->tokens * at->channels;
        if (at->rotate) {
            for (size_t token = 0; token < tokens; token++) rotate_row(rows + token * at->channels, at->channels);
        }
        if (at->smooth) smooth_head(at, rows, tokens, result->means + head * at->channels);
        for (size_t token = 0; token < tokens; token++) {
            for (size_t channel = 0; channel < at->channels; channel++) {
                const float value = rows[token * at->channels + channel];
                const size_t index = scale_index(at, head, token, channel);
                if (!isfinite(value)) result->refused = true;
                low[index] = fminf(low[index], value);
                high[index] = fmaxf(high[index], value);
            }
        }
    }
    choose_scales(at, low, high, count, result);
    const int64_t greatest = at->int4 ? 7 : 127;
    const int64_t least = at->symmetric ? -greatest : -greatest - 1;
    for (size_t head = 0; head < heads && !result->refused; head++) {
        for (size_t token = 0; token < tokens_of(at, head); token++) {
            for (size_t channel = 0; channel < at->channels; channel++) {
                const size_t element = (head * at->tokens + token) * at->channels + channel;
                const size_t index = scale_index(at, head, token, channel);
                if (result->scales[index] == 0.0f) continue;
                const int64_t code = (int64_t)rintf(values[element] / result->scales[index]) + result->zero_points[index];
                result->codes[element] = code < least ? least : code > greatest ? greatest : code;
            }
        }
    }
    for (size_t index = 0; index < count; index++) {
        if (result->scales[index] == 0.0f) result->scales[index] = 1.0f;
    }
    free(low);
    free(high);
}

static void dequantize(const vector_case* at, outcome* result) {
    for (size_t head = 0; head < at->batch * at->heads; head++) {
        for (size_t token = 0; token < at->tokens; token++) {
            float* row = result->dequantized + (head * at->tokens + token) * at->channels;
            for (size_t channel = 0; channel < at->channels; channel++) {
                const size_t index = scale_index(at, head, token, channel);
                const int64_t code = result->codes[(head * at->tokens + token) * at->channels + channel];
                row[channel] = result->scales[index] * (float)(code - result->zero_points[index]);
                if (at->smooth) row[channel] += result->means[head * at->channels + channel];
            }
            if (at->rotate) rotate_row(row, at->channels);
        }
    }
}

/* ---- Comparing ----------------------------------------------------------------------------------------------------------------------- */

/* Bytes of codes as they lie in memory. */
static uint8_t* packed(const vector_case* at, const int64_t* codes, size_t* count) {
    const size_t rows = at->batch * at->heads * at->tokens;
    const size_t row_bytes = at->int4 ? (at->channels + 1) / 2 : at->channels;
    uint8_t* bytes = allocate(rows * row_bytes, 1);
    for (size_t row = 0; row < rows; row++) {
        for (size_t channel = 0; channel < at->channels; channel++) {
            const uint8_t code = (uint8_t)codes[row * at->channels + channel];
            if (at->int4) {
                bytes[row * row_bytes + channel / 2] |= (uint8_t)((code & 15) << (channel % 2 ? 4 : 0));
            } else {
                bytes[row * row_bytes + channel] = code;
            }
        }
    }
    *count = rows * row_bytes;
    return bytes;
}

/* Codes from the bytes of a line. */
static void unpack(const vector_case* at, const uint8_t* bytes, int64_t* codes) {
    const size_t rows = at->batch * at->heads * at->tokens;
    for (size_t row = 0; row < rows; row++) {
        for (size_t channel = 0; channel < at->channels; channel++) {
            int code;
            if (at->int4) {
                code = bytes[row * ((at->channels + 1) / 2) + channel / 2] >> (channel % 2 ? 4 : 0) & 15;
                if (code > 7) code -= 16;
            } else {
                code = bytes[row * at->channels + channel];
                if (code > 127) code -= 256;
            }
            codes[row * at->channels + channel] = code;
        }
    }
}

static bool differs(const vector_case* at, const char* field, size_t index) {
    printf("%s: %s differs at %zu\n", at->name, field, index);
    return true;
}

/* Compares an array of 32-bit words with a line's field; `words` NULL stands for null. */
static bool words_differ(const char* line, const vector_case* at, const char* field, const uint32_t* words, size_t count) {
    size_t size = 0;
    uint8_t* bytes = read_bytes(line, field, &size);
    bool different = false;
    if ((bytes == NULL) != (words == NULL) || (words != NULL && size != 4 * count)) {
        different = differs(at, field, 0);
    } else {
        for (size_t index = 0; words != NULL && index < count && !different; index++) {
            if (little_endian(bytes + 4 * index, 4) != words[index]) different = differs(at, field, index);
        }
    }
    free(bytes);
    return different;
}

static bool floats_differ(const char* line, const vector_case* at, const char* field, const float* values, size_t count) {
    uint32_t* words = values == NULL ? NULL : allocate(count, sizeof *words);
    for (size_t index = 0; values != NULL && index < count; index++) words[index] = bits_of_float(values[index]);
    const bool different = words_differ(line, at, field, words, count);
    free(words);
    return different;
}

static bool codes_differ(const char* line, const vector_case* at, const int64_t* codes) {
    size_t count = 0, size = 0;
    uint8_t* mine = packed(at, codes, &count);
    uint8_t* given = read_bytes(line, "codes", &size);
    bool different = given == NULL || size != count;
    if (different) differs(at, "codes", 0);
    for (size_t index = 0; index < count && !different; index++) {
        if (mine[index] != given[index]) different = differs(at, "codes", index);
    }
    free(mine);
    free(given);
    return different;
}

/* An array of 32-bit floats or integers. */
static void read_words(const char* line, const char* field, void* words, size_t count) {
    size_t size = 0;
    uint8_t* bytes = read_bytes(line, field, &size);
    if (size != 4 * count) malformed(line, field);
    for (size_t index = 0; index < count; index++) {
        const uint32_t word = (uint32_t)little_endian(bytes + 4 * index, 4);
        memcpy((char*)words + 4 * index, &word, 4);
    }
    free(bytes);
}

static void read_outcome(const char* line, const vector_case* at, size_t scales, outcome* result) {
    size_t size = 0, count = 0;
    uint8_t* bytes = read_bytes(line, "codes", &size);
    free(packed(at, result->codes, &count));
    if (size != count) malformed(line, "codes");
    unpack(at, bytes, result->codes);
    free(bytes);
    read_words(line, "scales", result->scales, scales);
    read_words(line, "zero_points", result->zero_points, scales);
    if (at->smooth) read_words(line, "channel_means", result->means, at->batch * at->heads * at->channels);
}

static vector_case read_case(const char* line) {
    vector_case at;
    memset(&at, 0, sizeof at);
    read_text(line, "name", at.name, sizeof at.name);
    read_text(line, "kind", at.kind, sizeof at.kind);
    if (value_of(line, "input_type") != NULL) read_text(line, "input_type", at.input_type, sizeof at.input_type);
    int64_t* shape = read_list(line, "shape", 4);
    if (shape == NULL) malformed(line, "shape");
    at.batch = (size_t)shape[0];
    at.heads = (size_t)shape[1];
    at.tokens = (size_t)shape[2];
    at.channels = (size_t)shape[3];
    free(shape);
    at.lengths = read_list(line, "lengths", at.batch);
    char word[16];
    read_text(line, "dtype", word, sizeof word);
    at.int4 = strcmp(word, "int4") == 0;
    read_text(line, "granularity", word, sizeof word);
    at.granularity = TENSOR;
    while (strcmp(word, granularity_names[at.granularity]) != 0) {
        if (at.granularity == GROUP) malformed(line, "granularity");
        at.granularity++;
    }
    at.block_size = read_size(line, "block_size");
    at.group_size = read_size(line, "group_size");
    if ((at.granularity == BLOCK && at.block_size == 0) || (at.granularity == GROUP && at.group_size == 0)) malformed(line, "size");
    at.symmetric = read_flag(line, "symmetric");
    at.smooth = read_flag(line, "smooth");
    at.rotate = read_flag(line, "rotate");
    return at;
}

/* Whether a line says anything else than the definitions. */
static bool line_differs(const char* line) {
    const vector_case at = read_case(line);
    const size_t elements = at.batch * at.heads * at.tokens * at.channels;
    const size_t scales = scale_count(&at), means = at.batch * at.heads * at.channels;
    outcome result;
    result.refused = false;
    result.codes = allocate(elements, sizeof *result.codes);
    result.scales = allocate(scales, sizeof *result.scales);
    result.zero_points = allocate(scales, sizeof *result.zero_points);
    result.means = allocate(means, sizeof *result.means);
    result.dequantized = allocate(elements, sizeof *result.dequantized);

    if (strcmp(at.kind, "dequantize") == 0) {
        read_outcome(line, &at, scales, &result);
    } else {
        float* values = read_input(line, &at, elements);
        quantize(&at, values, &result);
        free(values);
    }
    bool different = false;
    if (result.refused != (strcmp(at.kind, "refuse") == 0)) {
        different = differs(&at, "kind", 0);
    } else if (!result.refused) {
        dequantize(&at, &result);
        different |= codes_differ(line, &at, result.codes);
        different |= floats_differ(line, &at, "scales", result.scales, scales);
        different |= words_differ(line, &at, "zero_points", at.symmetric ? NULL : (const uint32_t*)(const void*)result.zero_points, scales);
        different |= floats_differ(line, &at, "channel_means", at.smooth ? result.means : NULL, means);
        different |= floats_differ(line, &at, "dequantized", result.dequantized, elements);
    }
    free(at.lengths);
    free(result.codes);
    free(result.scales);
    free(result.zero_points);
    free(result.means);
    free(result.dequantized);
    return different;
}

/* The whole file, with a 0 at its end. */
static char* read_file(const char* path) {
    FILE* file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
        perror(path);
        exit(2);
    }
    const long size = ftell(file);
    char* text = allocate((size_t)size, 1);
    rewind(file);
    if (fread(text, 1, (size_t)size, file) != (size_t)size) {
        perror(path);
        exit(2);
    }
    fclose(file);
    return text;
}

int main(int argc, char** argv) {
    if (argc != 2) {
        fputs("usage: verify_quantization FILE\n", stderr);
        return 2;
    }
    char* text = read_file(argv[1]);
    size_t cases = 0, different = 0;
    for (char* line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        cases++;
        different += line_differs(line);
    }
    free(text);
    printf("%zu of %zu cases agree\n", cases - different, cases);
    return cases == 0 || different != 0;
}
