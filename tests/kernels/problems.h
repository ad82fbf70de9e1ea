/* Attention problems that are drawn from their number: the same on every machine, bit by bit. */
#ifndef PROBLEMS_H
#define PROBLEMS_H

#include "cpu_kernels.h"

/* A tensor's elements along batch, heads, rows and channels. */
typedef struct {
    int64_t counts[4];
} extent;

enum { MOST_PIECES = 48 };

typedef struct {
    int64_t number;
    /* Inputs are filled in; of results, `attention` has types and strides, but no memory. */
    cpu_attention attention;
    extent mask_extent;
    bool has_double_operands; /* which only FP64 arithmetic reads */
    bool overflows;           /* scores are beyond FP32: forward computes such rows in FP64, backward need not */
    bool with_output;         /* backward is given the forward result */
    const char* special;      /* what is not finite or not ordinary among the inputs */

    /* Memory of the inputs, `mapped` bytes between and with pages that nobody may touch; 0: from malloc(), where there are no pages. */
    struct {
        void* memory;
        size_t mapped;
    } pieces[MOST_PIECES];
    int piece_count;
} problem;

/* The problem of a number. Sizes grow with `work`, about the multiplications of one of its products. */
problem* make_problem(int64_t number, int64_t work);

void free_problem(problem* made);

/* Says on one line what the problem is. */
void print_problem(const problem* made);

/* The elements that a tensor's memory holds: up to its last one, INT4 in codes. */
int64_t reach_of_tensor(const cpu_tensor* tensor, extent sizes);

/* Bytes of `elements` of a precision. */
size_t bytes_of_elements(cpu_precision precision, int64_t elements);

#endif /* PROBLEMS_H */
