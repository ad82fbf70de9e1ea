// Fibers, and how they meet.

#include "executor_internal.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

// softmetal_switch(save, load): stores the stack pointer of who calls in *save and goes on where `load` was stored. What a function must
// preserve lies on the stacks.
#if defined(__x86_64__)
asm(R"(
    .text
    .type softmetal_switch, @function
softmetal_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size softmetal_switch, .-softmetal_switch
)");
#elif defined(__aarch64__)
asm(R"(
    .text
    .type softmetal_switch, %function
softmetal_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size softmetal_switch, .-softmetal_switch
)");
#else
#error "the software Metal device switches fibers on x86-64 and arm64 only"
#endif
extern "C" void softmetal_switch(void** save, void* load);

namespace softmetal {

__thread Fiber* current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr size_t stack_size = 256 * 1024;
constexpr size_t guard_size = 4096;
// Between two threadgroup variables, so that AddressSanitizer sees one overrun.
constexpr size_t red_zone = 32;

const char* name(Operation operation) {
    switch (operation) {
    case Operation::none: return "(running)";
    case Operation::simdgroup_barrier: return "simdgroup_barrier";
    case Operation::simd_shuffle: return "simd_shuffle";
    case Operation::simd_broadcast: return "simd_broadcast";
    case Operation::simd_reduction: return "a simd reduction";
    case Operation::simd_vote: return "a simd vote";
    case Operation::simdgroup_matrix: return "a simdgroup_matrix product";
    case Operation::threadgroup_barrier: return "threadgroup_barrier";
    case Operation::finished: return "the end of the kernel";
    }
    return "";
}

// Stacks outlive a dispatch: mapping them takes longer than most dispatches.
std::mutex spare_lock;
std::vector<char*>& spare_stacks() {
    static std::vector<char*> stacks;
    return stacks;
}

char* take_stack() {
    {
        std::lock_guard<std::mutex> guard(spare_lock);
        if (!spare_stacks().empty()) {
            char* stack = spare_stacks().back();
            spare_stacks().pop_back();
            return stack;
        }
    }
    void* memory = mmap(nullptr, guard_size + stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fputs("softmetal: no memory for the stack of a fiber\n", stderr);
        abort();
    }
    mprotect(memory, guard_size, PROT_NONE);
    return static_cast<char*>(memory) + guard_size;
}

void switch_to(Fiber* from, Fiber* to) {
    current = to;
#ifdef SOFTMETAL_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(&from->address_sanitizer_stack, to->stack, to->stack_size);
#endif
#ifdef SOFTMETAL_THREAD_SANITIZER
    __tsan_switch_to_fiber(to->thread_sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    softmetal_switch(&from->stack_pointer, to->stack_pointer);
#ifdef SOFTMETAL_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(from->address_sanitizer_stack, nullptr, nullptr);
#endif
}

unsigned draw(Threadgroup* group) {
    group->random ^= group->random << 13;
    group->random ^= group->random >> 7;
    group->random ^= group->random << 17;
    return static_cast<unsigned>(group->random >> 16);
}

// One of the lanes in `mask`: the next after `lane` in the group's order.
int pick(Threadgroup* group, unsigned mask, int lane) {
    switch (group->order) {
    case Order::forward: {
        const unsigned above = lane >= lanes - 1 ? 0 : mask & ~((2u << lane) - 1);
        return __builtin_ctz(above ? above : mask);
    }
    case Order::reverse: {
        const unsigned below = lane <= 0 ? 0 : mask & ((1u << lane) - 1);
        return 31 - __builtin_clz(below ? below : mask);
    }
    case Order::random: {
        for (unsigned skipped = draw(group) % __builtin_popcount(mask); skipped > 0; skipped--) mask &= mask - 1;
        return __builtin_ctz(mask);
    }
    }
    return 0;
}

// Ends the dispatch: the fibers are left where they are.
[[noreturn]] void stop(Threadgroup* group, const std::string& error) {
    if (group->error.empty()) group->error = error;
    switch_to(current, &group->host);
    abort();
}

std::string position(Threadgroup* group) {
    const uint32_t* at = group->base.threadgroup_position_in_grid;
    return "kernel '" + std::string(group->kernel->name) + "', threadgroup (" + std::to_string(at[0]) + ", " + std::to_string(at[1]) +
           ", " + std::to_string(at[2]) + ")";
}

// Says where all threads are.
[[noreturn]] void report_divergence(Threadgroup* group) {
    struct Crowd {
        Operation operation;
        Place place;
        unsigned count, first;
    };
    std::vector<Crowd> crowds;
    for (int index = 0; index < group->thread_count; index++) {
        const Fiber* fiber = group->fibers[index];
        auto same = [fiber](const Crowd& crowd) {
            return crowd.operation == fiber->operation && crowd.place.line == fiber->place.line && crowd.place.file == fiber->place.file;
        };
        auto found = std::find_if(crowds.begin(), crowds.end(), same);
        if (found == crowds.end())
            crowds.push_back({fiber->operation, fiber->place, 1, fiber->index});
        else
            found->count++;
    }
    std::string report = "threads wait for each other in different places, in " + position(group) + ":";
    for (const Crowd& crowd : crowds) {
        report += "\n  " + std::to_string(crowd.count) + " threads, the first is " + std::to_string(crowd.first) + ", at ";
        report += name(crowd.operation);
        if (crowd.place.file) report += std::string(", ") + crowd.place.file + ":" + std::to_string(crowd.place.line);
    }
    stop(group, report);
}

void empty(MatrixQueue* queue) {
    memset(queue->queued, 0, sizeof(queue->queued));
    memset(queue->at, 0, sizeof(queue->at));
    memset(queue->calls, 0, sizeof(queue->calls));
    queue->calls[MatrixQueue::capacity] = MatrixQueue::full;
    queue->computed = 0;
    queue->generation++;
}

// Takes no product: that of simdgroups that are not complete.
MatrixQueue* always_full() {
    static MatrixQueue queue = [] {
        MatrixQueue made{};
        made.calls[0] = MatrixQueue::full;
        return made;
    }();
    return &queue;
}

// Computes the products that every lane has queued. True if there were any.
bool compute_queued(Simdgroup* simdgroup) {
    typedef float row8 __attribute__((ext_vector_type(8), aligned(4)));
    MatrixQueue* queue = simdgroup->matrices;
    int ready = MatrixQueue::capacity;
    for (int lane = 0; lane < lanes; lane++) ready = std::min(ready, queue->queued[lane]);
    if (ready <= queue->computed) return false;
    for (int first = queue->computed, last; first < ready; first = last) {
        // The sum of a run is written once.
        for (last = first + 1; last < ready && !MatrixQueue::starts(queue->calls[last]);) last++;
        int start = first; // before `first` where a part of the run is computed already
        while (!MatrixQueue::starts(queue->calls[start])) start--;
        alignas(64) float elements[8][8];
        queue->gather[start](queue->accumulators[start], elements);
        row8 sum[8];
        for (int row = 0; row < 8; row++) memcpy(&sum[row], elements[row], sizeof(row8));
        for (int index = first; index < last; index++) {
            const MatrixQueue::Operands& product = queue->operands[index];
            row8 right[8];
            for (int k = 0; k < 8; k++) memcpy(&right[k], product.right + 8 * k, sizeof(row8));
            for (int row = 0; row < 8; row++)
                for (int k = 0; k < 8; k++) sum[row] += product.left[8 * row + k] * right[k];
        }
        for (int row = 0; row < 8; row++) memcpy(elements[row], &sum[row], sizeof(row8));
        queue->scatter[start](queue->accumulators[start], elements);
    }
    queue->computed = ready;
    if (queue->calls[ready] == MatrixQueue::nobody || queue->calls[ready] == MatrixQueue::full) empty(queue);
    simdgroup->runnable |= simdgroup->at_matrices;
    simdgroup->at_matrices = 0;
    return true;
}

// Runs another fiber; returns when this one may go on. It is not runnable now.
void wait(Fiber* self) {
    Threadgroup* group = self->threadgroup;
    Simdgroup* own = self->simdgroup;
    // Trying to compute is worth it when no lane has more to queue. At random orders lanes go on as early as they may.
    if (own->at_matrices && (!own->runnable || group->order == Order::random) && compute_queued(own) && (own->runnable & 1u << self->lane))
        return;
    if (group->order == Order::forward) {
        // Nearly always the next lane.
        const unsigned above = own->runnable & ~((2u << self->lane) - 1);
        if (above) return switch_to(self, group->fibers[own->index * lanes + __builtin_ctz(above)]);
    }
    const int count = group->simdgroup_count;
    int at = own->index;
    if (group->order == Order::random) at = static_cast<int>(draw(group) % count);
    for (int tried = 0; tried < count; tried++) {
        Simdgroup* simdgroup = group->simdgroups[at];
        if (group->order == Order::reverse)
            at = at ? at - 1 : count - 1;
        else
            at = at + 1 < count ? at + 1 : 0;
        if (!simdgroup->runnable) continue;
        const int before = simdgroup == own ? self->lane : group->order == Order::reverse ? lanes : -1;
        Fiber* next = group->fibers[simdgroup->index * lanes + pick(group, simdgroup->runnable, before)];
        if (next != self) switch_to(self, next);
        return;
    }
    if (group->finished_count < group->thread_count) report_divergence(group);
    switch_to(self, &group->host);
}

// Lets the lanes that met go on, if the last one is there.
bool release_simdgroup(Simdgroup* simdgroup) {
    if (!simdgroup->arrived || simdgroup->arrived != (simdgroup->present & ~simdgroup->finished)) return false;
    const Fiber* any = current->threadgroup->fibers[simdgroup->index * lanes + __builtin_ctz(simdgroup->arrived)];
    simdgroup->participants[any->parity] = simdgroup->arrived;
    simdgroup->runnable |= simdgroup->arrived;
    simdgroup->arrived = 0;
    return true;
}

#ifdef SOFTMETAL_THREAD_SANITIZER
void synchronise_release(void* token) {
    __tsan_release(token);
}
void synchronise_acquire(void* token) {
    __tsan_acquire(token);
}
#else
void synchronise_release(void*) {}
void synchronise_acquire(void*) {}
#endif

void fiber_main() {
#ifdef SOFTMETAL_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    for (;;) {
        Fiber* self = current;
        Threadgroup* group = self->threadgroup;
        synchronise_acquire(&group->start_token);
        sm_thread thread = group->base;
        const uint32_t* size = thread.threads_per_threadgroup;
        thread.thread_position_in_threadgroup[0] = self->index % size[0];
        thread.thread_position_in_threadgroup[1] = self->index / size[0] % size[1];
        thread.thread_position_in_threadgroup[2] = self->index / (size[0] * size[1]);
        for (int axis = 0; axis < 3; axis++)
            thread.thread_position_in_grid[axis] =
                thread.threadgroup_position_in_grid[axis] * group->full_size[axis] + thread.thread_position_in_threadgroup[axis];
        thread.thread_index_in_threadgroup = self->index;
        thread.thread_index_in_simdgroup = self->lane;
        thread.simdgroup_index_in_threadgroup = self->simdgroup->index;
        group->kernel->entry(group->arguments, &thread);
        self->operation = Operation::finished;
        self->place = {};
        self->simdgroup->runnable &= ~(1u << self->lane);
        self->simdgroup->finished |= 1u << self->lane;
        group->finished_count++;
        release_simdgroup(self->simdgroup);
        synchronise_release(&group->end_token);
        wait(self);
    }
}

Fiber* make_fiber(Threadgroup* group, unsigned index) {
    Fiber* fiber = new Fiber{};
    char* stack = take_stack();
#ifdef SOFTMETAL_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(stack, stack_size); // a dispatch that was stopped left its frames there
#endif
    fiber->stack = stack;
    fiber->stack_size = stack_size;
    // Frames of neighbours begin in different sets of the caches: at one place of their pages, eight of them would fill a set.
    const size_t colour = index * 37 % 64 * 64;
    void** top = reinterpret_cast<void**>(stack + stack_size - colour);
#if defined(__x86_64__)
    *--top = nullptr; // aligns the stack as after a call
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
#else
    top -= 20;
    memset(top, 0, 160);
    top[11] = reinterpret_cast<void*>(fiber_main);
#endif
    fiber->stack_pointer = top;
    fiber->threadgroup = group;
    fiber->index = index;
    fiber->lane = static_cast<int>(index % lanes);
    fiber->matrix_row = matrix_row(fiber->lane);
    fiber->matrix_column = matrix_column(fiber->lane);
    fiber->matrix_element = fiber->matrix_row * 8 + fiber->matrix_column;
#ifdef SOFTMETAL_THREAD_SANITIZER
    fiber->thread_sanitizer_fiber = __tsan_create_fiber(0);
#endif
    return fiber;
}

} // namespace

void meet_threadgroup(Place place) {
    Fiber* self = current;
    Threadgroup* group = self->threadgroup;
    // Two tokens take turns: with one, a thread that has left a barrier and arrived at the next would seem ordered before those still in it.
    void* token = &group->barrier_tokens[group->barriers_passed & 1];
    synchronise_release(token);
    self->operation = Operation::threadgroup_barrier;
    self->place = place;
    if (group->arrived_count && (group->barrier_place.line != place.line || group->barrier_place.file != place.file))
        report_divergence(group);
    group->barrier_place = place;
    self->simdgroup->runnable &= ~(1u << self->lane);
    self->simdgroup->at_barrier |= 1u << self->lane;
    if (++group->arrived_count == group->thread_count) {
        for (int index = 0; index < group->simdgroup_count; index++) {
            Simdgroup* simdgroup = group->simdgroups[index];
            simdgroup->runnable |= simdgroup->at_barrier;
            simdgroup->at_barrier = 0;
        }
        group->arrived_count = 0;
        group->barriers_passed++;
    }
    // The last one to arrive gives way where the order is not the usual one, so that any thread may be the first after a barrier.
    if (group->order == Order::random || !(self->simdgroup->runnable & (1u << self->lane))) wait(self);
    synchronise_acquire(token);
    self->operation = Operation::none;
}

void meet_simdgroup(Operation operation, Place place) {
    Fiber* self = current;
    Simdgroup* simdgroup = self->simdgroup;
    synchronise_release(simdgroup);
    self->operation = operation;
    self->place = place;
    if (simdgroup->arrived) {
        if (simdgroup->operation != operation || simdgroup->place.line != place.line || simdgroup->place.file != place.file)
            report_divergence(self->threadgroup);
    } else {
        simdgroup->operation = operation;
        simdgroup->place = place;
    }
    simdgroup->arrived |= 1u << self->lane;
    simdgroup->runnable &= ~(1u << self->lane);
    if (!release_simdgroup(simdgroup)) wait(self);
    synchronise_acquire(simdgroup);
    self->operation = Operation::none;
    self->parity ^= 1;
}

void compute_matrices(Place place) {
    Fiber* self = current;
    Simdgroup* simdgroup = self->simdgroup;
    MatrixQueue* queue = simdgroup->matrices;
    const int needed = queue->queued[self->lane];
    const unsigned generation = queue->generation;
    synchronise_release(queue);
    while (queue->generation == generation && queue->computed < needed) {
        self->operation = Operation::simdgroup_matrix;
        self->place = place;
        simdgroup->runnable &= ~(1u << self->lane);
        simdgroup->at_matrices |= 1u << self->lane;
        wait(self);
        self->operation = Operation::none;
    }
    synchronise_acquire(queue);
}

void prepare_product(Place place, const void* accumulator) {
    Threadgroup* group = current->threadgroup;
    MatrixQueue* queue = current->matrices;
    if (queue == always_full())
        stop(group, std::string(place.file) + ":" + std::to_string(place.line) + ": a simdgroup_matrix product needs all 32 lanes, in " +
                        position(group));
    const int lane = current->lane;
    if (queue->queued[lane] == MatrixQueue::capacity) compute_matrices(place);
    MatrixQueue::Call& call = queue->calls[queue->queued[lane]];
    const MatrixQueue::Call own = MatrixQueue::call(place.line, queue->at[lane] != accumulator);
    if (call == MatrixQueue::nobody) call = own;
    if (call == own) return;
    current->operation = Operation::simdgroup_matrix;
    current->place = place;
    report_divergence(group);
}

void* threadgroup_variable(const void* key, unsigned long size, unsigned long alignment) {
    Threadgroup* group = current->threadgroup;
    for (const Variable& variable : group->variables)
        if (variable.key == key) return variable.address;
    const size_t offset = (group->arena_used + alignment - 1) & ~(alignment - 1);
    group->memory_used += size;
    if (group->memory_used > SM_THREADGROUP_MEMORY || offset + size + red_zone > group->arena.size())
        stop(group, position(group) + ": more than " + std::to_string(SM_THREADGROUP_MEMORY) + " bytes of threadgroup memory (" +
                        std::to_string(group->memory_used) + ")");
    group->arena_used = offset + size + red_zone;
    char* address = group->arena.data() + offset;
#ifdef SOFTMETAL_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(address, size);
#endif
    // Not by memset(), which sanitizers intercept: to them it would be an access of this thread.
    for (unsigned long byte = 0; byte < size; byte++) reinterpret_cast<volatile unsigned char*>(address)[byte] = 0xff;
    group->variables.push_back({key, address});
    return address;
}

void Threadgroup::prepare() {
    const size_t alignment_room = 64;
    arena.resize(SM_THREADGROUP_MEMORY * 2 + alignment_room);
#ifdef SOFTMETAL_THREAD_SANITIZER
    host.thread_sanitizer_fiber = __tsan_get_current_fiber();
#endif
#ifdef SOFTMETAL_ADDRESS_SANITIZER
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    size_t size = 0;
    pthread_attr_getstack(&attributes, &host.stack, &size);
    host.stack_size = size;
    pthread_attr_destroy(&attributes);
#endif
}

bool Threadgroup::run() {
    thread_count = static_cast<int>(base.threads_per_threadgroup[0] * base.threads_per_threadgroup[1] * base.threads_per_threadgroup[2]);
    simdgroup_count = (thread_count + lanes - 1) / lanes;
    base.simdgroups_per_threadgroup = static_cast<uint32_t>(simdgroup_count);
    arrived_count = finished_count = 0;
    variables.clear();
    arena_used = 0;
    memory_used = host_memory;
    barrier_place = {};
#ifdef SOFTMETAL_ADDRESS_SANITIZER
    __asan_poison_memory_region(arena.data(), arena.size());
#endif
    while (static_cast<int>(fibers.size()) < thread_count) fibers.push_back(make_fiber(this, static_cast<unsigned>(fibers.size())));
    while (static_cast<int>(simdgroups.size()) < simdgroup_count) {
        Simdgroup* simdgroup = new Simdgroup{};
        simdgroup->index = static_cast<int>(simdgroups.size());
        simdgroup->matrices = new MatrixQueue{};
        simdgroups.push_back(simdgroup);
    }
    for (int index = 0; index < simdgroup_count; index++) {
        Simdgroup* simdgroup = simdgroups[index];
        const int count = std::min(lanes, thread_count - index * lanes);
        simdgroup->present = simdgroup->runnable = count == lanes ? ~0u : (1u << count) - 1;
        simdgroup->arrived = simdgroup->at_barrier = simdgroup->at_matrices = simdgroup->finished = 0;
        empty(simdgroup->matrices);
    }
    for (int index = 0; index < thread_count; index++) {
        Fiber* fiber = fibers[index];
        fiber->simdgroup = simdgroups[index / lanes];
        fiber->matrices = fiber->simdgroup->present == ~0u ? fiber->simdgroup->matrices : always_full();
        fiber->parity = 0;
        fiber->operation = Operation::none;
    }
    int first = 0;
    if (order == Order::reverse) first = thread_count - 1;
    if (order == Order::random) first = static_cast<int>(draw(this) % static_cast<unsigned>(thread_count));
    Fiber* caller = current;
    synchronise_release(&start_token);
    switch_to(&host, fibers[first]);
    current = caller;
    synchronise_acquire(&end_token);
    return error.empty();
}

Threadgroup::~Threadgroup() {
    for (Fiber* fiber : fibers) {
#ifdef SOFTMETAL_THREAD_SANITIZER
        __tsan_destroy_fiber(fiber->thread_sanitizer_fiber);
#endif
        std::lock_guard<std::mutex> guard(spare_lock);
        spare_stacks().push_back(static_cast<char*>(fiber->stack));
        delete fiber;
    }
    for (Simdgroup* simdgroup : simdgroups) {
        delete simdgroup->matrices;
        delete simdgroup;
    }
#ifdef SOFTMETAL_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(arena.data(), arena.size());
#endif
}

} // namespace softmetal
