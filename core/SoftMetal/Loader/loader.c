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
    functions.library_find = (const sm_library* (*)(uint64_t))dlsym(library, "sm_library_find");
    functions.library_kernel_count = (uint32_t (*)(const sm_library*))dlsym(library, "sm_library_kernel_count");
    functions.library_kernel = (const sm_kernel* (*)(const sm_library*, uint32_t))dlsym(library, "sm_library_kernel");
    functions.kernel_name = (const char* (*)(const sm_kernel*))dlsym(library, "sm_kernel_name");
    functions.kernel_most_threads = (uint32_t (*)(const sm_kernel*))dlsym(library, "sm_kernel_most_threads");
    functions.run = (int32_t (*)(const sm_job*, char*, size_t))dlsym(library, "sm_run");
    is_loaded = functions.library_find && functions.library_kernel_count && functions.library_kernel && functions.kernel_name &&
                functions.kernel_most_threads && functions.run;
    if (!is_loaded) snprintf(message, sizeof(message), "%s lacks a function", path);
}

const softmetal_functions* softmetal_load(void) {
    pthread_once(&once, load);
    return is_loaded ? &functions : NULL;
}

const char* softmetal_load_error(void) {
    pthread_once(&once, load);
    return message;
}
