// What translated kernels hand to the executor: tables that the translator writes.

#pragma once

#include "softmetal.h"

// Where a kernel finds its arguments.
struct sm_arguments {
    const sm_binding* buffers;
    void* const* threadgroup_memory;
};

// A thread's own values, in the words of the attributes of the Metal shading language.
struct sm_thread {
    uint32_t thread_position_in_grid[3];
    uint32_t threadgroup_position_in_grid[3];
    uint32_t thread_position_in_threadgroup[3];
    uint32_t threads_per_threadgroup[3];
    uint32_t threads_per_grid[3];
    uint32_t threadgroups_per_grid[3];
    uint32_t thread_index_in_threadgroup;
    uint32_t thread_index_in_simdgroup;
    uint32_t simdgroup_index_in_threadgroup;
    uint32_t threads_per_simdgroup;
    uint32_t simdgroups_per_threadgroup;
};

// A parameter that the host binds. `wanted` is NULL, or says whether the function constants make it exist.
struct sm_parameter {
    const char* name;
    bool is_threadgroup_memory;
    uint32_t index;
    uint32_t least_size;
    bool (*wanted)();
};

// A function constant. Its value lives in a variable of each worker thread, which `set` fills; NULL: not defined.
struct sm_constant_slot {
    const char* name;
    uint32_t index;
    uint32_t size;
    void (*set)(const void* value);
};

struct sm_kernel {
    const char* name;
    void (*entry)(const sm_arguments*, const sm_thread*);
    const sm_parameter* parameters;
    uint32_t parameter_count;
    const sm_constant_slot* constants;
    uint32_t constant_count;
    uint32_t most_threads;
};

struct sm_library {
    uint64_t source_hash;
    const sm_kernel* kernels;
    uint32_t kernel_count;
};

// Called by each translated source before main() or dlopen() goes on.
void sm_register(const sm_library* library);
