/* The few things that the Swift core needs from C: locks that survive fork(), a message for each thread, the floating-point environment. */
#ifndef MFA_SUPPORT_H
#define MFA_SUPPORT_H

#include <fenv.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- The registry's lock: one a process, held across fork(), so that what it guards is whole in the child ------------------------------
 * */

void support_registry_lock(void);
void support_registry_unlock(void);

/* ---- Locks of contexts: not held across fork(), which a long call would delay, but repaired in the child --------------------------------
 * */

typedef struct support_lock support_lock;

/* NULL if there is no memory. */
support_lock* _Nullable support_lock_create(void);
void support_lock_destroy(support_lock* _Nonnull lock);

/* Waits for the lock. False if another thread held it when this process was forked off: that thread does not exist here, and what the lock
 * guards may be half changed. Said once, to the first that acquires the lock in the child. */
bool support_lock_acquire(support_lock* _Nonnull lock);
void support_lock_release(support_lock* _Nonnull lock);

/* ---- A message for each thread ----------------------------------------------------------------------------------------------------------
 * */

enum { SUPPORT_MESSAGE_BYTES = 1024 };

/* Copies as much of a text into SUPPORT_MESSAGE_BYTES at `message` as fits, with a final 0, never half a UTF-8 character. */
void support_message_copy(char* _Nonnull message, const char* _Nonnull text, size_t length);

/* This thread's message: SUPPORT_MESSAGE_BYTES, "" at first. */
char* _Nonnull support_thread_message(void);

/* ---- Floating point ---------------------------------------------------------------------------------------------------------------------
 * */

/* How a thread computes with floats: rounding, treatment of denormals, which exceptions trap, and which have been raised. */
#if defined(__x86_64__)
typedef uint32_t support_environment; /* MXCSR: nothing here uses the x87 unit, which is slow to save */
#else
typedef fenv_t support_environment;
#endif

/* Makes this thread compute as programs do that have set nothing, and gives what it had set. */
support_environment support_environment_enter(void);
void support_environment_leave(support_environment environment);

/* ---- Processes --------------------------------------------------------------------------------------------------------------------------
 * */

/* How many forks lie between the process that loaded the library and this one. */
unsigned support_generation(void);

#endif /* MFA_SUPPORT_H */
