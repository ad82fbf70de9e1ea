/* What the instruction sets' products share: bytes as codes, or pairs of 16 bits. Before it is included, STEP, lane_code and signed_code are
 * defined: STEP codes fill 32 bits. */

typedef int8_t sixteen_codes __attribute__((ext_vector_type(16)));
typedef sixteen_codes sixteen_codes_in_memory __attribute__((aligned(1)));

/* The logarithm of weights that are none: finite, so that no arithmetic on it is NaN. Rows whose scores reach it are left to the reference. */
static const float NO_WEIGHT = -1e38f;

/* Each x becomes factor * 2^x within 8e-5 of it, for x and results below 2^128; 2^x for x below -126 is that of -126. Operation by operation,
 * for all of them: one after the other they would fill a processor's schedulers with what waits. */
INLINE void short_exp2(vector x[STEP], const float factor) {
    vector shifted[STEP], e[STEP];
    for (int k = 0; k < STEP; k++) x[k] = vector_max(vector_of(-126.0f), x[k]);
    for (int k = 0; k < STEP; k++) shifted[k] = x[k] + ROUND_TO_INTEGER;
    for (int k = 0; k < STEP; k++) x[k] -= shifted[k] - ROUND_TO_INTEGER;
    for (int k = 0; k < STEP; k++) e[k] = 0.05517167f * factor * x[k] + 0.24261113f * factor;
    for (int k = 0; k < STEP; k++) e[k] = e[k] * x[k] + 0.69326097f * factor;
    for (int k = 0; k < STEP; k++) e[k] = e[k] * x[k] + 0.99992806f * factor;
    for (int k = 0; k < STEP; k++) {
        const vector_mask bits = *(const vector_mask*)&e[k] + (*(const vector_mask*)&shifted[k] << 23);
        x[k] = *(const vector*)&bits;
    }
}
