// What the executor's own sources share.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "executor.h"
#include "library.h"

#if __has_feature(address_sanitizer)
#define SOFTMETAL_ADDRESS_SANITIZER 1
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// ThreadSanitizer must not look at the executor, only at kernels, so its sources are compiled without; then the build says that it is there.
#ifdef SOFTMETAL_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

// All kernels that there are.
std::vector<const sm_library*>& sm_libraries();

namespace softmetal {

// In which order threads run between two barriers.
enum class Order { forward, reverse, random };

// A variable in threadgroup memory.
struct Variable {
    const void* key;
    void* address;
};

// A threadgroup and the fibers that run it; used for one threadgroup after the other.
struct Threadgroup {
    const sm_kernel* kernel = nullptr;
    const sm_arguments* arguments = nullptr;
    sm_thread base{};        // what is the same for all threads; the threadgroup's own size, which is smaller at the edge of a grid
    uint32_t full_size[3]{}; // of threadgroups that are not at the edge
    size_t host_memory = 0;  // bytes of threadgroup memory that the host asked for
    Order order = Order::forward;
    uint64_t random = 1;
    std::string error; // why the dispatch was stopped

    Fiber host{}; // who called run()
    std::vector<Fiber*> fibers;
    std::vector<Simdgroup*> simdgroups;
    int thread_count = 0;
    int simdgroup_count = 0;
    int arrived_count = 0; // threads at a barrier
    int finished_count = 0;
    unsigned barriers_passed = 0;
    Place barrier_place{};
    std::vector<Variable> variables;
    std::vector<char> arena; // threadgroup memory
    size_t arena_used = 0;
    size_t memory_used = 0;
    // What ThreadSanitizer synchronises by. Start and end are two, else the end of one fiber would order it before the start of the next.
    char start_token = 0, end_token = 0, barrier_tokens[2] = {};

    Threadgroup() = default;
    Threadgroup(const Threadgroup&) = delete;
    ~Threadgroup();
    // Called once, by the thread that will call run().
    void prepare();
    // Runs all threads of one threadgroup. False if that was stopped: then this object cannot be used again.
    bool run();
};

} // namespace softmetal
