/* Transposing tiles of FP32 numbers, eight by eight. They lie in workspace, or as rows in the caller's memory. */

typedef float eight_floats __attribute__((ext_vector_type(8)));
typedef eight_floats eight_floats_in_memory __attribute__((aligned(4)));

/* target[channel][row] = source[row][channel] for 8 rows and 8 channels. */
INLINE void transpose_eight(const float* source, int64_t source_pitch, float* target, int64_t target_pitch) {
    eight_floats a[8], b[8];
#pragma clang loop unroll(full)
    for (int row = 0; row < 8; row++) a[row] = *(const eight_floats_in_memory*)(source + row * source_pitch);
#pragma clang loop unroll(full)
    for (int row = 0; row < 8; row += 2) {
        b[row] = __builtin_shufflevector(a[row], a[row + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[row + 1] = __builtin_shufflevector(a[row], a[row + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma clang loop unroll(full)
    for (int row = 0; row < 8; row += 4) {
        a[row] = __builtin_shufflevector(b[row], b[row + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        a[row + 1] = __builtin_shufflevector(b[row], b[row + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        a[row + 2] = __builtin_shufflevector(b[row + 1], b[row + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        a[row + 3] = __builtin_shufflevector(b[row + 1], b[row + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma clang loop unroll(full)
    for (int row = 0; row < 4; row++) {
        *(eight_floats_in_memory*)(target + row * target_pitch) = __builtin_shufflevector(a[row], a[row + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(eight_floats_in_memory*)(target + (row + 4) * target_pitch) =
            __builtin_shufflevector(a[row], a[row + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* target[channel][row] = source[row][channel]. Bits are moved as they are: they need not be those of numbers. */
static void transpose_floats(const float* source, int64_t source_pitch, int64_t rows, int64_t channels, float* target,
                             int64_t target_pitch) {
    const int64_t whole_rows = rows / 8 * 8, whole_channels = channels / 8 * 8;
    for (int64_t row = 0; row < whole_rows; row += 8) {
        for (int64_t channel = 0; channel < whole_channels; channel += 8) {
            transpose_eight(source + row * source_pitch + channel, source_pitch, target + channel * target_pitch + row, target_pitch);
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t channel = row < whole_rows ? whole_channels : 0; channel < channels; channel++) {
            memcpy(target + channel * target_pitch + row, source + row * source_pitch + channel, sizeof(float));
        }
    }
}
