/* The search of encode.c, with vectors of VECTOR bytes; encode_16.c and its like include it.
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
#include "encode.h"

#include <math.h>
#include <stdlib.h>

#if VECTOR > 16
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define LOCAL static inline __attribute__((always_inline)) TARGET
#else
#define LOCAL static inline
#endif

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

LOCAL void *reserve(const Search *search, Scratch *scratch) {
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

typedef float Floats __attribute__((vector_size(VECTOR)));
typedef int32_t Integers __attribute__((vector_size(VECTOR)));

/* A vector for each lane, in parts as the processor has them. */
#define WIDE (VECTOR / 4)
#define PARTS (LANES / WIDE)
typedef struct {
    Floats part[PARTS];
} Totals;
typedef struct {
    Integers part[PARTS];
} Keys;

/* DO(p, ...) for each part, EACH(f, p, ...) the values f(lane, ...) of its lanes: constants. */
#if VECTOR == 64
#define ALL_PARTS(DO, ...) DO(0, __VA_ARGS__)
#define EACH(f, p, ...) \
    {f(0, __VA_ARGS__),  f(1, __VA_ARGS__),  f(2, __VA_ARGS__),  f(3, __VA_ARGS__), \
     f(4, __VA_ARGS__),  f(5, __VA_ARGS__),  f(6, __VA_ARGS__),  f(7, __VA_ARGS__), \
     f(8, __VA_ARGS__),  f(9, __VA_ARGS__),  f(10, __VA_ARGS__), f(11, __VA_ARGS__), \
     f(12, __VA_ARGS__), f(13, __VA_ARGS__), f(14, __VA_ARGS__), f(15, __VA_ARGS__)}
#elif VECTOR == 32
#define ALL_PARTS(DO, ...) DO(0, __VA_ARGS__) DO(1, __VA_ARGS__)
#define EACH(f, p, ...) \
    {f(8 * p, __VA_ARGS__),     f(8 * p + 1, __VA_ARGS__), f(8 * p + 2, __VA_ARGS__), \
     f(8 * p + 3, __VA_ARGS__), f(8 * p + 4, __VA_ARGS__), f(8 * p + 5, __VA_ARGS__), \
     f(8 * p + 6, __VA_ARGS__), f(8 * p + 7, __VA_ARGS__)}
#else
#define ALL_PARTS(DO, ...) DO(0, __VA_ARGS__) DO(1, __VA_ARGS__) DO(2, __VA_ARGS__) DO(3, __VA_ARGS__)
#define EACH(f, p, ...) \
    {f(4 * p, __VA_ARGS__), f(4 * p + 1, __VA_ARGS__), f(4 * p + 2, __VA_ARGS__), \
     f(4 * p + 3, __VA_ARGS__)}
#endif

/* Lanes of the parts a and b, one after the other, by number. */
#if defined(__clang__)
LOCAL Integers pick(Integers a, Integers b, Integers from) {
    Integers result;
    for (int lane = 0; lane < WIDE; lane++) {
        const int place = from[lane] & (2 * WIDE - 1);
        result[lane] = place < WIDE ? a[place] : b[place - WIDE];
    }
    return result;
}
#define PICK(a, b, ...) pick(a, b, (Integers)__VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Integers)__VA_ARGS__)
#endif

LOCAL Floats load(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

LOCAL Integers either(Integers mask, Integers yes, Integers no) { return (yes & mask) | (no & ~mask); }

#if VECTOR == 64
LOCAL Integers least(Integers a, Integers b) {
    return (Integers)_mm512_min_epi32((__m512i)a, (__m512i)b);
}
LOCAL Integers most(Integers a, Integers b) {
    return (Integers)_mm512_max_epi32((__m512i)a, (__m512i)b);
}
#elif VECTOR == 32
LOCAL Integers least(Integers a, Integers b) {
    return (Integers)_mm256_min_epi32((__m256i)a, (__m256i)b);
}
LOCAL Integers most(Integers a, Integers b) {
    return (Integers)_mm256_max_epi32((__m256i)a, (__m256i)b);
}
#else
LOCAL Integers least(Integers a, Integers b) { return either((Integers)(a < b), a, b); }
LOCAL Integers most(Integers a, Integers b) { return either((Integers)(a > b), a, b); }
#endif

/* Squared errors as integers of the same order, in which what is no number comes last: without the
 * sign, which rounding gives to some that are about zero, and processors to NaN. */
LOCAL Integers ordered(Floats totals) { return (Integers)totals & INT32_MAX; }

LOCAL int32_t ordered_one(float total) {
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

LOCAL const float *cross_terms(const Search *search, const Step *step, int64_t b, int64_t d) {
    const int64_t word = step->words[b * search->stride + d];
    return step->gram + (d * search->size + word) * search->width;
}

/* to = base + first + second, of `width` codewords; second may be NULL. */
LOCAL void add_terms(int64_t width, const float *base, const float *first, const float *second,
                      float *to) {
    for (int64_t part = 0; part < width; part += WIDE) {
        Floats total = load(base + part) + load(first + part);
        if (second) total += load(second + part);
        memcpy(to + part, &total, sizeof total);
    }
}

/* Terms of all codewords with all words of sum b but the last, shared by sums of one parent. */
LOCAL const float *shared_terms(const Search *search, const Scratch *scratch, Step *step,
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

LOCAL Terms terms_of(const Search *search, const Scratch *scratch, Step *step, int64_t b) {
    Terms terms = {.base = step->alone, .error = step->sums->error[b]};
    if (step->m) terms.last = cross_terms(search, step, b, step->m - 1);
    /* Of three words, adding up costs less than keeping what sums share. */
    if (step->m == 2) terms.other = cross_terms(search, step, b, 0);
    if (step->m > 2) terms.base = shared_terms(search, scratch, step, b);
    return terms;
}

LOCAL Floats totals(Terms terms, int64_t from) {
    Floats total = load(terms.base + from) + terms.error;
    if (terms.last) total += load(terms.last + from);
    return terms.other ? total + load(terms.other + from) : total;
}

LOCAL float total(Terms terms, int64_t word) {
    float total = terms.base[word] + terms.error;
    if (terms.last) total += terms.last[word];
    return terms.other ? total + terms.other[word] : total;
}

/* ---- The best candidates ---- */

#define TURNED(lane, by) (lane) % WIDE + by
#define TURN(p, by) turned.part[p] = PICK(keys.part[p], keys.part[(p + 1) % PARTS], EACH(TURNED, p, by));

/* Lanes go by 1, or by 4. */
LOCAL Keys turn(Keys keys, int by) {
    Keys turned;
    if (by == 1) {
        ALL_PARTS(TURN, 1)
    } else {
        ALL_PARTS(TURN, 4)
    }
    return turned;
}

#define NO_KEYS(p, keys) keys.part[p] = none + INT32_MAX;
#define TAKE_KEYS(p, from) \
    { \
        const Integers key = (ordered(totals(terms, from + p * WIDE)) & ~number) | own; \
        second.part[p] = least(second.part[p], most(first.part[p], key)); \
        first.part[p] = least(first.part[p], key); \
    }

/* The two least keys of each lane: totals in the order of integers, whose last bits number sum and
 * codeword. */
LOCAL void find_best(const Search *search, const Scratch *scratch, Step *step, int by, int32_t *keys) {
    const int64_t count = step->sums->count;
    const int bits = search->bits;
    const Integers none = {0};
    const Integers number = none + ((1 << (bits + PARENT_BITS)) - 1);
    Keys first, second;
    ALL_PARTS(NO_KEYS, first)
    ALL_PARTS(NO_KEYS, second)
    for (int64_t b = 0; b < count; b++) {
        const Terms terms = terms_of(search, scratch, step, b);
        Integers own = none + (int32_t)(b << bits);
        if (b) {
            first = turn(first, by);
            second = turn(second, by);
        }
        for (int64_t from = 0; from < search->width; from += LANES) {
            ALL_PARTS(TAKE_KEYS, from)
            own += 1;
        }
    }
    memcpy(keys, &first, sizeof first);
    memcpy(keys + LANES, &second, sizeof second);
    BARRIER;
}

#define OTHER(lane, apart) ((lane) ^ apart) % WIDE
#define FALLS(lane, apart, rising) !((lane) & apart) == !((lane) & rising) ? -1 : 0
#define MEET(p, apart, rising) \
    { \
        const Integers own = keys.part[p], from = keys.part[(p ^ apart / WIDE) % PARTS]; \
        const Integers other = PICK(from, from, EACH(OTHER, p, apart)); \
        met.part[p] = either((Integers)EACH(FALLS, p, apart, rising), least(own, other), most(own, other)); \
    }

/* Each lane meets the one `apart` from it; lanes with the bit `rising` keep the larger key. */
#define DEFINE_MEET(apart, rising) \
    LOCAL Keys meet_##apart##_##rising(Keys keys) { \
        Keys met; \
        ALL_PARTS(MEET, apart, rising) \
        return met; \
    }
DEFINE_MEET(1, 2)
DEFINE_MEET(2, 4)
DEFINE_MEET(1, 4)
DEFINE_MEET(4, 8)
DEFINE_MEET(2, 8)
DEFINE_MEET(1, 8)
DEFINE_MEET(8, 16)
DEFINE_MEET(4, 16)
DEFINE_MEET(2, 16)
DEFINE_MEET(1, 16)

/* Sort a bitonic sequence, rising. */
LOCAL Keys merge(Keys keys) { return meet_1_16(meet_2_16(meet_4_16(meet_8_16(keys)))); }

/* Batcher's bitonic sort. */
LOCAL Keys sort(Keys keys) {
    keys = meet_1_4(meet_2_4(meet_1_2(keys)));
    return merge(meet_1_8(meet_2_8(meet_4_8(keys))));
}

#define BACKWARDS(lane, _) WIDE - 1 - (lane) % WIDE
#define SPLIT(p, _) \
    { \
        const Integers from = second.part[PARTS - 1 - p]; \
        const Integers falling = PICK(from, from, EACH(BACKWARDS, p, _)); \
        halves[0].part[p] = least(first.part[p], falling); \
        halves[1].part[p] = most(first.part[p], falling); \
    }

/* Numbers of the `wanted` least of the keys (two of each lane), in any order: how many. */
LOCAL int64_t choose(const int32_t *keys, int64_t wanted, uint8_t *chosen) {
    Keys first, second, halves[2];
    memcpy(&first, keys, sizeof first);
    memcpy(&second, keys + LANES, sizeof second);
    first = sort(first);
    second = sort(second);
    ALL_PARTS(SPLIT, 0)
    halves[0] = merge(halves[0]);
    halves[1] = merge(halves[1]);
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
LOCAL void extend(const Search *search, const Scratch *scratch, Step *step, int by, Sums *sums,
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

#define NO_PLACE(p, _) place.part[p] = none;
#define TAKE_LEAST(p, from) \
    own.part[p] = least(own.part[p], ordered(totals(terms, from + p * WIDE)));
#define KEEP_LESS(p, sum) \
    { \
        const Integers less = (Integers)(own.part[p] < low.part[p]); \
        place.part[p] = either(less, none + sum, place.part[p]); \
        low.part[p] = either(less, own.part[p], low.part[p]); \
    }

/* The best of all candidates by the last codebook, of equal ones the first: the sum, and the word
 * that joins it. */
LOCAL int64_t find_last(const Search *search, const Scratch *scratch, Step *step, int64_t *word) {
    const int64_t count = step->sums->count, width = search->width;
    const Integers none = {0};
    Keys low, place; /* of each lane: the least total, and its sum */
    ALL_PARTS(NO_KEYS, low)
    ALL_PARTS(NO_PLACE, 0)
    for (int64_t b = 0; b < count; b++) {
        const Terms terms = terms_of(search, scratch, step, b);
        Keys own;
        ALL_PARTS(NO_KEYS, own)
        for (int64_t from = 0; from < width; from += LANES) {
            ALL_PARTS(TAKE_LEAST, from)
        }
        ALL_PARTS(KEEP_LESS, (int32_t)b)
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

LOCAL void take_step(const Search *search, Scratch *scratch, const float *alone, int64_t rows,
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

TARGET int64_t OWN(search)(const void *what, int64_t begin, int64_t end) {
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
