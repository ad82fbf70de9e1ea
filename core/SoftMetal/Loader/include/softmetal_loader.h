// Finds libsoftmetal when a program first asks for the device, so that nothing that links the Metal module depends on it.

#ifndef SOFTMETAL_LOADER_H
#define SOFTMETAL_LOADER_H

#include <stdbool.h>

#include "softmetal.h"

// Swift asks about NULL where an answer is never that; all else may be.
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wnullability-completeness"

// The functions of softmetal.h that the Metal module calls.
typedef struct softmetal_functions {
    const sm_library* (*library_find)(uint64_t source_hash);
    uint32_t (*library_kernel_count)(const sm_library* library);
    const sm_kernel* (*library_kernel)(const sm_library* library, uint32_t index);
    const char* (*kernel_name)(const sm_kernel* kernel);
    uint32_t (*kernel_most_threads)(const sm_kernel* kernel);
    int32_t (*kernel_specialize)(const sm_kernel* kernel, const sm_constant* constants, uint32_t count, char* message, size_t message_size);
    int32_t (*kind)(const void* pointer);
    void* (*retain)(void* object);
    void (*release)(void* object);
    const char* (*label)(const void* object);
    void (*set_label)(void* object, const char* label);
    sm_device* (*device_default)(void);
    const char* (*device_name)(const sm_device* device);
    int32_t (*device_supports_family)(const sm_device* device, int32_t family);
    sm_command_queue* (*device_new_command_queue)(sm_device* device);
    sm_buffer* (*device_new_buffer)(sm_device* device, uint64_t length);
    sm_buffer* (*device_new_buffer_no_copy)(sm_device* device, void* memory, uint64_t length,
                                            void (*deallocate)(void* state, void* memory, uint64_t length), void* state);
    void* _Nonnull (*buffer_contents)(const sm_buffer* buffer);
    uint64_t (*buffer_length)(const sm_buffer* buffer);
    sm_device* _Nonnull (*buffer_device)(const sm_buffer* buffer);
    sm_device* _Nonnull (*command_queue_device)(const sm_command_queue* queue);
    sm_command_buffer* (*command_queue_new_command_buffer)(sm_command_queue* queue, int32_t retains_references);
    sm_device* _Nonnull (*command_buffer_device)(const sm_command_buffer* commands);
    int32_t (*command_buffer_dispatch)(sm_command_buffer* commands, const sm_dispatch* dispatch);
    int32_t (*command_buffer_add_completed_handler)(sm_command_buffer* commands, void (*handler)(void* state, sm_command_buffer* commands),
                                                    void* state);
    int32_t (*command_buffer_commit)(sm_command_buffer* commands);
    void (*command_buffer_wait_until_completed)(sm_command_buffer* commands);
    int32_t (*command_buffer_status)(const sm_command_buffer* commands);
    const char* (*command_buffer_error)(const sm_command_buffer* commands);
    double (*command_buffer_gpu_start_time)(const sm_command_buffer* commands);
    double (*command_buffer_gpu_end_time)(const sm_command_buffer* commands);
} softmetal_functions;

// Whether there is the library that the environment variable MFA_SOFTMETAL names, or else the file libsoftmetal.so beside the binary that this
// is linked into, with this interface. The first answer is kept.
bool softmetal_is_loaded(void);

// Its functions; all NULL where it is not loaded.
const softmetal_functions* _Nonnull softmetal_load(void);

// Why softmetal_is_loaded() is false; empty if it is not.
const char* _Nonnull softmetal_load_error(void);

#pragma clang diagnostic pop

#endif // SOFTMETAL_LOADER_H
