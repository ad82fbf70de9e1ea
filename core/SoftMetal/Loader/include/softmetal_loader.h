// Finds libsoftmetal when a program first asks for the device, so that nothing that links the Metal module depends on it.

#ifndef SOFTMETAL_LOADER_H
#define SOFTMETAL_LOADER_H

#include "softmetal.h"

// The functions of softmetal.h.
typedef struct softmetal_functions {
    const sm_library* (*library_find)(uint64_t source_hash);
    uint32_t (*library_kernel_count)(const sm_library* library);
    const sm_kernel* (*library_kernel)(const sm_library* library, uint32_t index);
    const char* (*kernel_name)(const sm_kernel* kernel);
    uint32_t (*kernel_most_threads)(const sm_kernel* kernel);
    int32_t (*run)(const sm_job* job, char* message, size_t message_size);
} softmetal_functions;

// The library that the environment variable MFA_SOFTMETAL names, or else the file libsoftmetal.so beside the binary that this is linked
// into. NULL if it is not there or has another interface. The first answer is kept.
const softmetal_functions* softmetal_load(void);

// Why softmetal_load() gives NULL; empty if it does not.
const char* softmetal_load_error(void);

#endif // SOFTMETAL_LOADER_H
