/* The first functions and codes of the interface, which programs were written against before this library was: they never change. The test
 * compares this text with include/mfa.h, where macros for visibility and nullability may stand between the words, and nothing else. */
int32_t mfa_create_context(void** context);
int32_t mfa_destroy_context(void* context);

int32_t mfa_attention_forward(
    void* context,
    void* query_ptr, void* key_ptr, void* value_ptr, void* output_ptr,
    uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
    uint32_t num_heads, uint16_t head_dim,
    float softmax_scale, bool causal,
    int32_t q_precision, int32_t k_precision, int32_t v_precision,
    bool transpose_q, bool transpose_k, bool transpose_v, bool transpose_o);

int32_t mfa_attention_forward_quantized(
    void* context,
    void* query_ptr, void* key_ptr, void* value_ptr,
    void* output_ptr, void* logsumexp_ptr,
    uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
    uint32_t num_heads, uint16_t head_dim,
    float softmax_scale, bool causal,
    int32_t q_precision, int32_t k_precision, int32_t v_precision,
    float q_scale, int32_t q_zero_point,
    float k_scale, int32_t k_zero_point,
    float v_scale, int32_t v_zero_point,
    bool transpose_q, bool transpose_k, bool transpose_v, bool transpose_o);

int32_t mfa_attention_backward_query_quantized(
    void* context,
    void* query_ptr, void* key_ptr, void* value_ptr,
    void* grad_output_ptr, void* logsumexp_ptr,
    void* grad_query_ptr, void* d_values_ptr,
    uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
    uint32_t num_heads, uint16_t head_dim,
    float q_scale, int32_t q_zero_point);

int32_t mfa_attention_backward_kv_quantized(
    void* context,
    void* query_ptr, void* key_ptr, void* value_ptr,
    void* grad_output_ptr, void* logsumexp_ptr, void* d_values_ptr,
    void* grad_key_ptr, void* grad_value_ptr,
    uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
    uint32_t num_heads, uint16_t head_dim,
    float q_scale, int32_t q_zero_point,
    float k_scale, int32_t k_zero_point,
    float v_scale, int32_t v_zero_point);

#define MFA_PRECISION_FP32 0
#define MFA_PRECISION_FP16 1
#define MFA_PRECISION_BF16 2   /* ours */
#define MFA_PRECISION_FP64 3   /* ours; general API, reference kernels */
#define MFA_PRECISION_INT8 8
#define MFA_PRECISION_INT4 4
