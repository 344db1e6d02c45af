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
#define AHEAD 24       /* ids between the one whose codes are asked for and the one decoded */
#define FAR_BYTES (1 << 20) /* codes that take more are not in the cache */
#define MOST_WIDENED (1 << 18) /* entries of codebooks that are worth widening for a call */
#define LINE 64        /* bytes of a cache line */

/* Kinds of codewords; PADDED are float32 at addresses and strides of whole cache lines. */
enum { FLOAT32, INT8, FLOAT16, BFLOAT16, PADDED };

/* Where a row is. */
typedef struct {
    const Table *table; /* NULL: it reads as zeros */
    int64_t row;
} Place;

/* Ids in memory, or offsets: `stride` items from one to the next. */
typedef struct {
    const char *from;
    int wide; /* int64, not int32 */
    int64_t stride;
} Ids;

INLINE int64_t id_at(const Ids *ids, int64_t i) {
    const int64_t at = i * ids->stride;
    return ids->wide ? ((const int64_t *)ids->from)[at] : (int64_t)((const int32_t *)ids->from)[at];
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

INLINE void expect_row(const Table *table, int64_t row) {
    /* An address that is out of range is only a hint that is not followed. */
    PREFETCH((uintptr_t)table->codes + (uintptr_t)((row * table->bits * table->books) >> 3));
}

/* Ask for what the next ids need: codes, or the map of the tiers. */
INLINE void expect_ids(const Plan *plan, const Ids *ids, int64_t from, int64_t to) {
    if (plan->tiers == 1)
        for (int64_t i = from; i < to; i++) expect_row(plan->table, id_at(ids, i));
    else if (!plan->runs)
        for (int64_t i = from; i < to; i++) {
            const int64_t block = id_at(ids, i) / BLOCK_ROWS;
            PREFETCH((uintptr_t)plan->bitmap + (uintptr_t)(block * (BLOCK_ROWS / 8)));
            PREFETCH((uintptr_t)plan->before + (uintptr_t)(block * 4));
        }
}

/* The places of `count` ids from number `first` on, at most BLOCK; as many that follow, before
 * number `end`, are asked for. 0 where an id is no row. */
INLINE int find_places(const Plan *plan, const Ids *ids, int64_t first, int64_t count, int64_t end,
                       int64_t zero_id, Place *place) {
    const int64_t next = first + count;
    expect_ids(plan, ids, next, next + count < end ? next + count : end);
    for (int64_t i = 0; i < count; i++) {
        const int64_t id = id_at(ids, first + i);
        if (id < 0 || id >= plan->rows) return 0;
        if (id == zero_id) {
            place[i].table = NULL;
            continue;
        }
        int64_t row = id;
        const Table *table = plan->table;
        if (plan->tiers == 2) {
            if (!is_popular(plan, id, &row)) table++;
            expect_row(table, row);
        }
        if (table->one_row) row = 0;
        if (row >= table->rows) return 0; /* a map that contradicts the tables */
        place[i].table = table;
        place[i].row = row;
    }
    return 1;
}

/* ---- Codes ---- */

INLINE int64_t stride_of(const Table *table) {
    switch (table->kind) {
        case INT8: return table->width;
        case FLOAT32: return table->width * 4;
        case PADDED: return (table->width * 4 + LINE - 1) / LINE * LINE;
        default: return table->width * 2;
    }
}

INLINE void put_scale(const Table *table, int64_t number, float *scale) {
    if (table->kind == INT8)
        *scale = as_float((uint32_t)((const uint16_t *)ADDRESS(table->scales))[number] << 16);
}

/* The codewords of a row, and the scale of each; 0 if one does not exist, as in damaged codes of
 * codebooks whose size is no power of two. */
INLINE int find_words(const Table *table, int64_t row, const char **word, float *scale) {
    const int64_t stride = stride_of(table), size = table->size;
    const char *book = ADDRESS(table->words);
    if (!table->bits) {
        word[0] = book + row * stride;
        put_scale(table, row, scale);
        return row < size;
    }
    int fits = 1;
    const uint8_t *codes = ADDRESS(table->codes);
    const int64_t bits = table->bits, books = table->books, next = size * stride;
    const int64_t first = row * bits * books;
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    if (bits * books <= 57) {
        uint64_t stream = load64(codes + (first >> 3)) >> (first & 7);
        for (int64_t m = 0; m < books; m++, stream >>= bits, book += next) {
            const int64_t code = (int64_t)(stream & mask);
            fits &= code < size;
            word[m] = book + code * stride;
            put_scale(table, fits ? m * size + code : 0, scale + m);
        }
        return fits;
    }
    for (int64_t m = 0; m < books; m++, book += next) {
        const int64_t place = first + m * bits;
        const int64_t code = (int64_t)(load64(codes + (place >> 3)) >> (place & 7) & mask);
        if (code >= size) return 0;
        word[m] = book + code * stride;
        put_scale(table, m * size + code, scale + m);
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

typedef float Line __attribute__((vector_size(LINE)));
#define LINE_LANES 16

INLINE Line line_at(const char *word, int64_t at) {
    Line values;
    memcpy(&values, __builtin_assume_aligned(word + at * 4, LINE), sizeof values);
    return values;
}

INLINE Floats half_line_at(const char *word, int64_t at) {
    Floats values;
    memcpy(&values, __builtin_assume_aligned(word + at * 4, LINE / 2), sizeof values);
    return values;
}

/* As sum_block, of padded codewords: `lines` times 16 columns, and 8 more where `half`. `pairs`:
 * two codewords are summed before they are added, which waits half as long. */
INLINE void sum_lines(int64_t count, const char **word, int64_t column, int lines, int half,
                      int pairs, int more, float *out) {
    Line total[4];
    Floats rest;
    const int64_t last = column + lines * LINE_LANES;
    for (int v = 0; v < lines; v++) {
        if (more)
            memcpy(&total[v], out + column + v * LINE_LANES, sizeof *total);
        else
            total[v] = line_at(word[0], column + v * LINE_LANES);
    }
    if (half && more) memcpy(&rest, out + last, sizeof rest);
    if (half && !more) rest = half_line_at(word[0], last);
    int64_t m = more ? 0 : 1;
    for (; pairs && m + 1 < count; m += 2) {
        for (int v = 0; v < lines; v++)
            total[v] += line_at(word[m], column + v * LINE_LANES) +
                        line_at(word[m + 1], column + v * LINE_LANES);
        if (half) rest += half_line_at(word[m], last) + half_line_at(word[m + 1], last);
    }
    for (; m < count; m++) {
        for (int v = 0; v < lines; v++) total[v] += line_at(word[m], column + v * LINE_LANES);
        if (half) rest += half_line_at(word[m], last);
    }
    for (int v = 0; v < lines; v++) memcpy(out + column + v * LINE_LANES, &total[v], sizeof *total);
    if (half) memcpy(out + last, &rest, sizeof rest);
}

/* The sum of `count` padded codewords; writes up to whole half lines. */
INLINE void sum_padded(int64_t count, const char **word, int64_t width, int pairs, int more,
                       float *out) {
    int64_t column = 0, halves = (width + 7) / 8;
    for (; halves >= 8; halves -= 8, column += 4 * LINE_LANES)
        sum_lines(count, word, column, 4, 0, pairs, more, out);
    switch (halves) {
        case 1: sum_lines(count, word, column, 0, 1, pairs, more, out); break;
        case 2: sum_lines(count, word, column, 1, 0, pairs, more, out); break;
        case 3: sum_lines(count, word, column, 1, 1, pairs, more, out); break;
        case 4: sum_lines(count, word, column, 2, 0, pairs, more, out); break;
        case 5: sum_lines(count, word, column, 2, 1, pairs, more, out); break;
        case 6: sum_lines(count, word, column, 3, 0, pairs, more, out); break;
        case 7: sum_lines(count, word, column, 3, 1, pairs, more, out); break;
    }
}

#define PADDING 8 /* floats that a padded sum may write after a row */

/* One row; 0 where its codes are damaged. `spare` takes a row and its padding where the padding
 * must not be written after `out`; else NULL. */
INLINE int decode(const Place *place, int64_t dim, float *out, float *spare) {
    const char *word[MOST_CODEBOOKS];
    float scale[MOST_CODEBOOKS];
    const Table *table = place->table;
    if (!table) {
        memset(out, 0, dim * sizeof(float));
        return 1;
    }
    if (!find_words(table, place->row, word, scale)) return 0;
    switch (table->kind) {
        case PADDED:
            sum_padded(table->books, word, dim, 0, 0, spare ? spare : out);
            if (spare) memcpy(out, spare, dim * sizeof(float));
            break;
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
    Ids ids, offsets; /* offsets from NULL: bags of `length` ids each */
    int padded;       /* some codebooks are */
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

INLINE int64_t decode_rows(const Job *job, const Ids *ids, int64_t begin, int64_t end,
                           float *spare) {
    const int64_t dim = job->plan->dim;
    Place place[BLOCK];
    expect_ids(job->plan, ids, begin, begin + BLOCK < end ? begin + BLOCK : end);
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t count = end - i < BLOCK ? end - i : BLOCK;
        if (!find_places(job->plan, ids, i, count, end, job->zero_id, place)) return 1;
        for (int64_t j = 0; j < count; j++) {
            /* What follows the last row is another thread's, or nobody's. */
            const int near_end = (end - (i + j + 1)) * dim < PADDING;
            if (!decode(place + j, dim, job->out + (i + j) * dim, near_end ? spare : NULL))
                return 1;
        }
    }
    return 0;
}

/* Floats that hold a row and what a padded sum writes after it. */
static float *make_row(const Plan *plan) {
    return malloc((plan->dim + PADDING) * sizeof(float));
}

DISPATCHED static int64_t rows_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    float *spare = job->padded ? make_row(job->plan) : NULL;
    if (job->padded && !spare) return 1;
    const Ids ids = job->ids, wide = {ids.from, 1, 1}, narrow = {ids.from, 0, 1};
    int64_t failed;
    if (ids.stride != 1)
        failed = decode_rows(job, &ids, begin, end, spare);
    else /* constants, for the compiler */
        failed = ids.wide ? decode_rows(job, &wide, begin, end, spare)
                          : decode_rows(job, &narrow, begin, end, spare);
    free(spare);
    return failed;
}

/* ---- Bags ---- */

enum { SUM, MEAN, MAX };

/* Codewords of a bag that are yet to be added up. */
typedef struct {
    const char *word[MOST_CODEBOOKS];
    float scale[MOST_CODEBOOKS];
    int64_t count;
    int started; /* the output holds a sum already */
    int pairs;   /* rows are sums themselves, so that the order does not matter */
} Heap;

INLINE void empty_heap(Heap *heap, int64_t width, int kind, float *out) {
    if (!heap->count) return;
    if (kind == PADDED && heap->started && heap->pairs)
        sum_padded(heap->count, heap->word, width, 1, 1, out);
    else if (kind == PADDED && heap->pairs)
        sum_padded(heap->count, heap->word, width, 1, 0, out);
    else if (kind == PADDED)
        sum_padded(heap->count, heap->word, width, 0, heap->started, out);
    else if (heap->started)
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

INLINE int sum_bag(const Job *job, int64_t begin, int64_t end, int kind, float *row,
                   int64_t *members) {
    const int64_t dim = job->plan->dim;
    Place place[BLOCK];
    Heap heap;
    heap.count = heap.started = 0;
    /* Rows of one codeword are added in their order, as torch adds those of a dense table. */
    heap.pairs = job->plan->table->books > 1;
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t count = end - i < BLOCK ? end - i : BLOCK;
        if (!find_places(job->plan, &job->ids, i, count, job->count, job->zero_id, place)) return 0;
        for (int64_t j = 0; j < count; j++) {
            const Table *table = place[j].table;
            if (!table) continue;
            if (heap.count + table->books > MOST_CODEBOOKS) empty_heap(&heap, dim, kind, row);
            if (!find_words(table, place[j].row, heap.word + heap.count, heap.scale + heap.count))
                return 0;
            heap.count += table->books;
            ++*members;
        }
    }
    empty_heap(&heap, dim, kind, row);
    if (!heap.started) memset(row, 0, dim * sizeof(float));
    return 1;
}

/* A bag whose rows are weighted, of two kinds, or compared: row by row. */
INLINE int mixed_bag(const Job *job, int64_t begin, int64_t end, float *row, float *out,
                     int64_t *members) {
    const int64_t dim = job->plan->dim;
    Place place;
    memset(out, 0, dim * sizeof(float));
    for (int64_t i = begin; i < end; i++) {
        if (!find_places(job->plan, &job->ids, i, 1, job->count, job->zero_id, &place)) return 0;
        if (!place.table) continue;
        if (!decode(&place, dim, row, NULL)) return 0;
        const float weight = job->weights ? job->weights[i] : 1.0f;
        if (job->mode == MAX)
            for (int64_t j = 0; j < dim; j++)
                out[j] = *members && !(row[j] > out[j]) ? out[j] : row[j];
        else if (job->weights)
            /* Fused, as torch's own bags are. */
            for (int64_t j = 0; j < dim; j++) out[j] = __builtin_fmaf(row[j], weight, out[j]);
        else
            for (int64_t j = 0; j < dim; j++) out[j] += row[j];
        ++*members;
    }
    return 1;
}

INLINE int64_t offset_at(const Job *job, int64_t bag) {
    if (!job->offsets.from) return bag * job->length;
    return bag < job->bags ? id_at(&job->offsets, bag) : job->count;
}

/* One bag, of ids that were not summed yet in `row`; 0 where ids, codes or offsets are wrong. */
INLINE int reduce_bag(const Job *job, int64_t bag, int kind, float *row) {
    const int64_t dim = job->plan->dim;
    const int64_t first = offset_at(job, bag), last = offset_at(job, bag + 1);
    float *out = job->out + bag * dim;
    int64_t members = 0;
    if (first < 0 || last < first || last > job->count || (!bag && first)) return 0;
    if (kind < 0) {
        if (!mixed_bag(job, first, last, row, out, &members)) return 0;
    } else {
        if (!sum_bag(job, first, last, kind, row, &members)) return 0;
        memcpy(out, row, dim * sizeof(float));
    }
    if (job->mode == MEAN && members > 1)
        for (int64_t j = 0; j < dim; j++) out[j] /= (float)members;
    return 1;
}

INLINE int reduce_bags(const Job *job, int64_t begin, int64_t end, int kind, float *row) {
    for (int64_t bag = begin; bag < end; bag++)
        if (!reduce_bag(job, bag, kind, row)) return 0;
    return 1;
}

DISPATCHED static int64_t bags_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const int plain = !job->weights && job->mode != MAX && all_alike(job->plan);
    float *row = make_row(job->plan);
    int fine = row != NULL;
    if (fine) switch (plain ? job->plan->table->kind : -1) {
            case FLOAT32: fine = reduce_bags(job, begin, end, FLOAT32, row); break;
            case INT8: fine = reduce_bags(job, begin, end, INT8, row); break;
            case FLOAT16: fine = reduce_bags(job, begin, end, FLOAT16, row); break;
            case BFLOAT16: fine = reduce_bags(job, begin, end, BFLOAT16, row); break;
            case PADDED: fine = reduce_bags(job, begin, end, PADDED, row); break;
            default: fine = reduce_bags(job, begin, end, -1, row);
        }
    free(row);
    return !fine;
}

/* ---- One table of padded codewords: rows and bags in one loop, sums in registers ---- */

typedef struct {
    Ids ids;
    const uint8_t *codes;
    const char *words;
    int64_t rows, bits, books, size, stride, row_bits, zero_id;
    uint64_t mask;
    int checked; /* a code may name a codeword that does not exist */
    int far;     /* codes are not in the cache: ask for them in advance */
} Flat;

static Flat flatten(const Job *job) {
    const Table *table = job->plan->table;
    Flat flat = {.ids = job->ids, .codes = ADDRESS(table->codes), .words = ADDRESS(table->words)};
    flat.rows = table->rows;
    flat.bits = table->bits;
    flat.books = table->books;
    flat.size = table->size;
    flat.stride = stride_of(table);
    flat.row_bits = table->bits * table->books;
    flat.zero_id = job->zero_id;
    flat.mask = ((uint64_t)1 << table->bits) - 1;
    flat.checked = table->size != (int64_t)1 << table->bits;
    flat.far = table->rows * flat.row_bits > 8 * FAR_BYTES;
    return flat;
}

/* Whether all rows are sums of padded codewords of one table. */
static int is_flat(const Plan *plan) {
    return plan->tiers == 1 && plan->table->kind == PADDED && plan->table->bits &&
           !plan->table->one_row;
}

INLINE void expect_later(const Flat *flat, int64_t i, int64_t end) {
    if (flat->far && i + AHEAD < end) {
        const int64_t later = id_at(&flat->ids, i + AHEAD) * flat->row_bits;
        PREFETCH((uintptr_t)flat->codes + (uintptr_t)(later >> 3));
    }
}

INLINE int64_t code_at(const Flat *flat, int64_t bit) {
    return (int64_t)(load64(flat->codes + (bit >> 3)) >> (bit & 7) & flat->mask);
}

/* Adds columns of one row: `lines` times 16, and 8 more where `half`; 0 where codes are damaged. */
INLINE int add_row(const Flat *flat, int64_t id, int64_t column, int lines, int half, Line *total,
                   Floats *rest) {
    const int64_t first = id * flat->row_bits, next = flat->size * flat->stride;
    const char *book = flat->words;
    uint64_t stream = load64(flat->codes + (first >> 3)) >> (first & 7);
    const int whole = flat->row_bits <= 57; /* all codes of the row are in the stream */
    for (int64_t m = 0; m < flat->books; m++, book += next) {
        int64_t code = (int64_t)(stream & flat->mask);
        stream >>= flat->bits;
        if (!whole) code = code_at(flat, first + m * flat->bits);
        if (flat->checked && code >= flat->size) return 0;
        const char *word = book + code * flat->stride;
        for (int v = 0; v < lines; v++) total[v] += line_at(word, column + v * LINE_LANES);
        if (half) *rest += half_line_at(word, column + lines * LINE_LANES);
    }
    return 1;
}

INLINE void put_lines(const Line *total, const Floats *rest, int lines, int half, float *out) {
    for (int v = 0; v < lines; v++) memcpy(out + v * LINE_LANES, &total[v], sizeof *total);
    if (half) memcpy(out + lines * LINE_LANES, rest, sizeof *rest);
}

/* Some columns of the rows begin..end, which are `dim` apart in `out`; up to whole half lines are
 * written, as what follows is written later. */
INLINE int64_t flat_rows(const Flat *flat, int64_t begin, int64_t end, int64_t column, int lines,
                         int half, int64_t dim, float *out) {
    for (int64_t i = begin; i < end; i++) {
        Line total[4] = {{0}};
        Floats rest = {0};
        const int64_t id = id_at(&flat->ids, i);
        expect_later(flat, i, end);
        if (id < 0 || id >= flat->rows) return 1;
        if (id != flat->zero_id && !add_row(flat, id, column, lines, half, total, &rest)) return 1;
        put_lines(total, &rest, lines, half, out + i * dim + column);
    }
    return 0;
}

/* Some columns of the sum of the rows begin..end; `total` ids follow, some of later bags. */
INLINE int64_t flat_bag(const Flat *flat, int64_t begin, int64_t end, int64_t total, int64_t column,
                        int lines, int half, float *out, int64_t *members) {
    Line sum[4] = {{0}};
    Floats sum_rest = {0};
    *members = 0;
    for (int64_t i = begin; i < end; i++) {
        /* A sum of its own, so that one row need not wait for the one before. */
        Line row[4] = {{0}};
        Floats rest = {0};
        const int64_t id = id_at(&flat->ids, i);
        expect_later(flat, i, total);
        if (id < 0 || id >= flat->rows) return 1;
        if (id == flat->zero_id) continue;
        if (!add_row(flat, id, column, lines, half, row, &rest)) return 1;
        for (int v = 0; v < lines; v++) sum[v] += row[v];
        if (half) sum_rest += rest;
        ++*members;
    }
    put_lines(sum, &sum_rest, lines, half, out + column);
    return 0;
}

#define BLOCK_COLUMNS (4 * LINE_LANES)

/* `call` with the numbers of lines and half lines of a block of columns as constants. */
#define BY_LINES(halves, call)          \
    switch (halves) {                   \
        case 1: call(0, 1); break;      \
        case 2: call(1, 0); break;      \
        case 3: call(1, 1); break;      \
        case 4: call(2, 0); break;      \
        case 5: call(2, 1); break;      \
        case 6: call(3, 0); break;      \
        case 7: call(3, 1); break;      \
        default: call(4, 0);            \
    }

DISPATCHED static int64_t flat_rows_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const Flat flat = flatten(job);
    const int64_t dim = job->plan->dim;
    /* Rows that something else follows closely are written to a row of their own first. */
    const int64_t near = PADDING / dim + 1, safe = end - near > begin ? end - near : begin;
    float *row = make_row(job->plan);
    int64_t failed = !row;
    for (int64_t i = begin; i < end && !failed; i = i < safe ? safe : i + 1) {
        const int64_t stop = i < safe ? safe : i + 1;
        float *out = i < safe ? job->out : row - i * dim;
        /* The last columns first: what they write after a row belongs to the first of the next. */
        for (int64_t column = (dim - 1) / BLOCK_COLUMNS * BLOCK_COLUMNS; column >= 0 && !failed;
             column -= BLOCK_COLUMNS) {
#define ROWS(lines, half) \
    failed = flat_rows(&flat, i, stop, column, lines, half, dim, out)
            BY_LINES((dim - column + 7) / 8, ROWS)
        }
        if (i >= safe && !failed) memcpy(job->out + i * dim, row, dim * sizeof(float));
    }
    free(row);
    return failed;
}

DISPATCHED static int64_t flat_bags_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const Flat flat = flatten(job);
    const int64_t dim = job->plan->dim;
    float *row = make_row(job->plan);
    int64_t failed = !row;
    for (int64_t bag = begin; bag < end && !failed; bag++) {
        const int64_t first = offset_at(job, bag), last = offset_at(job, bag + 1);
        float *out = job->out + bag * dim;
        int64_t members = 0;
        failed = first < 0 || last < first || last > job->count || (!bag && first);
        for (int64_t column = 0; column < dim && !failed; column += BLOCK_COLUMNS) {
#define BAG(lines, half) \
    failed = flat_bag(&flat, first, last, job->count, column, lines, half, row, &members)
            BY_LINES((dim - column + 7) / 8, BAG)
        }
        const float share = job->mode == MEAN && members > 1 ? (float)members : 1.0f;
        for (int64_t j = 0; j < dim && !failed; j++) out[j] = share == 1.0f ? row[j] : row[j] / share;
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
        const int64_t id = id_at(&job->ids, i);
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
        const int64_t id = id_at(&job->ids, i);
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

/* A copy of the codebooks in padded float32, for a call of many ids: what is returned is to be
 * freed. */
DISPATCHED static void *pad_codebooks(Table *table) {
    const int64_t words = table->books * table->size, stride = stride_of(table);
    Table padded = *table;
    padded.kind = PADDED;
    const int64_t padded_stride = stride_of(&padded);
    char *memory = malloc(words * padded_stride + LINE);
    if (!memory) return NULL;
    char *to = memory + LINE - (uintptr_t)memory % LINE;
    const char *from = ADDRESS(table->words);
    padded.words = (int64_t)(uintptr_t)to;
    for (int64_t w = 0; w < words; w++, from += stride, to += padded_stride) {
        float scale = 1.0f;
        put_scale(table, w, &scale);
        for (int64_t j = 0; j < padded_stride / 4; j++)
            ((float *)to)[j] = j < table->width ? entry(from, j, (int)table->kind, scale) : 0.0f;
    }
    *table = padded;
    return memory;
}

/* Run a job, its codebooks padded where that pays. */
static int64_t run_job(Part part, Job *job, Plan *plan, int64_t total, int64_t step, int threads) {
    void *memory[2] = {NULL, NULL};
    for (int64_t t = 0; t < plan->tiers; t++) {
        Table *table = plan->table + t;
        const int64_t words = table->books * table->size;
        const int sums = !table->product || table->books == 1;
        if (sums && words * table->width <= MOST_WIDENED && job->count * table->books >= 4 * words)
            memory[t] = pad_codebooks(table);
        job->padded |= memory[t] != NULL;
    }
    if (is_flat(plan) && part == rows_part) part = flat_rows_part;
    if (is_flat(plan) && part == bags_part && !job->weights && job->mode != MAX)
        part = flat_bags_part;
    const int64_t failed = run_parts(part, job, total, step, threads);
    free(memory[0]);
    free(memory[1]);
    return failed;
}

int64_t decode_ids(Plan *plan, int64_t ids, int bytes, int64_t stride, int64_t count,
                   int64_t zero_id, int64_t out, int threads) {
    Job job = {.plan = plan, .ids = {ADDRESS(ids), bytes == 8, stride}, .count = count};
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
        decode_ids(&plan, v[0], (int)v[1], 1, v[2], v[3], v[4], (int)v[5]));
}

/* plan, ids, bytes an id, count, id left out, offsets or 0, bytes an offset, bags, ids of a bag,
 * weights or 0, mode (0 sum, 1 mean, 2 max), out, threads
 * -> 0, or 1 where an id is no row, its codes are damaged, or offsets do not fit */
PyObject *bags(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[12];
    Plan plan;
    if (read_integers(args + 1, given - 1, 12, v) || read_plan(args[0], &plan)) return NULL;
    Job job = {.plan = &plan, .ids = {ADDRESS(v[0]), v[1] == 8, 1}, .count = v[2]};
    job.zero_id = v[3];
    job.offsets = (Ids){ADDRESS(v[4]), v[5] == 8, 1};
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
    Job job = {.plan = &plan, .ids = {ADDRESS(v[0]), v[1] == 8, 1}, .count = v[2]};
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
    Job job = {.plan = &plan, .ids = {ADDRESS(v[0]), v[1] == 8, 1}, .count = v[2]};
    job.flags = ADDRESS(v[3]);
    job.places = ADDRESS(v[4]);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_parts(tiers_part, &job, job.count, CHUNK, (int)v[5]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}
