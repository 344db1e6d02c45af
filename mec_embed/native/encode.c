/* Codes of least squared error for rows that shall be sums of codewords, by beam search.
 *
 * The squared error of a row x is, less ||x||^2, the sum over its codewords of ||c||^2 - 2 x.c
 * (`alone`) and over their pairs of 2 c.c' (`gram`). Codebook by codebook, the partial sums of
 * least error are kept. Those of one parent stay side by side, so that neighbours share their first
 * codewords, whose cross terms are added up once. Many rows take the same step before any takes the
 * next, which keeps the cross terms of that step in the cache.
 *
 * Loops are plain, for compilers to vectorise; where the processor would guess branches wrong,
 * lists are written one entry too far instead.
 */
#include "native.h"

#include <math.h>
#include <stdlib.h>

#define MOST_ROWS 512           /* that take a step together */
#define STATE_BYTES (1 << 18)   /* of their sums */
#define WORDS 8                 /* codewords of a sum that are copied at once */
#define MOST_WAYS 16            /* candidates of a group */
#define LOWS 16                 /* groups for each candidate that is wanted */
#define BISECTIONS 12

typedef struct {
    const float *alone; /* (rows, books * size) */
    const float *gram;  /* of every codebook but the first, (words of those before it, size) */
    int64_t books, size, beam;
    int64_t stride, block; /* codewords kept of a sum, a multiple of WORDS; rows at once */
    int64_t *codes;        /* (rows, books) */
} Search;

/* What one thread works on. */
typedef struct {
    uint64_t *best;          /* (beam): the best candidates */
    float *partial;          /* (books, size): zeros; totals with the first words of a sum */
    float *totals;           /* (beam, size): of all candidates */
    float *lows;             /* (beam, groups): the least total of each group of candidates */
    int32_t *open, *list;    /* (beam * size): groups and candidates that may be among the best */
    float *errors;           /* (block, beam): of the sums that are kept */
    uint16_t *words, *spare; /* (block, beam, stride): their codewords */
    int32_t *kept;           /* (block): how many they are */
} Scratch;

/* Memory of a thread, to be freed; NULL where there is none. */
static void *reserve(const Search *search, Scratch *scratch) {
    const int64_t beam = search->beam, size = search->size, sums = search->block * beam;
    const int64_t all = beam * size + 1; /* one entry more than can be listed */
    const int64_t floats = search->books * size + 4 * all + sums + search->block;
    char *memory = malloc(8 * beam + 4 * floats + 4 * sums * search->stride);
    if (!memory) return NULL;
    scratch->best = (uint64_t *)memory;
    scratch->partial = (float *)(scratch->best + beam);
    scratch->totals = scratch->partial + search->books * size;
    scratch->lows = scratch->totals + all;
    scratch->open = (int32_t *)(scratch->lows + all);
    scratch->list = scratch->open + all;
    scratch->errors = (float *)(scratch->list + all);
    scratch->kept = (int32_t *)(scratch->errors + sums);
    scratch->words = (uint16_t *)(scratch->kept + search->block);
    scratch->spare = scratch->words + sums * search->stride;
    memset(scratch->partial, 0, size * sizeof(float));
    return memory;
}

/* ---- Totals of the candidates ---- */

INLINE void add(const float *restrict a, const float *restrict b, int64_t count,
                float *restrict sum) {
    for (int64_t k = 0; k < count; k++) sum[k] = a[k] + b[k];
}

INLINE void add_with(const float *restrict a, const float *restrict b, float more, int64_t count,
                     float *restrict sum) {
    for (int64_t k = 0; k < count; k++) sum[k] = a[k] + b[k] + more;
}

/* The least of the totals k, k + groups, k + 2 * groups ...; `ways` is a constant. */
INLINE void fold(const float *restrict totals, int64_t groups, int ways, float *restrict lows) {
    for (int64_t k = 0; k < groups; k++) {
        float low = totals[k];
#if defined(__GNUC__)
#pragma GCC unroll 16
#endif
        for (int j = 1; j < ways; j++)
            low = totals[j * groups + k] < low ? totals[j * groups + k] : low;
        lows[k] = low;
    }
}

INLINE void find_lows(const float *totals, int64_t groups, int64_t ways, float *lows) {
    switch (ways) {
        case 1: memcpy(lows, totals, groups * sizeof *lows); break;
        case 2: fold(totals, groups, 2, lows); break;
        case 4: fold(totals, groups, 4, lows); break;
        case 8: fold(totals, groups, 8, lows); break;
        default: fold(totals, groups, MOST_WAYS, lows);
    }
}

/* Totals of the kept sums of a row with every codeword of codebook m, whose terms are `alone` and
 * `gram`. */
INLINE void extend(const Search *search, const Scratch *scratch, const float *alone,
                   const float *gram, const uint16_t *words, const float *errors, int64_t m,
                   int64_t kept, int64_t groups, int64_t ways) {
    const int64_t size = search->size;
    for (int64_t b = 0; b < kept; b++, words += search->stride) {
        int64_t d = 0;
        if (b)
            while (d < m - 1 && words[d] == words[d - search->stride]) d++;
        const float *sum = d ? scratch->partial + d * size : alone;
        const float *cross = scratch->partial;
        for (; d < m; d++) {
            cross = gram + (d * size + words[d]) * size;
            if (d == m - 1) break;
            float *const next = scratch->partial + (d + 1) * size;
            add(sum, cross, size, next);
            sum = next;
        }
        add_with(sum, cross, errors[b], size, scratch->totals + b * size);
        find_lows(scratch->totals + b * size, groups, ways, scratch->lows + b * groups);
    }
}

/* ---- The best of them ---- */

/* Integers in the order of the floats, and back. */
INLINE int32_t ordered(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits ^ (bits >> 31 & INT32_MAX);
}

INLINE float unordered(int32_t bits) {
    float value;
    bits ^= bits >> 31 & INT32_MAX;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int64_t count_up_to(const float *values, int64_t count, float bound) {
    int32_t found = 0;
    for (int64_t i = 0; i < count; i++) found += values[i] <= bound;
    return found;
}

/* What `wanted` of the values, and not many more, do not exceed. */
INLINE float find_bound(const float *values, int64_t count, int64_t wanted) {
    /* As integers: compilers may not reorder what is done to floats. */
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < count; i++) {
        const int32_t value = ordered(values[i]);
        least = value < least ? value : least;
        most = value > most ? value : most;
    }
    float low = unordered(least), high = unordered(most);
    if (wanted == 1) return low;
    if (wanted > count) return INFINITY;
    for (int step = 0; step < BISECTIONS; step++) {
        const float middle = low + (high - low) / 2;
        const int64_t found = count_up_to(values, count, middle);
        if (found < wanted) {
            low = middle;
            continue;
        }
        high = middle;
        if (found <= wanted + wanted / 4) break;
    }
    return high;
}

/* The candidates b * size + k whose total is not above the bound, by rising b: how many. */
INLINE int64_t list_candidates(const Scratch *scratch, int64_t kept, int64_t groups, int64_t ways,
                               float bound) {
    int32_t *const open = scratch->open, *const list = scratch->list;
    int64_t count = 0, listed = 0;
    for (int64_t b = 0; b < kept; b++)
        for (int64_t g = 0; g < groups; g++) {
            open[count] = (int32_t)(b * groups * ways + g);
            count += scratch->lows[b * groups + g] <= bound;
        }
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < ways; j++) {
            const int64_t candidate = open[i] + j * groups;
            list[listed] = (int32_t)candidate;
            listed += scratch->totals[candidate] <= bound;
        }
    return listed;
}

/* The least keys so far, in the order they came. */
typedef struct {
    uint64_t *key;
    int64_t count, wanted, worst;
} Best;

INLINE void offer(Best *best, uint64_t key) {
    uint64_t *const keys = best->key;
    if (best->count == best->wanted) {
        if (key >= keys[best->worst]) return;
        best->count--;
        memmove(keys + best->worst, keys + best->worst + 1,
                (best->count - best->worst) * sizeof *keys);
    }
    keys[best->count++] = key;
    if (best->count < best->wanted) return;
    best->worst = 0;
    for (int64_t i = 1; i < best->count; i++)
        best->worst = keys[i] > keys[best->worst] ? i : best->worst;
}

/* The best `wanted` candidates into scratch->best, equal ones by number: how many. */
INLINE int64_t find_best(const Scratch *scratch, int64_t kept, int64_t groups, int64_t ways,
                         int64_t wanted) {
    const float bound = find_bound(scratch->lows, kept * groups, wanted);
    const int64_t listed = list_candidates(scratch, kept, groups, ways, bound);
    Best best = {.key = scratch->best, .wanted = wanted};
    for (int64_t i = 0; i < listed; i++) {
        const uint32_t candidate = (uint32_t)scratch->list[i];
        const uint32_t rank = (uint32_t)ordered(scratch->totals[candidate]) ^ 0x80000000;
        offer(&best, (uint64_t)rank << 32 | candidate);
    }
    if (!best.count) offer(&best, 0); /* none is a number */
    return best.count;
}

/* ---- The search ---- */

/* The best candidates become the sums of a row; `before` are those they extend. */
INLINE void keep_best(const Search *search, const Scratch *scratch, const uint16_t *before,
                      int64_t m, int64_t kept, uint16_t *words, float *errors) {
    const uint32_t size = (uint32_t)search->size;
    for (int64_t i = 0; i < kept; i++, words += search->stride) {
        const uint32_t candidate = (uint32_t)scratch->best[i], parent = candidate / size;
        const uint16_t *from = before + parent * search->stride;
        for (int64_t j = 0; j < m; j += WORDS) memcpy(words + j, from + j, WORDS * sizeof *words);
        words[m] = (uint16_t)(candidate - parent * size);
        errors[i] = scratch->totals[candidate];
    }
}

/* Extend the sums of rows by codebook m. */
INLINE void take_step(const Search *search, Scratch *scratch, const float *alone, int64_t rows,
                      int64_t m) {
    const int64_t size = search->size, books = search->books, beam = search->beam;
    const float *gram = search->gram + m * (m - 1) / 2 * size * size;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = r * beam * search->stride;
        float *errors = scratch->errors + r * beam;
        const int64_t kept = scratch->kept[r], most = m + 1 < books ? beam : 1;
        const int64_t wanted = most < kept * size ? most : kept * size;
        int64_t groups = size, ways = 1;
        while (groups % 2 == 0 && ways < MOST_WAYS && groups * kept > LOWS * wanted) {
            groups /= 2;
            ways *= 2;
        }
        extend(search, scratch, alone + (r * books + m) * size, gram, scratch->words + first,
               errors, m, kept, groups, ways);
        const int64_t found = find_best(scratch, kept, groups, ways, wanted);
        keep_best(search, scratch, scratch->words + first, m, found, scratch->spare + first,
                  errors);
        scratch->kept[r] = (int32_t)found;
    }
    uint16_t *const words = scratch->spare;
    scratch->spare = scratch->words;
    scratch->words = words;
}

DISPATCHED static int64_t search_part(const void *what, int64_t begin, int64_t end) {
    const Search *search = what;
    const int64_t books = search->books, beam = search->beam;
    Scratch scratch;
    void *memory = reserve(search, &scratch);
    if (!memory) return 1;
    for (int64_t i = begin; i < end; i += search->block) {
        const int64_t rows = end - i < search->block ? end - i : search->block;
        for (int64_t r = 0; r < rows; r++) {
            scratch.kept[r] = 1;
            scratch.errors[r * beam] = 0;
        }
        for (int64_t m = 0; m < books; m++)
            take_step(search, &scratch, search->alone + i * books * search->size, rows, m);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t m = 0; m < books; m++)
                search->codes[(i + r) * books + m] = scratch.words[r * beam * search->stride + m];
    }
    free(memory);
    return 0;
}

/* alone, gram (doubled), rows, codebooks, codewords of each, beam, codes (out), threads
 * -> 0, or 1 where memory is short */
PyObject *encode(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[8];
    if (read_integers(args, given, 8, v)) return NULL;
    Search search = {.alone = ADDRESS(v[0]), .gram = ADDRESS(v[1]), .books = v[3], .size = v[4],
                     .beam = v[5], .codes = ADDRESS(v[6])};
    const int64_t rows = v[2], threads = v[7];
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
