/*
 * What one thread of this machine can do at most: multiplications and additions of floats and of small integers in registers, and reading
 * memory. umfa.bench.ceilings compiles this file, loads it, and times its functions, each thread of a measurement calling for itself.
 */
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

enum { ACCUMULATORS = 10 };
enum { FLOATS, INTEGERS };

/*
 * A rate is a loop over independent accumulators, enough of them to hide the latency of an instruction. HIDE makes the compiler believe that
 * a register changed, so that it can neither hoist, merge nor drop what follows; it costs no instruction.
 */
#define REPEAT(X, A, B) X(0, A, B) X(1, A, B) X(2, A, B) X(3, A, B) X(4, A, B) X(5, A, B) X(6, A, B) X(7, A, B) X(8, A, B) X(9, A, B)
#define HIDE(REGISTER, CLASS) __asm__ volatile("" : "+" CLASS(REGISTER));
#define DECLARE(N, VECTOR, CLASS) \
    VECTOR sum##N = right;        \
    HIDE(sum##N, CLASS)
#define STEP(N, OPERATION, CLASS)            \
    HIDE(left, CLASS)                        \
    sum##N = OPERATION(sum##N, left, right); \
    HIDE(sum##N, CLASS)
#define RATE(NAME, TARGET, VECTOR, CLASS, NUMBER, OPERATION) \
    TARGET static void NAME(int64_t iterations) {            \
        VECTOR left = NUMBER, right = NUMBER;                \
        HIDE(right, CLASS)                                   \
        REPEAT(DECLARE, VECTOR, CLASS)                       \
        for (int64_t i = 0; i < iterations; ++i) {           \
            REPEAT(STEP, OPERATION, CLASS)                   \
        }                                                    \
    }                                                        \
    _Static_assert(ACCUMULATORS == 10, "as many as REPEAT has")

/* Memory is read in vectors of 32 bytes, which the compiler splits where registers are shorter, from `streams` places side by side. */
typedef uint64_t vector __attribute__((vector_size(32)));
enum { VECTORS = 8, STEP_BYTES = VECTORS * sizeof(vector) };

static inline __attribute__((always_inline)) uint64_t read_streams(const char* memory, size_t bytes, int streams) {
    const size_t part = bytes / (size_t)streams / STEP_BYTES * STEP_BYTES;
    vector sums[VECTORS] = {{0}};
    for (size_t offset = 0; offset < part; offset += STEP_BYTES)
        for (int stream = 0; stream < streams; ++stream) {
            const vector* from = (const vector*)(memory + (size_t)stream * part + offset);
            for (int i = 0; i < VECTORS; ++i) sums[i] ^= from[i];
        }
    uint64_t sum = 0;
    for (int i = 0; i < VECTORS; ++i)
        for (int j = 0; j < 4; ++j) sum ^= sums[i][j];
    return sum;
}

#if defined(__x86_64__)

#define BASELINE __attribute__((noinline))
#define AVX2 __attribute__((noinline, target("avx2,fma")))
#define AVX512 __attribute__((noinline, target("avx512f,avx512bw")))
#define AVX512VNNI __attribute__((noinline, target("avx512f,avx512bw,avx512vnni")))

#define MULTIPLY_ADD_SSE2(SUM, A, B) _mm_add_ps(SUM, _mm_mul_ps(A, B))
#define MULTIPLY_ADD_AVX2(SUM, A, B) _mm256_fmadd_ps(A, B, SUM)
#define MULTIPLY_ADD_AVX512(SUM, A, B) _mm512_fmadd_ps(A, B, SUM)
RATE(floats_sse2, BASELINE, __m128, "x", _mm_set1_ps(0.5f), MULTIPLY_ADD_SSE2);
RATE(floats_avx2, AVX2, __m256, "x", _mm256_set1_ps(0.5f), MULTIPLY_ADD_AVX2);
RATE(floats_avx512, AVX512, __m512, "v", _mm512_set1_ps(0.5f), MULTIPLY_ADD_AVX512);

/* Products of 16-bit integers, exact. */
#define PMADDWD_SSE2(SUM, A, B) _mm_add_epi32(SUM, _mm_madd_epi16(A, B))
#define PMADDWD_AVX2(SUM, A, B) _mm256_add_epi32(SUM, _mm256_madd_epi16(A, B))
#define PMADDWD_AVX512(SUM, A, B) _mm512_add_epi32(SUM, _mm512_madd_epi16(A, B))
RATE(pmaddwd_sse2, BASELINE, __m128i, "x", _mm_set1_epi16(3), PMADDWD_SSE2);
RATE(pmaddwd_avx2, AVX2, __m256i, "x", _mm256_set1_epi16(3), PMADDWD_AVX2);
RATE(pmaddwd_avx512, AVX512, __m512i, "v", _mm512_set1_epi16(3), PMADDWD_AVX512);

/* Products of bytes, whose sums of two saturate at 16 bits. */
#define PMADDUBSW_AVX2(SUM, A, B) _mm256_add_epi32(SUM, _mm256_madd_epi16(_mm256_maddubs_epi16(A, B), _mm256_set1_epi16(1)))
#define PMADDUBSW_AVX512(SUM, A, B) _mm512_add_epi32(SUM, _mm512_madd_epi16(_mm512_maddubs_epi16(A, B), _mm512_set1_epi16(1)))
RATE(pmaddubsw_avx2, AVX2, __m256i, "x", _mm256_set1_epi8(3), PMADDUBSW_AVX2);
RATE(pmaddubsw_avx512, AVX512, __m512i, "v", _mm512_set1_epi8(3), PMADDUBSW_AVX512);

/* Products of bytes, exact. */
#define VPDPBUSD_AVX512(SUM, A, B) _mm512_dpbusd_epi32(SUM, A, B)
RATE(vpdpbusd_avx512, AVX512VNNI, __m512i, "v", _mm512_set1_epi8(3), VPDPBUSD_AVX512);
#if defined(__clang__) || __GNUC__ >= 11
#define HAS_AVXVNNI 1
#define AVXVNNI __attribute__((noinline, target("avx2,avxvnni")))
#define VPDPBUSD_AVXVNNI(SUM, A, B) _mm256_dpbusd_avx_epi32(SUM, A, B)
RATE(vpdpbusd_avxvnni, AVXVNNI, __m256i, "x", _mm256_set1_epi8(3), VPDPBUSD_AVXVNNI);
#endif

BASELINE static uint64_t read_sse2(const char* memory, size_t bytes, int streams) {
    return read_streams(memory, bytes, streams);
}
AVX2 static uint64_t read_avx2(const char* memory, size_t bytes, int streams) {
    return read_streams(memory, bytes, streams);
}
AVX512 static uint64_t read_avx512(const char* memory, size_t bytes, int streams) {
    return read_streams(memory, bytes, streams);
}

static int here_always(void) {
    return 1;
}
static int here_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static int here_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
static int here_avx512vnni(void) {
    return here_avx512() && __builtin_cpu_supports("avx512vnni");
}
#ifdef HAS_AVXVNNI
static int here_avxvnni(void) { /* a name that older compilers do not know */
    unsigned a = 0, b = 0, c = 0, d = 0;
    return here_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#elif defined(__aarch64__)

#define BASELINE __attribute__((noinline))
#if defined(__clang__)
#define DOTPROD __attribute__((noinline, target("dotprod")))
#else
#define DOTPROD __attribute__((noinline, target("+dotprod")))
#endif

#define MULTIPLY_ADD(SUM, A, B) vfmaq_f32(SUM, A, B)
#define SMULL(SUM, A, B) vpadalq_s16(SUM, vmull_high_s8(vreinterpretq_s8_s32(A), vreinterpretq_s8_s32(B)))
#define SDOT(SUM, A, B) vdotq_s32(SUM, vreinterpretq_s8_s32(A), vreinterpretq_s8_s32(B))
RATE(floats_neon, BASELINE, float32x4_t, "w", vdupq_n_f32(0.5f), MULTIPLY_ADD);
RATE(smull_neon, BASELINE, int32x4_t, "w", vdupq_n_s32(0x03030303), SMULL);
RATE(sdot_neon, DOTPROD, int32x4_t, "w", vdupq_n_s32(0x03030303), SDOT);

static int here_always(void) {
    return 1;
}
static int here_dotprod(void) {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
    int32_t here = 0;
    size_t size = sizeof here;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &here, &size, NULL, 0) == 0 && here;
#else
    return 0;
#endif
}

#endif

/* A rate: `operations` are multiplications and additions of one step; what is not exact can saturate on the way. */
typedef struct {
    const char* name;
    int kind;
    int exact;
    int operations;
    int (*is_here)(void);
    void (*run)(int64_t iterations);
} rate;

static const rate rates[] = {
#if defined(__x86_64__)
    {"mulps, addps", FLOATS, 1, 2 * 4, here_always, floats_sse2},
    {"vfmadd, 256 bits", FLOATS, 1, 2 * 8, here_avx2, floats_avx2},
    {"vfmadd, 512 bits", FLOATS, 1, 2 * 16, here_avx512, floats_avx512},
    {"pmaddwd, paddd", INTEGERS, 1, 2 * 8, here_always, pmaddwd_sse2},
    {"pmaddwd, paddd, 256 bits", INTEGERS, 1, 2 * 16, here_avx2, pmaddwd_avx2},
    {"pmaddubsw, pmaddwd, paddd, 256 bits", INTEGERS, 0, 2 * 32, here_avx2, pmaddubsw_avx2},
#ifdef HAS_AVXVNNI
    {"vpdpbusd, 256 bits", INTEGERS, 1, 2 * 32, here_avxvnni, vpdpbusd_avxvnni},
#endif
    {"pmaddwd, paddd, 512 bits", INTEGERS, 1, 2 * 32, here_avx512, pmaddwd_avx512},
    {"pmaddubsw, pmaddwd, paddd, 512 bits", INTEGERS, 0, 2 * 64, here_avx512, pmaddubsw_avx512},
    {"vpdpbusd, 512 bits", INTEGERS, 1, 2 * 64, here_avx512vnni, vpdpbusd_avx512},
#elif defined(__aarch64__)
    {"fmla", FLOATS, 1, 2 * 4, here_always, floats_neon},
    {"smull, sadalp", INTEGERS, 1, 2 * 8, here_always, smull_neon},
    {"sdot", INTEGERS, 1, 2 * 16, here_dotprod, sdot_neon},
#endif
    {NULL, 0, 0, 0, NULL, NULL},
};

int32_t ceilings_count(void) {
    return sizeof rates / sizeof *rates - 1;
}
const char* ceilings_name(int32_t index) {
    return rates[index].name;
}
int32_t ceilings_of_integers(int32_t index) {
    return rates[index].kind == INTEGERS;
}
int32_t ceilings_is_exact(int32_t index) {
    return rates[index].exact;
}
int32_t ceilings_is_here(int32_t index) {
    return rates[index].is_here();
}
int32_t ceilings_operations(int32_t index) {
    return rates[index].operations * ACCUMULATORS;
}
void ceilings_run(int32_t index, int64_t iterations) {
    rates[index].run(iterations);
}

/* Reads `bytes` of memory that is aligned to 64 bytes, less than 256 bytes a stream left out; the result depends on all that was read. */
uint64_t ceilings_read(const char* memory, size_t bytes, int32_t streams) {
#if defined(__x86_64__)
    if (here_avx512()) return read_avx512(memory, bytes, streams);
    return here_avx2() ? read_avx2(memory, bytes, streams) : read_sse2(memory, bytes, streams);
#else
    return read_streams(memory, bytes, streams);
#endif
}
