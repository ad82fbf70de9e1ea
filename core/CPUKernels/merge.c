/* Merging two partial results of attention over disjoint sets of keys into that over their union (Dao et al., "Flash-Decoding"; Liu et al.,
 * "Ring Attention"). Memory-bound, so the arithmetic is FP64 throughout. */
#include "shared/conversion.h"

#include <math.h>

static double get_logsumexp(const cpu_merge* merge, const void* array, int64_t index) {
    return merge->double_statistics ? ((const double*)array)[index] : (double)((const float*)array)[index];
}

size_t cpu_merge_workspace_bytes(const cpu_merge* merge) {
    return 2 * (size_t)merge->head_dim * sizeof(double);
}

void cpu_merge_run(const cpu_merge* merge, int64_t item, void* workspace) {
    const int64_t b = item / merge->num_heads, h = item % merge->num_heads;
    double* row = workspace;
    double* other = row + merge->head_dim;
    for (int64_t s = 0; s < merge->seq_len; s++) {
        const int64_t index = item * merge->seq_len + s;
        const double logsumexp_a = get_logsumexp(merge, merge->logsumexp_a, index);
        const double logsumexp_b = get_logsumexp(merge, merge->logsumexp_b, index);
        const double highest = logsumexp_a > logsumexp_b ? logsumexp_a : logsumexp_b;
        const bool has_a = logsumexp_a != -INFINITY, has_b = logsumexp_b != -INFINITY;
        double merged = -INFINITY;
        for (int64_t d = 0; d < merge->head_dim; d++) row[d] = 0;
        /* An absent part is skipped, not multiplied by 0: its output means nothing. */
        if (has_a && has_b) {
            const double weight_a = exp(logsumexp_a - highest), weight_b = exp(logsumexp_b - highest);
            const double total = weight_a + weight_b;
            load_row_double(&merge->output_a, b, h, s, merge->head_dim, row);
            load_row_double(&merge->output_b, b, h, s, merge->head_dim, other);
            for (int64_t d = 0; d < merge->head_dim; d++) row[d] = (row[d] * weight_a + other[d] * weight_b) / total;
            merged = highest + log(total);
        } else if (has_a || has_b) {
            load_row_double(has_a ? &merge->output_a : &merge->output_b, b, h, s, merge->head_dim, row);
            merged = has_a ? logsumexp_a : logsumexp_b;
        }
        store_row_double(&merge->output, b, h, s, merge->head_dim, row);
        if (merge->double_statistics) {
            ((double*)merge->logsumexp)[index] = merged;
        } else {
            ((float*)merge->logsumexp)[index] = (float)merged;
        }
    }
}
