/*
 * mfa.h - universal quantised Flash Attention: the C interface.
 *
 * One library (libmfa), one header. It computes exact and quantised scaled dot-product attention, forward and backward, in memory that
 * grows with the sequence lengths, never with their product. What is computed, to the last rule for masks, empty rows, NaN, alignment and
 * quantisation, is written down in docs/numerics.md; this header says how to ask for it.
 *
 * THREE WAYS TO USE IT
 *   1. Flat functions (mfa_attention_forward ...): contiguous host memory, plain arguments. The simplest start.
 *   2. Descriptors (mfa_attention_run_forward ...): any strides, grouped heads, masks, windows, lengths, dropout, every granularity of
 *      quantisation. The flat functions are thin callers of these.
 *   3. Encoding (mfa_attention_encode_forward ...): the same descriptors, recorded into a Metal command buffer that the caller owns.
 *
 * CONVENTIONS
 *   Status       Every function that can fail returns an int32_t: MFA_SUCCESS (0) or one of the MFA_ERROR_* codes. A refused call has
 *                written no output byte: only after MFA_ERROR_EXECUTION_FAILED are outputs undefined, and the context stays usable.
 *                Where several things are wrong, the first of this order is reported: context (1), sizes (3), pointers (5), training
 *                record (3), codes (5), scalars (5), values of arrays: kv_lengths (3) then scales (5) then the inputs of a fused call (5),
 *                overlap (5), what the device or function does not serve (6), workspace (2). mfa_last_error() has the words.
 *   NULL         Every pointer is checked; none is trusted. MFA_CHECKED marks a pointer for which NULL is refused with a status (a tensor
 *                without elements may have NULL data), MFA_NULLABLE one for which NULL has a meaning of its own.
 *   Strides      are in elements (codes, for INT4), may be 0 (broadcast inputs) or negative, and are given in the order batch, head, token,
 *                channel, whatever the layout in memory is.
 *   Ownership    The caller owns all memory that he passes; the library keeps no pointer to it after a call returns, except in a buffer made
 *                by mfa_create_buffer_from_memory() and as the key (never read) of a training record.
 *   Handles      mfa_context_t* and mfa_buffer_t* are tokens, never addresses. A destroyed, foreign or invented handle is recognised.
 *   Threads      A context serves one call at a time (a second thread waits for the first); different contexts are independent. fork() is
 *                survived: a CPU context works in the child, a Metal context answers MFA_ERROR_DEVICE_UNAVAILABLE there.
 *   Environment  How the calling thread rounds, flushes denormals or traps changes no result, and is as it was after the call.
 *   Growth       A descriptor begins with struct_size, which the caller sets to its sizeof. A longer descriptor than the library knows is
 *                accepted if the unknown rest is zero, else MFA_ERROR_UNSUPPORTED. Reserved fields must be 0.
 *   Flags        in descriptors are int32_t, 0 or 1; any other value is MFA_ERROR_INVALID_ARGUMENT.
 */
#ifndef MFA_H
#define MFA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MFA_VERSION_MAJOR 0
#define MFA_VERSION_MINOR 1
#define MFA_VERSION_PATCH 0

#if defined(_WIN32)
#define MFA_API
#elif defined(__GNUC__)
#define MFA_API __attribute__((visibility("default")))
#else
#define MFA_API
#endif

#if defined(__clang__)
#define MFA_NULLABLE _Nullable
#define MFA_CHECKED _Nullable
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wnullability-extension"
#else
#define MFA_NULLABLE
#define MFA_CHECKED
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Codes -------------------------------------------------------------------------------------------------------------------------- */

/* Status codes. */
#define MFA_SUCCESS 0                  /* done */
#define MFA_ERROR_INVALID_CONTEXT 1    /* context is NULL, destroyed or not a context */
#define MFA_ERROR_ALLOCATION_FAILED 2  /* memory for a buffer or for workspace could not be had */
#define MFA_ERROR_INVALID_DIMENSIONS 3 /* a size is illegal, sizes disagree, a product overflows, or no training record matches */
#define MFA_ERROR_EXECUTION_FAILED 4   /* a kernel failed; outputs are undefined, the context stays usable */
#define MFA_ERROR_INVALID_ARGUMENT 5   /* NULL, unknown code, non-finite scalar, overlap of an output with anything */
#define MFA_ERROR_UNSUPPORTED 6        /* legal, but not served by this device or function; the message names the feature */
#define MFA_ERROR_DEVICE_UNAVAILABLE 7 /* no such device here, or a Metal context in a child after fork() */

/* How an operand lies in memory. FP64 is served by the descriptors on the CPU only (reference kernels, for checks of gradients). INT4 packs
 * two two's complement codes a byte along the channels, the even channel in the low nibble. BOOL (one byte, nonzero = attend) is for masks. */
#define MFA_PRECISION_FP32 0
#define MFA_PRECISION_FP16 1
#define MFA_PRECISION_BF16 2
#define MFA_PRECISION_FP64 3
#define MFA_PRECISION_INT4 4
#define MFA_PRECISION_INT8 8
#define MFA_PRECISION_BOOL 16

/* Devices. AUTO is Metal where there is one, else the CPU. SOFTMETAL runs the Metal kernels in software, on Linux, for tests. */
#define MFA_DEVICE_AUTO 0
#define MFA_DEVICE_CPU 1
#define MFA_DEVICE_METAL 2
#define MFA_DEVICE_SOFTMETAL 3

/* Granularity: the shape of scales (float) and zero_points (int32_t), contiguous, in this order whatever the data's layout; H is the tensor's
 * own head count, S its tokens, D its channels. */
#define MFA_GRANULARITY_TENSOR 0  /* []  one scale */
#define MFA_GRANULARITY_HEAD 1    /* [B, H] */
#define MFA_GRANULARITY_TOKEN 2   /* [B, H, S] */
#define MFA_GRANULARITY_BLOCK 3   /* [B, H, ceil(S / block_size)] */
#define MFA_GRANULARITY_CHANNEL 4 /* [B, H, D] */
#define MFA_GRANULARITY_GROUP 5   /* [B, H, S, ceil(D / group_size)] */

/* Where query row i stands among the keys: at key position i + off. */
#define MFA_ALIGNMENT_UPPER_LEFT 0  /* off = 0, or query_offsets where given */
#define MFA_ALIGNMENT_LOWER_RIGHT 1 /* off = seq_len_kv - seq_len_q, with kv_lengths[b] in place of seq_len_kv where given */

/* Operations, for mfa_attention_kernel_name(). */
#define MFA_OPERATION_FORWARD 0
#define MFA_OPERATION_BACKWARD_QUERY 1
#define MFA_OPERATION_BACKWARD_KEY_VALUE 2

/* ---- Contexts ----------------------------------------------------------------------------------------------------------------------- */

typedef struct mfa_context mfa_context_t;
typedef struct mfa_buffer mfa_buffer_t;

/* An allocator for buffers and workspace. allocate returns `size` bytes aligned to `alignment` (a power of two, at least 64), or NULL, which
 * becomes MFA_ERROR_ALLOCATION_FAILED. deallocate gets back what allocate gave, with the same size and alignment. Both are called on the
 * thread that calls the library, never from a worker. */
typedef void* MFA_NULLABLE (*mfa_allocate_function)(void* MFA_NULLABLE state, size_t size, size_t alignment);
typedef void (*mfa_deallocate_function)(void* MFA_NULLABLE state, void* MFA_NULLABLE memory, size_t size, size_t alignment);

typedef struct mfa_context_options {
    uint32_t struct_size; /* sizeof(mfa_context_options_t) */
    int32_t device;       /* MFA_DEVICE_* */
    uint32_t num_threads; /* CPU threads of a call, the caller's included; 0: MFA_NUM_THREADS if set, else what the affinity mask and the
                             control group's quota allow; at most 256 */
    uint32_t reserved;    /* 0 */
    mfa_allocate_function MFA_NULLABLE allocate;     /* both or none; NULL: the C library's */
    mfa_deallocate_function MFA_NULLABLE deallocate;
    void* MFA_NULLABLE allocator_state; /* handed to both */
} mfa_context_options_t;

/*
 * Creates a context on the default device with default options and stores its handle in *context.
 * Returns 0; 5 if `context` is NULL; 2; 7, also for an environment variable that says what is not here. On failure *context is untouched.
 * Any thread.
 */
MFA_API int32_t mfa_create_context(void* MFA_NULLABLE* MFA_CHECKED context);

/*
 * Creates a context as `options` say (NULL: as mfa_create_context()).
 * Returns 0; 5 for a NULL `context`, a struct_size too small, an unknown device, num_threads above 256, or only one of the two allocator
 * functions; 6 for a longer options struct with nonzero unknown fields, or a GPU that lacks a feature that all kernels need (named in the
 * message); 2; 7 if the device is not here, or an environment variable says what is not. On failure *context is untouched.
 */
MFA_API int32_t mfa_create_context_with_options(const mfa_context_options_t* MFA_NULLABLE options, mfa_context_t* MFA_NULLABLE* MFA_CHECKED context);

/*
 * Destroys a context of either kind; waits for a call that another thread has in it. Its buffers stay valid until they are destroyed.
 * Returns 0, or 1 if `context` is NULL, was destroyed before or never was a context: nothing is touched then.
 */
MFA_API int32_t mfa_destroy_context(void* MFA_NULLABLE context);

/* What a context is and can do. Strings are static. */
typedef struct mfa_context_info {
    uint32_t struct_size;          /* in: sizeof(mfa_context_info_t) */
    int32_t device;                /* MFA_DEVICE_CPU, _METAL or _SOFTMETAL */
    uint32_t num_threads;          /* threads that a call uses on the CPU */
    uint32_t reserved;             /* 0 */
    const char* MFA_NULLABLE device_name;     /* "cpu", "metal", "softmetal" */
    const char* MFA_NULLABLE instruction_set; /* that the CPU kernels in use were compiled for: "baseline", "avx2" ... */
    uint64_t operand_precisions;   /* bit n set: operands of precision code n are served */
    uint64_t fallback_precisions;  /* those of them that this device leaves to the CPU kernels (on Metal: FP64) */
    uint64_t workspace_bytes;      /* that the context holds now */
    double gpu_seconds;            /* that the GPU was at work for the last call which computed; 0 if it was not. Not in the first version */
} mfa_context_info_t;

/* Fills *info. Returns 0; 1; 5 if `info` is NULL or its struct_size too small. */
MFA_API int32_t mfa_context_get_info(mfa_context_t* MFA_CHECKED context, mfa_context_info_t* MFA_CHECKED info);

/* 1 if contexts can be created on `device` here, else 0 (also for an unknown code). */
MFA_API int32_t mfa_device_is_available(int32_t device);

/*
 * The message of the last call on `context` that failed: function, argument, expected, got. "" if none has failed. Owned by the context,
 * valid until its next failing call or its destruction. With NULL or an invalid context: that of this thread's last failed call which had
 * no valid context (creation, destruction, buffers, status 1), valid until the next such failure on this thread. Never NULL.
 */
MFA_API const char* MFA_NULLABLE mfa_last_error(mfa_context_t* MFA_NULLABLE context);

/* A few words for a status code; "unknown status" for any other number. Static, never NULL. */
MFA_API const char* MFA_NULLABLE mfa_status_string(int32_t status);

/* MAJOR * 10000 + MINOR * 100 + PATCH of the library, and the same as text. */
MFA_API uint32_t mfa_version(void);
MFA_API const char* MFA_NULLABLE mfa_version_string(void);

/* ---- Buffers ------------------------------------------------------------------------------------------------------------------------ */

/* Memory with a size, so that a view into it can be checked, and with a device's own handle, so that a GPU needs no copy. Buffers are optional
 * on the CPU: plain addresses do. A buffer belongs to its context's device and may be used by any context on that device. */

/* Allocates `size` bytes (zeroed, aligned to the page; 0 is legal). Returns 0; 1; 3 if size exceeds 2^63 - 1; 5; 2. */
MFA_API int32_t mfa_create_buffer(mfa_context_t* MFA_CHECKED context, size_t size, mfa_buffer_t* MFA_NULLABLE* MFA_CHECKED buffer);

/* Wraps `size` bytes at `memory`, which the caller keeps alive until the buffer is destroyed; no copy. A GPU sees them there if they are whole
 * pages (of 16 KiB), else it gets copies. Returns 0; 1; 3 if the range wraps around; 5 for NULL memory with a size, or a NULL `buffer`; 2. */
MFA_API int32_t mfa_create_buffer_from_memory(mfa_context_t* MFA_CHECKED context, void* MFA_CHECKED memory, size_t size,
                                              mfa_buffer_t* MFA_NULLABLE* MFA_CHECKED buffer);

/* Wraps an id<MTLBuffer> (bridged to void*), which the buffer retains; no copy. On SOFTMETAL it is an sm_buffer* of softmetal.h. Returns 0; 1;
 * 5 for NULL, a buffer of another device, or (SOFTMETAL only: a Mac cannot tell) a pointer to anything else; 6 on a context that is not a Metal
 * one, or for memory that the host cannot read; 2. */
MFA_API int32_t mfa_create_buffer_from_metal(mfa_context_t* MFA_CHECKED context, void* MFA_CHECKED metal_buffer,
                                             mfa_buffer_t* MFA_NULLABLE* MFA_CHECKED buffer);

/* The host address of a buffer's first byte; NULL for an invalid handle, a buffer of 0 bytes, or one that the host cannot read. */
MFA_API void* MFA_NULLABLE mfa_buffer_contents(mfa_buffer_t* MFA_CHECKED buffer);

/* A buffer's size in bytes; 0 for an invalid handle. */
MFA_API size_t mfa_buffer_size(mfa_buffer_t* MFA_CHECKED buffer);

/* Destroys a buffer; memory that it wraps is left alone. Returns 0, or 5 if it is NULL, destroyed or not a buffer. */
MFA_API int32_t mfa_destroy_buffer(mfa_buffer_t* MFA_CHECKED buffer);

/* ---- Tensors ------------------------------------------------------------------------------------------------------------------------ */

/* How the codes of an INT8 or INT4 tensor stand for real numbers: scale * (code - zero_point) [+ channel_mean] [then the rotation undone].
 * The arrays are inputs of attention and of mfa_dequantize(), outputs of mfa_quantize(). Scales are finite and positive. */
typedef struct mfa_quantization {
    uint32_t struct_size; /* sizeof(mfa_quantization_t) */
    int32_t granularity;  /* MFA_GRANULARITY_* */
    uint32_t block_size;  /* tokens that share a scale, for BLOCK; else ignored */
    uint32_t group_size;  /* channels that share a scale, for GROUP; else ignored */
    int32_t rotated;      /* 1: the codes are those of the Walsh-Hadamard transform of each row */
    int32_t reserved;     /* 0 */
    float* MFA_CHECKED scales;           /* shape: see MFA_GRANULARITY_* */
    int32_t* MFA_NULLABLE zero_points;   /* the same shape; NULL: all 0 (symmetric) */
    float* MFA_NULLABLE channel_means;   /* [B, H, D], added to every token of a head; NULL: no smoothing. Keys only */
} mfa_quantization_t;

/* A strided view of a four-dimensional tensor. */
typedef struct mfa_tensor {
    uint32_t struct_size;  /* sizeof(mfa_tensor_t) */
    int32_t precision;     /* MFA_PRECISION_* */
    void* MFA_NULLABLE data; /* address of element (0, 0, 0, 0); NULL if `buffer` is used or the tensor has no element */
    mfa_buffer_t* MFA_NULLABLE buffer; /* instead of data: element (0, 0, 0, 0) lies `buffer_offset` bytes into it, and bounds are checked */
    uint64_t buffer_offset;
    int64_t shape[4];   /* batch, heads, tokens, channels; each 0 ... 2^32 - 1. A mask: batch, query heads, query rows, key columns */
    int64_t strides[4]; /* in elements, same order. INT4: in codes, even but for the channels'; code d of a row is nibble d & 1 of the byte at
                           (b * strides[0] + h * strides[1] + s * strides[2] + (d - (d & 1)) * strides[3]) / 2 */
    const mfa_quantization_t* MFA_NULLABLE quantization; /* for INT8 and INT4; NULL: scale 1, zero point 0. Ignored for other precisions */
} mfa_tensor_t;

/* How to quantise float operands on the way into attention. */
typedef struct mfa_quantization_scheme {
    uint32_t struct_size; /* sizeof(mfa_quantization_scheme_t) */
    int32_t precision;    /* MFA_PRECISION_INT8 or MFA_PRECISION_INT4 */
    int32_t granularity;  /* MFA_GRANULARITY_* */
    uint32_t block_size;  /* for BLOCK */
    uint32_t group_size;  /* for GROUP */
    int32_t asymmetric;   /* 1: with zero points */
    int32_t smooth;       /* 1: subtract each channel's mean first; keys only */
    int32_t rotate;       /* 1: Walsh-Hadamard transform first; query and key alike */
} mfa_quantization_scheme_t;

/* ---- Attention ---------------------------------------------------------------------------------------------------------------------- */

/*
 * One attention problem: operands, options, results. Initialise with mfa_attention_initialize(), then set what differs.
 *
 *   c[i,j] = softmax_scale * dot(Q[b,h,i], K[b,g,j]),  g = h / (num_heads / num_kv_heads)
 *   s[i,j] = softcap > 0 ? softcap * tanh(c / softcap) : c,   + mask (additive),  - alibi_slopes[h] * |i + off - j|
 *   excluded: boolean mask False, additive -inf, j > i + off if causal, outside the window, j >= kv_lengths[b]
 *   logsumexp[i] = log(sum_j exp(s[i,j]) + exp(sinks[h]));  output[i] = sum_j dropped(exp(s[i,j] - logsumexp[i])) * V[j]
 *   a row without any key: output 0, logsumexp -inf (sinks[h] with sinks)
 *
 * "Statistics" below (logsumexp, sinks, slopes, d_values and their gradients) are contiguous float arrays, double if Q, K or V is FP64.
 */
typedef struct mfa_attention {
    uint32_t struct_size;                  /* sizeof(mfa_attention_t) */
    int32_t causal;                        /* 1: j <= i + off */
    double softmax_scale;                  /* literal; any finite number */
    double softcap;                        /* 0: off; finite, >= 0 */
    const mfa_tensor_t* MFA_CHECKED query; /* [batch, num_heads, seq_len_q, head_dim] */
    const mfa_tensor_t* MFA_CHECKED key;   /* [batch, num_kv_heads, seq_len_kv, head_dim]; num_heads is a multiple of num_kv_heads */
    const mfa_tensor_t* MFA_CHECKED value; /* [batch, num_kv_heads, seq_len_kv, head_dim_v] */
    const mfa_tensor_t* MFA_CHECKED output; /* [batch, num_heads, seq_len_q, head_dim_v], any float type. Written by forward; in backward it is
                                               read for d_values, or NULL: these are then recomputed from Q, K and V */
    void* MFA_NULLABLE logsumexp; /* statistics [batch, num_heads, seq_len_q], natural log; forward: written, NULL: not wanted; backward: read */

    const mfa_tensor_t* MFA_NULLABLE mask; /* shape broadcasts to [batch, num_heads, seq_len_q, seq_len_kv] (sizes 1); BOOL: nonzero = attend; a
                                              float type: added to s. NULL: none */
    int32_t alignment;                     /* MFA_ALIGNMENT_*: what off is */
    uint32_t num_query_offsets;            /* length of query_offsets: 1, or batch, one per sequence; 0 with NULL */
    const int64_t* MFA_NULLABLE query_offsets; /* off itself, in place of alignment; |off| < 2^61; with LOWER_RIGHT an error; NULL: none */
    int64_t window_left;                   /* i + off - window_left <= j; -1: no limit. Not 0: that excludes all earlier keys */
    int64_t window_right;                  /* j <= i + off + window_right; -1: no limit */
    const int64_t* MFA_NULLABLE kv_lengths; /* [batch], each 0 ... seq_len_kv; keys and values beyond are never read. NULL: all are seq_len_kv */
    const void* MFA_NULLABLE alibi_slopes; /* statistics [num_heads] */
    const void* MFA_NULLABLE sinks;        /* statistics [num_heads]; -inf: no sink for that head */
    double dropout_p;                      /* probability of dropping, 0 ... 1 */
    uint64_t seed;                         /* Philox4x32-10 key */
    uint32_t dropout_offset;               /* last word of its counter */
    int32_t reserved;                      /* 0 */
    const mfa_quantization_scheme_t* MFA_NULLABLE quantize_query; /* quantise this float operand first ("fused"); NULL: take it as it is */
    const mfa_quantization_scheme_t* MFA_NULLABLE quantize_key;
    const mfa_quantization_scheme_t* MFA_NULLABLE quantize_value;
} mfa_attention_t;

/* Gradients of a problem, given that of its output. A NULL gradient is not computed. Gradients have the shape of their tensor (a mask's: the
 * mask's own shape, broadcast axes summed), any float type and strides; they are computed in FP32 (FP64 for FP64 operands). */
typedef struct mfa_attention_gradients {
    uint32_t struct_size;     /* sizeof(mfa_attention_gradients_t) */
    int32_t d_values_given;   /* 1: d_values is read; 0: it is written */
    const mfa_tensor_t* MFA_CHECKED grad_output; /* float type, shape of output */
    const void* MFA_NULLABLE grad_logsumexp;     /* statistics [batch, num_heads, seq_len_q]; NULL: 0 */
    void* MFA_NULLABLE d_values; /* rowsum(grad_output * output), statistics [batch, num_heads, seq_len_q]; NULL: kept in workspace */
    const mfa_tensor_t* MFA_NULLABLE grad_query;
    const mfa_tensor_t* MFA_NULLABLE grad_key;
    const mfa_tensor_t* MFA_NULLABLE grad_value;
    const mfa_tensor_t* MFA_NULLABLE grad_mask;   /* of an additive mask */
    void* MFA_NULLABLE grad_sinks;                /* statistics [num_heads] */
    void* MFA_NULLABLE grad_alibi_slopes;         /* statistics [num_heads] */
} mfa_attention_gradients_t;

/* Sets struct_size (at most the library's own), the window to (-1, -1), softmax_scale to 1 and all else to 0.
 * Returns 0, or 5 if `attention` is NULL or struct_size smaller than the first version's. */
MFA_API int32_t mfa_attention_initialize(mfa_attention_t* MFA_CHECKED attention, uint32_t struct_size);

/*
 * Computes output and, if asked for, logsumexp; returns when they are written. The output's precision is free; by convention it is Q's for
 * float inputs and FP32 when Q is quantised.
 * Returns 0, 1, 2, 3, 4, 5, 6 as said at the top; 6 also for FP64 where the device has no such kernel. Nothing is written on failure, but 4.
 */
MFA_API int32_t mfa_attention_run_forward(mfa_context_t* MFA_CHECKED context, const mfa_attention_t* MFA_CHECKED attention);

/*
 * Computes the gradients that are asked for; `attention` is what forward got, with the logsumexp that it wrote (and the output, or NULL).
 * Gradients of quantised operands are with respect to the real values that the codes stand for (straight-through).
 * Returns 0, 1, 2, 3, 4, 5, 6. Nothing is written on failure, but 4. Deterministic: no result depends on the thread count or the batch.
 */
MFA_API int32_t mfa_attention_run_backward(mfa_context_t* MFA_CHECKED context, const mfa_attention_t* MFA_CHECKED attention,
                                           const mfa_attention_gradients_t* MFA_CHECKED gradients);

/*
 * Record the same work into `command_buffer`, an id<MTLCommandBuffer> bridged to void* (on SOFTMETAL an sm_command_buffer* of softmetal.h),
 * which has no open encoder, without committing it or waiting. All arrays that the work reads or writes, kv_lengths and scales among them,
 * lie in buffers of the device, as `buffer` of their tensor or as addresses in such a buffer's contents, and are read when the work runs.
 * What only the device can see is not checked: kv_lengths are clamped to 0 ... seq_len_kv; bad scales, values that cannot be quantised, and
 * scores beyond the range of float make the rows that they reach NaN. Temporary memory is kept until the command buffer has completed.
 * Return 0, 1, 2, 3, 4 for a kernel that cannot be compiled, 5 also for a command buffer that is another device's or was committed, or 6: on a
 * context that is not a Metal one, or for work that the device leaves to the CPU. Nothing was recorded unless they return 0.
 */
MFA_API int32_t mfa_attention_encode_forward(mfa_context_t* MFA_CHECKED context, void* MFA_CHECKED command_buffer,
                                             const mfa_attention_t* MFA_CHECKED attention);
MFA_API int32_t mfa_attention_encode_backward(mfa_context_t* MFA_CHECKED context, void* MFA_CHECKED command_buffer,
                                              const mfa_attention_t* MFA_CHECKED attention,
                                              const mfa_attention_gradients_t* MFA_CHECKED gradients);

/* The bytes of workspace that run_forward (gradients NULL) or run_backward would hold during this call, in *size. The same checks and
 * statuses as the call itself; the operands' data are not read. 5 if `size` is NULL. */
MFA_API int32_t mfa_attention_workspace_size(mfa_context_t* MFA_CHECKED context, const mfa_attention_t* MFA_CHECKED attention,
                                             const mfa_attention_gradients_t* MFA_NULLABLE gradients, uint64_t* MFA_CHECKED size);

/* The name of the kernel that this problem would use for `operation` (MFA_OPERATION_*), in *name: a static string such as
 * "attention_forward_fp32_reference_avx2". Checks as above, without reading data. */
MFA_API int32_t mfa_attention_kernel_name(mfa_context_t* MFA_CHECKED context, const mfa_attention_t* MFA_CHECKED attention, int32_t operation,
                                          const char* MFA_NULLABLE* MFA_CHECKED name);

/*
 * Merges two partial results of the same queries over disjoint sets of keys (split K/V, ring attention) into the result over their union:
 *   logsumexp = log(exp(logsumexp_a) + exp(logsumexp_b)),  output = exp(logsumexp_a - logsumexp) * output_a + the same of b
 * A part whose logsumexp is -inf is absent: its output is not read for that row. Both absent: 0 and -inf. Sinks belong to one part only.
 * Outputs are float types in any mix and strides, all of the shape [batch, num_heads, seq_len_q, head_dim_v]; the three logsumexp arrays are
 * contiguous [batch, num_heads, seq_len_q], of statistics_precision: MFA_PRECISION_FP32 or _FP64, as attention wrote them.
 * Returns 0; 1; 2; 3 for shapes that differ; 5; 6. Nothing is written on failure.
 */
MFA_API int32_t mfa_attention_merge(mfa_context_t* MFA_CHECKED context,
                                    const mfa_tensor_t* MFA_CHECKED output_a, const void* MFA_CHECKED logsumexp_a,
                                    const mfa_tensor_t* MFA_CHECKED output_b, const void* MFA_CHECKED logsumexp_b,
                                    const mfa_tensor_t* MFA_CHECKED output, void* MFA_CHECKED logsumexp,
                                    int32_t statistics_precision);

/* ---- Quantisation ------------------------------------------------------------------------------------------------------------------- */

/*
 * Quantises `input` (a float type, any strides) into `output`: codes, and its quantization's scales, zero_points (if not NULL: asymmetric)
 * and channel_means (if not NULL: smoothing), by the scheme that output->quantization describes. Bit for bit as docs/numerics.md defines.
 * Returns 0; 1; 2; 3 for shapes that differ; 5 also if a value that takes part is not finite (nothing is written then); 6.
 */
MFA_API int32_t mfa_quantize(mfa_context_t* MFA_CHECKED context, const mfa_tensor_t* MFA_CHECKED input, const mfa_tensor_t* MFA_CHECKED output);

/* Writes the real values that the codes of `input` stand for to `output` (a float type, any strides). Returns 0, 1, 2, 3, 5, 6. */
MFA_API int32_t mfa_dequantize(mfa_context_t* MFA_CHECKED context, const mfa_tensor_t* MFA_CHECKED input, const mfa_tensor_t* MFA_CHECKED output);

/* ---- Flat functions ----------------------------------------------------------------------------------------------------------------- */

/*
 * Attention on contiguous host memory. `context` comes from either create function; all other pointers are host addresses (those inside a
 * buffer's contents included).
 *
 *   Layout      [batch_size, seq_len, num_heads, head_dim]; a set transpose flag means that this operand is stored [batch_size, num_heads,
 *               head_dim, seq_len]. A row of INT4 is ceil(head_dim / 2) bytes, transposed [batch_size, num_heads, ceil(head_dim / 2), seq_len].
 *   Precision   codes say how Q, K and V lie in memory: FP32, FP16, BF16, INT8, INT4 in any mix (FP64: 6). The output has Q's type if that is
 *               a float type, else FP32. logsumexp and d_values: float [batch_size, num_heads, seq_len_q]. grad_output and all gradients: float
 *               [batch_size, seq_len, num_heads, head_dim], whatever the transpose flags were.
 *   Scales      real = scale * (code - zero_point) for quantised operands, one scale a tensor; ignored for float operands.
 *               mfa_attention_forward() takes quantised operands with scale 1 and zero point 0.
 *   causal      j <= i: aligned upper left.
 *   Training    A successful forward call with a logsumexp leaves a training record in its context under that address: softmax_scale, causal,
 *               precisions, scales, zero points, transposes and dimensions. The backward calls find it by their logsumexp_ptr; one whose address
 *               and dimensions match no record returns 3, one whose scale or zero point of a quantised operand differs from it returns 5. A later
 *               successful forward call with the same address replaces it; 4,096 are kept, the oldest is dropped first; a forward call that
 *               returns 4 removes the record of its address.
 *   Order       mfa_attention_backward_query_quantized() writes d_values, which mfa_attention_backward_kv_quantized() reads. A backward call
 *               reads only memory passed to it.
 *   Empty       batch_size or seq_len_q 0: forward writes nothing; backward writes 0 to every gradient that has elements and needs no record.
 *               seq_len_kv 0: output 0, logsumexp -inf. num_heads 0, head_dim 0 or above 1024: 3.
 *   Returns     0, 1, 2, 3, 4, 5, 6 as said at the top.
 */
MFA_API int32_t mfa_attention_forward(
    void* MFA_NULLABLE context,
    void* MFA_CHECKED query_ptr, void* MFA_CHECKED key_ptr, void* MFA_CHECKED value_ptr, void* MFA_CHECKED output_ptr,
    uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
    uint32_t num_heads, uint16_t head_dim,
    float softmax_scale, bool causal,
    int32_t q_precision, int32_t k_precision, int32_t v_precision,
    bool transpose_q, bool transpose_k, bool transpose_v, bool transpose_o);

/* The same with scales and zero points of quantised operands and an optional logsumexp (NULL: inference, no training record). */
MFA_API int32_t mfa_attention_forward_quantized(
    void* MFA_NULLABLE context,
    void* MFA_CHECKED query_ptr, void* MFA_CHECKED key_ptr, void* MFA_CHECKED value_ptr,
    void* MFA_CHECKED output_ptr, void* MFA_NULLABLE logsumexp_ptr,
    uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
    uint32_t num_heads, uint16_t head_dim,
    float softmax_scale, bool causal,
    int32_t q_precision, int32_t k_precision, int32_t v_precision,
    float q_scale, int32_t q_zero_point,
    float k_scale, int32_t k_zero_point,
    float v_scale, int32_t v_zero_point,
    bool transpose_q, bool transpose_k, bool transpose_v, bool transpose_o);

/* Writes grad_query and d_values. */
MFA_API int32_t mfa_attention_backward_query_quantized(
    void* MFA_NULLABLE context,
    void* MFA_CHECKED query_ptr, void* MFA_CHECKED key_ptr, void* MFA_CHECKED value_ptr,
    void* MFA_CHECKED grad_output_ptr, void* MFA_CHECKED logsumexp_ptr,
    void* MFA_CHECKED grad_query_ptr, void* MFA_CHECKED d_values_ptr,
    uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
    uint32_t num_heads, uint16_t head_dim,
    float q_scale, int32_t q_zero_point);

/* Writes grad_key and grad_value, reading the d_values of the query call. */
MFA_API int32_t mfa_attention_backward_kv_quantized(
    void* MFA_NULLABLE context,
    void* MFA_CHECKED query_ptr, void* MFA_CHECKED key_ptr, void* MFA_CHECKED value_ptr,
    void* MFA_CHECKED grad_output_ptr, void* MFA_CHECKED logsumexp_ptr, void* MFA_CHECKED d_values_ptr,
    void* MFA_CHECKED grad_key_ptr, void* MFA_CHECKED grad_value_ptr,
    uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
    uint32_t num_heads, uint16_t head_dim,
    float q_scale, int32_t q_zero_point,
    float k_scale, int32_t k_zero_point,
    float v_scale, int32_t v_zero_point);

#ifdef __cplusplus
}
#endif

#if defined(__clang__)
#pragma clang diagnostic pop
#endif

#endif /* MFA_H */
