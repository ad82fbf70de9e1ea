// What the Metal headers are made of: the fiber that runs, its simdgroup, and the operations that make lanes and threads meet.
//
// A thread of the GPU is a fiber. A threadgroup is run by one thread of the host, which switches from fiber to fiber where they wait for each
// other, and nowhere else.

#pragma once

namespace softmetal {

// Where in the kernel's source an operation stands. Used as a default argument, it is the caller's place.
struct Place {
    const char* file;
    int line;

    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return Place{file, line}; }
};

enum class Operation : int {
    none,
    simdgroup_barrier,
    simd_shuffle,
    simd_broadcast,
    simd_reduction,
    simd_vote,
    simdgroup_matrix,
    threadgroup_barrier,
    finished,
};

inline constexpr int lanes = 32;

// Which elements of an 8x8 matrix a lane holds, as on Apple's GPUs: two neighbours of a row. The map is not in the specification; Apple's own
// open-source kernels (MLX) rely on it, and so do ours.
constexpr int matrix_row(int lane) {
    return (lane / 4 & 4) + lane / 2 % 4;
}
constexpr int matrix_column(int lane) {
    return (lane / 4 & 2) * 2 + lane % 2 * 2;
}

// What a lane shows the others.
struct Slot {
    alignas(16) unsigned char bytes[16];
};

// Products of 8x8 matrices that wait to be computed, in the order of the calls. Every lane writes its elements of the operands when it calls;
// one lane computes for all when somebody looks at a result. So lanes need not meet at each product.
struct MatrixQueue {
    static constexpr int capacity = 32; // fits a cache of the first level
    struct Operands {
        alignas(64) float left[64]; // by rows
        alignas(64) float right[64];
    };
    // What all lanes say of a product alike: the line of the call, and whether a run of products into one accumulator starts, as a loop over
    // channels makes them. A lane finds its own word here unless it is the first, diverges, or has no room: one comparison for the three.
    typedef unsigned Call;
    static constexpr Call nobody = 0, full = ~0u;
    static Call call(int line, bool starts) { return static_cast<Call>(line) << 1 | starts; }
    static bool starts(Call call) { return call & 1; }

    int queued[lanes];     // by each lane
    const void* at[lanes]; // the accumulator of each lane's newest product
    int computed;          // by all lanes together
    unsigned generation;   // counts how often the queue was emptied
    Call calls[capacity + 1];
    Operands operands[capacity];
    // Of the products that start a run:
    typedef void Gather(void* const* accumulators, float (*elements)[8]);
    typedef void Scatter(void* const* accumulators, float (*elements)[8]);
    Gather* gather[capacity];
    Scatter* scatter[capacity];
    void* accumulators[capacity][lanes];
};

struct Simdgroup {
    unsigned present;  // lanes that exist
    unsigned finished; // lanes that have returned from the kernel
    unsigned runnable;
    unsigned arrived; // lanes that wait for `operation`
    unsigned at_barrier;
    unsigned at_matrices;
    int index;
    Operation operation;
    Place place;
    unsigned participants[2]; // lanes that took part in an operation, by parity
    Slot slots[2][lanes];     // one set is read while the other is written
    MatrixQueue* matrices;
};

struct Threadgroup;

struct alignas(64) Fiber {
    void* stack_pointer;
    Simdgroup* simdgroup;
    Threadgroup* threadgroup;
    MatrixQueue* matrices; // one that is always full in a simdgroup that is not complete
    int lane;
    int matrix_row; // of the elements that the lane holds of a matrix, and the column of the first
    int matrix_column;
    int matrix_element; // the first of them in a matrix by rows
    int parity;         // of the operations that the lane has met in
    unsigned index;
    Operation operation;
    Place place;
    void* stack;
    unsigned long stack_size;
    void* thread_sanitizer_fiber;
    void* address_sanitizer_stack;
};

// The fiber that runs on this thread of the host. Fibers never change threads.
extern __thread Fiber* current __attribute__((tls_model("initial-exec")));

// Waits for all threads of the threadgroup.
void meet_threadgroup(Place place);
// Waits for all lanes of the simdgroup that have not returned.
void meet_simdgroup(Operation operation, Place place);
// Waits until the lane's products are computed.
void compute_matrices(Place place);
// Makes room for the product that the caller is about to queue. It does not return if the simdgroup is not complete, or if its lanes multiply
// in different places.
void prepare_product(Place place, const void* accumulator);
// The threadgroup's variable of this key, made at its first use and filled with ones: NaN, so that what is read before it is written shows.
void* threadgroup_variable(const void* key, unsigned long size, unsigned long alignment);

template <class T> inline __attribute__((always_inline)) T& variable(const void* key) {
    return *static_cast<T*>(threadgroup_variable(key, sizeof(T), alignof(T) < 16 ? 16 : alignof(T)));
}

} // namespace softmetal
