/* Calls of lookups: how a call is best done, see lookup.h for what is done. */
#include "lookup.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define CHUNK 512      /* ids that a thread takes at once */
#define MOST_WIDENED (1 << 14) /* cache lines of codebooks that are worth widening for a call */
#define WIDENING (1 << 14) /* what rounds cost besides, see should_widen */
#define MOST_UNPACKED (8 << 20) /* bytes of all rows of a table that are worth making for a call */
/* Columns from which on sums of whole numbers take less time than floats. */
#define LEAST_WHOLE (longest_vectors >= 64 ? 25 : 16)
#define MOST_KEPT 64 /* pieces of memory for widened codebooks that are kept for the next call */
#define FRESH_BYTES (32 << 20) /* of an output for which the C library asks for pages every time */
#define HUGE_PAGE (2 << 20)

/* For the processor that this is. */
static const Parts *parts(void) { return VARIANT(&parts); }

int read_plan(PyObject *packed, Plan *plan) {
    if (read_packed(packed, plan, sizeof *plan)) return -1;
    for (int64_t t = 0; t < plan->tiers && t < 2; t++) {
        const Table *table = plan->table + t;
        if (table->books < 1 || table->books > MOST_CODEBOOKS || table->bits < 0 ||
            table->bits > 16) {
            PyErr_SetString(PyExc_ValueError, "more codebooks or bits than the kernel takes");
            return -1;
        }
    }
    return 0;
}

/* Memory of earlier calls that widened codebooks, of each of their threads: fresh pages cost more
 * than what is put on them. */
typedef struct {
    int64_t bytes;
} Memory;

static Memory *kept[MOST_KEPT];

/* Where a thread looks first, and leaves its own: what another one wrote last would have to come from
 * its cache, if only to be written anew. */
static Memory **place_of_thread(int i) {
    static unsigned threads;
    static _Thread_local int own = -1;
    if (own < 0) own = (int)(__atomic_fetch_add(&threads, 1, __ATOMIC_RELAXED) % MOST_KEPT);
    return kept + (own + i) % MOST_KEPT;
}

static Memory *take_memory(int64_t bytes) {
    Memory *memory = NULL;
    for (int i = 0; !memory && i < MOST_KEPT; i++)
        memory = __atomic_exchange_n(place_of_thread(i), NULL, __ATOMIC_ACQ_REL);
    if (memory && memory->bytes >= bytes) return memory;
    free(memory);
    memory = malloc(sizeof *memory + bytes);
    if (memory) memory->bytes = bytes;
    return memory;
}

static void give_memory(Memory *memory) {
    for (int i = 0; memory && i < MOST_KEPT; i++)
        memory = __atomic_exchange_n(place_of_thread(i), memory, __ATOMIC_ACQ_REL);
    free(memory);
}

/* Codewords of a table that are whole numbers (lookup.h). */
typedef struct {
    int least;        /* exponent of their unit; 0: they are none, or floats take no more time */
    int64_t together; /* rows whose sum fits 16 bits */
    uint32_t factors[MOST_CODEBOOKS]; /* as Whole has them */
} Numbers;

/* Whether codewords are whole numbers whose sums take less time than floats, by a look at two scales of
 * each codebook: there are as many as codewords. */
static int seem_whole(const Table *table) {
    const int64_t books = table->books, size = table->size;
    if (longest_vectors < 32 || table->kind != INT8 || table->product || books == 1 ||
        table->width < LEAST_WHOLE || books * size * table->width > INT32_MAX)
        return 0;
    for (int64_t m = 0; m < books; m++) {
        const int first = exponent_of(table, m * size);
        if (!first || first != exponent_of(table, (m + 1) * size - 1)) return 0;
    }
    return 1;
}

/* Fills in `all`; its `least`. */
static int whole_numbers(const Table *table, Numbers *all) {
    const int64_t books = table->books, size = table->size;
    int exponent[MOST_CODEBOOKS], least = 1 << 8, most = 0, sum = 0;
    all->least = 0;
    if (!seem_whole(table)) return 0;
    for (int64_t m = 0; m < books; m++) {
        const uint16_t *own = (const uint16_t *)ADDRESS(table->scales) + m * size;
        if (memcmp(own, own + 1, (size - 1) * sizeof *own)) return 0;
        exponent[m] = exponent_of(table, m * size);
        least = exponent[m] < least ? exponent[m] : least;
        most = exponent[m] > most ? exponent[m] : most;
    }
    if (least > MOST_EXPONENT || most - least > MOST_SHIFT) return 0;
    for (int64_t m = 0; m < books; m++) {
        const int shift = exponent[m] - least, next = exponent[(m + 1) % books] - least;
        all->factors[m] = 0x10001u << shift | 0x1000100u << next;
        sum += LARGEST << shift;
    }
    all->together = INT16_MAX / sum;
    if (all->together > 1) all->together &= ~(int64_t)1; /* rows are added in pairs */
    return all->least = all->together ? least : 0;
}

/* Cache lines of the codebooks of a table as floats. */
static int64_t widened_lines(const Table *table) {
    return table->books * table->size * lines_of(table->width);
}

/* Whether float32 codewords of a job stay where they are, too. Where ids are many, those of several
 * blocks of columns take less time side by side, and those of bags where each begins a cache line. */
static int floats_stay(const Job *job, const Table *table) {
    const int64_t words = table->books * table->size, width = table->width;
    const int one_block = width <= FLOAT_LINES * LINE_LANES;
    if (longest_vectors < 32 || table->kind != FLOAT32 || width % LANES ||
        words * width > INT32_MAX / 4 || (job->bags && job->zero_id >= 0))
        return 0;
    return job->count < (one_block ? 8 : 2) * words || widened_lines(table) > MOST_WIDENED ||
           (one_block && (!job->bags || width % LINE_LANES == 0));
}

/* What it costs to prepare a codeword, in parts of 1/320 of what a codeword of an id then gains, as
 * measured: of whole numbers a look at its scale; widening is less of two codebooks, and where
 * codewords are converted. Below 0: they are too many. */
static int64_t widening_cost(const Job *job, const Table *table) {
    if (floats_stay(job, table)) return 0;
    if (seem_whole(table)) return table->width % LANES ? 116 : 16;
    if (widened_lines(table) > MOST_WIDENED) return -1;
    return (table->width + 32) * (table->books <= 2 ? 3 : table->kind == FLOAT32 ? 9 : 6);
}

/* Whether rounds (lookup.h) pay for so many ids of a job: rows are sums, and ids are many. */
static int should_widen(const Job *job, int64_t count) {
    const Plan *plan = job->plan;
    int64_t cost = 0, books = 0;
    for (int64_t t = 0; t < plan->tiers; t++) books += plan->table[t].books;
    if (job->mode == MAX || 320 * count * books < WIDENING) return 0;
    for (int64_t t = 0; t < plan->tiers; t++) {
        const Table *table = plan->table + t;
        const int64_t each = widening_cost(job, table);
        if (each < 0 || (table->product && table->books > 1)) return 0;
        cost += table->books * table->size * each;
    }
    return 320 * count * books >= cost * plan->tiers + WIDENING;
}

/* Lines of a block of columns, in blocks of about one size: as many as registers hold. Of floats more
 * than FLOAT_LINES cost more than a further pass. */
static int64_t choose_lines(const Plan *plan, int whole) {
    const int64_t all = lines_of(plan->dim), eights = (plan->dim + LANES - 1) / LANES;
    const int64_t most = whole && eights % (2 * MOST_LINES) == 0 ? MOST_LINES : FLOAT_LINES;
    const int64_t blocks = (all + most - 1) / most;
    return (all + blocks - 1) / blocks;
}

/* Bytes from one int8 codeword to the next where they are read by eights. */
static int64_t padded(const Table *table) { return (table->width + LANES - 1) / LANES * LANES; }

/* Bytes of memory that the codewords of a table take for a job, by blocks of `lines`; below 0 where
 * they are too many. */
static int64_t widened_bytes(const Job *job, const Table *table, const Numbers *numbers,
                             int64_t lines) {
    const int64_t words = table->books * table->size;
    if (numbers->least)
        return block_bytes(table->books, sizeof *numbers->factors) +
               (table->width % LANES ? block_bytes(words, padded(table)) : 0);
    if (floats_stay(job, table)) return 0;
    /* Scales that seemed whole, and are not. */
    if (widened_lines(table) > MOST_WIDENED) return -1;
    return block_bytes(words, lines * LINE) * ((lines_of(table->width) + lines - 1) / lines);
}

/* Codewords that are whole numbers: they stay where they are, if eights of columns end with them. */
static void use_numbers(Job *job, int64_t tier, Table *table, const Numbers *numbers, char *to) {
    const int64_t words = table->books * table->size, width = table->width, each = padded(table);
    const char *from = ADDRESS(table->words);
    memcpy(to, numbers->factors, table->books * sizeof *numbers->factors);
    job->factors[tier] = (const uint32_t *)to;
    job->unit[tier] = as_float((uint32_t)numbers->least << 23);
    job->together = numbers->together;
    job->step[tier] = each;
    job->block[tier] = job->lines * LINE_LANES;
    if (width == each) return;
    to += block_bytes(table->books, sizeof *numbers->factors);
    table->words = (int64_t)(uintptr_t)to;
    for (int64_t w = 0; w < words; w++, to += each) {
        memcpy(to, from + w * width, width);
        memset(to + width, 0, each - width);
    }
}

static void use_floats(Job *job, int64_t tier, Table *table, char *to) {
    const int stay = floats_stay(job, table);
    job->step[tier] = stay ? stride_of(table) : job->lines * LINE;
    job->block[tier] =
        stay ? job->lines * LINE : block_bytes(table->books * table->size, job->lines * LINE);
    job->unit[tier] = 0.0f;
    if (stay) return;
    parts()->widen(table, job->lines, to);
    table->words = (int64_t)(uintptr_t)to;
}

/* Widen the codebooks of a job's plan that do not stay where they are; memory to be given back, or NULL
 * where there is none, or where that would be too much. */
static Memory *widen_plan(Job *job, Plan *plan) {
    Numbers numbers[2];
    int64_t bytes[2], all = LINE;
    int whole = 1;
    for (int64_t t = 0; t < plan->tiers; t++)
        whole &= whole_numbers(plan->table + t, numbers + t) != 0;
    job->lines = choose_lines(plan, whole);
    for (int64_t t = 0; t < plan->tiers; t++) {
        bytes[t] = widened_bytes(job, plan->table + t, numbers + t, job->lines);
        if (bytes[t] < 0) return NULL;
        all += bytes[t];
    }
    Memory *memory = take_memory(all);
    if (!memory) return NULL;
    char *to = (char *)(memory + 1);
    to += LINE - (uintptr_t)to % LINE;
    for (int64_t t = 0; t < plan->tiers; to += bytes[t++]) {
        if (numbers[t].least)
            use_numbers(job, t, plan->table + t, numbers + t, to);
        else
            use_floats(job, t, plan->table + t, to);
    }
    return memory;
}

typedef struct {
    Part part;
    const Job *job;
    const Plan *plan;
    int64_t total;
} Widening;

/* Part of a job, by rounds, with codebooks that do not stay where they are widened for it alone: what
 * another thread has just written takes longer to read than to write anew. */
static int64_t widening_part(const void *what, int64_t begin, int64_t end) {
    const Widening *all = what;
    Part part = all->part;
    Plan plan = *all->plan;
    Job job = *all->job;
    job.plan = &plan;
    const int64_t count = (int64_t)((double)job.count * (end - begin) / all->total);
    Memory *memory = should_widen(&job, count) ? widen_plan(&job, &plan) : NULL;
    if (memory) part = part == parts()->rows ? parts()->wide_rows : parts()->wide_bags;
    const int64_t failed = part(&job, begin, end);
    give_memory(memory);
    return failed;
}

/* Run a job with the codewords of each id, by rounds where they pay for each share of the threads that
 * have one: even shares, but for what a round takes at most. Where they do not, threads take small
 * parts; a part that is the only one, as when others hold the threads, may still be large enough. */
static int64_t run_words(Part part, const Job *job, const Plan *plan, int64_t total, int64_t step,
                         int threads) {
    if (!total || !should_widen(job, job->count)) return run_parts(part, job, total, step, threads);
    const Widening all = {part, job, plan, total};
    const int64_t pieces = (total + step - 1) / step, shares = threads < pieces ? threads : pieces;
    const int64_t of_step = step * ROUND / CHUNK, round = of_step ? of_step : 1;
    const int64_t rounds = (total + round - 1) / round;
    if (should_widen(job, job->count / shares)) step = (rounds + shares - 1) / shares * round;
    return run_parts(widening_part, &all, total, step, threads);
}

/* Whether ids are so many for their table that all its rows are made first, each once. In halves
 * of a codeword's addition, as measured: to read a row that is there costs `read`, to make one
 * `write` besides its codewords. */
static int should_unpack(const Job *job, int64_t read, int64_t write) {
    const Plan *plan = job->plan;
    int64_t rows = 0, words = 0;
    if (job->mode == MAX || !plan->rows) return 0;
    for (int64_t t = 0; t < plan->tiers; t++) {
        rows += plan->table[t].rows;
        words += plan->table[t].rows * plan->table[t].books;
    }
    /* Each takes whole cache lines, be it one column. */
    const int64_t lines = lines_of(plan->dim);
    if (plan->rows * lines > MOST_UNPACKED / LINE) return 0;
    return job->count / plan->rows * (2 * words - read * rows) > 2 * words + write * rows;
}

/* Make all rows of a job's plan, which consists of them from then on: codewords of one codebook,
 * with zeros after the last. To be freed; NULL where there is no memory, or where codes are
 * damaged, be it of rows that nobody asks for. */
static void *unpack_plan(Job *job, Plan *plan, int threads) {
    const int64_t rows = plan->rows, dim = plan->dim;
    const int64_t lines = lines_of(dim), pitch = lines * LINE_LANES;
    char *memory = malloc((rows + 1) * lines * LINE + LINE + rows * sizeof(int32_t));
    if (!memory) return NULL;
    float *out = (float *)(memory + LINE - (uintptr_t)memory % LINE);
    int32_t *ids = (int32_t *)(out + (rows + 1) * pitch);
    for (int64_t i = 0; i < rows; i++) {
        ids[i] = (int32_t)i;
        memset(out + i * pitch + dim, 0, (pitch - dim) * sizeof(float));
    }
    memset(out + rows * pitch, 0, lines * LINE);
    Plan packed = *plan;
    Job all = {.plan = &packed, .ids = {(const char *)ids, 0, 1}, .count = rows, .zero_id = -1};
    all.out = out;
    all.pitch = pitch;
    if (run_words(parts()->rows, &all, &packed, rows, CHUNK, threads)) {
        free(memory);
        return NULL;
    }
    plan->tiers = 1;
    plan->table[0] = (Table){.words = (int64_t)(uintptr_t)out, .rows = rows, .books = 1};
    plan->table->size = rows;
    plan->table->width = dim;
    job->lines = lines < FLOAT_LINES ? lines : FLOAT_LINES;
    job->step[0] = lines * LINE;
    job->block[0] = job->lines * LINE;
    return memory;
}

/* Ask for huge pages for a large output, as numpy does for its arrays: fetching fresh pages of 4 KB
 * takes several times as long as writing to them. */
static void expect_pages(const Job *job, int64_t rows) {
#if defined(MADV_HUGEPAGE)
    const int64_t bytes = rows * job->plan->dim * (int64_t)sizeof(float);
    const uintptr_t begin = (uintptr_t)job->out, mask = ~(uintptr_t)(HUGE_PAGE - 1);
    const uintptr_t from = (begin + HUGE_PAGE - 1) & mask, to = (begin + bytes) & mask;
    /* A hint: where it is refused, pages are small. */
    if (bytes >= FRESH_BYTES) madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
}

/* Run a job on rows or bags, in the way that costs least. */
static int64_t run_job(Part part, Job *job, Plan *plan, int64_t total, int64_t step, int threads) {
    const int bags = part == parts()->bags, pays = should_unpack(job, bags ? 2 : 6, bags ? 8 : 10);
    expect_pages(job, total);
    void *rows = pays ? unpack_plan(job, plan, threads) : NULL;
    if (!rows) return run_words(part, job, plan, total, step, threads);
    part = !bags ? parts()->copy_rows : job->weights ? parts()->wide_bags : parts()->unpacked_bags;
    const int64_t failed = run_parts(part, job, total, step, threads);
    free(rows);
    return failed;
}

int64_t decode_ids(Plan *plan, int64_t ids, int bytes, int64_t stride, int64_t count,
                   int64_t zero_id, int64_t out, int threads) {
    Job job = {.plan = plan, .ids = {ADDRESS(ids), bytes == 8, stride}, .count = count};
    job.zero_id = zero_id;
    job.out = ADDRESS(out);
    job.pitch = plan->dim;
    /* Too short for another Python thread to gain from the lock. */
    if (count <= CHUNK) return run_job(parts()->rows, &job, plan, count, CHUNK, 1);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_job(parts()->rows, &job, plan, count, CHUNK, threads);
    Py_END_ALLOW_THREADS
    return failed;
}

/* plan, ids, bytes an id, count, zero id, out, threads
 * -> 0, or 1 where an id is no row or its codes are damaged */
PyObject *rows(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[6];
    Plan plan;
    if (read_integers(args + 1, given - 1, 6, v) || read_plan(args[0], &plan)) return NULL;
    return PyLong_FromLongLong(
        decode_ids(&plan, v[0], (int)v[1], 1, v[2], v[3], v[4], (int)v[5]));
}

/* A job on bags: ids, bytes an id, count, id left out, offsets or 0, bytes an offset, bags, ids of a
 * bag, weights or 0, mode (0 sum, 1 mean, 2 max). */
static Job read_bags(const Plan *plan, const long long *v) {
    Job job = {.plan = plan, .ids = {ADDRESS(v[0]), v[1] == 8, 1}, .count = v[2]};
    job.zero_id = v[3];
    job.offsets = (Ids){ADDRESS(v[4]), v[5] == 8, 1};
    job.bags = v[6];
    job.length = v[7];
    job.weights = ADDRESS(v[8]);
    job.mode = (int)v[9];
    return job;
}

int64_t reduce_ids(Plan *plan, const long long *v, int64_t out, int threads) {
    Job job = read_bags(plan, v);
    job.out = ADDRESS(out);
    const int64_t each = job.bags ? job.count / job.bags + 1 : 1, step = CHUNK / each + 1;
    if (job.count <= CHUNK && job.bags <= CHUNK)
        return run_job(parts()->bags, &job, plan, job.bags, step, 1);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_job(parts()->bags, &job, plan, job.bags, step, threads);
    Py_END_ALLOW_THREADS
    return failed;
}

/* plan, what read_bags takes, out, threads
 * -> 0, or 1 where an id is no row, its codes are damaged, or offsets do not fit */
PyObject *bags(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[12];
    Plan plan;
    if (read_integers(args + 1, given - 1, 12, v) || read_plan(args[0], &plan)) return NULL;
    return PyLong_FromLongLong(reduce_ids(&plan, v, v[10], (int)v[11]));
}

/* plan, ids, bytes an id, count, id without gradient, grad, out (zeroed), threads -> as rows */
PyObject *gradient(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[7];
    Plan plan;
    if (read_integers(args + 1, given - 1, 7, v) || read_plan(args[0], &plan)) return NULL;
    Job job = {.plan = &plan, .ids = {ADDRESS(v[0]), v[1] == 8, 1}, .count = v[2]};
    job.zero_id = v[3];
    job.grad = ADDRESS(v[4]);
    job.out = ADDRESS(v[5]);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_parts(parts()->collect, &job, plan.table->books, 1, (int)v[6]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}

/* plan, what read_bags takes (but mode 2), grad of the bags, out (zeroed), threads -> as bags */
PyObject *bags_gradient(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[13];
    Plan plan;
    if (read_integers(args + 1, given - 1, 13, v) || read_plan(args[0], &plan)) return NULL;
    Job job = read_bags(&plan, v);
    job.grad = ADDRESS(v[10]);
    job.out = ADDRESS(v[11]);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_parts(parts()->collect_bags, &job, plan.table->books, 1, (int)v[12]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}

/* plan, ids, bytes an id, count, flags, places, threads -> 0, or 1 where an id is no row */
PyObject *tiers(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[6];
    Plan plan;
    if (read_integers(args + 1, given - 1, 6, v) || read_plan(args[0], &plan)) return NULL;
    Job job = {.plan = &plan, .ids = {ADDRESS(v[0]), v[1] == 8, 1}, .count = v[2]};
    job.flags = ADDRESS(v[3]);
    job.places = ADDRESS(v[4]);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_parts(parts()->tiers, &job, job.count, CHUNK, (int)v[5]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}
