/* Threads that sleep between jobs: a second OpenMP runtime would spin against torch's. */
#include "native.h"

#if !defined(_WIN32)
#include <pthread.h>
#define MOST_THREADS 64

static struct {
    pthread_mutex_t busy, lock;
    pthread_cond_t wake, done;
    int threads, running, wanted;
    unsigned long round;
    Part part;
    const void *job;
    int64_t next, total, step, result;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static void take_parts(void) {
    int64_t result = 0;
    while (!result) {
        const int64_t begin = __atomic_fetch_add(&pool.next, pool.step, __ATOMIC_RELAXED);
        if (begin >= pool.total) return;
        const int64_t end = begin + pool.step;
        result = pool.part(pool.job, begin, end < pool.total ? end : pool.total);
    }
    pthread_mutex_lock(&pool.lock);
    pool.result = result;
    pthread_mutex_unlock(&pool.lock);
}

static void *work(void *number) {
    unsigned long seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.round == seen || (intptr_t)number >= pool.wanted) {
            seen = pool.round;
            pthread_cond_wait(&pool.wake, &pool.lock);
        }
        seen = pool.round;
        pthread_mutex_unlock(&pool.lock);
        take_parts();
        pthread_mutex_lock(&pool.lock);
        if (--pool.running == 0) pthread_cond_signal(&pool.done);
    }
    return NULL;
}

/* Threads do not survive a fork. */
static void forget_threads(void) {
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.threads = pool.running = pool.wanted = 0;
}

void prepare_threads(void) { pthread_atfork(NULL, NULL, forget_threads); }

static int64_t run_shared(Part part, const void *job, int64_t total, int64_t step, int threads) {
    pthread_mutex_lock(&pool.lock);
    while (pool.threads < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)pool.threads)) break;
        pthread_detach(thread);
        pool.threads++;
    }
    pool.part = part;
    pool.job = job;
    pool.next = pool.result = 0;
    pool.total = total;
    pool.step = step;
    pool.wanted = threads - 1 < pool.threads ? threads - 1 : pool.threads;
    pool.running = pool.wanted;
    pool.round++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_parts();
    pthread_mutex_lock(&pool.lock);
    while (pool.running) pthread_cond_wait(&pool.done, &pool.lock);
    pool.wanted = 0;
    const int64_t result = pool.result;
    pthread_mutex_unlock(&pool.lock);
    return result;
}
#else
void prepare_threads(void) {}
#endif

int64_t run_parts(Part part, const void *job, int64_t total, int64_t step, int threads) {
#if !defined(_WIN32)
    const int64_t parts = (total + step - 1) / step;
    if (threads > parts) threads = (int)parts;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    /* Where another Python thread has the pool, do without. */
    if (threads > 1 && !pthread_mutex_trylock(&pool.busy)) {
        const int64_t result = run_shared(part, job, total, step, threads);
        pthread_mutex_unlock(&pool.busy);
        return result;
    }
#endif
    return total ? part(job, 0, total) : 0;
}
