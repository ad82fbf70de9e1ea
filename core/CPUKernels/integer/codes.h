/* What the instruction sets' products share: bytes as codes, or pairs of 16 bits. Before it is included, STEP, lane_code and signed_code are
 * defined: STEP codes fill 32 bits. */

typedef int8_t sixteen_codes __attribute__((ext_vector_type(16)));
typedef sixteen_codes sixteen_codes_in_memory __attribute__((aligned(1)));

/* 2^x within 3e-6 of the result, for x below 128; 0 for what is less than the smallest normal number. */
INLINE vector short_exp2(vector x) {
    const float round_to_integer = 12582912.0f; /* see vector_exp2() */
    vector shifted = x + round_to_integer;
    vector r = x - (shifted - round_to_integer);
    vector e = vector_of(9.570102e-3f);
    e = e * r + 5.591786e-2f;
    e = e * r + 2.4024744e-1f;
    e = e * r + 6.931218e-1f;
    e = e * r + 0.9999993f;
    vector_mask bits = *(vector_mask*)&e + (*(vector_mask*)&shifted << 23);
    return vector_select(x < -126.0f, vector_of(0), *(vector*)&bits);
}
