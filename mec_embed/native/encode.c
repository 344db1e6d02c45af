/* Codes of least squared error for rows that shall be sums of codewords, by beam search.
 *
 * The squared error of a row x is ||x||^2 and the sum over its codewords of ||c||^2 - 2 x.c
 * (`alone`) and over their pairs of 2 c.c' (`gram`). Codebook by codebook, the partial sums of least
 * error are kept. To find the best of all candidates takes longer than to add up their errors, so
 * candidates fall into lanes, of which each keeps its two best, and the best of these are kept. Lanes
 * turn from one sum to the next, lest a codeword meets the same others each time.
 *
 * Many rows take the same step before any takes the next, which keeps the cross terms of that step in
 * the cache.
 */
#include "native.h"

#include <math.h>
#include <stdlib.h>

#define LANES 16
#define MOST_BEAM (2 * LANES)
#define PARENT_BITS 5           /* of the number of a sum */
#define MOST_ROWS 512           /* that take a step together */
#define STATE_BYTES (1 << 18)   /* of their sums */
#define WORDS 8                 /* codewords of a sum that are copied at once */

typedef float Totals __attribute__((vector_size(4 * LANES)));
typedef int32_t Keys __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *alone; /* (rows, books, size) */
    const float *norms; /* (rows): ||x||^2 */
    const float *gram;  /* of every codebook but the first, (words of those before it, width) */
    int64_t books, size, beam;
    int64_t width;         /* size, up to whole lanes; gram is zero there */
    int bits;              /* that tell which LANES codewords of a codebook */
    int64_t stride, block; /* codewords kept of a sum, a multiple of WORDS; rows at once */
    int64_t *codes;        /* (rows, books) */
} Search;

/* Partial sums of a row. */
typedef struct {
    int32_t count;
    float error[MOST_BEAM];
    uint8_t from[MOST_BEAM]; /* the sum before that it extends */
} Sums;

/* What one thread works on. */
typedef struct {
    float *partial;          /* (beam, width): terms of a step, without those of the last codeword */
    float *alone;            /* (width): of the row, infinite beyond `size` */
    uint16_t *words, *spare; /* (block, beam, stride): codewords of the sums */
    Sums *sums;              /* (block) */
} Scratch;

static void *reserve(const Search *search, Scratch *scratch) {
    const int64_t floats = (search->beam + 1) * search->width, sums = search->block * search->beam;
    char *memory = malloc(4 * floats + search->block * sizeof(Sums) + 4 * sums * search->stride);
    if (!memory) return NULL;
    scratch->partial = (float *)memory;
    scratch->alone = scratch->partial + search->beam * search->width;
    scratch->sums = (Sums *)(scratch->partial + floats);
    scratch->words = (uint16_t *)(scratch->sums + search->block);
    scratch->spare = scratch->words + sums * search->stride;
    return memory;
}

/* ---- Vectors ---- */

/* Compilers that know what becomes of the lanes take vectors apart. */
#define BARRIER __asm__ volatile("" ::: "memory")

#define EACH for (int lane = 0; lane < LANES; lane++)

INLINE Totals load(const float *from) {
    Totals value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE Keys least(Keys a, Keys b) {
    Keys result;
    EACH result[lane] = a[lane] < b[lane] ? a[lane] : b[lane];
    return result;
}

INLINE Keys most(Keys a, Keys b) {
    Keys result;
    EACH result[lane] = a[lane] > b[lane] ? a[lane] : b[lane];
    return result;
}

/* Squared errors as integers of the same order, in which what is no number comes last: without the
 * sign, which rounding gives to some that are about zero, and processors to NaN. */
INLINE Keys ordered(Totals totals) { return (Keys)totals & INT32_MAX; }

INLINE int32_t ordered_one(float total) {
    int32_t bits;
    memcpy(&bits, &total, sizeof bits);
    return bits & INT32_MAX;
}

/* ---- The terms of a step ---- */

/* A row takes its step by codebook m. */
typedef struct {
    const float *alone, *gram; /* of this codebook */
    int64_t m;
    const uint16_t *words;
    const Sums *sums;
    uint32_t ready; /* parts of scratch->partial, a bit for each */
} Step;

INLINE const float *cross_terms(const Search *search, const Step *step, int64_t b, int64_t d) {
    const int64_t word = step->words[b * search->stride + d];
    return step->gram + (d * search->size + word) * search->width;
}

/* to = base + first + second, of `width` codewords; second may be NULL. */
INLINE void add_terms(int64_t width, const float *base, const float *first, const float *second,
                      float *to) {
    for (int64_t part = 0; part < width; part += LANES) {
        Totals total = load(base + part) + load(first + part);
        if (second) total += load(second + part);
        memcpy(to + part, &total, sizeof total);
    }
}

/* Terms of all codewords with all words of sum b but the last, shared by sums of one parent. */
INLINE const float *shared_terms(const Search *search, const Scratch *scratch, Step *step,
                                 int64_t b) {
    const uint32_t from = step->sums->from[b];
    float *const partial = scratch->partial + from * search->width;
    if (step->ready >> from & 1) return partial;
    step->ready |= (uint32_t)1 << from;
    const float *first = cross_terms(search, step, b, 0);
    const float *second = cross_terms(search, step, b, 1);
    add_terms(search->width, step->alone, first, second, partial);
    for (int64_t d = 2; d < step->m - 1; d += 2) {
        first = cross_terms(search, step, b, d);
        second = d + 1 < step->m - 1 ? cross_terms(search, step, b, d + 1) : NULL;
        add_terms(search->width, partial, first, second, partial);
    }
    return partial;
}

/* Totals of a sum with the codewords of a codebook: its error, and two or three terms of each. */
typedef struct {
    const float *base, *last, *other; /* last and other: of its last word and another one, or NULL */
    float error;
} Terms;

INLINE Terms terms_of(const Search *search, const Scratch *scratch, Step *step, int64_t b) {
    Terms terms = {.base = step->alone, .error = step->sums->error[b]};
    if (step->m) terms.last = cross_terms(search, step, b, step->m - 1);
    /* Of three words, adding up costs less than keeping what sums share. */
    if (step->m == 2) terms.other = cross_terms(search, step, b, 0);
    if (step->m > 2) terms.base = shared_terms(search, scratch, step, b);
    return terms;
}

INLINE Totals totals(Terms terms, int64_t from) {
    Totals total = load(terms.base + from) + terms.error;
    if (terms.last) total += load(terms.last + from);
    return terms.other ? total + load(terms.other + from) : total;
}

INLINE float total(Terms terms, int64_t word) {
    float total = terms.base[word] + terms.error;
    if (terms.last) total += terms.last[word];
    return terms.other ? total + terms.other[word] : total;
}

/* ---- The best candidates ---- */

INLINE void turn(Keys *keys, int by) {
    const Keys from = *keys;
    EACH (*keys)[lane] = from[(lane + by) % LANES];
}

/* The two least keys of each lane: totals in the order of integers, whose last bits number sum and
 * codeword. */
INLINE void find_best(const Search *search, const Scratch *scratch, Step *step, int by, int32_t *keys) {
    const int64_t count = step->sums->count;
    const int bits = search->bits;
    const Keys none = {0};
    const Keys number = none + ((1 << (bits + PARENT_BITS)) - 1);
    Keys first = none + INT32_MAX, second = first;
    for (int64_t b = 0; b < count; b++) {
        const Terms terms = terms_of(search, scratch, step, b);
        Keys own = none + (int32_t)(b << bits);
        if (b) {
            turn(&first, by);
            turn(&second, by);
        }
        for (int64_t from = 0; from < search->width; from += LANES) {
            const Keys key = (ordered(totals(terms, from)) & ~number) | own;
            second = least(second, most(first, key));
            first = least(first, key);
            own += 1;
        }
    }
    memcpy(keys, &first, sizeof first);
    memcpy(keys + LANES, &second, sizeof second);
    BARRIER;
}

/* Each lane meets the one `apart` from it; lanes with the bit `rising` keep the larger key. */
INLINE void meet(Keys *keys, int apart, int rising) {
    const Keys from = *keys;
    Keys other, falls;
    EACH other[lane] = from[lane ^ apart];
    EACH falls[lane] = !(lane & apart) == !(lane & rising) ? -1 : 0;
    const Keys low = least(from, other), high = most(from, other);
    *keys = (low & falls) | (high & ~falls);
}

/* Sort a bitonic sequence, rising. */
INLINE void merge(Keys *keys) {
    meet(keys, 8, LANES);
    meet(keys, 4, LANES);
    meet(keys, 2, LANES);
    meet(keys, 1, LANES);
}

/* Batcher's bitonic sort. */
INLINE void sort(Keys *keys) {
    meet(keys, 1, 2);
    meet(keys, 2, 4);
    meet(keys, 1, 4);
    meet(keys, 4, 8);
    meet(keys, 2, 8);
    meet(keys, 1, 8);
    merge(keys);
}

/* Numbers of the `wanted` least of the keys (two of each lane), in any order: how many. */
INLINE int64_t choose(const int32_t *keys, int64_t wanted, uint8_t *chosen) {
    Keys first, second, falling;
    memcpy(&first, keys, sizeof first);
    memcpy(&second, keys + LANES, sizeof second);
    sort(&first);
    sort(&second);
    EACH falling[lane] = second[LANES - 1 - lane];
    Keys halves[2] = {least(first, falling), most(first, falling)};
    merge(&halves[0]);
    merge(&halves[1]);
    int32_t sorted[2 * LANES];
    memcpy(sorted, halves, sizeof sorted);
    const int32_t infinite = 0x7f800000, worst = sorted[wanted - 1];
    const int32_t bound = worst < infinite ? worst : infinite - 1;
    BARRIER;
    /* Those on the bound come last, as many as there is room for. */
    uint8_t equal[2 * LANES + 1];
    int64_t count = 0, also = 0;
    for (int i = 0; i < 2 * LANES; i++) {
        chosen[count] = equal[also] = (uint8_t)i;
        count += keys[i] < bound;
        also += keys[i] == bound;
    }
    for (int64_t i = 0; i < also && count < wanted; i++) chosen[count++] = equal[i];
    return count;
}

/* Extend the sums of a row by codebook m; `spare` are the words of the new ones. */
INLINE void extend(const Search *search, const Scratch *scratch, Step *step, int by, Sums *sums,
                   uint16_t *spare) {
    const int bits = search->bits;
    int32_t keys[2 * LANES];
    uint8_t chosen[2 * LANES + 1];
    find_best(search, scratch, step, by, keys);
    int64_t count = choose(keys, search->beam, chosen);
    if (!count) { /* none is a number */
        keys[0] = 0;
        chosen[0] = 0;
        count = 1;
    }
    Sums kept;
    for (int64_t i = 0; i < count; i++, spare += search->stride) {
        const int32_t key = keys[chosen[i]];
        const int64_t b = key >> bits & (MOST_BEAM - 1);
        const int64_t lane = (chosen[i] + by * (sums->count - 1 - b)) & (LANES - 1);
        int64_t word = (key & ((1 << bits) - 1)) * LANES + lane;
        if (word >= search->size) word = 0;
        const uint16_t *from = step->words + b * search->stride;
        for (int64_t j = 0; j < step->m; j += WORDS)
            memcpy(spare + j, from + j, WORDS * sizeof *from);
        spare[step->m] = (uint16_t)word;
        kept.error[i] = total(terms_of(search, scratch, step, b), word);
        kept.from[i] = (uint8_t)b;
    }
    kept.count = (int32_t)count;
    *sums = kept;
}

/* The best of all candidates by the last codebook, of equal ones the first: the sum, and the word
 * that joins it. */
INLINE int64_t find_last(const Search *search, const Scratch *scratch, Step *step, int64_t *word) {
    const int64_t count = step->sums->count, width = search->width;
    const Keys none = {0};
    Keys low = none + INT32_MAX, place = none; /* of each lane: the least total, and its sum */
    for (int64_t b = 0; b < count; b++) {
        const Terms terms = terms_of(search, scratch, step, b);
        Keys own = none + INT32_MAX;
        for (int64_t from = 0; from < width; from += LANES)
            own = least(own, ordered(totals(terms, from)));
        const Keys less = own < low;
        place = ((none + (int32_t)b) & less) | (place & ~less);
        low = (own & less) | (low & ~less);
    }
    int32_t lows[LANES], places[LANES];
    memcpy(lows, &low, sizeof low);
    memcpy(places, &place, sizeof place);
    BARRIER;
    int best = 0;
    for (int lane = 1; lane < LANES; lane++) {
        const int first = lows[lane] == lows[best] && places[lane] < places[best];
        if (lows[lane] < lows[best] || first) best = lane;
    }
    const Terms terms = terms_of(search, scratch, step, places[best]);
    *word = width;
    for (int lane = best; lane < LANES; lane++) {
        if (lows[lane] != lows[best] || places[lane] != places[best]) continue;
        for (int64_t k = lane; k < *word; k += LANES)
            if (ordered_one(total(terms, k)) == lows[best]) *word = k;
    }
    return places[best];
}

/* ---- The search ---- */

INLINE void take_step(const Search *search, Scratch *scratch, const float *alone, int64_t rows,
                      int64_t m) {
    const int64_t size = search->size, width = search->width, books = search->books;
    const int64_t each = search->beam * search->stride;
    Step step = {.m = m, .gram = search->gram + m * (m - 1) / 2 * size * width};
    for (int64_t k = size; k < width; k++) scratch->alone[k] = INFINITY;
    for (int64_t r = 0; r < rows; r++) {
        step.alone = alone + (r * books + m) * size;
        if (size < width) {
            memcpy(scratch->alone, step.alone, size * sizeof *alone);
            step.alone = scratch->alone;
        }
        step.words = scratch->words + r * each;
        step.sums = scratch->sums + r;
        step.ready = 0;
        if (m + 1 < books) {
            /* Few codewords fall into other lanes than those of the sum before. */
            if (size == 3 || size == 4)
                extend(search, scratch, &step, 4, scratch->sums + r, scratch->spare + r * each);
            else
                extend(search, scratch, &step, 1, scratch->sums + r, scratch->spare + r * each);
            continue;
        }
        int64_t word;
        const int64_t b = find_last(search, scratch, &step, &word);
        int64_t *codes = search->codes + r * books;
        for (int64_t d = 0; d < m; d++) codes[d] = step.words[b * search->stride + d];
        codes[m] = word < size ? word : 0;
    }
    uint16_t *const words = scratch->spare;
    scratch->spare = scratch->words;
    scratch->words = words;
}

DISPATCHED static int64_t search_part(const void *what, int64_t begin, int64_t end) {
    Search search = *(const Search *)what;
    const int64_t books = search.books;
    Scratch scratch;
    void *memory = reserve(&search, &scratch);
    if (!memory) return 1;
    int64_t *const codes = search.codes;
    for (int64_t i = begin; i < end; i += search.block) {
        const int64_t rows = end - i < search.block ? end - i : search.block;
        for (int64_t r = 0; r < rows; r++) {
            scratch.sums[r].count = 1;
            scratch.sums[r].error[0] = search.norms[i + r];
        }
        search.codes = codes + i * books;
        for (int64_t m = 0; m < books; m++)
            take_step(&search, &scratch, search.alone + i * books * search.size, rows, m);
    }
    free(memory);
    return 0;
}

/* alone, norms, gram (doubled), rows, codebooks, codewords of each, beam, codes (out), threads
 * -> 0, or 1 where memory is short */
PyObject *encode(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[9];
    if (read_integers(args, given, 9, v)) return NULL;
    Search search = {.alone = ADDRESS(v[0]), .norms = ADDRESS(v[1]), .gram = ADDRESS(v[2]),
                     .books = v[4], .size = v[5], .codes = ADDRESS(v[7])};
    const int64_t rows = v[3], threads = v[8];
    search.beam = v[6] < MOST_BEAM ? v[6] : MOST_BEAM;
    search.width = (search.size + LANES - 1) / LANES * LANES;
    while (search.width / LANES > 1 << search.bits) search.bits++;
    search.stride = (search.books + WORDS - 1) / WORDS * WORDS;
    const int64_t fit = STATE_BYTES / (search.beam * search.stride * 2) + 1;
    const int64_t most = threads * (fit < MOST_ROWS ? fit : MOST_ROWS);
    /* As many blocks for each thread, and as large ones. */
    const int64_t parts = threads * ((rows + most - 1) / most);
    search.block = rows ? (rows + parts - 1) / parts : 0;
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = rows ? run_parts(search_part, &search, rows, search.block, (int)threads) : 0;
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}
