/* A fork-join thread pool, one for the process.
 *
 * The caller takes part in its own job, so a worker that never gets a processor costs nothing: a job is over when its items are, whoever
 * ran them. Items are numbered by tickets that only ever grow: a job owns the tickets begin ..< end, and claiming one is a
 * compare-and-swap on the pool's next ticket. A worker that wakes up late, with a job that is over, finds the next ticket at or past that
 * job's end; it can neither take an item of a newer job nor touch a state that its caller has released. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getaffinity */
#endif

#include "cpu_kernels.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#endif

/* How long a thread watches for work, or for the end of a job, before it sleeps: long enough to bridge the gap between the passes of one
 * call, short enough to be no burden on a machine that others use. */
enum { SPIN_NANOSECONDS = 20000 };

/* Threads write the counters on which others spin: each has a cache line of its own (128 bytes on Apple processors). */
enum { CACHE_LINE_BYTES = 128 };

typedef struct job {
    cpu_task_function task;
    void* state;
    int64_t begin;      /* its tickets are begin ..< end */
    int64_t end;        /* also identifies the job: no two have the same, and none has 0 */
    int32_t threads;    /* that may take part, the caller's included */
    int32_t joined;     /* workers that do; the next one's thread number is joined + 1 */
    fenv_t environment; /* the caller's floating-point environment: workers compute as the caller would */
} job;

static struct {
    _Alignas(CACHE_LINE_BYTES) _Atomic int64_t next;      /* the next ticket to be claimed */
    _Alignas(CACHE_LINE_BYTES) _Atomic int64_t finished;  /* how many tickets' items are done */
    _Alignas(CACHE_LINE_BYTES) _Atomic int64_t published; /* current.end, for those who spin */
    atomic_bool busy;                                     /* a caller is using the pool */
    int32_t workers;                                      /* started so far; belongs to the caller that made the pool busy */

    _Alignas(CACHE_LINE_BYTES) pthread_mutex_t lock; /* guards what follows; never held while an item runs */
    pthread_cond_t work;                             /* a job was published */
    pthread_cond_t done;                             /* a worker has finished a job's last item */
    int32_t sleeping;                                /* workers that wait for `work` */
    job current;
} pool = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .work = PTHREAD_COND_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
};

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static bool pool_usable = false; /* written once, by prepare_pool */

/* ---- fork() -------------------------------------------------------------------------------------------------------------------------- */

/* fork() copies the memory but only the calling thread. Holding the lock across it keeps the guarded fields whole; the child then starts
 * with no workers and an idle pool, even if another thread of the parent had a job in it. (An item itself must not fork.) */
static void before_fork(void) {
    pthread_mutex_lock(&pool.lock);
}

static void after_fork_in_parent(void) {
    pthread_mutex_unlock(&pool.lock);
}

static void after_fork_in_child(void) {
    /* Condition variables remember waiters that do not exist here, so all three are made anew. */
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.workers = 0;
    pool.sleeping = 0;
    pool.current = (job){0};
    atomic_store(&pool.next, 0);
    atomic_store(&pool.finished, 0);
    atomic_store(&pool.published, 0);
    atomic_store(&pool.busy, false);
}

static void prepare_pool(void) {
    pool_usable = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) == 0;
}

/* ---- Spinning ------------------------------------------------------------------------------------------------------------------------ */

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* "yield" is a no-op on most cores */
#endif
}

static int64_t monotonic_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Watches *value for a while. True as soon as (*value == expected) is `equal`. */
static bool spin_until(const _Atomic int64_t* value, int64_t expected, bool equal) {
    const int64_t deadline = monotonic_nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 32; ++i) {
            if ((atomic_load_explicit(value, memory_order_acquire) == expected) == equal) {
                return true;
            }
            relax();
        }
    } while (monotonic_nanoseconds() < deadline);
    return false;
}

/* ---- Jobs ---------------------------------------------------------------------------------------------------------------------------- */

/* Runs items of a job until none is left to claim. True if this thread finished the job's last item. */
static bool run_items(const job* current, int32_t thread) {
    int64_t count = 0;
    int64_t ticket = atomic_load_explicit(&pool.next, memory_order_relaxed);
    while (ticket < current->end) {
        if (atomic_compare_exchange_weak_explicit(&pool.next, &ticket, ticket + 1, memory_order_relaxed, memory_order_relaxed)) {
            current->task(current->state, ticket - current->begin, thread);
            ++count;
            ++ticket;
        }
    }
    if (count == 0) {
        return false;
    }
    /* Release: what the items wrote is seen by the caller, who acquires this counter. */
    return atomic_fetch_add_explicit(&pool.finished, count, memory_order_acq_rel) + count == current->end;
}

static void* run_worker(void* unused) {
    (void)unused;
    int64_t seen = 0; /* end of the last job that this worker looked at */
    for (;;) {
        spin_until(&pool.published, seen, false);

        pthread_mutex_lock(&pool.lock);
        while (pool.current.end == seen) {
            ++pool.sleeping;
            pthread_cond_wait(&pool.work, &pool.lock);
            --pool.sleeping;
        }
        seen = pool.current.end;
        const bool joins = pool.current.joined + 1 < pool.current.threads;
        if (joins) {
            ++pool.current.joined;
        }
        const job current = pool.current;
        pthread_mutex_unlock(&pool.lock);

        if (joins) {
            fesetenv(&current.environment);
            if (run_items(&current, current.joined)) {
                pthread_mutex_lock(&pool.lock);
                pthread_cond_signal(&pool.done);
                pthread_mutex_unlock(&pool.lock);
            }
        }
    }
    return NULL;
}

/* Starts workers until there are `count`, or as many as the system grants. */
static void start_workers(int32_t count) {
    if (pool.workers >= count) {
        return;
    }
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) {
        return;
    }
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);

    /* Signals are the application's: workers inherit a mask that blocks them all. */
    sigset_t all, previous;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    pthread_t thread;
    while (pool.workers < count && pthread_create(&thread, &attributes, run_worker, NULL) == 0) {
        ++pool.workers;
    }
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    pthread_attr_destroy(&attributes);
}

/* Makes a job the current one, wakes as many sleepers as can take part, and returns a copy. */
static job publish_job(int32_t threads, int64_t items, cpu_task_function task, void* state) {
    const int64_t begin = atomic_load_explicit(&pool.next, memory_order_relaxed);
    job current = {.task = task, .state = state, .begin = begin, .end = begin + items, .threads = threads, .joined = 0};
    fegetenv(&current.environment);

    pthread_mutex_lock(&pool.lock);
    pool.current = current;
    atomic_store_explicit(&pool.published, current.end, memory_order_release);
    const int32_t wake = threads - 1 < pool.sleeping ? threads - 1 : pool.sleeping;
    for (int32_t i = 0; i < wake; ++i) {
        pthread_cond_signal(&pool.work);
    }
    pthread_mutex_unlock(&pool.lock);
    return current;
}

static void wait_for_end(const job* current) {
    if (spin_until(&pool.finished, current->end, true)) {
        return;
    }
    pthread_mutex_lock(&pool.lock);
    while (atomic_load_explicit(&pool.finished, memory_order_acquire) != current->end) {
        pthread_cond_wait(&pool.done, &pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
}

void cpu_parallel_for(int32_t threads, int64_t items, cpu_task_function task, void* state) {
    if (threads > CPU_MAX_THREADS) {
        threads = CPU_MAX_THREADS;
    }
    if (threads > items) {
        threads = (int32_t)items;
    }
    bool alone = threads <= 1;
    if (!alone) {
        pthread_once(&pool_once, prepare_pool);
        alone = !pool_usable || atomic_exchange_explicit(&pool.busy, true, memory_order_acquire);
    }
    if (alone) {
        for (int64_t item = 0; item < items; ++item) {
            task(state, item, 0);
        }
        return;
    }

    start_workers(threads - 1);
    const job current = publish_job(threads, items, task, state);
    if (!run_items(&current, 0)) {
        wait_for_end(&current);
    }
    atomic_store_explicit(&pool.busy, false, memory_order_release);
}

/* ---- Processors that may be used ----------------------------------------------------------------------------------------------------- */

#if defined(__linux__)

/* CPUs of the affinity mask; 0 if the system does not say. */
static int64_t affinity_count(void) {
    /* The kernel's mask may be wider than cpu_set_t: EINVAL asks for a larger one. */
    for (size_t cpus = CPU_SETSIZE; cpus <= (size_t)1 << 20; cpus *= 2) {
        cpu_set_t* set = CPU_ALLOC(cpus);
        if (set == NULL) {
            return 0;
        }
        const size_t bytes = CPU_ALLOC_SIZE(cpus);
        const int failure = sched_getaffinity(0, bytes, set) == 0 ? 0 : errno;
        const int64_t count = failure == 0 ? CPU_COUNT_S(bytes, set) : 0;
        CPU_FREE(set);
        if (failure != EINVAL) {
            return count;
        }
    }
    return 0;
}

enum { CONTROL_GROUP_PATH_BYTES = 4096 };

/* Reads the first line of directory/name. */
static bool read_line(const char* directory, const char* name, char* line, int size) {
    char path[CONTROL_GROUP_PATH_BYTES + 64];
    if (snprintf(path, sizeof path, "%s/%s", directory, name) >= (int)sizeof path) {
        return false;
    }
    FILE* file = fopen(path, "re");
    if (file == NULL) {
        return false;
    }
    const bool read = fgets(line, size, file) != NULL;
    fclose(file);
    return read;
}

/* The CPUs that the quota of one control group directory allows; INT64_MAX if it sets none. */
static int64_t directory_quota(const char* directory, bool version_2) {
    char line[128];
    long long quota = -1, period = 0; /* "max", and -1 in version 1, mean no quota */
    if (version_2) {
        if (!read_line(directory, "cpu.max", line, sizeof line) || sscanf(line, "%lld %lld", &quota, &period) != 2) {
            return INT64_MAX;
        }
    } else {
        if (!read_line(directory, "cpu.cfs_quota_us", line, sizeof line) || sscanf(line, "%lld", &quota) != 1 ||
            !read_line(directory, "cpu.cfs_period_us", line, sizeof line) || sscanf(line, "%lld", &period) != 1) {
            return INT64_MAX;
        }
    }
    if (quota <= 0 || period <= 0) {
        return INT64_MAX;
    }
    return (quota - 1) / period + 1;
}

/* The tightest quota of a group and its ancestors. In a container the group's path may name directories that are not mounted here, while
 * the mount's root is the group itself: so the root is tried in any case. */
static int64_t group_quota(const char* root, const char* group, bool version_2) {
    char directory[CONTROL_GROUP_PATH_BYTES];
    if (snprintf(directory, sizeof directory, "%s%s", root, group) >= (int)sizeof directory) {
        return INT64_MAX;
    }
    const size_t root_length = strlen(root);
    int64_t smallest = INT64_MAX;
    for (;;) {
        const int64_t quota = directory_quota(directory, version_2);
        smallest = quota < smallest ? quota : smallest;
        char* slash = strrchr(directory + root_length, '/');
        if (slash == NULL) {
            return smallest;
        }
        *slash = '\0';
    }
}

/* Whether a comma-separated list of controllers has "cpu" in it. */
static bool names_cpu(const char* controllers) {
    for (const char* name = controllers; name != NULL; name = strchr(name, ',')) {
        name += *name == ',';
        if (strncmp(name, "cpu", 3) == 0 && (name[3] == ',' || name[3] == '\0')) {
            return true;
        }
    }
    return false;
}

/* The CPUs that the control group's quota allows; INT64_MAX without one. Lines are "number:controllers:path", in version 2 "0::path". */
static int64_t control_group_quota(void) {
    FILE* file = fopen("/proc/self/cgroup", "re");
    if (file == NULL) {
        return INT64_MAX;
    }
    int64_t smallest = INT64_MAX;
    char line[CONTROL_GROUP_PATH_BYTES];
    while (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char* controllers = strchr(line, ':');
        char* group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (group == NULL) {
            continue;
        }
        *group++ = '\0';
        ++controllers;
        int64_t quota = INT64_MAX;
        if (*controllers == '\0') {
            quota = group_quota("/sys/fs/cgroup", group, true);
        } else if (names_cpu(controllers)) {
            quota = group_quota("/sys/fs/cgroup/cpu", group, false);
        }
        smallest = quota < smallest ? quota : smallest;
    }
    fclose(file);
    return smallest;
}

int32_t cpu_available_threads(void) {
    int64_t count = affinity_count();
    if (count < 1) {
        count = sysconf(_SC_NPROCESSORS_ONLN);
    }
    const int64_t quota = control_group_quota();
    count = quota < count ? quota : count;
    count = count < CPU_MAX_THREADS ? count : CPU_MAX_THREADS;
    return count > 1 ? (int32_t)count : 1;
}

#else

int32_t cpu_available_threads(void) {
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    if (count < 1) {
        return 1;
    }
    return count < CPU_MAX_THREADS ? (int32_t)count : CPU_MAX_THREADS;
}

#endif
