/* Functions of mfa.h that move every buffer of a call to where an access beyond it cannot go unseen.
 *
 * A library that is put before libmfa, by LD_PRELOAD or as the library that a binding loads. Each call that the library would accept runs on
 * copies: a buffer ends at a page that nobody may touch, or begins right after one; what is only read lies in pages that cannot be written;
 * the rest of the pages of a result, and the gaps between its elements, must stay as they were. Contexts get their workspace in the same way.
 * Results are copied back, so a caller sees nothing of it but the same bits. What is touched in spite of that ends the process with a message
 * that names the buffer.
 *
 *     GUARD_PLACE   end | begin: which side of a buffer touches the page
 *     GUARD_LAYOUT  kept | gaps | transposed: how the copies of tensors lie. Strides change no result, so neither does this
 *     GUARD_SHIFT   the name of a buffer that is to lie 64 bytes too far, so that its last or first ones cannot be touched: to see that the
 *                   guards work
 *
 * At the end of the process a line on standard error says how much was done. For programs that call from one thread. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "../precision_bytes.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* A GPU uses memory of the host without a copy in pages of this size only. */
enum { PAGE = 16384, CANARY = 0xA5, POISON = 0xFF, MOST_REGIONS = 64, MOST_WORKSPACES = 64, FAILED = 86 };

/* Calls with larger tensors are left as they are: copying is not what they are for. */
static const int64_t MOST_BYTES = 1 << 26;

/* ---- Settings and counts ----------------------------------------------------------------------------------------------------------------- */

enum place { AT_END, AT_BEGIN };
enum layout { KEPT, GAPS, TRANSPOSED };

static enum place place;
static enum layout layout;
static const char* shifted;
static bool inside; /* the library is at work */
static struct {
    long calls, buffers, untouched;
} counts;

static void* library(const char* function) {
    static void* handle;
    if (!handle) handle = dlopen("libmfa.so", RTLD_NOLOAD | RTLD_NOW);
    void* found = handle ? dlsym(handle, function) : NULL;
    if (!found) {
        fprintf(stderr, "guarded_calls: libmfa.so has no %s\n", function);
        _exit(FAILED);
    }
    return found;
}

/* The function of the library itself, with its type. */
#define ORIGINAL(function) ((__typeof__(&function))library(#function))

/* ---- Regions ----------------------------------------------------------------------------------------------------------------------------- */

/* A buffer between two pages that nobody may touch. */
typedef struct {
    const char* name;
    char* memory; /* the first of `pages` pages that may be used; the forbidden ones are before and behind */
    size_t pages;
    char* begin;
    size_t bytes;
    bool written;         /* a result */
    bool kept;            /* its pages stay when the call is over */
    mfa_buffer_t* buffer; /* for devices that copy what is not in a buffer of theirs */
} region;

static region regions[MOST_REGIONS], workspaces[MOST_WORKSPACES];
static int region_count;
static const char* function_name = "";

static void say(const char* text) {
    if (write(STDERR_FILENO, text, strlen(text)) < 0) _exit(FAILED);
}

static void say_number(long number) {
    char digits[24];
    snprintf(digits, sizeof digits, "%ld", number);
    say(digits);
}

/* Says which buffer was left and ends the process, if it was one of these. */
static void name_fault(const char* at, const region* of, int count) {
    for (int n = 0; n < count; n++) {
        const region* each = &of[n];
        if (!each->memory || at < each->memory - PAGE || at >= each->memory + (each->pages + 1) * PAGE) continue;
        say(inside ? "guarded_calls: " : "guarded_calls, not the library, in ");
        say(function_name);
        say(": ");
        say(each->name);
        say(each->written ? " (a result): byte " : ": byte ");
        say_number(at - each->begin);
        say(" of ");
        say_number((long)each->bytes);
        say(at >= each->memory && at < each->memory + each->pages * PAGE ? " was written\n" : " was touched\n");
        _exit(FAILED);
    }
}

static void on_fault(int signal_number, siginfo_t* info, void* machine) {
    (void)signal_number, (void)machine;
    name_fault(info->si_addr, regions, region_count);
    name_fault(info->si_addr, workspaces, MOST_WORKSPACES);
    signal(SIGSEGV, SIG_DFL); /* the access is made again, without this handler */
    signal(SIGBUS, SIG_DFL);
}

__attribute__((constructor)) static void begin_process(void) {
    static char stack[1 << 16];
    const stack_t alternative = {.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alternative, NULL);
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    setvbuf(stdout, NULL, _IOLBF, 1 << 16); /* so that what was answered before a fault is known */
    const char *where = getenv("GUARD_PLACE"), *how = getenv("GUARD_LAYOUT");
    place = where && strcmp(where, "begin") == 0 ? AT_BEGIN : AT_END;
    shifted = getenv("GUARD_SHIFT");
    layout = how && strcmp(how, "gaps") == 0 ? GAPS : how && strcmp(how, "transposed") == 0 ? TRANSPOSED : KEPT;
}

__attribute__((destructor)) static void end_process(void) {
    fprintf(stderr, "guarded_calls: %ld calls, %ld buffers, %ld calls untouched\n", counts.calls, counts.buffers, counts.untouched);
}

static void must(bool happened, const char* what) {
    if (happened) return;
    fprintf(stderr, "guarded_calls: %s: %s\n", function_name, what);
    fflush(stderr);
    _exit(FAILED);
}

/* A region of `bytes` bytes; everything in it, and in the rest of its pages, is `filler`. */
static region* take(const char* name, size_t bytes, bool written, int filler) {
    must(region_count < MOST_REGIONS, "there are too many buffers");
    const size_t pages = (bytes + PAGE - 1) / PAGE ? (bytes + PAGE - 1) / PAGE : 1, all = (pages + 3) * PAGE;
    char* mapped = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(mapped != MAP_FAILED, "no memory");
    char* memory = mapped + 2 * PAGE - (uintptr_t)mapped % PAGE; /* where a page of a GPU begins, behind a whole one */
    region* made = &regions[region_count++];
    *made = (region){.name = name, .memory = memory, .pages = pages, .bytes = bytes, .written = written};
    made->begin = place == AT_END ? memory + pages * PAGE - bytes : memory;
    if (shifted && strcmp(shifted, name) == 0) made->begin += place == AT_END ? 64 : -64;
    memset(memory, filler, pages * PAGE);
    counts.buffers++;
    return made;
}

/* Before the call: pages beside buffers cannot be touched, those of inputs not be written, and a device that has memory of its own gets them
 * as a buffer. */
static void protect_all(void* context) {
    mfa_context_info_t info = {.struct_size = sizeof info};
    const bool device = mfa_context_get_info(context, &info) == 0 && info.device != MFA_DEVICE_CPU;
    for (int n = 0; n < region_count; n++) {
        region* each = &regions[n];
        if (device) must(mfa_create_buffer_from_memory(context, each->memory, each->pages * PAGE, &each->buffer) == 0, "no buffer");
        must(mprotect(each->memory - PAGE, PAGE, PROT_NONE) == 0, "mprotect() failed");
        must(mprotect(each->memory + each->pages * PAGE, PAGE, PROT_NONE) == 0, "mprotect() failed");
        if (!each->written) must(mprotect(each->memory, each->pages * PAGE, PROT_READ) == 0, "mprotect() failed");
    }
    counts.calls++;
    inside = true;
}

/* After the call: the rest of a result's pages is as it was. */
static void check_rest(const region* of) {
    for (const char* at = of->memory; at < of->memory + of->pages * PAGE; at++) {
        if (at == of->begin) at += of->bytes;
        if (at == of->memory + of->pages * PAGE) break;
        if ((uint8_t)*at == CANARY) continue;
        fprintf(stderr, "guarded_calls: %s: %s (a result): byte %ld of %zu was written\n", function_name, of->name, (long)(at - of->begin),
                of->bytes);
        fflush(stderr);
        _exit(FAILED);
    }
}

/* ---- Workspace --------------------------------------------------------------------------------------------------------------------------- */

/* The allocator of contexts that have none: what it gives ends at a forbidden page, as closely as the alignment lets it, or begins after one. */
static void* allocate(void* state, size_t size, size_t alignment) {
    (void)state;
    int n = 0;
    while (n < MOST_WORKSPACES && workspaces[n].memory) n++;
    must(n < MOST_WORKSPACES && alignment <= PAGE, "there are too many workspaces");
    must(region_count < MOST_REGIONS, "there are too many buffers");
    workspaces[n] = *take("workspace", (size + alignment - 1) / alignment * alignment, true, CANARY);
    workspaces[n].bytes = size;
    region_count--;
    mprotect(workspaces[n].memory - PAGE, PAGE, PROT_NONE);
    mprotect(workspaces[n].memory + workspaces[n].pages * PAGE, PAGE, PROT_NONE);
    return workspaces[n].begin;
}

static void deallocate(void* state, void* memory, size_t size, size_t alignment) {
    (void)state, (void)alignment;
    int n = 0;
    while (n < MOST_WORKSPACES && workspaces[n].begin != memory) n++;
    must(n < MOST_WORKSPACES && workspaces[n].bytes == size, "that is no workspace");
    check_rest(&workspaces[n]);
    munmap(workspaces[n].memory - PAGE, (workspaces[n].pages + 2) * PAGE);
    memset(&workspaces[n], 0, sizeof workspaces[n]);
}

int32_t mfa_create_context_with_options(const mfa_context_options_t* options, mfa_context_t** context) {
    function_name = "mfa_create_context_with_options";
    if (!options || options->struct_size != sizeof *options || options->allocate || options->deallocate) {
        return ORIGINAL(mfa_create_context_with_options)(options, context);
    }
    mfa_context_options_t copy = *options;
    copy.allocate = allocate;
    copy.deallocate = deallocate;
    return ORIGINAL(mfa_create_context_with_options)(&copy, context);
}

/* ---- Plain arrays ------------------------------------------------------------------------------------------------------------------------ */

/* A result that is to be copied back to the caller. */
static struct {
    region* from;
    void* to;
} returns[64];
static int return_count;

/* A guarded copy of `bytes` bytes at `data`. */
static void* array(const char* name, const void* data, int64_t bytes, bool written) {
    if (!data || bytes <= 0) return (void*)data;
    region* made = take(name, (size_t)bytes, written, written ? CANARY : POISON);
    memcpy(made->begin, data, (size_t)bytes);
    if (written) {
        must(return_count < 64, "there are too many results");
        returns[return_count].from = made;
        returns[return_count++].to = (void*)data;
    }
    return made->begin;
}

/* ---- Tensors ----------------------------------------------------------------------------------------------------------------------------- */

/* Elements in memory, in bytes: bytes that hold codes of INT4 count as elements. An axis that repeats itself has one. */
typedef struct {
    char* data;
    int64_t counts[4];
    int64_t strides[4];
    int64_t size;
} view;

/* The axes from the slowest to the fastest, as the order of a copy. */
static const int ORDERS[3][4] = {[KEPT] = {0, 1, 2, 3}, [GAPS] = {0, 2, 1, 3}, [TRANSPOSED] = {0, 1, 3, 2}};

typedef struct {
    mfa_tensor_t tensor;
    mfa_quantization_t quantization;
    view caller, copy;
    region* region;
} moved_tensor;

static view view_of(const mfa_tensor_t* tensor) {
    view made = {.data = tensor->data, .size = (int64_t)precision_bytes(tensor->precision)};
    const bool packed = tensor->precision == MFA_PRECISION_INT4;
    for (int axis = 0; axis < 4; axis++) {
        made.counts[axis] = packed && axis == 3 ? (tensor->shape[3] + 1) / 2 : tensor->shape[axis];
        made.strides[axis] = packed && axis < 3 ? tensor->strides[axis] / 2 : tensor->strides[axis] * made.size;
        if (tensor->strides[axis] == 0 || made.counts[axis] == 1) made.counts[axis] = 1;
    }
    return made;
}

/* Calls `body` with the addresses of each element in two views of the same counts. */
#define FOR_EACH_ELEMENT(one, other)                                                                                                   \
    for (int64_t i0 = 0; i0 < (one).counts[0]; i0++)                                                                                   \
        for (int64_t i1 = 0; i1 < (one).counts[1]; i1++)                                                                               \
            for (int64_t i2 = 0; i2 < (one).counts[2]; i2++)                                                                           \
                for (int64_t i3 = 0; i3 < (one).counts[3]; i3++)                                                                       \
                    for (char *in_one = (one).data + i0 * (one).strides[0] + i1 * (one).strides[1] + i2 * (one).strides[2] +           \
                                        i3 * (one).strides[3],                                                                         \
                              *in_other = (other).data + i0 * (other).strides[0] + i1 * (other).strides[1] + i2 * (other).strides[2] + \
                                          i3 * (other).strides[3];                                                                     \
                         in_one; in_one = NULL)

static int64_t scale_count(const mfa_tensor_t* tensor) {
    const mfa_quantization_t* quantization = tensor->quantization;
    const int64_t *shape = tensor->shape, heads = shape[0] * shape[1];
    const int64_t block = quantization->block_size ? quantization->block_size : 1,
                  group = quantization->group_size ? quantization->group_size : 1;
    switch (quantization->granularity) {
    case MFA_GRANULARITY_TENSOR: return 1;
    case MFA_GRANULARITY_HEAD: return heads;
    case MFA_GRANULARITY_BLOCK: return heads * ((shape[2] + block - 1) / block);
    case MFA_GRANULARITY_CHANNEL: return heads * shape[3];
    case MFA_GRANULARITY_GROUP: return heads * shape[2] * ((shape[3] + group - 1) / group);
    default: return heads * shape[2];
    }
}

/* Whether a tensor's copy may be made. */
static bool is_small(const mfa_tensor_t* tensor) {
    if (!tensor) return true;
    if (tensor->struct_size != sizeof *tensor || tensor->buffer) return false;
    int64_t bytes = 16;
    for (int axis = 0; axis < 4; axis++) {
        if (tensor->shape[axis] < 0) return false;
        if (__builtin_mul_overflow(bytes, tensor->shape[axis] + 8, &bytes) || bytes > 64 * MOST_BYTES) return false;
    }
    return true;
}

static moved_tensor moved[16];
static int moved_count;

/* A guarded copy of a tensor, in the layout that is asked for, with its scales and all that belongs to them. The last `absent` tokens of the
 * last sequence need not be there: with gaps, where they are last in memory, they are not. */
static const mfa_tensor_t* move(const char* name, const char* scales_name, const mfa_tensor_t* tensor, bool written, int64_t absent) {
    if (!tensor) return NULL;
    must(moved_count < 16, "there are too many tensors");
    moved_tensor* made = &moved[moved_count++];
    *made = (moved_tensor){.tensor = *tensor};
    const bool quantized = (tensor->precision == MFA_PRECISION_INT8 || tensor->precision == MFA_PRECISION_INT4) && tensor->quantization;
    if (quantized) {
        mfa_quantization_t* parts = &made->quantization;
        *parts = *tensor->quantization;
        const int64_t count = scale_count(tensor);
        parts->scales = array(scales_name, parts->scales, count * 4, written);
        parts->zero_points = array("zero points", parts->zero_points, count * 4, written);
        parts->channel_means =
            array("channel means", parts->channel_means, tensor->shape[0] * tensor->shape[1] * tensor->shape[3] * 4, written);
        made->tensor.quantization = parts;
    }
    view caller = view_of(tensor), copy = caller;
    if (!caller.counts[0] || !caller.counts[1] || !caller.counts[2] || !caller.counts[3]) return &made->tensor;
    if (layout == KEPT) {
        for (int axis = 0; axis < 4; axis++) { /* from the lowest address on */
            if (caller.strides[axis] < 0) copy.data += (caller.counts[axis] - 1) * caller.strides[axis];
        }
    } else {
        int64_t stride = caller.size;
        for (int n = 3; n >= 0; n--) {
            const int axis = ORDERS[layout][n];
            copy.strides[axis] = caller.counts[axis] == 1 && caller.strides[axis] == 0 ? 0 : stride;
            stride *= caller.counts[axis];
            /* Rows do not meet. INT4 has strides of whole bytes, two codes each. */
            if (n == 3) stride += 3 * caller.size;
        }
    }
    if (layout != GAPS || copy.counts[0] != tensor->shape[0] || copy.counts[2] != tensor->shape[2]) absent = 0;
    int64_t reach = caller.size - absent * copy.strides[2], offset = 0;
    for (int axis = 0; axis < 4; axis++) {
        const int64_t span = (caller.counts[axis] - 1) * copy.strides[axis];
        reach += span < 0 ? -span : span;
        offset += span < 0 ? -span : 0;
    }
    must(reach <= MOST_BYTES, "a tensor is too large");
    if (reach < 0) reach = 0; /* without any token there is not even what follows a row */
    made->region = take(name, (size_t)reach, written, written ? CANARY : POISON);
    copy.data = made->region->begin + offset;
    FOR_EACH_ELEMENT(copy, caller) {
        if (i0 < copy.counts[0] - 1 || i2 < copy.counts[2] - absent) memcpy(in_one, in_other, (size_t)copy.size);
    }
    made->caller = caller;
    made->copy = copy;
    made->tensor.data = copy.data;
    const bool packed = tensor->precision == MFA_PRECISION_INT4;
    for (int axis = 0; axis < 4 && layout != KEPT; axis++) {
        made->tensor.strides[axis] = packed && axis < 3 ? 2 * copy.strides[axis] : copy.strides[axis] / copy.size;
    }
    return &made->tensor;
}

/* Whether the gaps between a result's elements are as they were; then the elements go to the caller. */
static void give_back(const moved_tensor* of) {
    if (!of->region || !of->region->written) return;
    FOR_EACH_ELEMENT(of->copy, of->caller) {
        memcpy(in_other, in_one, (size_t)of->copy.size);
        memset(in_one, CANARY, (size_t)of->copy.size);
    }
    for (size_t n = 0; n < of->region->bytes; n++) {
        if ((uint8_t)of->region->begin[n] == CANARY) continue;
        fprintf(stderr, "guarded_calls: %s: %s (a result): byte %zu, between elements, was written\n", function_name, of->region->name, n);
        fflush(stderr);
        _exit(FAILED);
    }
}

/* After the call: results are checked and go to the caller, and all regions away. */
static void finish(void) {
    inside = false;
    for (int n = 0; n < region_count; n++) {
        if (regions[n].written) check_rest(&regions[n]);
    }
    for (int n = 0; n < moved_count; n++) give_back(&moved[n]);
    for (int n = 0; n < return_count; n++) memcpy(returns[n].to, returns[n].from->begin, returns[n].from->bytes);
    for (int n = 0; n < region_count; n++) {
        if (regions[n].buffer) must(mfa_destroy_buffer(regions[n].buffer) == 0, "a buffer was no buffer");
        if (!regions[n].kept) munmap(regions[n].memory - PAGE, (regions[n].pages + 2) * PAGE);
    }
    region_count = moved_count = return_count = 0;
}

/* ---- The general functions --------------------------------------------------------------------------------------------------------------- */

static bool is_wide(const mfa_attention_t* attention) {
    return attention->query->precision == MFA_PRECISION_FP64 || attention->key->precision == MFA_PRECISION_FP64 ||
           attention->value->precision == MFA_PRECISION_FP64;
}

/* Whether a call is one that the library accepts, as far as it can tell without reading data, and small enough to be moved. */
static bool is_ordinary(mfa_context_t* context, const mfa_attention_t* attention, const mfa_attention_gradients_t* gradients) {
    uint64_t size;
    if (mfa_attention_workspace_size(context, attention, gradients, &size) || attention->struct_size != sizeof *attention) return false;
    if (gradients && gradients->struct_size != sizeof *gradients) return false;
    return is_small(attention->query) && is_small(attention->key) && is_small(attention->value) && is_small(attention->output) &&
           is_small(attention->mask);
}

static mfa_attention_t move_attention(const mfa_attention_t* attention, bool backward) {
    mfa_attention_t copy = *attention;
    const int64_t *shape = attention->query->shape, statistic = is_wide(attention) ? 8 : 4;
    const int64_t* lengths = attention->kv_lengths;
    int64_t absent = lengths && shape[0] ? attention->key->shape[2] - lengths[shape[0] - 1] : 0;
    if (absent < 0 || absent > attention->key->shape[2]) absent = 0; /* which the library refuses */
    copy.query = move("query", "scales of query", attention->query, false, 0);
    copy.key = move("key", "scales of key", attention->key, false, absent);
    copy.value = move("value", "scales of value", attention->value, false, absent);
    copy.output = move("output", "", attention->output, !backward, 0);
    copy.mask = move("mask", "", attention->mask, false, 0);
    copy.logsumexp = array("logsumexp", attention->logsumexp, shape[0] * shape[1] * shape[2] * statistic, !backward);
    copy.query_offsets = array("query_offsets", attention->query_offsets, attention->num_query_offsets * 8, false);
    copy.kv_lengths = array("kv_lengths", attention->kv_lengths, shape[0] * 8, false);
    copy.alibi_slopes = array("alibi_slopes", attention->alibi_slopes, shape[1] * statistic, false);
    copy.sinks = array("sinks", attention->sinks, shape[1] * statistic, false);
    return copy;
}

int32_t mfa_attention_run_forward(mfa_context_t* context, const mfa_attention_t* attention) {
    function_name = "mfa_attention_run_forward";
    if (!is_ordinary(context, attention, NULL)) {
        counts.untouched++;
        return ORIGINAL(mfa_attention_run_forward)(context, attention);
    }
    const mfa_attention_t copy = move_attention(attention, false);
    protect_all(context);
    const int32_t status = ORIGINAL(mfa_attention_run_forward)(context, &copy);
    finish();
    return status;
}

int32_t mfa_attention_run_backward(mfa_context_t* context, const mfa_attention_t* attention, const mfa_attention_gradients_t* gradients) {
    function_name = "mfa_attention_run_backward";
    if (!is_ordinary(context, attention, gradients)) {
        counts.untouched++;
        return ORIGINAL(mfa_attention_run_backward)(context, attention, gradients);
    }
    const mfa_attention_t copy = move_attention(attention, true);
    mfa_attention_gradients_t wanted = *gradients;
    const int64_t *shape = attention->query->shape, statistic = is_wide(attention) ? 8 : 4;
    const int64_t rows = shape[0] * shape[1] * shape[2] * statistic;
    wanted.grad_output = move("grad_output", "", gradients->grad_output, false, 0);
    wanted.grad_logsumexp = array("grad_logsumexp", gradients->grad_logsumexp, rows, false);
    wanted.d_values = array("d_values", gradients->d_values, rows, !gradients->d_values_given);
    wanted.grad_query = move("grad_query", "", gradients->grad_query, true, 0);
    wanted.grad_key = move("grad_key", "", gradients->grad_key, true, 0);
    wanted.grad_value = move("grad_value", "", gradients->grad_value, true, 0);
    wanted.grad_mask = move("grad_mask", "", gradients->grad_mask, true, 0);
    wanted.grad_sinks = array("grad_sinks", gradients->grad_sinks, shape[1] * statistic, true);
    wanted.grad_alibi_slopes = array("grad_alibi_slopes", gradients->grad_alibi_slopes, shape[1] * statistic, true);
    protect_all(context);
    const int32_t status = ORIGINAL(mfa_attention_run_backward)(context, &copy, &wanted);
    finish();
    return status;
}

/* Whether a tensor can be moved: it is there, is small, and has data if it has elements. */
static bool is_there(const mfa_tensor_t* tensor) {
    return tensor && is_small(tensor) && tensor->data;
}

static int32_t convert(const char* name, mfa_context_t* context, const mfa_tensor_t* input, const mfa_tensor_t* output) {
    function_name = name;
    __typeof__(&mfa_quantize) original = (__typeof__(&mfa_quantize))library(name);
    if (!is_there(input) || !is_there(output)) {
        counts.untouched++;
        return original(context, input, output);
    }
    const mfa_tensor_t *from = move("input", "scales of input", input, false, 0), *to = move("output", "scales of output", output, true, 0);
    protect_all(context);
    const int32_t status = original(context, from, to);
    finish();
    return status;
}

int32_t mfa_quantize(mfa_context_t* context, const mfa_tensor_t* input, const mfa_tensor_t* output) {
    return convert("mfa_quantize", context, input, output);
}

int32_t mfa_dequantize(mfa_context_t* context, const mfa_tensor_t* input, const mfa_tensor_t* output) {
    return convert("mfa_dequantize", context, input, output);
}

int32_t mfa_attention_merge(mfa_context_t* context, const mfa_tensor_t* output_a, const void* logsumexp_a, const mfa_tensor_t* output_b,
                            const void* logsumexp_b, const mfa_tensor_t* output, void* logsumexp, int32_t statistics_precision) {
    function_name = "mfa_attention_merge";
    if (!is_there(output_a) || !is_there(output_b) || !is_there(output)) {
        counts.untouched++;
        return ORIGINAL(mfa_attention_merge)(context, output_a, logsumexp_a, output_b, logsumexp_b, output, logsumexp,
                                             statistics_precision);
    }
    const int64_t* shape = output->shape;
    const int64_t rows = shape[0] * shape[1] * shape[2] * (int64_t)precision_bytes(statistics_precision);
    const mfa_tensor_t *a = move("output_a", "", output_a, false, 0), *b = move("output_b", "", output_b, false, 0);
    const mfa_tensor_t* to = move("output", "", output, true, 0);
    const void *lse_a = array("logsumexp_a", logsumexp_a, rows, false), *lse_b = array("logsumexp_b", logsumexp_b, rows, false);
    void* lse = array("logsumexp", logsumexp, rows, true);
    protect_all(context);
    const int32_t status = ORIGINAL(mfa_attention_merge)(context, a, lse_a, b, lse_b, to, lse, statistics_precision);
    finish();
    return status;
}

/* ---- The flat functions --------------------------------------------------------------------------------------------------------------- */

/* A training record is found by the address of its logsumexp, so the region that stands for a caller's is kept. */
static struct {
    const void* caller;
    region logsumexp;
    int64_t bytes[3]; /* of Q, K and V, which the backward calls do not tell */
} records[512];
static int record_count;

static int64_t flat_bytes(int64_t tokens, int64_t head_dim, int32_t precision) {
    return tokens * (precision == MFA_PRECISION_INT4 ? (head_dim + 1) / 2 : head_dim * (int64_t)precision_bytes(precision));
}

/* Whether Q, K and V are of types that the flat functions take, and not too large. */
static bool is_flat_ordinary(int64_t tokens, int64_t head_dim, const int32_t precisions[3]) {
    for (int n = 0; n < 3; n++) {
        const bool codes = precisions[n] == MFA_PRECISION_INT8 || precisions[n] == MFA_PRECISION_INT4;
        if (!codes && (int64_t)precision_bytes(precisions[n]) != 2 && precisions[n] != MFA_PRECISION_FP32) return false;
    }
    return (double)tokens * (double)head_dim * 8 <= (double)MOST_BYTES;
}

static int32_t forward_flat(bool quantized, void* context, void* pointers[4], void* logsumexp, uint32_t batch_size, uint32_t seq_len_q,
                            uint32_t seq_len_kv, uint32_t num_heads, uint16_t head_dim, float softmax_scale, bool causal,
                            const int32_t precisions[3], const float scales[3], const int32_t zero_points[3], const bool transposes[4]) {
    const int64_t rows = (int64_t)batch_size * seq_len_q * num_heads, columns = (int64_t)batch_size * seq_len_kv * num_heads;
    void *moved_to[4], *moved_logsumexp = logsumexp;
    memcpy(moved_to, pointers, sizeof moved_to);
    if (is_flat_ordinary(rows + columns, head_dim, precisions)) {
        static const char* const names[] = {"query", "key", "value"};
        const bool codes = precisions[0] == MFA_PRECISION_INT8 || precisions[0] == MFA_PRECISION_INT4;
        int64_t bytes[3];
        for (int n = 0; n < 3; n++) {
            bytes[n] = flat_bytes(n == 0 ? rows : columns, head_dim, precisions[n]);
            moved_to[n] = array(names[n], pointers[n], bytes[n], false);
        }
        moved_to[3] = array("output", pointers[3], rows * head_dim * (codes ? 4 : (int64_t)precision_bytes(precisions[0])), true);
        if (logsumexp && rows) {
            moved_logsumexp = array("logsumexp", logsumexp, rows * 4, true);
            regions[region_count - 1].kept = true;
            must(record_count < 512, "there are too many training records");
            records[record_count].caller = logsumexp;
            records[record_count].logsumexp = regions[region_count - 1];
            memcpy(records[record_count++].bytes, bytes, sizeof bytes);
        }
        protect_all(context);
    } else {
        counts.untouched++;
    }
    const int32_t status =
        quantized ? ORIGINAL(mfa_attention_forward_quantized)(
                        context, moved_to[0], moved_to[1], moved_to[2], moved_to[3], moved_logsumexp, batch_size, seq_len_q, seq_len_kv,
                        num_heads, head_dim, softmax_scale, causal, precisions[0], precisions[1], precisions[2], scales[0], zero_points[0],
                        scales[1], zero_points[1], scales[2], zero_points[2], transposes[0], transposes[1], transposes[2], transposes[3])
                  : ORIGINAL(mfa_attention_forward)(context, moved_to[0], moved_to[1], moved_to[2], moved_to[3], batch_size, seq_len_q,
                                                    seq_len_kv, num_heads, head_dim, softmax_scale, causal, precisions[0], precisions[1],
                                                    precisions[2], transposes[0], transposes[1], transposes[2], transposes[3]);
    finish();
    return status;
}

int32_t mfa_attention_forward(void* context, void* query_ptr, void* key_ptr, void* value_ptr, void* output_ptr, uint32_t batch_size,
                              uint32_t seq_len_q, uint32_t seq_len_kv, uint32_t num_heads, uint16_t head_dim, float softmax_scale,
                              bool causal, int32_t q_precision, int32_t k_precision, int32_t v_precision, bool transpose_q,
                              bool transpose_k, bool transpose_v, bool transpose_o) {
    function_name = "mfa_attention_forward";
    return forward_flat(false, context, (void*[]){query_ptr, key_ptr, value_ptr, output_ptr}, NULL, batch_size, seq_len_q, seq_len_kv,
                        num_heads, head_dim, softmax_scale, causal, (const int32_t[]){q_precision, k_precision, v_precision}, NULL, NULL,
                        (const bool[]){transpose_q, transpose_k, transpose_v, transpose_o});
}

int32_t mfa_attention_forward_quantized(void* context, void* query_ptr, void* key_ptr, void* value_ptr, void* output_ptr,
                                        void* logsumexp_ptr, uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv,
                                        uint32_t num_heads, uint16_t head_dim, float softmax_scale, bool causal, int32_t q_precision,
                                        int32_t k_precision, int32_t v_precision, float q_scale, int32_t q_zero_point, float k_scale,
                                        int32_t k_zero_point, float v_scale, int32_t v_zero_point, bool transpose_q, bool transpose_k,
                                        bool transpose_v, bool transpose_o) {
    function_name = "mfa_attention_forward_quantized";
    return forward_flat(true, context, (void*[]){query_ptr, key_ptr, value_ptr, output_ptr}, logsumexp_ptr, batch_size, seq_len_q,
                        seq_len_kv, num_heads, head_dim, softmax_scale, causal, (const int32_t[]){q_precision, k_precision, v_precision},
                        (const float[]){q_scale, k_scale, v_scale}, (const int32_t[]){q_zero_point, k_zero_point, v_zero_point},
                        (const bool[]){transpose_q, transpose_k, transpose_v, transpose_o});
}

/* Moves what both backward calls read: Q, K, V and the logsumexp, to where its record is. False if there is none. */
static bool move_recorded(void* pointers[5], int64_t rows) {
    int found = record_count - 1;
    while (found >= 0 && records[found].caller != pointers[4]) found--;
    if (found < 0) {
        counts.untouched++;
        return false;
    }
    static const char* const names[] = {"query", "key", "value"};
    for (int n = 0; n < 3; n++) pointers[n] = array(names[n], pointers[n], records[found].bytes[n], false);
    region* kept = &regions[region_count++];
    *kept = records[found].logsumexp;
    kept->written = false;
    must(mprotect(kept->memory, kept->pages * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect() failed");
    memcpy(kept->begin, pointers[4], (size_t)rows * 4);
    pointers[4] = kept->begin;
    return true;
}

int32_t mfa_attention_backward_query_quantized(void* context, void* query_ptr, void* key_ptr, void* value_ptr, void* grad_output_ptr,
                                               void* logsumexp_ptr, void* grad_query_ptr, void* d_values_ptr, uint32_t batch_size,
                                               uint32_t seq_len_q, uint32_t seq_len_kv, uint32_t num_heads, uint16_t head_dim,
                                               float q_scale, int32_t q_zero_point) {
    function_name = "mfa_attention_backward_query_quantized";
    const int64_t rows = (int64_t)batch_size * seq_len_q * num_heads;
    void* moved_to[5] = {query_ptr, key_ptr, value_ptr, grad_output_ptr, logsumexp_ptr};
    if (move_recorded(moved_to, rows)) {
        moved_to[3] = array("grad_output", grad_output_ptr, rows * head_dim * 4, false);
        grad_query_ptr = array("grad_query", grad_query_ptr, rows * head_dim * 4, true);
        d_values_ptr = array("d_values", d_values_ptr, rows * 4, true);
        protect_all(context);
    }
    const int32_t status = ORIGINAL(mfa_attention_backward_query_quantized)(
        context, moved_to[0], moved_to[1], moved_to[2], moved_to[3], moved_to[4], grad_query_ptr, d_values_ptr, batch_size, seq_len_q,
        seq_len_kv, num_heads, head_dim, q_scale, q_zero_point);
    finish();
    return status;
}

int32_t mfa_attention_backward_kv_quantized(void* context, void* query_ptr, void* key_ptr, void* value_ptr, void* grad_output_ptr,
                                            void* logsumexp_ptr, void* d_values_ptr, void* grad_key_ptr, void* grad_value_ptr,
                                            uint32_t batch_size, uint32_t seq_len_q, uint32_t seq_len_kv, uint32_t num_heads,
                                            uint16_t head_dim, float q_scale, int32_t q_zero_point, float k_scale, int32_t k_zero_point,
                                            float v_scale, int32_t v_zero_point) {
    function_name = "mfa_attention_backward_kv_quantized";
    const int64_t rows = (int64_t)batch_size * seq_len_q * num_heads, columns = (int64_t)batch_size * seq_len_kv * num_heads;
    void* moved_to[5] = {query_ptr, key_ptr, value_ptr, grad_output_ptr, logsumexp_ptr};
    if (move_recorded(moved_to, rows)) {
        moved_to[3] = array("grad_output", grad_output_ptr, rows * head_dim * 4, false);
        d_values_ptr = array("d_values", d_values_ptr, rows * 4, false);
        grad_key_ptr = array("grad_key", grad_key_ptr, columns * head_dim * 4, true);
        grad_value_ptr = array("grad_value", grad_value_ptr, columns * head_dim * 4, true);
        protect_all(context);
    }
    const int32_t status = ORIGINAL(mfa_attention_backward_kv_quantized)(
        context, moved_to[0], moved_to[1], moved_to[2], moved_to[3], moved_to[4], d_values_ptr, grad_key_ptr, grad_value_ptr, batch_size,
        seq_len_q, seq_len_kv, num_heads, head_dim, q_scale, q_zero_point, k_scale, k_zero_point, v_scale, v_zero_point);
    finish();
    return status;
}
