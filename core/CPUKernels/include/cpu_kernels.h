/* What the CPU backend's planner (Swift) and its kernels (C) know of each other.
 *
 * Everything here was validated by the caller: pointers are good wherever there are elements, sizes agree, no product overflows. Kernels
 * add no checks, never allocate and never fail. A kernel divides its problem into items that are independent of one another; what an item
 * computes depends neither on the thread that runs it nor on any other item, so results are bitwise the same for any number of threads. */
#ifndef CPU_KERNELS_H
#define CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- Threads: a fork-join pool that survives fork() ---------------------------------------------------------------------------------- */

typedef void (*cpu_task_function)(void* _Nullable state, int64_t item, int32_t thread);

/* Calls task(state, item, thread) once for each item 0 ..< items, on at most `threads` threads, the caller's included (thread numbers are
 * 0 ..< threads, each used by one thread at a time). Returns when all are done. Runs alone if the pool is busy with another caller. */
void cpu_parallel_for(int32_t threads, int64_t items, cpu_task_function _Nonnull task, void* _Nullable state);

/* The CPUs that this process may use: affinity mask and control group quota, at least 1. */
int32_t cpu_available_threads(void);

enum { CPU_MAX_THREADS = 256 };

/* ---- Processor ----------------------------------------------------------------------------------------------------------------------- */

/* Whether this processor (and its operating system) can run AVX2 with FMA and F16C. */
bool cpu_has_avx2(void);

/* The same of AVX-512 with its F, BW, DQ and VL parts. */
bool cpu_has_avx512(void);

/* The same of AVX-512's VNNI part. */
bool cpu_has_avx512vnni(void);

/* The same of AVX-VNNI, which needs AVX2 only. */
bool cpu_has_avxvnni(void);

/* Whether this arm64 processor has the dot products of signed or unsigned bytes, and those of unsigned by signed bytes. */
bool cpu_has_dotprod(void);
bool cpu_has_i8mm(void);

/* ---- Tensors ------------------------------------------------------------------------------------------------------------------------- */

typedef enum cpu_precision {
    CPU_FP32 = 0,
    CPU_FP16 = 1,
    CPU_BF16 = 2,
    CPU_FP64 = 3,
    CPU_INT4 = 4,
    CPU_INT8 = 8,
    CPU_BOOL = 16,
} cpu_precision;

/* A tensor in memory. strides: batch, head, token, channel, in elements (codes for INT4: see mfa_tensor in mfa.h for its nibbles). */
typedef struct cpu_tensor {
    void* _Nullable data;
    int64_t strides[4];
    cpu_precision precision;
    /* Of INT8 and INT4: real = scale * (code - zero_point) + channel_mean, then the rotation undone. The scale of (b, h, s, d) has index
     * b * scale_strides[0] + h * scale_strides[1] + (s / scale_tokens) * scale_strides[2] + (d / scale_channels) * scale_strides[3]. */
    bool rotated;
    float* _Nullable scales;        /* NULL: 1 */
    int32_t* _Nullable zero_points; /* NULL: 0 */
    float* _Nullable channel_means; /* NULL: 0; index b * mean_strides[0] + h * mean_strides[1] + d */
    int64_t scale_strides[4];
    int64_t scale_tokens;   /* >= 1 */
    int64_t scale_channels; /* >= 1 */
    int64_t mean_strides[2];
} cpu_tensor;

/* ---- Attention ----------------------------------------------------------------------------------------------------------------------- */

/* One attention problem, forward or backward; see mfa_attention in mfa.h for the meaning. Absent tensors have data == NULL. Arrays named
 * "statistics" are float for kernels of FP32 arithmetic, double for those of FP64. */
typedef struct cpu_attention {
    int64_t batch_size, num_heads, num_kv_heads, seq_len_q, seq_len_kv;
    int64_t head_dim, head_dim_v;

    cpu_tensor query, key, value;
    cpu_tensor output;         /* forward: written. backward: read for d_values where present */
    void* _Nullable logsumexp; /* statistics [batch, num_heads, seq_len_q] */

    cpu_tensor mask; /* CPU_BOOL or a float type; strides 0 where it broadcasts */
    bool causal;
    bool lower_right;
    const int64_t* _Nullable query_offsets; /* index b * query_offset_stride */
    int64_t query_offset_stride;            /* 0 or 1 */
    int64_t window_left, window_right;      /* -1: no limit; at most 2^62 */
    const int64_t* _Nullable kv_lengths;    /* [batch] */
    double softmax_scale;
    double softcap;                     /* 0: off */
    const void* _Nullable alibi_slopes; /* statistics [num_heads] */
    const void* _Nullable sinks;        /* statistics [num_heads] */
    double dropout_p;
    uint64_t seed;
    uint32_t dropout_offset;
    void* _Nullable shared; /* workspace of all items: what preparation writes, or what items leave for the finish */
    bool float_statistics;  /* statistics are float whatever the arithmetic is */
    int32_t threads;        /* that share the items: their number may depend on it, results may not */

    /* Backward only. */
    cpu_tensor grad_output;
    const void* _Nullable grad_logsumexp; /* statistics [batch, num_heads, seq_len_q] */
    void* _Nullable d_values; /* statistics [batch, num_heads, seq_len_q]: written by d_values, read by the others; never NULL */
    cpu_tensor grad_query, grad_key, grad_value;
    cpu_tensor grad_mask;              /* strides 0 where the mask broadcasts */
    void* _Nullable grad_sinks;        /* statistics [num_heads] */
    void* _Nullable grad_alibi_slopes; /* statistics [num_heads] */
} cpu_attention;

/* A kernel: how many items a problem has, how much workspace a thread needs (aligned to 64 bytes, contents arbitrary), and one item's work.
 * Items are begun in their order, so that one may wait for others before it. */
typedef struct cpu_attention_kernel {
    const char* _Nonnull name;
    /* Whether it computes this problem; NULL: any. Looks at no data. */
    bool (*_Nullable serves)(const cpu_attention* _Nonnull attention);
    /* Bytes of attention->shared; NULL: none. */
    size_t (*_Nullable shared_bytes)(const cpu_attention* _Nonnull attention);
    /* Preparation, all of it done before the first item: how many items, and one's work. NULL: none. */
    int64_t (*_Nullable prepare_items)(const cpu_attention* _Nonnull attention);
    void (*_Nullable prepare)(const cpu_attention* _Nonnull attention, int64_t item, void* _Nonnull workspace);
    int64_t (*_Nonnull item_count)(const cpu_attention* _Nonnull attention);
    size_t (*_Nonnull workspace_bytes)(const cpu_attention* _Nonnull attention);
    void (*_Nonnull run)(const cpu_attention* _Nonnull attention, int64_t item, void* _Nonnull workspace);
    /* What comes when all items are done, items of its own too. NULL: nothing. */
    int64_t (*_Nullable finish_items)(const cpu_attention* _Nonnull attention);
    void (*_Nullable finish)(const cpu_attention* _Nonnull attention, int64_t item, void* _Nonnull workspace);
} cpu_attention_kernel;

/* Reference kernels, from one source: REAL is the arithmetic (fp32 serves all operands but FP64, fp64 all operands), and each is compiled
 * for the baseline of the architecture and, on x86-64, for AVX2 with FMA and for AVX-512. They implement all of the semantics.
 *   attention_forward            writes output and logsumexp
 *   attention_d_values           writes d_values = rowsum(grad_output * output), recomputing where output is absent
 *   attention_backward_query     reads logsumexp and d_values, writes grad_query
 *   attention_backward_key_value reads logsumexp and d_values, writes grad_key and grad_value (either may be absent)
 *   attention_backward_bias      reads logsumexp and d_values, writes grad_mask, grad_sinks, grad_alibi_slopes (those present) */
#define CPU_DECLARE_REFERENCE_KERNELS(suffix)                                \
    extern const cpu_attention_kernel attention_forward_##suffix;            \
    extern const cpu_attention_kernel attention_d_values_##suffix;           \
    extern const cpu_attention_kernel attention_backward_query_##suffix;     \
    extern const cpu_attention_kernel attention_backward_key_value_##suffix; \
    extern const cpu_attention_kernel attention_backward_bias_##suffix;

CPU_DECLARE_REFERENCE_KERNELS(fp32_reference)
CPU_DECLARE_REFERENCE_KERNELS(fp64_reference)
#if defined(__x86_64__)
CPU_DECLARE_REFERENCE_KERNELS(fp32_reference_avx2)
CPU_DECLARE_REFERENCE_KERNELS(fp64_reference_avx2)
CPU_DECLARE_REFERENCE_KERNELS(fp32_reference_avx512)
CPU_DECLARE_REFERENCE_KERNELS(fp64_reference_avx512)
#endif

/* Kernels of FP32 arithmetic. They serve all operands but FP64. attention_backward writes those of grad_query, grad_key and grad_value that
 * are present. */
#if defined(__x86_64__)
extern const cpu_attention_kernel attention_d_values_float_avx2;
extern const cpu_attention_kernel attention_d_values_float_avx512;
extern const cpu_attention_kernel attention_backward_float_avx2;
extern const cpu_attention_kernel attention_backward_float_avx512;
extern const cpu_attention_kernel attention_forward_float_avx2;
extern const cpu_attention_kernel attention_forward_float_avx512;
#elif defined(__aarch64__)
extern const cpu_attention_kernel attention_d_values_float_neon;
extern const cpu_attention_kernel attention_backward_float_neon;
extern const cpu_attention_kernel attention_forward_float_neon;
#endif

/* Kernels that multiply codes as integers. Backward: codes with one scale a row and no zero points. */
#if defined(__x86_64__)
extern const cpu_attention_kernel attention_d_values_int8_avx2;
extern const cpu_attention_kernel attention_d_values_int8_avxvnni;
extern const cpu_attention_kernel attention_d_values_int8_avx512;
extern const cpu_attention_kernel attention_d_values_int8_avx512vnni;
extern const cpu_attention_kernel attention_backward_int8_avx2;
extern const cpu_attention_kernel attention_backward_int8_avxvnni;
extern const cpu_attention_kernel attention_backward_int8_avx512;
extern const cpu_attention_kernel attention_backward_int8_avx512vnni;
extern const cpu_attention_kernel attention_forward_int8_avx2;
extern const cpu_attention_kernel attention_forward_int4_avx2;
extern const cpu_attention_kernel attention_forward_int8_avxvnni;
extern const cpu_attention_kernel attention_forward_int8_avx512vnni;
#elif defined(__aarch64__)
extern const cpu_attention_kernel attention_forward_int8_dotprod;
extern const cpu_attention_kernel attention_forward_int8_i8mm;
#endif

/* Kernels for few query rows over many keys, forward: float in FP32 on operands of any type, int8 in integers on INT8 and INT4 keys and
 * values. */
#if defined(__x86_64__)
extern const cpu_attention_kernel attention_decode_float_avx2;
extern const cpu_attention_kernel attention_decode_float_avx512;
extern const cpu_attention_kernel attention_decode_int8_avxvnni;
extern const cpu_attention_kernel attention_decode_int8_avx512vnni;
extern const cpu_attention_kernel attention_decode_int8_avx2;
extern const cpu_attention_kernel attention_decode_int8_avx512;
#elif defined(__aarch64__)
extern const cpu_attention_kernel attention_decode_float_neon;
#endif

/* ---- Quantisation -------------------------------------------------------------------------------------------------------------------- */

/* Quantising `input` (a float type) into `output`, or dequantising (`input` INT8 or INT4, `output` a float type). An item is one (batch,
 * head): batch_size * num_heads items. Each FP32 operation is one rounding, never contracted: the result is defined bit by bit. */
typedef struct cpu_quantization {
    int64_t batch_size, num_heads, seq_len, head_dim;
    const int64_t* _Nullable lengths; /* [batch]: tokens beyond take no part and are not touched; NULL: seq_len */
    cpu_tensor input;
    cpu_tensor output;         /* quantising: asymmetric if zero_points is not NULL, smoothed if channel_means is not NULL */
    bool per_tensor;           /* one scale for the whole tensor */
    float* _Nullable extremes; /* quantising: [batch * num_heads][2], lowest and highest value, from scan to write; workspace */
} cpu_quantization;

/* The three passes of a make. */
typedef struct cpu_quantization_kernel {
    const char* _Nonnull name;
    /* Workspace that a thread needs for any of them. */
    size_t (*_Nonnull workspace_bytes)(const cpu_quantization* _Nonnull quantization);
    /* First pass: the item's extremes after rotation and smoothing. False if a value that takes part is not finite. Writes nothing else. */
    bool (*_Nonnull scan)(const cpu_quantization* _Nonnull quantization, int64_t item, void* _Nonnull workspace);
    /* Second pass, after all scans: the item's scales, zero points, means and codes (the one scale of a tensor: item 0 writes it). Without a
     * scan it finds by itself whether a value is not finite, and returns false; one scale a tensor or a head needs the scan. */
    bool (*_Nonnull write)(const cpu_quantization* _Nonnull quantization, int64_t item, void* _Nonnull workspace);
    void (*_Nonnull dequantize)(const cpu_quantization* _Nonnull quantization, int64_t item, void* _Nonnull workspace);
} cpu_quantization_kernel;

extern const cpu_quantization_kernel quantization_reference;
#if defined(__x86_64__)
extern const cpu_quantization_kernel quantization_reference_avx2;
extern const cpu_quantization_kernel quantization_reference_avx512;
#endif

/* ---- Merging ---------------------------------------------------------------------------------------------------------------------------
 * */

/* Two partial results over disjoint sets of keys and where their union's goes; see mfa_attention_merge() in mfa.h. An item is one (batch,
 * head): batch_size * num_heads items. */
typedef struct cpu_merge {
    int64_t batch_size, num_heads, seq_len, head_dim;
    cpu_tensor output_a, output_b;
    cpu_tensor output;
    const void* _Nullable logsumexp_a; /* statistics [batch, num_heads, seq_len], like the other two */
    const void* _Nullable logsumexp_b;
    void* _Nullable logsumexp;
    bool double_statistics;
} cpu_merge;

/* Workspace that a thread needs. */
size_t cpu_merge_workspace_bytes(const cpu_merge* _Nonnull merge);

void cpu_merge_run(const cpu_merge* _Nonnull merge, int64_t item, void* _Nonnull workspace);

#endif /* CPU_KERNELS_H */
