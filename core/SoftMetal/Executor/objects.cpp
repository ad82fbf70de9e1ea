// The objects of the framework: devices, queues, command buffers and buffers.

#include <fenv.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "library.h"

namespace {

// Nothing here is destroyed when the process ends: a thread of a queue may still be at work then.
template <class T> T& immortal() {
    static T* made = new T;
    return *made;
}

struct Registry {
    std::mutex lock;
    std::unordered_map<const void*, int32_t> kinds; // of all objects that live
    void* classes[SM_KIND_BUFFER + 1] = {};
};

Registry& registry() {
    // A child after fork() finds the registry as its parent had it, not locked by a thread that the child does not have.
    static const bool is_prepared = pthread_atfork([] { immortal<Registry>().lock.lock(); }, [] { immortal<Registry>().lock.unlock(); },
                                                   [] { immortal<Registry>().lock.unlock(); }) == 0;
    (void)is_prepared;
    return immortal<Registry>();
}

bool fails(const char* what) {
    const char* fault = getenv("SOFTMETAL_FAULT");
    return fault && !strcmp(fault, what);
}

// What a test asked for by sm_fail_memory().
struct MemoryFault {
    std::mutex lock;
    int64_t granted = -1;
    bool forever = false;
    uint64_t requests = 0;
};

bool memory_fails() {
    MemoryFault& fault = immortal<MemoryFault>();
    std::lock_guard<std::mutex> guard(fault.lock);
    fault.requests++;
    if (fails("memory")) return true;
    if (fault.granted < 0) return false;
    if (fault.granted > 0) {
        fault.granted--;
        return false;
    }
    if (!fault.forever) fault.granted = -1;
    return true;
}

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

} // namespace

struct sm_object {
    void* class_pointer = nullptr; // the first word: see softmetal.h
    unsigned references = 1;       // guarded by the registry's lock
    const int32_t kind;
    std::string label;
    bool has_label = false;

    sm_object(const sm_object&) = delete;

  protected:
    explicit sm_object(int32_t kind) : kind(kind) {}
};

namespace {

// Has an object that was just made known.
template <class T> T* enter(T* object) {
    Registry& known = registry();
    std::lock_guard<std::mutex> guard(known.lock);
    object->class_pointer = known.classes[object->kind];
    known.kinds[object] = object->kind;
    return object;
}

template <class T> T* retain(T* object) {
    return static_cast<T*>(sm_retain(object));
}

} // namespace

struct sm_device : sm_object {
    const std::string name;
    const int32_t family;
    sm_device(const char* name, int32_t family) : sm_object(SM_KIND_DEVICE), name(name), family(family) {}
};

struct sm_buffer : sm_object {
    sm_device* const device;
    void* const memory;
    const uint64_t length;
    void (*const deallocate)(void* state, void* memory, uint64_t length);
    void* const state;
    sm_buffer(sm_device* device, void* memory, uint64_t length, void (*deallocate)(void*, void*, uint64_t), void* state)
        : sm_object(SM_KIND_BUFFER), device(retain(device)), memory(memory), length(length), deallocate(deallocate), state(state) {}
    ~sm_buffer() {
        if (deallocate) deallocate(state, memory, length);
        sm_release(device);
    }
};

struct sm_command_queue : sm_object {
    sm_device* const device;
    std::mutex lock;
    std::deque<sm_command_buffer*> committed; // each is held
    bool is_running = false;                  // a thread is at work, which holds the queue
    explicit sm_command_queue(sm_device* device) : sm_object(SM_KIND_COMMAND_QUEUE), device(retain(device)) {}
    ~sm_command_queue() { sm_release(device); }
    void run();
};

namespace {

// A dispatch with copies of all that it refers to.
struct Dispatch {
    struct Argument {
        sm_buffer* buffer = nullptr;
        uint64_t offset = 0;
        std::vector<char> bytes;
    };
    struct Constant {
        uint32_t index;
        std::vector<char> value;
    };
    const sm_kernel* kernel;
    std::vector<Argument> arguments;
    std::vector<uint32_t> threadgroup_lengths;
    std::vector<Constant> constants;
    uint32_t grid[3];
    uint32_t threadgroup[3];

    explicit Dispatch(const sm_dispatch& given);
    // Why it failed; empty if it did not.
    std::string run() const;
};

std::vector<char> copy(const void* bytes, uint64_t length) {
    const char* start = static_cast<const char*>(bytes);
    return length ? std::vector<char>(start, start + length) : std::vector<char>();
}

Dispatch::Dispatch(const sm_dispatch& given) : kernel(given.kernel), arguments(SM_BUFFER_SLOTS) {
    for (int index = 0; index < SM_BUFFER_SLOTS; index++) {
        const sm_argument& argument = given.arguments[index];
        arguments[index].buffer = argument.buffer;
        arguments[index].offset = argument.offset;
        if (argument.bytes) arguments[index].bytes = copy(argument.bytes, argument.length);
    }
    threadgroup_lengths.assign(given.threadgroup_lengths, given.threadgroup_lengths + SM_BUFFER_SLOTS);
    for (uint32_t index = 0; index < given.constant_count; index++)
        constants.push_back({given.constants[index].index, copy(given.constants[index].value, given.constants[index].size)});
    memcpy(grid, given.grid, sizeof(grid));
    memcpy(threadgroup, given.threadgroup, sizeof(threadgroup));
}

std::string Dispatch::run() const {
    sm_binding bindings[SM_BUFFER_SLOTS] = {};
    for (int index = 0; index < SM_BUFFER_SLOTS; index++) {
        const Argument& argument = arguments[index];
        if (!argument.bytes.empty()) bindings[index] = {const_cast<char*>(argument.bytes.data()), argument.bytes.size()};
        if (!argument.buffer) continue;
        if (sm_kind(argument.buffer) != SM_KIND_BUFFER)
            return std::string("kernel '") + sm_kernel_name(kernel) + "': the buffer at index " + std::to_string(index) +
                   " was released before the work was done";
        bindings[index] = {static_cast<char*>(argument.buffer->memory) + argument.offset, argument.buffer->length - argument.offset};
    }
    std::vector<sm_constant> values;
    for (const Constant& constant : constants)
        values.push_back({constant.index, static_cast<uint32_t>(constant.value.size()), constant.value.data()});
    sm_job job{};
    job.kernel = kernel;
    job.bindings = bindings;
    job.threadgroup_lengths = threadgroup_lengths.data();
    job.constants = values.data();
    job.constant_count = static_cast<uint32_t>(values.size());
    memcpy(job.grid, grid, sizeof(grid));
    memcpy(job.threadgroup, threadgroup, sizeof(threadgroup));
    char message[4096];
    return sm_run(&job, message, sizeof(message)) == 0 ? "" : message;
}

} // namespace

struct sm_command_buffer : sm_object {
    sm_command_queue* const queue;
    const bool retains_references;
    mutable std::mutex lock;
    std::condition_variable changed;
    int32_t status = SM_STATUS_NOT_ENQUEUED;
    bool is_done = false; // its handlers have been called
    std::string error;
    double start_time = 0, end_time = 0;
    std::vector<Dispatch> dispatches;
    std::vector<std::pair<void (*)(void*, sm_command_buffer*), void*>> handlers;

    sm_command_buffer(sm_command_queue* queue, bool retains_references)
        : sm_object(SM_KIND_COMMAND_BUFFER), queue(retain(queue)), retains_references(retains_references) {}
    ~sm_command_buffer() {
        forget();
        sm_release(queue);
    }

    // Lets go of what the dispatches refer to.
    void forget() {
        for (const Dispatch& dispatch : dispatches)
            for (const Dispatch::Argument& argument : dispatch.arguments)
                if (retains_references && argument.buffer) sm_release(argument.buffer);
        dispatches.clear();
    }

    // On the queue's thread.
    void run() {
        set_status(SM_STATUS_SCHEDULED);
        const double start = now();
        std::string failure;
        if (fails("execute")) failure = "the GPU gave up: SOFTMETAL_FAULT asks for it";
        for (const Dispatch& dispatch : dispatches) {
            if (!failure.empty()) break;
            failure = dispatch.run();
        }
        {
            std::lock_guard<std::mutex> guard(lock);
            start_time = start;
            end_time = now();
            error = failure;
            status = failure.empty() ? SM_STATUS_COMPLETED : SM_STATUS_ERROR;
        }
        for (const auto& [handler, state] : handlers) handler(state, this);
        handlers.clear();
        forget();
        std::lock_guard<std::mutex> guard(lock);
        is_done = true;
        changed.notify_all();
    }

    void set_status(int32_t next) {
        std::lock_guard<std::mutex> guard(lock);
        status = next;
    }
};

void sm_command_queue::run() {
    fesetenv(FE_DFL_ENV); // A GPU knows nothing of how the thread that committed the work computes.
    for (;;) {
        sm_command_buffer* next;
        {
            std::lock_guard<std::mutex> guard(lock);
            if (committed.empty()) {
                is_running = false;
                break;
            }
            next = committed.front();
            committed.pop_front();
        }
        next->run();
        sm_release(next);
    }
    sm_release(this);
}

namespace {

void destroy(sm_object* object) {
    switch (object->kind) {
    case SM_KIND_DEVICE: delete static_cast<sm_device*>(object); break;
    case SM_KIND_COMMAND_QUEUE: delete static_cast<sm_command_queue*>(object); break;
    case SM_KIND_COMMAND_BUFFER: delete static_cast<sm_command_buffer*>(object); break;
    case SM_KIND_BUFFER: delete static_cast<sm_buffer*>(object); break;
    }
}

int32_t family_of_default_device() {
    const char* words = getenv("SOFTMETAL_FAMILY");
    return words && *words ? static_cast<int32_t>(strtol(words, nullptr, 10)) : 1010;
}

} // namespace

extern "C" {

#pragma GCC visibility push(default)

int32_t sm_kind(const void* pointer) {
    Registry& known = registry();
    std::lock_guard<std::mutex> guard(known.lock);
    const auto found = known.kinds.find(pointer);
    return found == known.kinds.end() ? SM_KIND_NONE : found->second;
}

void* sm_retain(void* object) {
    Registry& known = registry();
    std::lock_guard<std::mutex> guard(known.lock);
    if (!known.kinds.count(object)) return nullptr;
    static_cast<sm_object*>(object)->references++;
    return object;
}

void sm_release(void* object) {
    {
        Registry& known = registry();
        std::lock_guard<std::mutex> guard(known.lock);
        if (!known.kinds.count(object) || --static_cast<sm_object*>(object)->references > 0) return;
        known.kinds.erase(object);
    }
    destroy(static_cast<sm_object*>(object));
}

uint64_t sm_live_count(int32_t kind) {
    Registry& known = registry();
    std::lock_guard<std::mutex> guard(known.lock);
    uint64_t count = 0;
    for (const auto& [object, its_kind] : known.kinds) count += its_kind == kind;
    return count;
}

uint64_t sm_fail_memory(int64_t granted, int32_t forever) {
    MemoryFault& fault = immortal<MemoryFault>();
    std::lock_guard<std::mutex> guard(fault.lock);
    const uint64_t requests = fault.requests;
    fault.granted = granted;
    fault.forever = forever != 0;
    fault.requests = 0;
    return requests;
}

void sm_set_class(int32_t kind, void* class_pointer) {
    if (kind <= SM_KIND_NONE || kind > SM_KIND_BUFFER) return;
    Registry& known = registry();
    std::lock_guard<std::mutex> guard(known.lock);
    known.classes[kind] = class_pointer;
    for (const auto& [object, its_kind] : known.kinds)
        if (its_kind == kind) static_cast<sm_object*>(const_cast<void*>(object))->class_pointer = class_pointer;
}

sm_device* sm_device_default(void) {
    static sm_device* const device = enter(new sm_device("software Metal device", family_of_default_device()));
    return device;
}

sm_device* sm_device_create(const char* name, int32_t family) {
    return enter(new sm_device(name, family));
}

const char* sm_device_name(const sm_device* device) {
    return device->name.c_str();
}

int32_t sm_device_supports_family(const sm_device* device, int32_t family) {
    return family <= device->family;
}

sm_command_queue* sm_device_new_command_queue(sm_device* device) {
    return enter(new sm_command_queue(device));
}

sm_buffer* sm_device_new_buffer(sm_device* device, uint64_t length) {
    void* memory = nullptr;
    if (length == 0 || memory_fails() || posix_memalign(&memory, static_cast<size_t>(sysconf(_SC_PAGESIZE)), length)) return nullptr;
    memset(memory, 0, length);
    return enter(new sm_buffer(device, memory, length, [](void*, void* memory, uint64_t) { free(memory); }, nullptr));
}

sm_buffer* sm_device_new_buffer_no_copy(sm_device* device, void* memory, uint64_t length,
                                        void (*deallocate)(void* state, void* memory, uint64_t length), void* state) {
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    if (length == 0 || length % page || reinterpret_cast<uint64_t>(memory) % page || memory_fails()) return nullptr;
    return enter(new sm_buffer(device, memory, length, deallocate, state));
}

void* sm_buffer_contents(const sm_buffer* buffer) {
    return buffer->memory;
}

uint64_t sm_buffer_length(const sm_buffer* buffer) {
    return buffer->length;
}

sm_device* sm_buffer_device(const sm_buffer* buffer) {
    return buffer->device;
}

const char* sm_label(const void* object) {
    const sm_object* labelled = static_cast<const sm_object*>(object);
    return labelled->has_label ? labelled->label.c_str() : nullptr;
}

void sm_set_label(void* object, const char* label) {
    sm_object* labelled = static_cast<sm_object*>(object);
    labelled->has_label = label != nullptr;
    labelled->label = label ? label : "";
}

sm_device* sm_command_queue_device(const sm_command_queue* queue) {
    return queue->device;
}

sm_command_buffer* sm_command_queue_new_command_buffer(sm_command_queue* queue, int32_t retains_references) {
    if (memory_fails()) return nullptr;
    return enter(new sm_command_buffer(queue, retains_references != 0));
}

sm_device* sm_command_buffer_device(const sm_command_buffer* commands) {
    return commands->queue->device;
}

int32_t sm_command_buffer_dispatch(sm_command_buffer* commands, const sm_dispatch* dispatch) {
    std::lock_guard<std::mutex> guard(commands->lock);
    if (commands->status >= SM_STATUS_COMMITTED) return 1;
    commands->dispatches.emplace_back(*dispatch);
    if (!commands->retains_references) return 0;
    for (const Dispatch::Argument& argument : commands->dispatches.back().arguments) retain(argument.buffer);
    return 0;
}

int32_t sm_command_buffer_add_completed_handler(sm_command_buffer* commands, void (*handler)(void* state, sm_command_buffer* commands),
                                                void* state) {
    std::lock_guard<std::mutex> guard(commands->lock);
    if (commands->status >= SM_STATUS_COMMITTED) return 1;
    commands->handlers.emplace_back(handler, state);
    return 0;
}

int32_t sm_command_buffer_commit(sm_command_buffer* commands) {
    {
        std::lock_guard<std::mutex> guard(commands->lock);
        if (commands->status >= SM_STATUS_COMMITTED) return 1;
        commands->status = SM_STATUS_COMMITTED;
    }
    sm_command_queue* queue = commands->queue;
    std::lock_guard<std::mutex> guard(queue->lock);
    queue->committed.push_back(retain(commands));
    if (!queue->is_running) {
        queue->is_running = true;
        std::thread(&sm_command_queue::run, retain(queue)).detach();
    }
    return 0;
}

void sm_command_buffer_wait_until_completed(sm_command_buffer* commands) {
    std::unique_lock<std::mutex> guard(commands->lock);
    if (commands->status < SM_STATUS_COMMITTED) return;
    commands->changed.wait(guard, [commands] { return commands->is_done; });
}

int32_t sm_command_buffer_status(const sm_command_buffer* commands) {
    std::lock_guard<std::mutex> guard(commands->lock);
    return commands->status;
}

const char* sm_command_buffer_error(const sm_command_buffer* commands) {
    std::lock_guard<std::mutex> guard(commands->lock);
    return commands->status == SM_STATUS_ERROR ? commands->error.c_str() : nullptr;
}

double sm_command_buffer_gpu_start_time(const sm_command_buffer* commands) {
    std::lock_guard<std::mutex> guard(commands->lock);
    return commands->start_time;
}

double sm_command_buffer_gpu_end_time(const sm_command_buffer* commands) {
    std::lock_guard<std::mutex> guard(commands->lock);
    return commands->end_time;
}

int32_t sm_kernel_specialize(const sm_kernel* kernel, const sm_constant* constants, uint32_t count, char* message, size_t message_size) {
    std::string wrong;
    if (fails("compile"))
        wrong = "program_source:1:1: error: the kernel '" + std::string(kernel->name) + "' is refused: SOFTMETAL_FAULT asks for it";
    for (uint32_t index = 0; index < count && wrong.empty(); index++) {
        const uint32_t size = sm_kernel_constant_size(kernel, constants[index].index);
        if (size && size != constants[index].size)
            wrong = "kernel '" + std::string(kernel->name) + "': function constant " + std::to_string(constants[index].index) + " has " +
                    std::to_string(size) + " bytes (got " + std::to_string(constants[index].size) + ")";
    }
    if (wrong.empty()) return 0;
    if (message_size) snprintf(message, message_size, "%s", wrong.c_str());
    return 1;
}

#pragma GCC visibility pop
}
