// The interface of libsoftmetal, the software Metal device: kernels that were translated from the Metal shading language and compiled, an
// executor that runs them on the host as a GPU would, and the objects of the framework that programs hold. docs/softmetal.md says what it
// checks and what it cannot.
//
// Every function may be called from any thread. Nothing is kept of what a caller passes, except where it says so.

#ifndef SOFTMETAL_H
#define SOFTMETAL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SM_INTERFACE_VERSION 2
#define SM_BUFFER_SLOTS 31
#define SM_SIMDGROUP_SIZE 32
#define SM_MOST_THREADS 1024
#define SM_THREADGROUP_MEMORY 32768

// SM_INTERFACE_VERSION of the library.
uint32_t sm_interface_version(void);

// ---- Kernels ----

// The kernels of one source text.
typedef struct sm_library sm_library;
// One of them, for the types and sizes of its host name.
typedef struct sm_kernel sm_kernel;

// The value of a function constant.
typedef struct sm_constant {
    uint32_t index;
    uint32_t size;
    const void* value;
} sm_constant;

// The kernels of the source text whose 64-bit FNV-1a hash is given, NULL if that text is not part of this libsoftmetal.
const sm_library* sm_library_find(uint64_t source_hash);
uint32_t sm_library_kernel_count(const sm_library* library);
const sm_kernel* sm_library_kernel(const sm_library* library, uint32_t index);

const char* sm_kernel_name(const sm_kernel* kernel);
// The most threads a threadgroup of this kernel may have.
uint32_t sm_kernel_most_threads(const sm_kernel* kernel);
// The size in bytes of function constant `index`; 0 if the kernel's source has none of that index.
uint32_t sm_kernel_constant_size(const sm_kernel* kernel, uint32_t index);
// Whether a pipeline can be made of a kernel with these constants: 0, or 1 with what the compiler says in `message`.
int32_t sm_kernel_specialize(const sm_kernel* kernel, const sm_constant* constants, uint32_t count, char* message, size_t message_size);

// A binding; address NULL: there is none. `length` counts from the address.
typedef struct sm_binding {
    void* address;
    uint64_t length;
} sm_binding;

// One dispatch, run at once.
typedef struct sm_job {
    const sm_kernel* kernel;
    const sm_binding* bindings;          // SM_BUFFER_SLOTS
    const uint32_t* threadgroup_lengths; // SM_BUFFER_SLOTS: bytes of threadgroup memory that the host sets, 0 for none
    const sm_constant* constants;
    uint32_t constant_count;
    uint32_t grid[3];        // threads; need not be a multiple of the threadgroup
    uint32_t threadgroup[3]; // threads
} sm_job;

// Runs a dispatch to its end. Returns 0, or 1 with a report in `message`; what was written until then stays written.
//
//   SOFTMETAL_ORDER      forward (default), reverse, random or random:SEED: the order in which threads run between two barriers
//   SOFTMETAL_THREADS    how many threadgroups run at a time (default: one for each processor)
//   SOFTMETAL_RECORD     a folder into which each dispatch is written, for softmetal-replay
int32_t sm_run(const sm_job* job, char* message, size_t message_size);

// ---- Objects ----
//
// Devices, queues, command buffers and buffers, counted by references: who makes one holds it and releases it. Their words are those of
// Apple's framework. All that live are known, so that a pointer to one that was released, or to something else, is recognised.
//
// The first word of an object is left to a binding whose objects begin with their class: sm_set_class() has every object of a kind begin with
// it. In a program of that language a pointer to an object here is then one of that language's, and no object stands for another.
//
//   SOFTMETAL_FAMILY     the family of the default device, as in supports_family(); 1010 if it is not set
//   SOFTMETAL_FAULT      what fails: compile (sm_kernel_specialize), memory (buffers cannot be had) or execute (command buffers end in an
//                        error without having run). Read when it would happen

typedef struct sm_device sm_device;
typedef struct sm_command_queue sm_command_queue;
typedef struct sm_command_buffer sm_command_buffer;
typedef struct sm_buffer sm_buffer;

#define SM_KIND_NONE 0
#define SM_KIND_DEVICE 1
#define SM_KIND_COMMAND_QUEUE 2
#define SM_KIND_COMMAND_BUFFER 3
#define SM_KIND_BUFFER 4

// The kind of a living object; SM_KIND_NONE for any other pointer.
int32_t sm_kind(const void* pointer);
// Both take any object; other pointers, NULL among them, are left alone. sm_retain() gives the object, NULL if it is none.
void* sm_retain(void* object);
void sm_release(void* object);
// How many objects of a kind live.
uint64_t sm_live_count(int32_t kind);
// For tests: of the buffers and command buffers that are asked for from now on, `granted` can be had, the next one cannot, nor can those after
// it if it is `forever`. A negative number: all can. Gives how many were asked for since the last call.
uint64_t sm_fail_memory(int64_t granted, int32_t forever);
// The first word of all objects of a kind, of those that live and those to come.
void sm_set_class(int32_t kind, void* class_pointer);

// The device that a program gets if it asks for no other. It is not to be released.
sm_device* sm_device_default(void);
// Another device, whose buffers and queues are not those of the default one.
sm_device* sm_device_create(const char* name, int32_t family);
const char* sm_device_name(const sm_device* device);
// Families by their numbers in the framework: 1007 is Apple7.
int32_t sm_device_supports_family(const sm_device* device, int32_t family);
sm_command_queue* sm_device_new_command_queue(sm_device* device);
// Zeroed memory on a page of its own, exactly as long as asked; NULL if `length` is 0 or there is no such memory.
sm_buffer* sm_device_new_buffer(sm_device* device, uint64_t length);
// The caller's memory: whole pages, else NULL. `deallocate`, if there is one, is called when the last reference goes.
sm_buffer* sm_device_new_buffer_no_copy(sm_device* device, void* memory, uint64_t length,
                                        void (*deallocate)(void* state, void* memory, uint64_t length), void* state);

void* sm_buffer_contents(const sm_buffer* buffer);
uint64_t sm_buffer_length(const sm_buffer* buffer);
sm_device* sm_buffer_device(const sm_buffer* buffer);

// The label of a buffer, a queue or a command buffer: NULL until one is set, copied. It lives until the next.
const char* sm_label(const void* object);
void sm_set_label(void* object, const char* label);

sm_device* sm_command_queue_device(const sm_command_queue* queue);
// With retained references a command buffer holds the buffers of its dispatches until it has completed; without, somebody else must, or it
// ends in an error that says so.
sm_command_buffer* sm_command_queue_new_command_buffer(sm_command_queue* queue, int32_t retains_references);

// What a dispatch gets at an index: a buffer from an offset on; or, without one, bytes, which are copied; or, without either, nothing.
typedef struct sm_argument {
    sm_buffer* buffer;
    uint64_t offset;
    const void* bytes;
    uint64_t length; // of bytes
} sm_argument;

typedef struct sm_dispatch {
    const sm_kernel* kernel;
    const sm_argument* arguments;        // SM_BUFFER_SLOTS
    const uint32_t* threadgroup_lengths; // SM_BUFFER_SLOTS
    const sm_constant* constants;
    uint32_t constant_count;
    uint32_t grid[3];
    uint32_t threadgroup[3];
} sm_dispatch;

#define SM_STATUS_NOT_ENQUEUED 0
#define SM_STATUS_ENQUEUED 1
#define SM_STATUS_COMMITTED 2
#define SM_STATUS_SCHEDULED 3
#define SM_STATUS_COMPLETED 4
#define SM_STATUS_ERROR 5

sm_device* sm_command_buffer_device(const sm_command_buffer* commands);
// Adds a dispatch. Returns 0, or 1 if the command buffer was committed before.
int32_t sm_command_buffer_dispatch(sm_command_buffer* commands, const sm_dispatch* dispatch);
// Adds a function that is called once, on a thread of the device, when the work is done or has failed; before anybody who waits goes on.
// Returns 0, or 1 if the command buffer was committed before.
int32_t sm_command_buffer_add_completed_handler(sm_command_buffer* commands, void (*handler)(void* state, sm_command_buffer* commands),
                                                void* state);
// Has the work run on another thread, after that of the queue's command buffers which were committed before. Returns 0, or 1 if that was done
// already.
int32_t sm_command_buffer_commit(sm_command_buffer* commands);
// Returns at once if it was never committed.
void sm_command_buffer_wait_until_completed(sm_command_buffer* commands);
int32_t sm_command_buffer_status(const sm_command_buffer* commands);
// Why the work failed; NULL if it did not. Lives as long as the command buffer.
const char* sm_command_buffer_error(const sm_command_buffer* commands);
// Seconds since some moment, at the begin and end of the work; 0 before that.
double sm_command_buffer_gpu_start_time(const sm_command_buffer* commands);
double sm_command_buffer_gpu_end_time(const sm_command_buffer* commands);

#ifdef __cplusplus
}
#endif

#endif // SOFTMETAL_H
