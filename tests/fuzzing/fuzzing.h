/* What all fuzzing targets share: structures decoded from bytes, memory of exact size, failures. */
#ifndef FUZZING_H
#define FUZZING_H

#include "../precision_bytes.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* libFuzzer calls this once an execution. */
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

/* Says what is wrong and stops: libFuzzer then keeps the input. */
_Noreturn void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/* ---- Bytes ---- */

/* What is left of an input. Beyond its end there are zeros, so that every input means something. */
typedef struct {
    const uint8_t* next;
    size_t left;
} input;

uint8_t take(input* from);
uint64_t take_bytes(input* from, int count);
/* A number from 0 to most, which is less than 256. */
int take_upto(input* from, int most);
bool take_bool(input* from);

/* Numbers drawn from a seed that the input gives: contents of tensors, which are too many to be decoded. */
typedef struct {
    uint64_t state;
} numbers;

uint64_t draw(numbers* from);
/* One of 257 numbers from -1 to 1. */
double draw_value(numbers* from);

/* ---- Memory ---- */

/* Under AddressSanitizer nobody may touch what is poisoned. */
#ifdef POISONED
#include <sanitizer/asan_interface.h>
#define POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define SHOW(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define POISON(address, bytes) ((void)(address), (void)(bytes))
#define SHOW(address, bytes) ((void)(address), (void)(bytes))
#endif

/* Takes memory of the arena, 8-aligned, exactly so many bytes: those behind it are poisoned, or at the next reset found to be written. */
void* arena_take(size_t bytes);
/* Gives all memory back. Every input begins with it. */
void arena_reset(void);

/* ---- Contexts ---- */

/* The context on one CPU thread whose kernels are limited to `kernels` (MFA_KERNELS), made once; NULL for a limit of no processor here. */
mfa_context_t* context_of(const char* kernels);

/* ---- Tensors ---- */

/* A tensor with its quantisation and its memory. The tensor's pointer to `quantization` is set where codes have one. */
typedef struct {
    mfa_tensor_t tensor;
    mfa_quantization_t quantization;
    uint8_t* memory;
    size_t bytes;
} view;

bool is_quantized(int32_t precision);
int64_t element_count(const mfa_tensor_t* tensor);
/* How many scales, zero points or means a quantised tensor of this shape has; block and group sizes are not 0. */
int64_t scale_count(const mfa_quantization_t* quantization, const int64_t shape[4]);
int64_t scale_index(const mfa_quantization_t* quantization, const int64_t shape[4], const int64_t index[4]);

/* The bits of an element: a code without its sign's extension, or those of a float. */
uint64_t load_bits(const mfa_tensor_t* tensor, const int64_t index[4]);
void store_bits(const mfa_tensor_t* tensor, const int64_t index[4], uint64_t bits);
/* An element of a float type, or a code, as a number. */
double load_number(const mfa_tensor_t* tensor, const int64_t index[4]);
/* Rounds a number to the tensor's type. */
void store_number(const mfa_tensor_t* tensor, const int64_t index[4], double number);

/* Calls body for each index of a shape. */
#define FOR_EACH_INDEX(shape, index)                                \
    for (int64_t index[4] = {0}; index[0] < (shape)[0]; index[0]++) \
        for (index[1] = 0; index[1] < (shape)[1]; index[1]++)       \
            for (index[2] = 0; index[2] < (shape)[2]; index[2]++)   \
                for (index[3] = 0; index[3] < (shape)[3]; index[3]++)

/* Sets the sizes and contiguous strides, [batch, head, token, channel], and takes memory, which is filled with 0xFF: NaN in every float. */
void make_compact(view* made, int32_t precision, const int64_t shape[4]);
/* The same with strides that the input says: any order, gaps, directions and, where that may be, strides of 0. */
void make_strided(view* made, int32_t precision, const int64_t shape[4], bool may_broadcast, input* from);
/* Scales, zero points and means by what `quantization` says; draws them. */
void make_scales(view* made, bool with_zero_points, bool with_means, numbers* from);

/* ---- Problems ---- */

/* An attention problem with all that it reads and writes. */
typedef struct {
    mfa_attention_t attention;
    mfa_attention_gradients_t gradients;
    view query, key, value, output, mask;
    view grad_output, grad_query, grad_key, grad_value, grad_mask;
    mfa_quantization_scheme_t query_scheme, key_scheme, value_scheme;
    int64_t lengths[4], offsets[4];
    int64_t rows; /* of logsumexp */
    int64_t heads;
    bool special; /* some elements are NaN, infinite or denormal */
} problem;

/* Draws a small legal problem. With `fused`, floats may be quantised on the way in; with `special`, some elements may be no numbers. */
void make_problem(problem* made, input* from, bool fused, bool special);
/* The same problem in compact memory; with `exact`, of FP64 operands that are the real numbers of the others. */
void copy_problem(problem* made, const problem* from, bool exact);
/* Fails unless all bytes of a view that belong to no element are still 0xFF. */
void check_gaps(const view* of, const char* name);

#endif
