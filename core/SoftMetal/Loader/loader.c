#define _GNU_SOURCE

#include "softmetal_loader.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static softmetal_functions functions;
static bool is_loaded;
static char message[1024];

// Writes the path of libsoftmetal.so beside this binary.
static void path_beside(char* path, size_t size) {
    Dl_info info;
    const char* own = dladdr((const void*)&once, &info) && info.dli_fname ? info.dli_fname : "";
    const char* slash = strrchr(own, '/');
    const int folder = slash ? (int)(slash - own) + 1 : 0;
    snprintf(path, size, "%.*slibsoftmetal.so", folder, own);
}

static void load(void) {
    char path[4096];
    const char* given = getenv("MFA_SOFTMETAL");
    if (given && *given)
        snprintf(path, sizeof(path), "%s", given);
    else
        path_beside(path, sizeof(path));
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(message, sizeof(message), "%s", dlerror());
        return;
    }
    uint32_t (*version)(void) = (uint32_t (*)(void))dlsym(library, "sm_interface_version");
    if (!version || version() != SM_INTERFACE_VERSION) {
        snprintf(message, sizeof(message), "%s has another interface than this library asks for", path);
        return;
    }
    is_loaded = true;
#define LOAD(name)                                                          \
    do {                                                                    \
        *(void**)&functions.name = dlsym(library, "sm_" #name);             \
        if (!functions.name) {                                              \
            snprintf(message, sizeof(message), "%s lacks sm_" #name, path); \
            is_loaded = false;                                              \
        }                                                                   \
    } while (0)
    LOAD(library_find);
    LOAD(library_kernel_count);
    LOAD(library_kernel);
    LOAD(kernel_name);
    LOAD(kernel_most_threads);
    LOAD(kernel_specialize);
    LOAD(kind);
    LOAD(retain);
    LOAD(release);
    LOAD(label);
    LOAD(set_label);
    LOAD(device_default);
    LOAD(device_name);
    LOAD(device_supports_family);
    LOAD(device_new_command_queue);
    LOAD(device_new_buffer);
    LOAD(device_new_buffer_no_copy);
    LOAD(buffer_contents);
    LOAD(buffer_length);
    LOAD(buffer_device);
    LOAD(command_queue_device);
    LOAD(command_queue_new_command_buffer);
    LOAD(command_buffer_device);
    LOAD(command_buffer_dispatch);
    LOAD(command_buffer_add_completed_handler);
    LOAD(command_buffer_commit);
    LOAD(command_buffer_wait_until_completed);
    LOAD(command_buffer_status);
    LOAD(command_buffer_error);
    LOAD(command_buffer_gpu_start_time);
    LOAD(command_buffer_gpu_end_time);
#undef LOAD
}

bool softmetal_is_loaded(void) {
    pthread_once(&once, load);
    return is_loaded;
}

const softmetal_functions* softmetal_load(void) {
    pthread_once(&once, load);
    return &functions;
}

const char* softmetal_load_error(void) {
    pthread_once(&once, load);
    return message;
}
