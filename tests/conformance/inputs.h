/* The inputs of conformance cases: a number for each place in each tensor, from a generator that docs/conformance.md specifies. */
#ifndef INPUTS_H
#define INPUTS_H

#include <stdint.h>
#include <string.h>

/* What a number belongs to. */
typedef enum {
    STREAM_QUERY = 0,
    STREAM_KEY = 1,
    STREAM_VALUE = 2,
    STREAM_GRAD_OUTPUT = 3,
    STREAM_GRAD_LOGSUMEXP = 4,
    STREAM_MASK = 5,
    STREAM_SINKS = 6,
    STREAM_ALIBI_SLOPES = 7,
    STREAM_SCALES = 16,        /* plus the operand's own: 0, 1, 2 */
    STREAM_ZERO_POINTS = 32,   /* likewise */
    STREAM_CHANNEL_MEANS = 48, /* likewise */
} stream;

static inline uint64_t input_word(uint64_t seed, int number, uint64_t index) {
    uint64_t z = (index + 1) * 0x9E3779B97F4A7C15u + (seed * 256 + (uint64_t)number) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* 0 ... 262140, nearly normal around 131070. */
static inline int32_t input_sum(uint64_t word) {
    return (int32_t)((word & 0xFFFF) + (word >> 16 & 0xFFFF) + (word >> 32 & 0xFFFF) + (word >> 48));
}

/* For FP32 and FP64: exact in both. */
static inline float input_real(uint64_t word) {
    return (float)(input_sum(word) - 131070) * 0x1p-15f;
}

/* For FP16 and BF16: exact in both. */
static inline float input_short_real(uint64_t word) {
    return (float)((input_sum(word) >> 10) - 128) * 0x1p-5f;
}

static inline int8_t input_int8(uint64_t word) {
    return (int8_t)((int32_t)(word >> 56) - 128);
}

static inline int8_t input_int4(uint64_t word) {
    return (int8_t)((int32_t)(word >> 60) - 8);
}

static inline float input_scale(uint64_t word, int is_int8) {
    return (float)(8 + (word >> 61)) * (is_int8 ? 0x1p-8f : 0x1p-5f);
}

static inline int32_t input_zero_point(uint64_t word) {
    return (int32_t)(word >> 61) - 4;
}

static inline uint8_t input_bool(uint64_t word) {
    return (word >> 62) != 0;
}

static inline float input_slope(uint64_t word) {
    return (float)(1 + (word >> 61)) * 0x1p-4f;
}

/* The bits of numbers that input_short_real() gives. */
static inline uint16_t bits_of_bfloat(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static inline uint16_t bits_of_half(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    return (uint16_t)(sign | (magnitude == 0 ? 0 : (magnitude - (112u << 23)) >> 13));
}

/* What runners print of their results. */
static inline uint64_t hash_of(const void* memory, size_t bytes) {
    const uint8_t* at = memory;
    uint64_t hash = 0xCBF29CE484222325u;
    for (size_t k = 0; k < bytes; k++) hash = hash * 0x100000001B3u + at[k];
    return hash;
}

#endif /* INPUTS_H */
