/* Jobs are shared between the threads of torch's OpenMP runtime where it has the entry that GNU
 * compilers call: after a job of torch's own they wait for more by spinning, and threads of another
 * pool would get half of each core. Elsewhere a pool serves whose threads sleep between jobs. */
#include "native.h"

typedef struct {
    Part part;
    const void *job;
    int64_t next, total, step, result;
} Team;

#if !defined(_WIN32)
#include <pthread.h>
#define MOST_THREADS 64

/* GOMP_parallel: run a function on so many threads, of which the caller is one. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel open_mp;

static struct {
    pthread_mutex_t busy, lock;
    pthread_cond_t wake, done;
    int threads, running, wanted;
    unsigned long round;
    Team *team;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static void take_parts(void *of) {
    Team *team = of;
    int64_t result = 0;
    while (!result) {
        const int64_t begin = __atomic_fetch_add(&team->next, team->step, __ATOMIC_RELAXED);
        if (begin >= team->total) return;
        const int64_t end = begin + team->step;
        result = team->part(team->job, begin, end < team->total ? end : team->total);
    }
    __atomic_store_n(&team->result, result, __ATOMIC_RELAXED);
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
        take_parts(pool.team);
        pthread_mutex_lock(&pool.lock);
        if (--pool.running == 0) pthread_cond_signal(&pool.done);
    }
    return NULL;
}

/* Threads do not survive a fork, and a child cannot use the OpenMP runtime of its parent. */
static void forget_threads(void) {
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.threads = pool.running = pool.wanted = 0;
    open_mp = NULL;
}

void prepare_threads(void) { pthread_atfork(NULL, NULL, forget_threads); }

static void run_in_pool(Team *team, int threads) {
    pthread_mutex_lock(&pool.lock);
    while (pool.threads < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)pool.threads)) break;
        pthread_detach(thread);
        pool.threads++;
    }
    pool.team = team;
    pool.wanted = threads - 1 < pool.threads ? threads - 1 : pool.threads;
    pool.running = pool.wanted;
    pool.round++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_parts(team);
    pthread_mutex_lock(&pool.lock);
    while (pool.running) pthread_cond_wait(&pool.done, &pool.lock);
    pool.wanted = 0;
    pthread_mutex_unlock(&pool.lock);
}

static void run_shared(Team *team, int threads) {
    if (open_mp) {
        /* As many as torch asks for, though there be fewer parts: a smaller team would end the
         * threads that it leaves out, and the next job of torch would start them again. */
        open_mp(take_parts, team, (unsigned)threads, 0);
        return;
    }
    const int64_t parts = (team->total + team->step - 1) / team->step;
    if (threads > parts) threads = (int)parts;
    run_in_pool(team, threads < MOST_THREADS ? threads : MOST_THREADS);
}
#else
void prepare_threads(void) {}
#endif

int64_t run_parts(Part part, const void *job, int64_t total, int64_t step, int threads) {
#if !defined(_WIN32)
    /* Where another Python thread has the threads, do without. */
    if (threads > 1 && total > step && !pthread_mutex_trylock(&pool.busy)) {
        Team team = {.part = part, .job = job, .total = total, .step = step};
        run_shared(&team, threads);
        pthread_mutex_unlock(&pool.busy);
        return team.result;
    }
#endif
    return total ? part(job, 0, total) : 0;
}

/* address of GOMP_parallel, or 0 for threads of its own */
PyObject *share_threads(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    long long address;
    (void)module;
    if (read_integers(args, given, 1, &address)) return NULL;
#if !defined(_WIN32)
    open_mp = (Parallel)ADDRESS(address);
#endif
    Py_RETURN_NONE;
}
