#include "support.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

static pthread_mutex_t registry = PTHREAD_MUTEX_INITIALIZER;

/* How many forks lie between the process that loaded the library and this one. */
static atomic_uint generation;

unsigned support_generation(void) {
    return atomic_load(&generation);
}

struct support_lock {
    pthread_mutex_t mutex;
    atomic_uint generation; /* of the process that last looked at the lock */
    bool abandoned;         /* guarded by the mutex */
};

static void after_fork_in_child(void) {
    atomic_fetch_add(&generation, 1);
    pthread_mutex_unlock(&registry);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(support_registry_lock, support_registry_unlock, after_fork_in_child);
}

void support_registry_lock(void) {
    pthread_mutex_lock(&registry);
}

void support_registry_unlock(void) {
    pthread_mutex_unlock(&registry);
}

support_lock* support_lock_create(void) {
    support_lock* lock = malloc(sizeof *lock);
    if (!lock) {
        return NULL;
    }
    if (pthread_mutex_init(&lock->mutex, NULL) != 0) {
        free(lock);
        return NULL;
    }
    atomic_init(&lock->generation, atomic_load(&generation));
    lock->abandoned = false;
    return lock;
}

void support_lock_destroy(support_lock* lock) {
    pthread_mutex_destroy(&lock->mutex);
    free(lock);
}

/* First use since a fork: a mutex that is locked now was locked by a thread of the parent, unless another thread of the child was here
 * before, which the registry's lock rules out. */
static void repair(support_lock* lock) {
    support_registry_lock();
    unsigned current = atomic_load(&generation);
    if (atomic_load(&lock->generation) != current) {
        if (pthread_mutex_trylock(&lock->mutex) == 0) {
            pthread_mutex_unlock(&lock->mutex);
        } else {
            pthread_mutex_init(&lock->mutex, NULL);
            lock->abandoned = true;
        }
        atomic_store(&lock->generation, current);
    }
    support_registry_unlock();
}

bool support_lock_acquire(support_lock* lock) {
    if (atomic_load_explicit(&lock->generation, memory_order_acquire) != atomic_load_explicit(&generation, memory_order_relaxed)) {
        repair(lock);
    }
    pthread_mutex_lock(&lock->mutex);
    bool whole = !lock->abandoned;
    lock->abandoned = false;
    return whole;
}

void support_lock_release(support_lock* lock) {
    pthread_mutex_unlock(&lock->mutex);
}
