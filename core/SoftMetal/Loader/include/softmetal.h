// The interface of libsoftmetal, the software Metal device: kernels that were translated from the Metal shading language and compiled, and
// an executor that runs them on the host as a GPU would. docs/softmetal.md says what it checks and what it cannot.
//
// Every function may be called from any thread. Nothing is kept of what a caller passes.

#ifndef SOFTMETAL_H
#define SOFTMETAL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SM_INTERFACE_VERSION 1
#define SM_BUFFER_SLOTS 31
#define SM_SIMDGROUP_SIZE 32
#define SM_MOST_THREADS 1024
#define SM_THREADGROUP_MEMORY 32768

// The kernels of one source text.
typedef struct sm_library sm_library;
// One of them, for the types and sizes of its host name.
typedef struct sm_kernel sm_kernel;

// A binding; address NULL: there is none. `length` counts from the address.
typedef struct sm_buffer {
    void* address;
    uint64_t length;
} sm_buffer;

// The value of a function constant.
typedef struct sm_constant {
    uint32_t index;
    uint32_t size;
    const void* value;
} sm_constant;

// One dispatch.
typedef struct sm_job {
    const sm_kernel* kernel;
    const sm_buffer* buffers;            // SM_BUFFER_SLOTS
    const uint32_t* threadgroup_lengths; // SM_BUFFER_SLOTS: bytes of threadgroup memory that the host sets, 0 for none
    const sm_constant* constants;
    uint32_t constant_count;
    uint32_t grid[3];        // threads; need not be a multiple of the threadgroup
    uint32_t threadgroup[3]; // threads
} sm_job;

// SM_INTERFACE_VERSION of the library.
uint32_t sm_interface_version(void);

// The kernels of the source text whose 64-bit FNV-1a hash is given, NULL if that text is not part of this libsoftmetal.
const sm_library* sm_library_find(uint64_t source_hash);
uint32_t sm_library_kernel_count(const sm_library* library);
const sm_kernel* sm_library_kernel(const sm_library* library, uint32_t index);

const char* sm_kernel_name(const sm_kernel* kernel);
// The most threads a threadgroup of this kernel may have.
uint32_t sm_kernel_most_threads(const sm_kernel* kernel);
// The size in bytes of function constant `index`; 0 if the kernel's source has none of that index.
uint32_t sm_kernel_constant_size(const sm_kernel* kernel, uint32_t index);

// Runs a dispatch to its end. Returns 0, or 1 with a report in `message`; what was written until then stays written.
//
//   SOFTMETAL_ORDER      forward (default), reverse, random or random:SEED: the order in which threads run between two barriers
//   SOFTMETAL_THREADS    how many threadgroups run at a time (default: one for each processor)
//   SOFTMETAL_RECORD     a folder into which each dispatch is written, for softmetal-replay
int32_t sm_run(const sm_job* job, char* message, size_t message_size);

#ifdef __cplusplus
}
#endif

#endif // SOFTMETAL_H
