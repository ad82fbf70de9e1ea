/* Random numbers that are the same on every machine. */
#ifndef RANDOM_NUMBERS_H
#define RANDOM_NUMBERS_H

#include <stdbool.h>
#include <stdint.h>

/* Also on one with fused multiply-add. */
#pragma clang fp contract(off)

/* SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). */
typedef struct {
    uint64_t state;
} generator;

static inline uint64_t next_bits(generator* random) {
    uint64_t bits = random->state += 0x9E3779B97F4A7C15u;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

/* One of first ... last. */
static inline int64_t draw(generator* random, int64_t first, int64_t last) {
    return first + (int64_t)(next_bits(random) % (uint64_t)(last - first + 1));
}

static inline bool chance(generator* random, int64_t percent) {
    return draw(random, 1, 100) <= percent;
}

static inline double draw_fraction(generator* random) {
    return (double)(next_bits(random) >> 11) * 0x1p-53;
}

/* About a standard normal number: four uniform ones of 16 bits, whose variances are 1/12, times the root of 3. */
static inline float draw_normal(generator* random) {
    const uint64_t bits = next_bits(random);
    const int64_t sum = (int64_t)((bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48));
    return (float)(sum - 2 * 0xFFFF) * (1.7320508f / 0x1p16f);
}

#define DRAW_FROM(random, ...) \
    ((const int64_t[]){__VA_ARGS__}[draw(random, 0, (int64_t)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)) - 1)])

#endif /* RANDOM_NUMBERS_H */
