/* Lookups in compressed tables on the CPU: CPython's stable ABI, no torch headers.
 *
 * Tensors come as addresses; Python has checked dtypes, shapes and contiguity. The codes of a row
 * are a run of bits in one little-endian stream, 8 zero bytes end the stream, so 64 bits may be
 * loaded from where any row starts. Sums are made in the order of the codebooks, without fused
 * multiply-adds, so that results equal those of the plain-torch reference bit for bit.
 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if !defined(_WIN32)
#include <pthread.h>
#define HAVE_THREADS 1
#else
#define HAVE_THREADS 0
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
/* The best of these that the processor runs is chosen when the library is loaded. */
#define DISPATCHED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCHED
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define INLINE static inline
#define PREFETCH(address)
#endif

#define MOST_CODEBOOKS 256
#define MOST_VECTORS 8 /* summed in registers */
#define AHEAD 16   /* rows whose codes are fetched in advance */
#define BLOCK_ROWS 128 /* of a bitmap, with one count */
#define CHUNK 512  /* ids that a thread takes at once */

typedef struct {
    const char *ids;
    int wide; /* ids are int64, not int32 */
    int64_t count, rows;
    const uint8_t *codes;
    int bits, books, product;
    int64_t size, width; /* codewords of a codebook, columns of a codeword */
    const char *words;
    int narrow; /* codewords are int8 with bfloat16 scales, not float32 */
    const uint16_t *scales;
    int64_t zero_id; /* id that reads as zeros, -1 for none */
    int64_t skip_id; /* id that passes no gradient, -1 for none */
    float *out;
    const float *grad;
    uint8_t *flags;
    int64_t *places;
    int64_t bad; /* where failed: an id that is no row, or whose codes name no codeword */
    int failed;
} Job;

INLINE int64_t id_at(const Job *job, int64_t i, int wide) {
    return wide ? ((const int64_t *)job->ids)[i] : (int64_t)((const int32_t *)job->ids)[i];
}

INLINE uint64_t load64(const uint8_t *from) {
    uint64_t value;
    memcpy(&value, from, 8);
    return value;
}

INLINE float scale_at(const Job *job, int64_t word) {
    uint32_t wide = (uint32_t)job->scales[word] << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Numbers of the codewords of a row, among those of all codebooks; 0 if one does not exist, as in
 * damaged codes of codebooks whose size is no power of two. */
INLINE int read_codes(const Job *job, int64_t id, int64_t *word) {
    if (!job->bits) {
        word[0] = id;
        return id < job->size;
    }
    int fits = 1;
    const int64_t first = id * job->bits * job->books;
    const uint64_t mask = ((uint64_t)1 << job->bits) - 1;
    if (job->bits * job->books <= 57) {
        uint64_t stream = load64(job->codes + (first >> 3)) >> (first & 7);
        for (int m = 0; m < job->books; m++, stream >>= job->bits) {
            const int64_t code = (int64_t)(stream & mask);
            fits &= code < job->size;
            word[m] = m * job->size + code;
        }
        return fits;
    }
    for (int m = 0; m < job->books; m++) {
        const int64_t place = first + (int64_t)m * job->bits;
        const int64_t code = (int64_t)(load64(job->codes + (place >> 3)) >> (place & 7) & mask);
        fits &= code < job->size;
        word[m] = m * job->size + code;
    }
    return fits;
}

INLINE float entry(const char *word, int64_t at, int narrow, float scale) {
    return narrow ? (float)((const int8_t *)word)[at] * scale : ((const float *)word)[at];
}

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(8)));
#define LANES 8

INLINE Floats entries(const char *word, int64_t at, int narrow, float scale) {
    if (narrow) {
        Bytes small;
        memcpy(&small, word + at, sizeof small);
        /* In steps that are one instruction each; GCC takes a wider one apart. */
        const Shorts medium = __builtin_convertvector(small, Shorts);
        return __builtin_convertvector(__builtin_convertvector(medium, Integers), Floats) * scale;
    }
    Floats values;
    memcpy(&values, word + at * sizeof(float), sizeof values);
    return values;
}

/* `vectors` times 8 columns of the sum of the codewords; `vectors` is a constant, so that the sums
 * stay in registers. */
INLINE void sum_block(int books, const char **word, const float *scale, int64_t column,
                      int vectors, int narrow, float *out) {
    Floats total[MOST_VECTORS];
    for (int v = 0; v < vectors; v++)
        total[v] = entries(word[0], column + v * LANES, narrow, scale[0]);
    for (int m = 1; m < books; m++)
        for (int v = 0; v < vectors; v++)
            total[v] += entries(word[m], column + v * LANES, narrow, scale[m]);
    for (int v = 0; v < vectors; v++) memcpy(out + column + v * LANES, &total[v], sizeof *total);
}

INLINE void sum_row(const Job *job, const char **word, const float *scale, int narrow,
                    float *out) {
    int64_t column = 0;
    for (; column + 8 * LANES <= job->width; column += 8 * LANES)
        sum_block(job->books, word, scale, column, 8, narrow, out);
    if (column + 5 * LANES <= job->width) {
        sum_block(job->books, word, scale, column, 5, narrow, out);
        column += 5 * LANES;
    }
    for (; column + 2 * LANES <= job->width; column += 2 * LANES)
        sum_block(job->books, word, scale, column, 2, narrow, out);
    if (column + LANES <= job->width) {
        sum_block(job->books, word, scale, column, 1, narrow, out);
        column += LANES;
    }
    for (; column < job->width; column++) {
        float total = entry(word[0], column, narrow, scale[0]);
        for (int m = 1; m < job->books; m++) total += entry(word[m], column, narrow, scale[m]);
        out[column] = total;
    }
}

INLINE void join_row(const Job *job, const char **word, const float *scale, int narrow,
                     float *out) {
    for (int m = 0; m < job->books; m++, out += job->width) {
        int64_t column = 0;
        for (; column + LANES <= job->width; column += LANES) {
            const Floats values = entries(word[m], column, narrow, scale[m]);
            memcpy(out + column, &values, sizeof values);
        }
        for (; column < job->width; column++) out[column] = entry(word[m], column, narrow, scale[m]);
    }
}

INLINE void look_up(Job *job, int64_t begin, int64_t end, int wide, int narrow, int product) {
    int64_t number[MOST_CODEBOOKS];
    const char *word[MOST_CODEBOOKS];
    float scale[MOST_CODEBOOKS];
    const int64_t word_bytes = job->width * (narrow ? 1 : (int64_t)sizeof(float));
    const int64_t dim = job->product ? job->width * job->books : job->width;
    const int64_t row_bits = (int64_t)job->bits * job->books;
    for (int64_t i = begin; i < end; i++) {
        const int64_t id = id_at(job, i, wide);
        float *out = job->out + i * dim;
        if (i + AHEAD < end && row_bits) {
            /* An address that is out of range is only a hint that is not followed. */
            const int64_t next = id_at(job, i + AHEAD, wide);
            PREFETCH((const char *)((uintptr_t)job->codes + (uintptr_t)((next * row_bits) >> 3)));
        }
        if (id < 0 || id >= job->rows) {
            job->bad = id;
            job->failed = 1;
            return;
        }
        if (id == job->zero_id) {
            memset(out, 0, dim * sizeof(float));
            continue;
        }
        if (!read_codes(job, id, number)) {
            job->bad = id;
            job->failed = 1;
            return;
        }
        for (int m = 0; m < job->books; m++) {
            word[m] = job->words + number[m] * word_bytes;
            scale[m] = narrow ? scale_at(job, number[m]) : 1.0f;
        }
        if (product)
            join_row(job, word, scale, narrow, out);
        else
            sum_row(job, word, scale, narrow, out);
    }
}

DISPATCHED static void look_up_part(Job *job, int64_t begin, int64_t end) {
    const int kind = (job->wide ? 4 : 0) | (job->narrow ? 2 : 0) | (job->product ? 1 : 0);
    switch (kind) {
        case 0: look_up(job, begin, end, 0, 0, 0); break;
        case 1: look_up(job, begin, end, 0, 0, 1); break;
        case 2: look_up(job, begin, end, 0, 1, 0); break;
        case 3: look_up(job, begin, end, 0, 1, 1); break;
        case 4: look_up(job, begin, end, 1, 0, 0); break;
        case 5: look_up(job, begin, end, 1, 0, 1); break;
        case 6: look_up(job, begin, end, 1, 1, 0); break;
        case 7: look_up(job, begin, end, 1, 1, 1); break;
    }
}

/* Gradient of the codebooks begin..end: each is one thread's alone, and sums in the order of ids. */
DISPATCHED static void collect_part(Job *job, int64_t begin, int64_t end) {
    const int64_t dim = job->product ? job->width * job->books : job->width;
    const uint64_t mask = ((uint64_t)1 << job->bits) - 1;
    for (int64_t i = 0; i < job->count; i++) {
        const int64_t id = id_at(job, i, job->wide);
        if (id == job->skip_id) continue;
        if (id < 0 || id >= job->rows) {
            job->bad = id;
            job->failed = 1;
            return;
        }
        for (int64_t m = begin; m < end; m++) {
            int64_t word = id;
            if (job->bits) {
                const int64_t place = (id * job->books + m) * job->bits;
                word = (int64_t)(load64(job->codes + (place >> 3)) >> (place & 7) & mask);
            }
            if (word >= job->size) {
                job->bad = id;
                job->failed = 1;
                return;
            }
            word += m * job->size;
            const float *from = job->grad + i * dim + (job->product ? m * job->width : 0);
            float *to = job->out + word * job->width;
            for (int64_t j = 0; j < job->width; j++) to[j] += from[j];
        }
    }
}

/* Tier and place of rows, see mec_embed.tiers.TierMap. The map is in `codes` (bitmap), `words`
 * (starts of runs) and `scales` (popular rows before a run or block); `size` is the number of runs.
 * The flag of each id is written to `flags`, its place to `places`. */
INLINE void find_in_runs(const Job *job, int64_t id, uint8_t *flag, int64_t *place) {
    const int64_t *starts = (const int64_t *)job->words, *before = (const int64_t *)job->scales;
    int64_t run = 0;
    while (run + 1 < job->size && starts[run + 1] <= id) run++;
    *flag = !(run & 1);
    *place = id - (*flag ? starts[run] - before[run] : before[run]);
}

INLINE void find_in_bitmap(const Job *job, int64_t id, uint8_t *flag, int64_t *place) {
    const int64_t block = id / BLOCK_ROWS, within = id % BLOCK_ROWS;
    uint64_t half[2];
    memcpy(half, job->codes + block * (BLOCK_ROWS / 8), sizeof half);
    const uint64_t own = half[within >> 6];
    int64_t rank = ((const int32_t *)job->scales)[block];
    if (within >> 6) rank += __builtin_popcountll(half[0]);
    rank += __builtin_popcountll(own & (((uint64_t)1 << (within & 63)) - 1));
    *flag = own >> (within & 63) & 1;
    *place = *flag ? rank : id - rank;
}

DISPATCHED static void find_tiers_part(Job *job, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        const int64_t id = id_at(job, i, job->wide);
        if (id < 0 || id >= job->rows) {
            job->bad = id;
            job->failed = 1;
            return;
        }
        if (job->size)
            find_in_runs(job, id, job->flags + i, job->places + i);
        else
            find_in_bitmap(job, id, job->flags + i, job->places + i);
    }
}

typedef void (*Part)(Job *, int64_t, int64_t);

/* Threads that sleep between jobs: a second OpenMP runtime would spin against torch's. */
#if HAVE_THREADS
#define MOST_THREADS 64
static struct {
    pthread_mutex_t busy, lock;
    pthread_cond_t wake, done;
    int threads, running;
    unsigned long round;
    Part part;
    Job *job;
    int64_t next, total, step;
    int wanted;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static void take_parts(void) {
    Job own = *pool.job; /* what a part reports is its own until the end */
    for (;;) {
        const int64_t begin = __atomic_fetch_add(&pool.next, pool.step, __ATOMIC_RELAXED);
        if (begin >= pool.total || own.failed) break;
        const int64_t end = begin + pool.step;
        pool.part(&own, begin, end < pool.total ? end : pool.total);
    }
    if (own.failed) {
        pthread_mutex_lock(&pool.lock);
        pool.job->failed = 1;
        pool.job->bad = own.bad;
        pthread_mutex_unlock(&pool.lock);
    }
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

static void run_parts(Part part, Job *job, int64_t total, int64_t step, int threads) {
    const int64_t parts = (total + step - 1) / step;
    if (threads > parts) threads = (int)parts;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    /* Another Python thread has the pool: do without. */
    if (threads < 2 || pthread_mutex_trylock(&pool.busy)) {
        part(job, 0, total);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    while (pool.threads < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)pool.threads)) break;
        pthread_detach(thread);
        pool.threads++;
    }
    pool.part = part;
    pool.job = job;
    pool.next = 0;
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
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.busy);
}
#else
static void run_parts(Part part, Job *job, int64_t total, int64_t step, int threads) {
    part(job, 0, total);
}
#endif

static int read_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted,
                         long long *values) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", wanted, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < wanted; i++) {
        values[i] = PyLong_AsLongLong(args[i]);
        if (values[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

#define ADDRESS(value) ((void *)(uintptr_t)(value))

static int fill_job(Job *job, const long long *v) {
    memset(job, 0, sizeof *job);
    job->ids = ADDRESS(v[0]);
    job->wide = v[1] == 8;
    job->count = v[2];
    job->rows = v[3];
    job->codes = ADDRESS(v[4]);
    job->bits = (int)v[5];
    job->books = (int)v[6];
    job->size = v[7];
    job->width = v[8];
    job->product = (int)v[9];
    if (job->books < 1 || job->books > MOST_CODEBOOKS || job->bits < 0 || job->bits > 16) {
        PyErr_SetString(PyExc_ValueError, "more codebooks or bits than the kernel takes");
        return -1;
    }
    return 0;
}

/* ids, bytes an id, count, rows, codes, bits, books, size, width, product,
 * words, narrow, scales, zero id, out, threads -> an id that is no row, or whose codes are
 * damaged, or None */
static PyObject *lookup(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[16];
    Job job;
    if (read_integers(args, given, 16, v) || fill_job(&job, v)) return NULL;
    job.words = ADDRESS(v[10]);
    job.narrow = (int)v[11];
    job.scales = ADDRESS(v[12]);
    job.zero_id = v[13];
    job.out = ADDRESS(v[14]);
    Py_BEGIN_ALLOW_THREADS
    run_parts(look_up_part, &job, job.count, CHUNK, (int)v[15]);
    Py_END_ALLOW_THREADS
    if (job.failed) return PyLong_FromLongLong(job.bad);
    Py_RETURN_NONE;
}

/* ids, bytes an id, count, rows, codes, bits, books, size, width, product,
 * grad, id without gradient, out (zeroed), threads -> as lookup */
static PyObject *lookup_backward(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[14];
    Job job;
    if (read_integers(args, given, 14, v) || fill_job(&job, v)) return NULL;
    job.grad = ADDRESS(v[10]);
    job.skip_id = v[11];
    job.out = ADDRESS(v[12]);
    Py_BEGIN_ALLOW_THREADS
    run_parts(collect_part, &job, job.books, 1, (int)v[13]);
    Py_END_ALLOW_THREADS
    if (job.failed) return PyLong_FromLongLong(job.bad);
    Py_RETURN_NONE;
}

/* ids, bytes an id, count, rows, bitmap, runs, starts, before, flags, places, threads
 * -> an id that is no row, or None */
static PyObject *tiers(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[11];
    Job job;
    if (read_integers(args, given, 11, v)) return NULL;
    memset(&job, 0, sizeof job);
    job.ids = ADDRESS(v[0]);
    job.wide = v[1] == 8;
    job.count = v[2];
    job.rows = v[3];
    job.codes = ADDRESS(v[4]);
    job.size = v[5];
    job.words = ADDRESS(v[6]);
    job.scales = ADDRESS(v[7]);
    job.flags = ADDRESS(v[8]);
    job.places = ADDRESS(v[9]);
    Py_BEGIN_ALLOW_THREADS
    run_parts(find_tiers_part, &job, job.count, CHUNK, (int)v[10]);
    Py_END_ALLOW_THREADS
    if (job.failed) return PyLong_FromLongLong(job.bad);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"tiers", (PyCFunction)(void (*)(void))tiers, METH_FASTCALL, "Tier and place of rows."},
    {"lookup", (PyCFunction)(void (*)(void))lookup, METH_FASTCALL, "Decode rows."},
    {"lookup_backward", (PyCFunction)(void (*)(void))lookup_backward, METH_FASTCALL,
     "Gradient of the codebooks."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods};

PyMODINIT_FUNC PyInit__native(void) {
#if HAVE_THREADS
    pthread_atfork(NULL, NULL, forget_threads);
#endif
    return PyModule_Create(&module);
}
