/* Threads, forks and exits around calls of mfa.h, by a program that ThreadSanitizer can watch.
 *
 *     threads churn THREADS ROUNDS     each thread makes a context, computes and destroys it, again and again
 *     threads shared THREADS ROUNDS    all threads compute in one context
 *     threads fork THREADS FORKS       children compute, in contexts that they inherit and in their own, while threads of the parent do
 *     threads exit THREADS 0|1         main() returns, or one more thread calls exit(), while threads compute in contexts that nobody destroys
 *     threads race THREADS             threads write one number without any order: what ThreadSanitizer has to find
 *
 * What a thread computes has to be, to the bit, what one thread computed at first. Prints how many results were compared; status 0: all was
 * well. */
#include <mfa.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BATCH = 2, HEADS = 4, KV_HEADS = 2, ROWS = 70, COLUMNS = 90, CHANNELS = 24, MOST_THREADS = 64, CHILD_SECONDS = 300 };
enum { QUERIES = BATCH * HEADS * ROWS * CHANNELS, KEYS = BATCH * KV_HEADS * COLUMNS * CHANNELS, STATISTICS = BATCH * HEADS * ROWS };

static float query[QUERIES], key[KEYS], value[KEYS], grad_output[QUERIES];

static _Atomic long compared;

static void fail(const char* what, mfa_context_t* context) {
    fprintf(stderr, "threads: %s: %s\n", what, mfa_last_error(context));
    _exit(1);
}

static void fill(float* numbers, int count, uint32_t state) {
    for (int k = 0; k < count; k++) {
        state = state * 1664525 + 1013904223;
        numbers[k] = (float)(int32_t)state * 0x1p-30f;
    }
}

/* ---- Work ------------------------------------------------------------------------------------------------------------------------------ */

/* What one thread writes. */
typedef struct {
    float output[QUERIES], logsumexp[STATISTICS], d_values[STATISTICS], grad_query[QUERIES], grad_key[KEYS], grad_value[KEYS];
    int8_t codes[2][KEYS];
    float scales[2][BATCH * KV_HEADS * COLUMNS];
} results;

static mfa_tensor_t tensor_of(const void* data, int32_t precision, int64_t heads, int64_t tokens) {
    mfa_tensor_t made = {.struct_size = sizeof made, .precision = precision, .data = (void*)data};
    const int64_t shape[4] = {BATCH, heads, tokens, CHANNELS};
    memcpy(made.shape, shape, sizeof shape);
    made.strides[3] = 1;
    made.strides[2] = CHANNELS;
    made.strides[1] = tokens * CHANNELS;
    made.strides[0] = heads * tokens * CHANNELS;
    return made;
}

static uint64_t mix(uint64_t hash, const void* memory, size_t size) {
    for (size_t k = 0; k < size; k++) hash = hash * 0x100000001B3 + ((const uint8_t*)memory)[k];
    return hash;
}

#define MIX(hash, array) mix(hash, array, sizeof(array))

/* Computes a bit of everything, and a hash of the results. */
static uint64_t compute(mfa_context_t* context, results* to) {
    uint64_t hash = 0;
    const mfa_tensor_t q = tensor_of(query, MFA_PRECISION_FP32, HEADS, ROWS), k = tensor_of(key, MFA_PRECISION_FP32, KV_HEADS, COLUMNS);
    const mfa_tensor_t v = tensor_of(value, MFA_PRECISION_FP32, KV_HEADS, COLUMNS),
                       o = tensor_of(to->output, MFA_PRECISION_FP32, HEADS, ROWS);

    mfa_attention_t attention;
    mfa_attention_initialize(&attention, sizeof attention);
    attention.query = &q;
    attention.key = &k;
    attention.value = &v;
    attention.output = &o;
    attention.logsumexp = to->logsumexp;
    attention.softmax_scale = 0.2;
    attention.causal = 1;
    attention.alignment = MFA_ALIGNMENT_LOWER_RIGHT;
    if (mfa_attention_run_forward(context, &attention)) fail("forward", context);
    hash = MIX(MIX(hash, to->output), to->logsumexp);

    const mfa_tensor_t go = tensor_of(grad_output, MFA_PRECISION_FP32, HEADS, ROWS);
    const mfa_tensor_t gq = tensor_of(to->grad_query, MFA_PRECISION_FP32, HEADS, ROWS);
    const mfa_tensor_t gk = tensor_of(to->grad_key, MFA_PRECISION_FP32, KV_HEADS, COLUMNS);
    const mfa_tensor_t gv = tensor_of(to->grad_value, MFA_PRECISION_FP32, KV_HEADS, COLUMNS);
    mfa_attention_gradients_t gradients = {.struct_size = sizeof gradients, .grad_output = &go, .d_values = to->d_values};
    gradients.grad_query = &gq;
    gradients.grad_key = &gk;
    gradients.grad_value = &gv;
    if (mfa_attention_run_backward(context, &attention, &gradients)) fail("backward", context);
    hash = MIX(MIX(MIX(hash, to->grad_query), to->grad_key), to->grad_value);

    mfa_quantization_t quantizations[2];
    mfa_tensor_t codes[2];
    for (int n = 0; n < 2; n++) {
        quantizations[n] = (mfa_quantization_t){.struct_size = sizeof quantizations[n], .granularity = MFA_GRANULARITY_TOKEN};
        quantizations[n].scales = to->scales[n];
        codes[n] = tensor_of(to->codes[n], MFA_PRECISION_INT8, KV_HEADS, COLUMNS);
        codes[n].quantization = &quantizations[n];
        if (mfa_quantize(context, n == 0 ? &k : &v, &codes[n])) fail("quantise", context);
    }
    attention.key = &codes[0];
    attention.value = &codes[1];
    const mfa_quantization_scheme_t scheme = {
        .struct_size = sizeof scheme, .precision = MFA_PRECISION_INT8, .granularity = MFA_GRANULARITY_TOKEN};
    attention.quantize_query = &scheme;
    if (mfa_attention_run_forward(context, &attention)) fail("forward on codes", context);
    hash = MIX(MIX(MIX(hash, to->output), to->logsumexp), to->codes);

    attention.quantize_query = NULL;
    mfa_tensor_t few = q, written = o;
    few.shape[2] = written.shape[2] = 1;
    attention.query = &few;
    attention.output = &written;
    if (mfa_attention_run_forward(context, &attention)) fail("decode", context);
    hash = MIX(hash, to->output);

    if (mfa_attention_forward_quantized(context, query, key, key, to->output, to->logsumexp, BATCH, ROWS, ROWS, KV_HEADS, CHANNELS, 0.25f,
                                        false, MFA_PRECISION_FP32, MFA_PRECISION_FP32, MFA_PRECISION_FP32, 1, 0, 1, 0, 1, 0, false, false,
                                        false, false))
        fail("flat forward", context);
    if (mfa_attention_backward_query_quantized(context, query, key, key, grad_output, to->logsumexp, to->grad_query, to->d_values, BATCH,
                                               ROWS, ROWS, KV_HEADS, CHANNELS, 1, 0))
        fail("flat backward", context);
    hash = MIX(MIX(MIX(hash, to->output), to->grad_query), to->d_values);

    /* What is refused leaves a message, which other threads' failures do not change. */
    mfa_tensor_t wrong = k;
    wrong.shape[3]++;
    attention.key = &wrong;
    if (mfa_attention_run_forward(context, &attention) != MFA_ERROR_INVALID_DIMENSIONS) fail("a call that is to be refused", context);
    return hash;
}

static mfa_context_t* make_context(uint32_t threads) {
    const mfa_context_options_t options = {.struct_size = sizeof options, .device = MFA_DEVICE_CPU, .num_threads = threads};
    mfa_context_t* context;
    if (mfa_create_context_with_options(&options, &context)) fail("creating a context", NULL);
    return context;
}

static void destroy(mfa_context_t* context) {
    if (mfa_destroy_context(context)) fail("destroying a context", NULL);
}

/* ---- Threads --------------------------------------------------------------------------------------------------------------------------- */

static uint64_t expected;
static mfa_context_t* shared_context;
static int rounds;
static atomic_bool stopping;
static _Atomic int running;

static void check(mfa_context_t* context, results* to) {
    if (compute(context, to) != expected) fail("other bits than those of one thread", context);
    atomic_fetch_add(&compared, 1);
}

static results* take_results(void) {
    results* made = calloc(1, sizeof *made);
    if (!made) fail("no memory", NULL);
    return made;
}

static void* churn(void* number) {
    results* to = take_results();
    for (int round = 0; round < rounds; round++) {
        mfa_context_t* context = make_context(1 + (uint32_t)((uintptr_t)number + (uintptr_t)round) % 4);
        check(context, to);
        if (round % 2) check(context, to);
        destroy(context);
    }
    free(to);
    return NULL;
}

static void* share(void* number) {
    (void)number;
    results* to = take_results();
    for (int round = 0; round < rounds; round++) check(shared_context, to);
    free(to);
    return NULL;
}

/* Computes until it is told to stop, in the shared context or one of its own. */
static void* go_on(void* number) {
    results* to = take_results();
    mfa_context_t* own = make_context(1 + (uint32_t)((uintptr_t)number % 3));
    atomic_fetch_add(&running, 1);
    while (!atomic_load(&stopping)) check((uintptr_t)number % 2 ? shared_context : own, to);
    destroy(own);
    free(to);
    return NULL;
}

static void start(pthread_t* threads, int count, void* (*work)(void*)) {
    for (intptr_t n = 0; n < count; n++) {
        if (pthread_create(&threads[n], NULL, work, (void*)n)) fail("pthread_create", NULL);
    }
}

static void join(const pthread_t* threads, int count) {
    for (int n = 0; n < count; n++) pthread_join(threads[n], NULL);
}

static void wait_until_running(int count) {
    while (atomic_load(&running) < count) usleep(1000);
}

/* Ends the process beside threads that compute. */
static void* end_process(void* nothing) {
    (void)nothing;
    exit(0);
}

static void* race(void* number) {
    static uintptr_t without_order;
    for (int n = 0; n < 1000; n++) without_order += (uintptr_t)number;
    atomic_fetch_add(&compared, (long)without_order);
    return NULL;
}

/* ---- fork() ---------------------------------------------------------------------------------------------------------------------------- */

/* What a child does, whatever the threads of its parent were doing. */
static void run_child(mfa_context_t* idle) {
    alarm(CHILD_SECONDS); /* a child that hangs is killed by it */
    results* to = take_results();
    check(idle, to);
    check(shared_context, to);
    mfa_context_t* own = make_context(3);
    check(own, to);
    destroy(own);
    destroy(idle);
    _exit(0);
}

static void fork_children(int count) {
    mfa_context_t* idle = make_context(2);
    for (int n = 0; n < count; n++) {
        usleep((useconds_t)(n * 137 % 1000)); /* at other moments of the threads' work */
        const pid_t child = fork();
        if (child < 0) fail("fork", NULL);
        if (child == 0) run_child(idle);
        int status;
        if (waitpid(child, &status, 0) != child || status) {
            fprintf(stderr, "threads: a child ended with status %x\n", (unsigned)status);
            _exit(1);
        }
        atomic_fetch_add(&compared, 3);
    }
    destroy(idle);
}

/* ---- The program ----------------------------------------------------------------------------------------------------------------------- */

int main(int argc, char** argv) {
    if (argc < 3) return 2;
    const int count = atoi(argv[2]);
    rounds = argc > 3 ? atoi(argv[3]) : 1;
    if (count < 1 || count > MOST_THREADS) return 2;
    fill(query, QUERIES, 1);
    fill(key, KEYS, 2);
    fill(value, KEYS, 3);
    fill(grad_output, QUERIES, 4);
    static pthread_t threads[MOST_THREADS];
    results* first = take_results();
    mfa_context_t* single = make_context(1);
    expected = compute(single, first);
    destroy(single);
    free(first);
    shared_context = make_context(3);

    if (strcmp(argv[1], "churn") == 0) {
        start(threads, count, churn);
        join(threads, count);
    } else if (strcmp(argv[1], "shared") == 0) {
        start(threads, count, share);
        join(threads, count);
    } else if (strcmp(argv[1], "fork") == 0) {
        start(threads, count, go_on);
        wait_until_running(count);
        fork_children(rounds);
        atomic_store(&stopping, true);
        join(threads, count);
    } else if (strcmp(argv[1], "exit") == 0) {
        start(threads, count, go_on);
        wait_until_running(count);
        while (atomic_load(&compared) < count) usleep(1000);
        printf("%ld\n", atomic_load(&compared));
        if (rounds == 0) return 0;
        pthread_t last;
        if (pthread_create(&last, NULL, end_process, NULL)) fail("pthread_create", NULL);
        pause();
    } else if (strcmp(argv[1], "race") == 0) {
        start(threads, count, race);
        join(threads, count);
    } else {
        return 2;
    }
    destroy(shared_context);
    printf("%ld\n", atomic_load(&compared));
    return 0;
}
