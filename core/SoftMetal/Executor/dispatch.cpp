// The interface of the library: checks a dispatch and hands its threadgroups to threads of the host.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "executor_internal.h"
#include "record.h"

namespace {

using softmetal::Order;
using softmetal::Threadgroup;

std::string text(uint64_t number) {
    return std::to_string(number);
}

// What is wrong with the sizes and bindings of a dispatch; empty if nothing is. The function constants are set.
std::string check(const sm_job& job) {
    const sm_kernel& kernel = *job.kernel;
    const std::string which = "kernel '" + std::string(kernel.name) + "': ";
    uint64_t threads = 1;
    for (int axis = 0; axis < 3; axis++) {
        if (job.threadgroup[axis] == 0 || job.threadgroup[axis] > SM_MOST_THREADS)
            threads = SM_MOST_THREADS + 1;
        else
            threads *= job.threadgroup[axis];
    }
    const uint64_t most = sm_kernel_most_threads(&kernel);
    if (threads > most) return which + "a threadgroup has 1 to " + text(most) + " threads (got " + text(threads) + ")";
    for (uint32_t index = 0; index < kernel.constant_count; index++) {
        const sm_constant_slot& slot = kernel.constants[index];
        for (uint32_t given = 0; given < job.constant_count; given++)
            if (job.constants[given].index == slot.index && job.constants[given].size != slot.size)
                return which + "function constant '" + slot.name + "' has " + text(slot.size) + " bytes (got " +
                       text(job.constants[given].size) + ")";
    }
    uint64_t memory = 0;
    for (uint32_t index = 0; index < kernel.parameter_count; index++) {
        const sm_parameter& parameter = kernel.parameters[index];
        if (parameter.wanted && !parameter.wanted()) continue;
        const std::string what = which + "'" + parameter.name + "', index " + text(parameter.index) + ": ";
        if (parameter.is_threadgroup_memory) {
            const uint32_t length = job.threadgroup_lengths[parameter.index];
            if (length == 0) return what + "the length of threadgroup memory is not set";
            if (length % 16) return what + "a length of threadgroup memory is a multiple of 16 (got " + text(length) + ")";
            memory += length;
        } else {
            const sm_binding& buffer = job.bindings[parameter.index];
            if (!buffer.address) return what + "no buffer is bound";
            if (buffer.length < parameter.least_size)
                return what + "the buffer has " + text(buffer.length) + " bytes, " + text(parameter.least_size) + " are needed";
        }
    }
    if (memory > SM_THREADGROUP_MEMORY)
        return which + "threadgroup memory has at most " + text(SM_THREADGROUP_MEMORY) + " bytes (got " + text(memory) + ")";
    return "";
}

void set_constants(const sm_job& job) {
    for (uint32_t index = 0; index < job.kernel->constant_count; index++) {
        const sm_constant_slot& slot = job.kernel->constants[index];
        const void* value = nullptr;
        for (uint32_t given = 0; given < job.constant_count; given++)
            if (job.constants[given].index == slot.index && job.constants[given].size == slot.size) value = job.constants[given].value;
        slot.set(value);
    }
}

Order chosen_order(uint64_t* seed) {
    const char* words = getenv("SOFTMETAL_ORDER");
    *seed = 1;
    if (!words) return Order::forward;
    if (!strcmp(words, "reverse")) return Order::reverse;
    if (strncmp(words, "random", 6)) return Order::forward;
    if (words[6] == ':') *seed = strtoull(words + 7, nullptr, 10);
    return Order::random;
}

unsigned chosen_workers(uint64_t threadgroups) {
    const char* words = getenv("SOFTMETAL_THREADS");
    const unsigned long asked = words ? strtoul(words, nullptr, 10) : std::thread::hardware_concurrency();
    return static_cast<unsigned>(std::max<uint64_t>(1, std::min<uint64_t>(asked, threadgroups)));
}

// A dispatch that several workers share.
struct Work {
    const sm_job& job;
    uint32_t groups[3];
    uint64_t count;
    Order order;
    uint64_t seed;
    std::atomic<uint64_t> next{0};
    std::mutex lock;
    std::string error;

    void run() {
        set_constants(job);
        Threadgroup group;
        group.kernel = job.kernel;
        group.order = order;
        std::vector<std::vector<char>> memory(SM_BUFFER_SLOTS);
        void* addresses[SM_BUFFER_SLOTS] = {};
        for (uint32_t index = 0; index < job.kernel->parameter_count; index++) {
            const sm_parameter& parameter = job.kernel->parameters[index];
            if (!parameter.is_threadgroup_memory) continue;
            memory[parameter.index].resize(job.threadgroup_lengths[parameter.index]);
            addresses[parameter.index] = memory[parameter.index].data();
            group.host_memory += memory[parameter.index].size();
        }
        const sm_arguments arguments = {job.bindings, addresses};
        group.arguments = &arguments;
        group.prepare();
        sm_thread& base = group.base;
        base.threads_per_simdgroup = SM_SIMDGROUP_SIZE;
        for (int axis = 0; axis < 3; axis++) {
            base.threads_per_grid[axis] = job.grid[axis];
            base.threadgroups_per_grid[axis] = groups[axis];
            group.full_size[axis] = job.threadgroup[axis];
        }
        for (uint64_t index; (index = next.fetch_add(1)) < count;) {
            const uint64_t plane = static_cast<uint64_t>(groups[0]) * groups[1];
            const uint64_t position[3] = {index % groups[0], index / groups[0] % groups[1], index / plane};
            group.random = seed * 0x9E3779B97F4A7C15u + index * 0xBF58476D1CE4E5B9u + 1;
            for (int axis = 0; axis < 3; axis++) {
                base.threadgroup_position_in_grid[axis] = static_cast<uint32_t>(position[axis]);
                const uint64_t left = job.grid[axis] - position[axis] * job.threadgroup[axis];
                base.threads_per_threadgroup[axis] = static_cast<uint32_t>(std::min<uint64_t>(left, job.threadgroup[axis]));
            }
            for (std::vector<char>& bytes : memory) memset(bytes.data(), 0xff, bytes.size());
            if (group.run()) continue;
            std::lock_guard<std::mutex> guard(lock);
            if (error.empty()) error = group.error;
            next = count;
            break;
        }
    }
};

int32_t fail(const std::string& error, char* message, size_t message_size) {
    if (message_size) snprintf(message, message_size, "%s", error.c_str());
    return 1;
}

} // namespace

std::vector<const sm_library*>& sm_libraries() {
    static std::vector<const sm_library*> all;
    return all;
}

void sm_register(const sm_library* library) {
    sm_libraries().push_back(library);
}

extern "C" {

#pragma GCC visibility push(default)

uint32_t sm_interface_version(void) {
    return SM_INTERFACE_VERSION;
}

const sm_library* sm_library_find(uint64_t source_hash) {
    for (const sm_library* library : sm_libraries())
        if (library->source_hash == source_hash) return library;
    return nullptr;
}

uint32_t sm_library_kernel_count(const sm_library* library) {
    return library->kernel_count;
}

const sm_kernel* sm_library_kernel(const sm_library* library, uint32_t index) {
    return &library->kernels[index];
}

const char* sm_kernel_name(const sm_kernel* kernel) {
    return kernel->name;
}

uint32_t sm_kernel_most_threads(const sm_kernel* kernel) {
    return kernel->most_threads ? kernel->most_threads : SM_MOST_THREADS;
}

uint32_t sm_kernel_constant_size(const sm_kernel* kernel, uint32_t index) {
    for (uint32_t slot = 0; slot < kernel->constant_count; slot++)
        if (kernel->constants[slot].index == index) return kernel->constants[slot].size;
    return 0;
}

int32_t sm_run(const sm_job* job, char* message, size_t message_size) {
    set_constants(*job);
    const std::string wrong = check(*job);
    if (!wrong.empty()) return fail(wrong, message, message_size);
    Work work{*job, {}, 1, Order::forward, 1, {}, {}, {}};
    work.order = chosen_order(&work.seed);
    for (int axis = 0; axis < 3; axis++) {
        work.groups[axis] = (job->grid[axis] + job->threadgroup[axis] - 1) / job->threadgroup[axis];
        work.count *= work.groups[axis];
    }
    const softmetal::Record record(*job);
    const unsigned workers = chosen_workers(work.count);
    std::vector<std::thread> threads;
    for (unsigned worker = 1; worker < workers; worker++) threads.emplace_back([&work] { work.run(); });
    work.run();
    for (std::thread& thread : threads) thread.join();
    if (!work.error.empty()) return fail(work.error, message, message_size);
    record.finish(*job);
    return 0;
}

#pragma GCC visibility pop
}
