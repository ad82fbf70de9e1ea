/* The reference attention kernels: plain C for every rule of the semantics, the truth that faster kernels are tested against and the
 * fallback for what they do not serve. This file is a template; the attention_*_reference*.c files beside it instantiate it with
 *
 *   KERNEL_FP64     0: FP32 arithmetic, operands of any type but FP64.  1: FP64 arithmetic, operands of any type
 *   KERNEL_SUFFIX   the end of the kernels' names, such as fp32_reference_avx2
 *   KERNEL_WIDE_SUFFIX  FP32 only: the FP64 kernels that compute rows which overflow FP32 arithmetic
 *   KERNEL_TARGET   the instruction set as a target attribute string, or undefined for the architecture's baseline
 *
 * Numerical contract: operands are dequantised to the real type, scores, softmax and sums are in it; sums over head_dim run in order of the
 * channels, sums over keys in order of the columns within tiles of TILE_COLUMNS, and of the tiles. No result depends on threads, on other
 * rows, heads or batches, or on strides. Masked scores are selected, not added; values that are not finite are found by one test a tile and
 * then take a careful path. */
#include "cpu_kernels.h"
#include "../shared/naming.h"

#include <float.h>
#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpsabi" /* every function that takes or returns a vector is inlined */
#if !KERNEL_FP64
#define KERNEL_WIDE_ROWS KERNEL_NAME(attention_forward_rows, KERNEL_WIDE_SUFFIX)
#define KERNEL_WIDE_ROWS_BYTES KERNEL_NAME(attention_forward_rows_bytes, KERNEL_WIDE_SUFFIX)
void KERNEL_WIDE_ROWS(const cpu_attention* attention, int64_t b, int64_t h, int64_t first_row, int64_t rows, void* memory);
size_t KERNEL_WIDE_ROWS_BYTES(const cpu_attention* attention);
#endif

#ifdef KERNEL_TARGET
#pragma clang attribute push(__attribute__((target(KERNEL_TARGET))), apply_to = function)
#endif

/* clang-format off: each file needs those before it */
#include "../shared/conversion.h"
#include "../shared/real.h"
#include "../shared/multiply.h"
#include "../shared/tile.h"
#include "../shared/rows.h"
#include "forward.h"
#include "backward.h"
/* clang-format on */

#ifdef KERNEL_TARGET
#pragma clang attribute pop
#endif
#pragma clang diagnostic pop

#define DEFINE_KERNEL(operation, count, bytes, run_item)                 \
    const cpu_attention_kernel KERNEL_NAME(operation, KERNEL_SUFFIX) = { \
        .name = #operation "_" KERNEL_TEXT(KERNEL_SUFFIX),               \
        .item_count = count,                                             \
        .workspace_bytes = bytes,                                        \
        .run = run_item,                                                 \
    }

DEFINE_KERNEL(attention_forward, forward_tile_items, forward_workspace_bytes, forward_run);
DEFINE_KERNEL(attention_d_values, row_tile_items, backward_workspace_bytes, d_values_run);
DEFINE_KERNEL(attention_backward_query, row_tile_items, backward_workspace_bytes, backward_query_run);
DEFINE_KERNEL(attention_backward_key_value, backward_key_value_items, backward_workspace_bytes, backward_key_value_run);
DEFINE_KERNEL(attention_backward_bias, backward_bias_items, backward_workspace_bytes, backward_bias_run);
