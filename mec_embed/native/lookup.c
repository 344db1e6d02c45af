/* Rows and bags of compressed tables, and the gradient of their codebooks.
 *
 * Tensors come as addresses; Python has checked dtypes, shapes and contiguity. The codes of a row
 * are a run of bits in one little-endian stream, 8 zero bytes end the stream, so 64 bits may be
 * loaded from where any row starts. Sums of codewords are made in the order of the codebooks,
 * without fused multiply-adds, so that rows equal those of the plain-torch reference bit for bit.
 */
#include "native.h"

#include <stdlib.h>

#define MOST_CODEBOOKS 256
#define MOST_VECTORS 8 /* summed in registers */
#define BLOCK 32       /* rows whose codes are asked for before the first of them is decoded */
#define BLOCK_ROWS 128 /* of a bitmap, with one count */
#define CHUNK 512      /* ids that a thread takes at once */
#define MOST_WIDENED (1 << 18) /* entries of codebooks that are worth widening for a call */

enum { FLOAT32, INT8, FLOAT16, BFLOAT16 }; /* kinds of codewords */

/* Where a row is. */
typedef struct {
    const Table *table; /* NULL: it reads as zeros */
    int64_t row;
} Place;

INLINE int64_t id_at(const void *ids, int64_t i, int wide) {
    return wide ? ((const int64_t *)ids)[i] : (int64_t)((const int32_t *)ids)[i];
}

INLINE uint64_t load64(const uint8_t *from) {
    uint64_t value;
    memcpy(&value, from, 8);
    return value;
}

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* ---- Where rows are ---- */

INLINE int in_runs(const Plan *plan, int64_t id, int64_t *place) {
    const int64_t *starts = ADDRESS(plan->starts), *before = ADDRESS(plan->before);
    int64_t run = 0;
    while (run + 1 < plan->runs && starts[run + 1] <= id) run++;
    const int popular = !(run & 1);
    *place = id - (popular ? starts[run] - before[run] : before[run]);
    return popular;
}

INLINE int in_bitmap(const Plan *plan, int64_t id, int64_t *place) {
    const int64_t block = id / BLOCK_ROWS, within = id % BLOCK_ROWS;
    uint64_t half[2];
    memcpy(half, (const uint8_t *)ADDRESS(plan->bitmap) + block * (BLOCK_ROWS / 8), sizeof half);
    const uint64_t own = half[within >> 6];
    int64_t rank = ((const int32_t *)ADDRESS(plan->before))[block];
    if (within >> 6) rank += __builtin_popcountll(half[0]);
    rank += __builtin_popcountll(own & (((uint64_t)1 << (within & 63)) - 1));
    const int popular = own >> (within & 63) & 1;
    *place = popular ? rank : id - rank;
    return popular;
}

INLINE int is_popular(const Plan *plan, int64_t id, int64_t *place) {
    return plan->runs ? in_runs(plan, id, place) : in_bitmap(plan, id, place);
}

/* The places of up to BLOCK ids, and their codes on the way into the cache; 0 where one is no row. */
INLINE int find_places(const Plan *plan, const void *ids, int wide, int64_t count, int64_t zero_id,
                       Place *place) {
    if (plan->tiers == 2 && !plan->runs)
        for (int64_t i = 0; i < count; i++) {
            const int64_t block = id_at(ids, i, wide) / BLOCK_ROWS;
            PREFETCH((uintptr_t)plan->bitmap + (uintptr_t)(block * (BLOCK_ROWS / 8)));
            PREFETCH((uintptr_t)plan->before + (uintptr_t)(block * 4));
        }
    for (int64_t i = 0; i < count; i++) {
        const int64_t id = id_at(ids, i, wide);
        if (id < 0 || id >= plan->rows) return 0;
        if (id == zero_id) {
            place[i].table = NULL;
            continue;
        }
        int64_t row = id;
        const Table *table = plan->table;
        if (plan->tiers == 2 && !is_popular(plan, id, &row)) table++;
        if (table->one_row) row = 0;
        if (row >= table->rows) return 0; /* a map that contradicts the tables */
        place[i].table = table;
        place[i].row = row;
        const int64_t row_bits = table->bits * table->books;
        PREFETCH((uintptr_t)table->codes + (uintptr_t)((row * row_bits) >> 3));
    }
    return 1;
}

/* ---- Codes ---- */

/* Numbers of the codewords of a row, among those of all codebooks; 0 if one does not exist, as in
 * damaged codes of codebooks whose size is no power of two. */
INLINE int read_codes(const Table *table, int64_t row, int64_t *word) {
    if (!table->bits) {
        word[0] = row;
        return row < table->size;
    }
    int fits = 1;
    const uint8_t *codes = ADDRESS(table->codes);
    const int64_t bits = table->bits, books = table->books, size = table->size;
    const int64_t first = row * bits * books;
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    if (bits * books <= 57) {
        uint64_t stream = load64(codes + (first >> 3)) >> (first & 7);
        for (int64_t m = 0; m < books; m++, stream >>= bits) {
            const int64_t code = (int64_t)(stream & mask);
            fits &= code < size;
            word[m] = m * size + code;
        }
        return fits;
    }
    for (int64_t m = 0; m < books; m++) {
        const int64_t place = first + m * bits;
        const int64_t code = (int64_t)(load64(codes + (place >> 3)) >> (place & 7) & mask);
        fits &= code < size;
        word[m] = m * size + code;
    }
    return fits;
}

/* The codewords of a row, and the scale of each; 0 where codes are damaged. */
INLINE int find_words(const Table *table, int64_t row, const char **word, float *scale) {
    int64_t number[MOST_CODEBOOKS];
    if (!read_codes(table, row, number)) return 0;
    const int64_t bytes = table->width * (table->kind == FLOAT32 ? 4 : table->kind == INT8 ? 1 : 2);
    const uint16_t *scales = ADDRESS(table->scales);
    for (int64_t m = 0; m < table->books; m++) {
        word[m] = (const char *)ADDRESS(table->words) + number[m] * bytes;
        if (table->kind == INT8) scale[m] = as_float((uint32_t)scales[number[m]] << 16);
    }
    return 1;
}

/* ---- Codewords ---- */

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(8)));
#define LANES 8

/* Half precision, exactly: the exponent is moved by a product, which also serves subnormals. */
INLINE float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    float value = as_float(rest << 13) * as_float(0x77800000);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (rest >= 0x7c00) bits |= 0x7f800000; /* infinite, or not a number */
    return as_float(bits | sign);
}

INLINE float entry(const char *word, int64_t at, int kind, float scale) {
    switch (kind) {
        case INT8: return (float)((const int8_t *)word)[at] * scale;
        case FLOAT16: return from_half(((const uint16_t *)word)[at]);
        case BFLOAT16: return as_float((uint32_t)((const uint16_t *)word)[at] << 16);
        default: return ((const float *)word)[at];
    }
}

INLINE Floats entries(const char *word, int64_t at, int kind, float scale) {
    Floats values;
    if (kind == INT8) {
        Bytes small;
        memcpy(&small, word + at, sizeof small);
        /* In steps that are one instruction each; GCC takes a wider one apart. */
        const Shorts medium = __builtin_convertvector(small, Shorts);
        return __builtin_convertvector(__builtin_convertvector(medium, Integers), Floats) * scale;
    }
    if (kind == FLOAT32) {
        memcpy(&values, word + at * 4, sizeof values);
        return values;
    }
    Halves halves;
    memcpy(&halves, word + at * 2, sizeof halves);
    Words wide = __builtin_convertvector(halves, Words);
    if (kind == BFLOAT16) {
        wide <<= 16;
        memcpy(&values, &wide, sizeof values);
        return values;
    }
    const Words rest = wide & 0x7fff, moved = rest << 13;
    memcpy(&values, &moved, sizeof values);
    values *= as_float(0x77800000);
    Words bits;
    memcpy(&bits, &values, sizeof bits);
    bits |= (Words)(rest >= 0x7c00) & 0x7f800000;
    bits |= (wide & 0x8000) << 16;
    memcpy(&values, &bits, sizeof values);
    return values;
}

/* `vectors` times 8 columns of the sum of codewords, from what `out` holds on where `more`;
 * `vectors` is a constant, so that the sums stay in registers. */
INLINE void sum_block(int64_t count, const char **word, const float *scale, int64_t column,
                      int vectors, int kind, int more, float *out) {
    Floats total[MOST_VECTORS];
    for (int v = 0; v < vectors; v++) {
        if (more)
            memcpy(&total[v], out + column + v * LANES, sizeof *total);
        else
            total[v] = entries(word[0], column + v * LANES, kind, scale[0]);
    }
    for (int64_t m = more ? 0 : 1; m < count; m++)
        for (int v = 0; v < vectors; v++)
            total[v] += entries(word[m], column + v * LANES, kind, scale[m]);
    for (int v = 0; v < vectors; v++) memcpy(out + column + v * LANES, &total[v], sizeof *total);
}

/* The sum of `count` codewords of `width` columns, added to what `out` holds where `more`. */
INLINE void sum_words(int64_t count, const char **word, const float *scale, int64_t width, int kind,
                      int more, float *out) {
    int64_t column = 0;
    for (; column + 8 * LANES <= width; column += 8 * LANES)
        sum_block(count, word, scale, column, 8, kind, more, out);
    if (column + 5 * LANES <= width) {
        sum_block(count, word, scale, column, 5, kind, more, out);
        column += 5 * LANES;
    }
    for (; column + 2 * LANES <= width; column += 2 * LANES)
        sum_block(count, word, scale, column, 2, kind, more, out);
    if (column + LANES <= width) {
        sum_block(count, word, scale, column, 1, kind, more, out);
        column += LANES;
    }
    for (; column < width; column++) {
        float total = more ? out[column] : entry(word[0], column, kind, scale[0]);
        for (int64_t m = more ? 0 : 1; m < count; m++)
            total += entry(word[m], column, kind, scale[m]);
        out[column] = total;
    }
}

INLINE void join_words(const Table *table, const char **word, const float *scale, int kind,
                       float *out) {
    for (int64_t m = 0; m < table->books; m++, out += table->width) {
        int64_t column = 0;
        for (; column + LANES <= table->width; column += LANES) {
            const Floats values = entries(word[m], column, kind, scale[m]);
            memcpy(out + column, &values, sizeof values);
        }
        for (; column < table->width; column++)
            out[column] = entry(word[m], column, kind, scale[m]);
    }
}

INLINE void put_words(const Table *table, const char **word, const float *scale, int kind,
                      float *out) {
    if (table->product)
        join_words(table, word, scale, kind, out);
    else
        sum_words(table->books, word, scale, table->width, kind, 0, out);
}

/* One row; 0 where its codes are damaged. */
INLINE int decode(const Place *place, int64_t dim, float *out) {
    const char *word[MOST_CODEBOOKS];
    float scale[MOST_CODEBOOKS];
    const Table *table = place->table;
    if (!table) {
        memset(out, 0, dim * sizeof(float));
        return 1;
    }
    if (!find_words(table, place->row, word, scale)) return 0;
    switch (table->kind) {
        case FLOAT32: put_words(table, word, scale, FLOAT32, out); break;
        case INT8: put_words(table, word, scale, INT8, out); break;
        case FLOAT16: put_words(table, word, scale, FLOAT16, out); break;
        default: put_words(table, word, scale, BFLOAT16, out);
    }
    return 1;
}

/* ---- Jobs ---- */

typedef struct {
    const Plan *plan;
    const void *ids, *offsets; /* offsets NULL: bags of `length` ids each */
    int wide, wide_offsets;
    int64_t count, bags, length;
    int64_t zero_id; /* id that reads as zeros, or that bags leave out; -1 for none */
    const float *weights; /* of the ids of a bag, or NULL */
    int mode;
    float *out;
    /* of gradients and of tiers alone */
    const float *grad;
    int64_t skip_id;      /* id that passes no gradient, -1 for none */
    uint8_t *flags;
    int64_t *places;
} Job;

INLINE const void *ids_from(const Job *job, int64_t i) {
    return (const char *)job->ids + i * (job->wide ? 8 : 4);
}

INLINE int64_t decode_rows(const Job *job, int64_t begin, int64_t end, int wide) {
    const int64_t dim = job->plan->dim;
    Place place[BLOCK];
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t count = end - i < BLOCK ? end - i : BLOCK;
        if (!find_places(job->plan, ids_from(job, i), wide, count, job->zero_id, place)) return 1;
        for (int64_t j = 0; j < count; j++)
            if (!decode(place + j, dim, job->out + (i + j) * dim)) return 1;
    }
    return 0;
}

DISPATCHED static int64_t rows_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    return job->wide ? decode_rows(job, begin, end, 1) : decode_rows(job, begin, end, 0);
}

/* ---- Bags ---- */

enum { SUM, MEAN, MAX };

/* Codewords of a bag that are yet to be added up. */
typedef struct {
    const char *word[MOST_CODEBOOKS];
    float scale[MOST_CODEBOOKS];
    int64_t count;
    int started; /* the output holds a sum already */
} Heap;

INLINE void empty_heap(Heap *heap, int64_t width, int kind, float *out) {
    if (!heap->count) return;
    if (heap->started)
        sum_words(heap->count, heap->word, heap->scale, width, kind, 1, out);
    else
        sum_words(heap->count, heap->word, heap->scale, width, kind, 0, out);
    heap->started = 1;
    heap->count = 0;
}

/* Whether rows of all tables are sums of codewords of one kind: bags are then one long sum. */
static int all_alike(const Plan *plan) {
    const Table *one = plan->table, *last = plan->table + plan->tiers - 1;
    return (!one->product || one->books == 1) && (!last->product || last->books == 1) &&
           one->kind == last->kind && one->width == last->width;
}

/* The sum of the rows at `place`; 0 where codes are damaged. */
INLINE int heap_rows(const Place *place, int64_t count, Heap *heap, int64_t width, int kind,
                     float *out) {
    for (int64_t j = 0; j < count; j++) {
        const Table *table = place[j].table;
        if (!table) continue;
        if (heap->count + table->books > MOST_CODEBOOKS) empty_heap(heap, width, kind, out);
        if (!find_words(table, place[j].row, heap->word + heap->count, heap->scale + heap->count))
            return 0;
        heap->count += table->books;
    }
    return 1;
}

INLINE int sum_bag(const Job *job, int64_t begin, int64_t end, int kind, float *out,
                   int64_t *members) {
    const int64_t dim = job->plan->dim;
    Place place[BLOCK];
    Heap heap;
    heap.count = heap.started = 0;
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t count = end - i < BLOCK ? end - i : BLOCK;
        if (!find_places(job->plan, ids_from(job, i), job->wide, count, job->zero_id, place))
            return 0;
        for (int64_t j = 0; j < count; j++) *members += place[j].table != NULL;
        if (!heap_rows(place, count, &heap, dim, kind, out)) return 0;
    }
    empty_heap(&heap, dim, kind, out);
    if (!heap.started) memset(out, 0, dim * sizeof(float));
    return 1;
}

/* A bag whose rows are weighted, of two kinds, or compared: row by row through `row`. */
INLINE int mixed_bag(const Job *job, int64_t begin, int64_t end, float *row, float *out,
                     int64_t *members) {
    const int64_t dim = job->plan->dim;
    Place place;
    memset(out, 0, dim * sizeof(float));
    for (int64_t i = begin; i < end; i++) {
        if (!find_places(job->plan, ids_from(job, i), job->wide, 1, job->zero_id, &place)) return 0;
        if (!place.table) continue;
        if (!decode(&place, dim, row)) return 0;
        const float weight = job->weights ? job->weights[i] : 1.0f;
        if (job->mode == MAX)
            for (int64_t j = 0; j < dim; j++)
                /* Like torch, keeps what is not a number out only if it comes later. */
                out[j] = *members && !(row[j] > out[j]) ? out[j] : row[j];
        else if (job->weights)
            for (int64_t j = 0; j < dim; j++) out[j] += row[j] * weight;
        else
            for (int64_t j = 0; j < dim; j++) out[j] += row[j];
        ++*members;
    }
    return 1;
}

INLINE int64_t offset_at(const Job *job, int64_t bag) {
    if (!job->offsets) return bag * job->length;
    return bag < job->bags ? id_at(job->offsets, bag, job->wide_offsets) : job->count;
}

DISPATCHED static int64_t bags_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const int64_t dim = job->plan->dim;
    const int plain = !job->weights && job->mode != MAX && all_alike(job->plan);
    float *row = plain ? NULL : malloc(dim * sizeof(float));
    int64_t failed = !plain && !row;
    for (int64_t bag = begin; bag < end && !failed; bag++) {
        float *out = job->out + bag * dim;
        const int64_t first = offset_at(job, bag), last = offset_at(job, bag + 1);
        int64_t members = 0;
        if (first < 0 || last < first || last > job->count || (!bag && first)) {
            failed = 1;
            break;
        }
        if (!plain)
            failed = !mixed_bag(job, first, last, row, out, &members);
        else if (job->plan->table->kind == FLOAT32)
            failed = !sum_bag(job, first, last, FLOAT32, out, &members);
        else if (job->plan->table->kind == INT8)
            failed = !sum_bag(job, first, last, INT8, out, &members);
        else if (job->plan->table->kind == FLOAT16)
            failed = !sum_bag(job, first, last, FLOAT16, out, &members);
        else
            failed = !sum_bag(job, first, last, BFLOAT16, out, &members);
        if (job->mode == MEAN && members > 1)
            for (int64_t j = 0; j < dim; j++) out[j] /= (float)members;
    }
    free(row);
    return failed;
}

/* ---- Gradients ---- */

/* Gradient of the codebooks begin..end: each is one thread's alone, and sums in the order of ids. */
DISPATCHED static int64_t collect_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const Table *table = job->plan->table;
    const int64_t dim = job->plan->dim, bits = table->bits, width = table->width;
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    const uint8_t *codes = ADDRESS(table->codes);
    for (int64_t i = 0; i < job->count; i++) {
        const int64_t id = id_at(job->ids, i, job->wide);
        if (id == job->skip_id) continue;
        if (id < 0 || id >= table->rows) return 1;
        for (int64_t m = begin; m < end; m++) {
            int64_t word = id;
            if (bits) {
                const int64_t place = (id * table->books + m) * bits;
                word = (int64_t)(load64(codes + (place >> 3)) >> (place & 7) & mask);
            }
            if (word >= table->size) return 1;
            const float *from = job->grad + i * dim + (table->product ? m * width : 0);
            float *to = job->out + (m * table->size + word) * width;
            for (int64_t j = 0; j < width; j++) to[j] += from[j];
        }
    }
    return 0;
}

DISPATCHED static int64_t tiers_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    for (int64_t i = begin; i < end; i++) {
        const int64_t id = id_at(job->ids, i, job->wide);
        if (id < 0 || id >= job->plan->rows) return 1;
        job->flags[i] = (uint8_t)is_popular(job->plan, id, job->places + i);
    }
    return 0;
}

/* ---- Calls ---- */

int read_plan(PyObject *packed, Plan *plan) {
    char *data;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(packed, &data, &length)) return -1;
    if (length != (Py_ssize_t)sizeof *plan) {
        PyErr_SetString(PyExc_ValueError, "a plan of another version of the kernel");
        return -1;
    }
    memcpy(plan, data, sizeof *plan);
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

/* Codebooks in float32 for a call of many ids: what is returned is to be freed. */
DISPATCHED static float *widen(Table *table) {
    const int64_t words = table->books * table->size, entries_of_all = words * table->width;
    float *wide = malloc(entries_of_all * sizeof(float));
    const uint16_t *scales = ADDRESS(table->scales);
    if (!wide) return NULL;
    for (int64_t w = 0; w < words; w++) {
        const float scale = table->kind == INT8 ? as_float((uint32_t)scales[w] << 16) : 1.0f;
        float *to = wide + w * table->width;
        const char *from = ADDRESS(table->words);
        from += w * table->width * (table->kind == INT8 ? 1 : 2);
        if (table->kind == INT8)
            for (int64_t j = 0; j < table->width; j++) to[j] = entry(from, j, INT8, scale);
        else if (table->kind == FLOAT16)
            for (int64_t j = 0; j < table->width; j++) to[j] = entry(from, j, FLOAT16, scale);
        else
            for (int64_t j = 0; j < table->width; j++) to[j] = entry(from, j, BFLOAT16, scale);
    }
    table->kind = FLOAT32;
    table->words = (int64_t)(uintptr_t)wide;
    return wide;
}

/* Run a job, its codebooks widened where that pays. */
static int64_t run_job(Part part, Job *job, Plan *plan, int64_t total, int64_t step, int threads) {
    float *wide[2] = {NULL, NULL};
    for (int64_t t = 0; t < plan->tiers; t++) {
        Table *table = plan->table + t;
        const int64_t words = table->books * table->size;
        if (table->kind != FLOAT32 && words * table->width <= MOST_WIDENED &&
            job->count * table->books >= 4 * words)
            wide[t] = widen(table);
    }
    const int64_t failed = run_parts(part, job, total, step, threads);
    free(wide[0]);
    free(wide[1]);
    return failed;
}

int64_t decode_ids(Plan *plan, int64_t ids, int bytes, int64_t count, int64_t zero_id, int64_t out,
                   int threads) {
    Job job = {.plan = plan, .ids = ADDRESS(ids), .wide = bytes == 8, .count = count};
    job.zero_id = zero_id;
    job.out = ADDRESS(out);
    /* Too short for another Python thread to gain from the lock. */
    if (count <= CHUNK) return run_job(rows_part, &job, plan, count, CHUNK, 1);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_job(rows_part, &job, plan, count, CHUNK, threads);
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
        decode_ids(&plan, v[0], (int)v[1], v[2], v[3], v[4], (int)v[5]));
}

/* plan, ids, bytes an id, count, id left out, offsets or 0, bytes an offset, bags, ids of a bag,
 * weights or 0, mode (0 sum, 1 mean, 2 max), out, threads
 * -> 0, or 1 where an id is no row, its codes are damaged, or offsets do not fit */
PyObject *bags(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[12];
    Plan plan;
    if (read_integers(args + 1, given - 1, 12, v) || read_plan(args[0], &plan)) return NULL;
    Job job = {.plan = &plan, .ids = ADDRESS(v[0]), .wide = v[1] == 8, .count = v[2]};
    job.zero_id = v[3];
    job.offsets = ADDRESS(v[4]);
    job.wide_offsets = v[5] == 8;
    job.bags = v[6];
    job.length = v[7];
    job.weights = ADDRESS(v[8]);
    job.mode = (int)v[9];
    job.out = ADDRESS(v[10]);
    const int64_t each = job.bags ? job.count / job.bags + 1 : 1;
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_job(bags_part, &job, &plan, job.bags, CHUNK / each + 1, (int)v[11]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}

/* plan, ids, bytes an id, count, id without gradient, grad, out (zeroed), threads -> as rows */
PyObject *gradient(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[7];
    Plan plan;
    if (read_integers(args + 1, given - 1, 7, v) || read_plan(args[0], &plan)) return NULL;
    Job job = {.plan = &plan, .ids = ADDRESS(v[0]), .wide = v[1] == 8, .count = v[2]};
    job.skip_id = v[3];
    job.grad = ADDRESS(v[4]);
    job.out = ADDRESS(v[5]);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_parts(collect_part, &job, plan.table->books, 1, (int)v[6]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}

/* plan, ids, bytes an id, count, flags, places, threads -> 0, or 1 where an id is no row */
PyObject *tiers(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[6];
    Plan plan;
    if (read_integers(args + 1, given - 1, 6, v) || read_plan(args[0], &plan)) return NULL;
    Job job = {.plan = &plan, .ids = ADDRESS(v[0]), .wide = v[1] == 8, .count = v[2]};
    job.flags = ADDRESS(v[3]);
    job.places = ADDRESS(v[4]);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_parts(tiers_part, &job, job.count, CHUNK, (int)v[5]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}
