/* Quantisation is defined bit by bit: so is what it makes of numbers that are the same everywhere. */
#ifndef QUANTIZATION_CHECK_H
#define QUANTIZATION_CHECK_H

#include "cpu_kernels.h"

/* A digest of all codes, scales, zero points, means and dequantised numbers that a kernel makes of some tensors. */
uint64_t digest_of_quantization(const cpu_quantization_kernel* kernel);

/* What it is on every machine, as long as numerics.md says the same. tests/test_vectors.py holds the kernels to the formulas. */
extern const uint64_t EXPECTED_DIGEST;

#endif /* QUANTIZATION_CHECK_H */
