/* Rows and bags of compressed tables, and the gradient of their codebooks.
 *
 * Tensors come as addresses; Python has checked dtypes, shapes and contiguity. The codes of a row
 * are a run of bits in one little-endian stream, 8 zero bytes end the stream, so 64 bits may be
 * loaded from where any row starts. Sums of codewords are made in the order of the codebooks,
 * without fused multiply-adds, so that rows equal those of the plain-torch reference bit for bit.
 */
#ifndef MEC_EMBED_LOOKUP_H
#define MEC_EMBED_LOOKUP_H

#include "native.h"

#include <stdlib.h>
#if VECTOR >= 32
#include <immintrin.h>
#endif

#define MOST_CODEBOOKS 256
#define MOST_VECTORS 8 /* summed in registers */
#define BLOCK 32       /* rows whose codes are asked for before the first of them is decoded */
#define MOST_BITS 57   /* that are read at once, from any bit of a byte on */
#define FEW 8          /* codewords of a row that are asked for as well, at most */
#define BLOCK_ROWS 128 /* of a bitmap, with one count */

#define LINE 64 /* bytes of a cache line */
#define FAR_ROWS (6 << 20) /* bytes of rows that are worth asking for: not in the near caches */
#define FIRST_LINES 8 /* of a row, that are asked for: the processor goes on by itself */

/* Kinds of codewords. */
enum { FLOAT32, INT8, FLOAT16, BFLOAT16 };

/* Where a row is. */
typedef struct {
    const Table *table; /* NULL: it reads as zeros */
    int64_t row;
    int32_t number[FEW]; /* of its codewords, where they are few, see find_block */
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
    for (int64_t k = 1; k < plan->runs; k++) run += starts[k] <= id; /* no branch to guess */
    const int popular = !(run & 1);
    *place = id - (popular ? starts[run] - before[run] : before[run]);
    return popular;
}

INLINE int in_bitmap(const Plan *plan, int64_t id, int64_t *place) {
    const uint8_t *words = ADDRESS(plan->bitmap);
    const int64_t at = id / 64, within = id % 64; /* two words have one count */
    const uint64_t own = load64(words + at * 8), before = load64(words + (at & ~(int64_t)1) * 8);
    int64_t rank = ((const int32_t *)ADDRESS(plan->before))[id / BLOCK_ROWS];
    rank += __builtin_popcountll(before) & -(at & 1); /* no branch to guess */
    rank += __builtin_popcountll(own & (((uint64_t)1 << within) - 1));
    const int popular = own >> within & 1;
    *place = rank + ((id - 2 * rank) & (int64_t)(popular - 1)); /* or id - rank, and no branch to guess */
    return popular;
}

INLINE int is_popular(const Plan *plan, int64_t id, int64_t *place) {
    return plan->runs ? in_runs(plan, id, place) : in_bitmap(plan, id, place);
}

INLINE int64_t stride_of(const Table *table) {
    switch (table->kind) {
        case INT8: return table->width;
        case FLOAT32: return table->width * 4;
        default: return table->width * 2;
    }
}

/* Whether rows are worth asking for: codes, or rows of a large table that has none. */
INLINE int is_far(const Table *table) {
    return table->bits || table->size * stride_of(table) > FAR_ROWS;
}

/* Ask for the codes of a row, or for where the row itself begins. An address that is out of range
 * is only a hint that is not followed. */
INLINE void expect_row(const Table *table, int64_t row) {
    const int64_t stride = stride_of(table), most = FIRST_LINES * LINE;
    const uintptr_t from = (uintptr_t)table->words + (uintptr_t)row * stride;
    if (table->bits)
        PREFETCH((uintptr_t)table->codes + (((uintptr_t)row * table->bits * table->books) >> 3));
    else
        for (int64_t at = 0; at < stride && at < most; at += LINE) PREFETCH(from + at);
}

/* Ask for what the next ids need: codes, rows that have none, or the map of the tiers. */
INLINE void expect_ids(const Plan *plan, const Ids *ids, int64_t from, int64_t to) {
    const Table *table = plan->table;
    const int64_t bits = table->bits * table->books;
    if (plan->tiers == 1 && bits) {
        UNROLL(4)
        for (int64_t i = from; i < to; i++)
            PREFETCH((uintptr_t)table->codes + ((uintptr_t)id_at(ids, i) * bits >> 3));
    } else if (plan->tiers == 1)
        for (int64_t i = from; i < to && is_far(table); i++) expect_row(table, id_at(ids, i));
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
            if (is_far(table)) expect_row(table, row);
        }
        if (table->one_row) row = 0;
        if (row < 0 || row >= table->rows) return 0; /* a map that contradicts the tables */
        place[i].table = table;
        place[i].row = row;
    }
    return 1;
}

/* ---- Words ---- */

INLINE void put_scale(const Table *table, int64_t number, float *scale) {
    if (table->kind == INT8)
        *scale = as_float((uint32_t)((const uint16_t *)ADDRESS(table->scales))[number] << 16);
}

/* The exponent of the scale of a codeword that is a power of two, or 0. */
INLINE int exponent_of(const Table *table, int64_t number) {
    const uint16_t scale = ((const uint16_t *)ADDRESS(table->scales))[number];
    return scale & 0x807f || scale == 0x7f80 ? 0 : scale >> 7;
}

/* Whether all codes of a row are read at once. */
INLINE int read_at_once(const Table *table) {
    return table->bits && table->bits * table->books <= MOST_BITS;
}

/* Numbers of the codewords of a row whose codes are read at once; 0 if one does not exist. */
INLINE int number_words(const Table *table, int64_t row, int32_t *number) {
    const int64_t bits = table->bits, size = table->size, last = table->books * size;
    const int64_t first = row * bits * table->books;
    const uint8_t *codes = ADDRESS(table->codes);
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    uint64_t stream = load64(codes + (first >> 3)) >> (first & 7);
    int fits = 1;
    for (int64_t book = 0; book < last; book += size, stream >>= bits) {
        const int64_t code = (int64_t)(stream & mask);
        fits &= code < size;
        *number++ = (int32_t)(book + code);
    }
    return fits;
}

/* The codewords of these numbers, and the scale of each. */
INLINE void name_words(const Table *table, const int32_t *number, const char **word,
                       float *scale) {
    const char *words = ADDRESS(table->words);
    for (int64_t m = 0; m < table->books; m++) {
        word[m] = words + number[m] * stride_of(table);
        put_scale(table, number[m], scale + m);
    }
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
    if (read_at_once(table)) {
        int32_t number[MOST_BITS];
        if (!number_words(table, row, number)) return 0;
        name_words(table, number, word, scale);
        return 1;
    }
    const uint8_t *codes = ADDRESS(table->codes);
    const int64_t bits = table->bits, books = table->books, next = size * stride;
    const int64_t first = row * bits * books;
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    for (int64_t m = 0; m < books; m++, book += next) {
        const int64_t place = first + m * bits;
        const int64_t code = (int64_t)(load64(codes + (place >> 3)) >> (place & 7) & mask);
        if (code >= size) return 0;
        word[m] = book + code * stride;
        put_scale(table, m * size + code, scale + m);
    }
    return 1;
}

/* Whether a row has so few codewords that they are asked for before any is read: those of a block
 * of rows then arrive together. */
INLINE int has_few(const Table *table) { return read_at_once(table) && table->books <= FEW; }

/* As find_places; the codewords of rows that have few, and their scales, are numbered and asked for.
 * 0 also where a codeword does not exist. */
INLINE int find_block(const Plan *plan, const Ids *ids, int64_t first, int64_t count, int64_t end,
                      int64_t zero_id, Place *place) {
    if (!find_places(plan, ids, first, count, end, zero_id, place)) return 0;
    for (int64_t i = 0; i < count; i++, place++) {
        const Table *table = place->table;
        if (!table || !has_few(table)) continue;
        if (!number_words(table, place->row, place->number)) return 0;
        for (int64_t m = 0; m < table->books; m++) {
            const int64_t number = place->number[m];
            PREFETCH((uintptr_t)table->words + (uintptr_t)(number * stride_of(table)));
            if (table->kind == INT8) PREFETCH((uintptr_t)table->scales + (uintptr_t)number * 2);
        }
    }
    return 1;
}

/* As find_words, of a place that find_block found. */
INLINE int take_words(const Place *place, const char **word, float *scale) {
    if (!has_few(place->table)) return find_words(place->table, place->row, word, scale);
    name_words(place->table, place->number, word, scale);
    return 1;
}

/* ---- Codewords ---- */

#define LANES 8 /* columns of a codeword that are read and added together */

/* Vectors of them: one, or two where the processor has no longer ones. GCC keeps vectors that the
 * processor has not in memory, which takes several times as long. */
#if VECTOR >= 32
#define WIDE 8
#define OF_EACH(b) {b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]}
#else
#define WIDE 4
#define OF_EACH(b) {b[0], b[1], b[2], b[3]}
#endif
typedef float Vector __attribute__((vector_size(4 * WIDE)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDE)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDE)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDE)));

typedef struct {
    Vector part[LANES / WIDE];
} Floats;

INLINE void add_floats(Floats *total, Floats values) {
    for (int p = 0; p < LANES / WIDE; p++) total->part[p] += values.part[p];
}

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

INLINE Vector some_entries(const char *word, int64_t at, int kind, float scale) {
    Vector values;
    if (kind == INT8) {
        /* One by one: GCC makes one instruction of these, and many of a conversion of vectors. */
        const int8_t *b = (const int8_t *)word + at;
        const Integers whole = OF_EACH(b);
        return __builtin_convertvector(whole, Vector) * scale;
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

INLINE Floats entries(const char *word, int64_t at, int kind, float scale) {
    Floats values;
    for (int p = 0; p < LANES / WIDE; p++)
        values.part[p] = some_entries(word, at + p * WIDE, kind, scale);
    return values;
}

/* ---- Whole numbers ---- */

/* int8 codewords with one scale a codebook, powers of two near to each other (quantize_codebooks), are
 * whole numbers of one unit: their sums are exact in any order, also in 16 bits, of which a vector
 * has twice as many as of floats. Codewords stay where they are, and as they are. */
#define LARGEST 128    /* int8, without the sign */
#define MOST_SHIFT 6   /* of one, so that two fit 16 bits */
#define MOST_EXPONENT 239 /* of their unit, so that their sum is finite */
#define MOST_EIGHTS 16 /* of columns, summed in registers */
#if VECTOR >= 32
#define SUMS_EIGHTS (VECTOR / LANES) /* times 8 columns in one Sums */

/* The codebooks of a table. */
typedef struct {
    const int8_t *words;
    int64_t books;
    uint32_t none; /* where rows of zeros would have their codewords */
    /* Of each codebook the factor of its codewords, in the byte above it that of the next one, or of
     * the first one after the last, and both once more. */
    const uint32_t *factors;
} Whole;

/* Numbers of 16 bits as floats to `to`, or added to what is there. */
INLINE void put_eight(__m128i numbers, float unit, int more, float *to) {
    const __m256 floats = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(numbers));
    const __m256 all = _mm256_mul_ps(floats, _mm256_set1_ps(unit));
    _mm256_storeu_ps(to, more ? _mm256_add_ps(all, _mm256_loadu_ps(to)) : all);
}

/* Sums of as many columns as bytes of a vector, in 16 bits. Two codewords at a time: their bytes in
 * turn, then one instruction multiplies each by its factor and adds the two. Of every 16 columns the
 * first eight go to `low`. With intrinsics: GCC has no other word for that instruction, and takes a
 * dozen for what the conversions say in three. */
#if VECTOR == 64
typedef struct {
    __m512i low, high;
} Sums;

/* `eights` times 8 bytes, a constant; zeros after them. */
INLINE __m512i load_bytes(const int8_t *from, int eights) {
    if (eights == VECTOR / LANES) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi8(((uint64_t)1 << eights * LANES) - 1, from);
}

INLINE void add_two(Sums *sums, const int8_t *one, const int8_t *other, uint32_t factors, int eights) {
    const __m512i a = load_bytes(one, eights), b = load_bytes(other, eights);
    const __m512i both = _mm512_set1_epi32((int)factors);
    const __m512i low = _mm512_maddubs_epi16(both, _mm512_unpacklo_epi8(a, b));
    sums->low = _mm512_add_epi16(sums->low, low);
    if (eights == 1) return;
    const __m512i high = _mm512_maddubs_epi16(both, _mm512_unpackhi_epi8(a, b));
    sums->high = _mm512_add_epi16(sums->high, high);
}

INLINE void put_sixteen(__m256i numbers, float unit, int more, float *to) {
    const __m512 floats = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(numbers));
    const __m512 all = _mm512_mul_ps(floats, _mm512_set1_ps(unit));
    _mm512_storeu_ps(to, more ? _mm512_add_ps(all, _mm512_loadu_ps(to)) : all);
}

/* The first `eights` times 8 of 32. */
INLINE void put_some(__m512i numbers, int eights, float unit, int more, float *to) {
    const __m256i low = _mm512_castsi512_si256(numbers), high = _mm512_extracti64x4_epi64(numbers, 1);
    if (eights == 1) put_eight(_mm256_castsi256_si128(low), unit, more, to);
    if (eights > 1) put_sixteen(low, unit, more, to);
    if (eights == 3) put_eight(_mm256_castsi256_si128(high), unit, more, to + 16);
    if (eights > 3) put_sixteen(high, unit, more, to + 16);
}

INLINE void put_sums(const Sums *sums, int eights, float unit, int more, float *to) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    put_some(_mm512_permutex2var_epi64(sums->low, first, sums->high), eights, unit, more, to);
    if (eights > 4)
        put_some(_mm512_permutex2var_epi64(sums->low, second, sums->high), eights - 4, unit, more,
                 to + 32);
}
#else
typedef struct {
    __m256i low, high;
} Sums;

/* What is after them is not asked for. */
INLINE __m256i load_bytes(const int8_t *from, int eights) {
    const __m128i *const at = (const __m128i *)from;
    switch (eights) {
        case 1: return _mm256_castsi128_si256(_mm_loadl_epi64(at));
        case 2: return _mm256_castsi128_si256(_mm_loadu_si128(at));
        case 3: return _mm256_setr_m128i(_mm_loadu_si128(at), _mm_loadl_epi64(at + 1));
        default: return _mm256_loadu_si256((const __m256i *)from);
    }
}

INLINE void add_two(Sums *sums, const int8_t *one, const int8_t *other, uint32_t factors, int eights) {
    const __m256i a = load_bytes(one, eights), b = load_bytes(other, eights);
    const __m256i both = _mm256_set1_epi32((int)factors);
    const __m256i low = _mm256_maddubs_epi16(both, _mm256_unpacklo_epi8(a, b));
    sums->low = _mm256_add_epi16(sums->low, low);
    if (eights == 1) return;
    const __m256i high = _mm256_maddubs_epi16(both, _mm256_unpackhi_epi8(a, b));
    sums->high = _mm256_add_epi16(sums->high, high);
}

INLINE void put_sums(const Sums *sums, int eights, float unit, int more, float *to) {
    put_eight(_mm256_castsi256_si128(sums->low), unit, more, to);
    if (eights > 1) put_eight(_mm256_castsi256_si128(sums->high), unit, more, to + LANES);
    if (eights > 2)
        put_eight(_mm256_extracti128_si256(sums->low, 1), unit, more, to + 2 * LANES);
    if (eights > 3)
        put_eight(_mm256_extracti128_si256(sums->high, 1), unit, more, to + 3 * LANES);
}
#endif

/* Of some columns: how many eights of them the sums number v hold. */
INLINE int eights_of(int eights, int v) {
    const int left = eights - v * SUMS_EIGHTS;
    return left < SUMS_EIGHTS ? left : SUMS_EIGHTS;
}

INLINE void clear_sums(Sums *sums, int eights) {
    for (int v = 0; v * SUMS_EIGHTS < eights; v++) sums[v] = (Sums){0};
}

/* Two codewords. */
INLINE void add_codes(Sums *sums, const int8_t *one, const int8_t *other, uint32_t factors, int eights) {
    for (int v = 0; v * SUMS_EIGHTS < eights; v++)
        add_two(sums + v, one + v * SUMS_EIGHTS * LANES, other + v * SUMS_EIGHTS * LANES, factors,
                eights_of(eights, v));
}

/* One codeword; `factors` of two of its codebook, or more. */
INLINE void add_code(Sums *sums, const int8_t *one, uint32_t factors, int eights) {
    add_codes(sums, one, one, factors & 0xff00ff, eights);
}

/* Add `eights` times 8 columns, a constant, of the codewords of a row, which are `pitch` words apart. */
INLINE void sum_bytes(const Whole *all, const uint32_t *word, int64_t pitch, int eights, Sums *sums) {
    int64_t m = 0;
    UNROLL(2)
    for (; m + 1 < all->books; m += 2, word += 2 * pitch)
        add_codes(sums, all->words + word[0], all->words + word[pitch], all->factors[m], eights);
    if (m < all->books) add_code(sums, all->words + word[0], all->factors[m], eights);
}

/* The same of the codewords of `rows` rows, one codebook after the other; of one row, in pairs of them. */
INLINE void sum_rows_of_bytes(const Whole *all, const uint32_t *word, int64_t pitch, int64_t rows,
                              int eights, Sums *sums) {
    if (rows == 1) sum_bytes(all, word, pitch, eights, sums);
    if (rows < 2) return;
    for (int64_t m = 0; m < all->books; m++, word += pitch) {
        const uint32_t factors = (all->factors[m] & 0xff) * 0x1010101u;
        int64_t i = 0;
        UNROLL(2)
        for (; i + 1 < rows; i += 2)
            add_codes(sums, all->words + word[i], all->words + word[i + 1], factors, eights);
        if (i < rows) add_code(sums, all->words + word[i], factors, eights);
    }
}

INLINE void put_bytes(const Sums *sums, int eights, float unit, int more, float *out) {
    for (int v = 0; v * SUMS_EIGHTS < eights; v++)
        put_sums(sums + v, eights_of(eights, v), unit, more, out + v * SUMS_EIGHTS * LANES);
}

#endif

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
            add_floats(&total[v], entries(word[m], column + v * LANES, kind, scale[m]));
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

/* One row that find_block found; 0 where its codes are damaged. */
INLINE int decode(const Place *place, int64_t dim, float *out) {
    const char *word[MOST_CODEBOOKS];
    float scale[MOST_CODEBOOKS];
    const Table *table = place->table;
    if (!table) {
        memset(out, 0, dim * sizeof(float));
        return 1;
    }
    if (!take_words(place, word, scale)) return 0;
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
    Ids ids, offsets; /* offsets from NULL: bags of `length` ids each */
    int64_t count, bags, length;
    /* Of rounds, in blocks of columns: lines of a block, and of each tier bytes from one codeword to
     * the next, and from one block to the next. */
    int64_t lines, step[2], block[2];
    float unit[2]; /* of each tier whose codewords are whole numbers, else 0 */
    const uint32_t *factors[2];
    int64_t together; /* rows of them whose sum fits 16 bits */
    int64_t zero_id; /* id that reads as zeros, is left out, or has no gradient; -1 for none */
    const float *weights; /* of the ids of a bag, or NULL */
    int mode;
    float *out;
    int64_t pitch; /* entries from one row of the output to the next, of rows alone */
    /* of gradients and of tiers alone */
    const float *grad;
    uint8_t *flags;
    int64_t *places;
} Job;

INLINE int64_t decode_rows(const Job *job, const Ids *ids, int64_t begin, int64_t end) {
    const int64_t dim = job->plan->dim;
    Place place[BLOCK];
    expect_ids(job->plan, ids, begin, begin + BLOCK < end ? begin + BLOCK : end);
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t count = end - i < BLOCK ? end - i : BLOCK;
        if (!find_block(job->plan, ids, i, count, end, job->zero_id, place)) return 1;
        for (int64_t j = 0; j < count; j++)
            if (!decode(place + j, dim, job->out + (i + j) * job->pitch)) return 1;
    }
    return 0;
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
INLINE int all_alike(const Plan *plan) {
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
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t count = end - i < BLOCK ? end - i : BLOCK;
        if (!find_block(job->plan, &job->ids, i, count, job->count, job->zero_id, place)) return 0;
        for (int64_t j = 0; j < count; j++) {
            const Table *table = place[j].table;
            if (!table) continue;
            if (heap.count + table->books > MOST_CODEBOOKS) empty_heap(&heap, dim, kind, row);
            if (!take_words(place + j, heap.word + heap.count, heap.scale + heap.count)) return 0;
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
        if (!find_block(job->plan, &job->ids, i, 1, job->count, job->zero_id, &place)) return 0;
        if (!place.table) continue;
        if (!decode(&place, dim, row)) return 0;
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

/* ---- Many ids: by rounds ---- */

/* Ids are taken in rounds: codes are read once, then the sums of each block of columns are made in
 * registers. Codewords stay where they are, or are copied first: to float32, into blocks of columns
 * about as small as the nearest cache, each with all codewords at whole cache lines and zeros after
 * the last. */
#define LINE_LANES 16
#define MOST_LINES 8  /* of a block */
#define FLOAT_LINES 4 /* of one that has floats */
#define FAR_CODES (512 << 10) /* bytes of codes that are worth asking for */
#define MOST_ROWS 4 /* made side by side, of one line and less; of two 2, of more LONG_ROWS */
#define ROUND 128
#define ROUND_WORDS 2048

#if VECTOR == 64
#define LONG_ROWS 2
typedef float Line __attribute__((vector_size(LINE)));

INLINE void add_line(Line *total, Line line) { *total += line; }
#else
#define LONG_ROWS 1
typedef struct {
    Floats half[2];
} Line;

INLINE void add_line(Line *total, Line line) {
    for (int h = 0; h < 2; h++) add_floats(&total->half[h], line.half[h]);
}
#endif

typedef struct {
    Line sums[ROUND * MOST_LINES];  /* of a block of columns, where they do not go to the output */
    int64_t row[2][ROUND + LANES];  /* by tier; -1: zeros; up to the pitch the last once more */
    int32_t at[2][ROUND + LANES];   /* their numbers within the round */
    int64_t count[2];               /* how many */
    /* Where their codewords are in a block of columns, by tier, by codebook (pitch_of). */
    uint32_t word[ROUND_WORDS + 2 * LANES * MOST_CODEBOOKS];
} Round;

/* Of a round, or of a tier of it: words from one codebook to the next. */
INLINE int64_t pitch_of(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Vector by vector: GCC takes what holds several through memory. */
INLINE Floats half_line_at(const char *word, int64_t at) {
    Floats values;
    for (int p = 0; p < LANES / WIDE; p++)
        memcpy(&values.part[p], word + at * LINE + p * sizeof(Vector), sizeof(Vector));
    return values;
}

INLINE Line line_at(const char *word, int64_t at) {
    Line values;
#if VECTOR == 64
    memcpy(&values, word + at * LINE, sizeof values);
#else
    for (int h = 0; h < 2; h++) values.half[h] = half_line_at(word + h * sizeof(Floats), at);
#endif
    return values;
}

INLINE int64_t lines_of(int64_t columns) { return (columns + LINE_LANES - 1) / LINE_LANES; }

/* Bytes of a block of so many codewords of `line` bytes, and one more. */
INLINE int64_t block_bytes(int64_t words, int64_t line) {
    return ((words + 1) * line + LINE - 1) / LINE * LINE;
}

/* A codeword in float32, in blocks of `lines` that are `block` bytes apart. */
INLINE void widen(const char *word, int64_t width, int kind, float scale, int64_t lines,
                  int64_t block, char *to) {
    for (int64_t column = 0; column < width; to += block)
        for (int64_t half = 0; half < 2 * lines && column < width; half++, column += LANES) {
            float *const values = (float *)(to + half * sizeof(Floats));
            if (column + LANES <= width) {
                const Floats all = entries(word, column, kind, scale);
                memcpy(values, &all, sizeof all);
            } else {
                memset(values, 0, sizeof(Floats));
                for (int64_t j = column; j < width; j++)
                    values[j - column] = entry(word, j, kind, scale);
            }
        }
}

INLINE void put_lines(const Line *total, const Floats *rest, int lines, int half, float *out) {
    for (int v = 0; v < lines; v++) memcpy(out + v * LINE_LANES, &total[v], sizeof *total);
    if (half) memcpy(out + lines * LINE_LANES, rest, sizeof *rest);
}

INLINE int64_t ids_of_round(const Plan *plan) {
    int64_t books = plan->table[0].books;
    if (plan->tiers == 2 && plan->table[1].books > books) books = plan->table[1].books;
    return books * ROUND > ROUND_WORDS ? ROUND_WORDS / books : ROUND;
}

/* Rows are read eight at a time: after the last one of a list stands the same, whose codes are wanted. */
INLINE void fill_pitch(Round *round, int tier) {
    const int64_t count = round->count[tier];
    int64_t *row = round->row[tier];
    for (int64_t i = count; count && i < pitch_of(count); i++) row[i] = row[count - 1];
}

/* The rows of `count` ids from number `first` on; 0 where an id is none. */
INLINE int list_ids(const Job *job, const Ids *ids, int64_t first, int64_t count, Round *round) {
    const int64_t rows = job->plan->rows, zero_id = job->zero_id;
    const int64_t only = job->plan->table->one_row ? 0 : -1;
    int fits = 1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t id = id_at(ids, first + i);
        fits &= id >= 0 && id < rows;
        round->row[0][i] = id == zero_id ? -1 : id & only;
        round->at[0][i] = (int32_t)i;
    }
    round->count[0] = count;
    fill_pitch(round, 0);
    return fits;
}

/* As list_ids, in a list for each tier. */
INLINE int sort_ids(const Job *job, const Ids *ids, int64_t first, int64_t count, Round *round) {
    const Plan plan = *job->plan; /* nothing that is written here can change it */
    const int64_t zero_id = job->zero_id;
    int64_t rows[2], only[2], bits[2], popular = 0;
    uintptr_t codes[2];
    int fits = 1;
    for (int t = 0; t < 2; t++) {
        const Table *table = plan.table + t;
        rows[t] = table->rows;
        bits[t] = table->bits * table->books;
        codes[t] = (uintptr_t)table->codes;
        only[t] = table->one_row ? 0 : -1;
    }
    /* Which tier an id is of cannot be foreseen: no branches. */
    for (int64_t i = 0; i < count; i++) {
        const int64_t id = id_at(ids, first + i);
        if (id < 0 || id >= plan.rows) return 0;
        int64_t row;
        const int one = is_popular(&plan, id, &row), tier = !one;
        row &= only[tier];
        PREFETCH(codes[tier] + (uintptr_t)(row * bits[tier] >> 3)); /* only a hint, see expect_row */
        /* Else the map contradicts the tables; rows below 0 are large without their sign. */
        fits &= (uint64_t)row < (uint64_t)rows[tier];
        row |= -(int64_t)(id == zero_id);
        /* Into both lists, of which one goes on. */
        const int64_t other = i - popular;
        round->row[0][popular] = round->row[1][other] = row;
        round->at[0][popular] = round->at[1][other] = (int32_t)i;
        popular += one;
    }
    round->count[0] = popular;
    round->count[1] = count - popular;
    for (int t = 0; t < 2; t++) fill_pitch(round, t);
    return fits;
}

INLINE int list_round(const Job *job, int64_t first, int64_t count, Round *round) {
    const Ids *ids = &job->ids, wide = {ids->from, 1, 1};
    if (job->plan->tiers == 2)
        return ids->wide && ids->stride == 1 ? sort_ids(job, &wide, first, count, round)
                                             : sort_ids(job, ids, first, count, round);
    if (ids->wide && ids->stride == 1) ids = &wide; /* constants, for the compiler */
    return list_ids(job, ids, first, count, round);
}

/* Words that name no codeword; added to a code, they show by the bits that it must not have. */
INLINE uint32_t spare_codes(const Table *table) {
    return (uint32_t)(((int64_t)1 << table->bits) - table->size);
}

#if VECTOR >= 32
/* 64 bits of the codes of each of eight rows. */
#define STREAMS (VECTOR / 8) /* in one vector */
typedef uint64_t Stream __attribute__((vector_size(VECTOR)));
typedef struct {
    Stream part[LANES / STREAMS];
} Streams;

/* Where the loads of codes from number `from` on begin: bytes, and bits after them. In a loop of its own:
 * GCC would take addresses out of vectors one by one. */
INLINE void find_loads(const Table *table, const int64_t *row, int64_t count, int64_t from,
                       int64_t *byte, int64_t *bit) {
    const int64_t bits = table->bits, all = bits * table->books;
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = (row[i] < 0 ? 0 : row[i]) * all + from * bits;
        byte[i] = at >> 3;
        bit[i] = at & 7;
    }
}

INLINE Streams load_streams(const uint8_t *codes, const int64_t *byte, const int64_t *bit) {
    Streams all;
    for (int p = 0; p < LANES / STREAMS; p++, byte += STREAMS, bit += STREAMS) {
        Stream own, shift;
        for (int k = 0; k < STREAMS; k++) own[k] = load64(codes + byte[k]);
        memcpy(&shift, bit, sizeof shift);
        all.part[p] = own >> shift;
    }
    return all;
}

/* The next code of each, which the streams then begin after. */
INLINE Words next_codes(Streams *all, int64_t bits, uint32_t mask) {
#if VECTOR == 64
    const Words codes = __builtin_convertvector(all->part[0], Words);
#else
    /* GCC takes three times as many instructions. */
    const __m256 halves = _mm256_shuffle_ps((__m256)all->part[0], (__m256)all->part[1], 0x88);
    const Words codes = (Words)_mm256_permute4x64_epi64((__m256i)halves, 0xd8);
#endif
    for (int p = 0; p < LANES / STREAMS; p++) all->part[p] >>= (uint64_t)bits;
    return codes & mask;
}

/* Where the codewords of rows are in a block of columns whose codewords take `stride` bytes; 0 where there
 * is no such codeword. As many codes of a row as one load holds are read at once, of eight rows side by
 * side: those of a list, up to its pitch. */
OUTLINE int find_codes(const Table *table, const int64_t *row, int64_t count, int64_t stride,
                       uint32_t *word) {
    const int64_t bits = table->bits, books = table->books, size = table->size;
    const int64_t once = MOST_BITS / bits, pitch = pitch_of(count);
    const uint8_t *codes = ADDRESS(table->codes);
    const uint32_t mask = ((uint32_t)1 << bits) - 1, spare = spare_codes(table);
    int64_t byte[ROUND], bit[ROUND];
    Words over = {0};
    for (int64_t from = 0; from < books; from += once) {
        const int64_t last = from + once < books ? from + once : books;
        find_loads(table, row, pitch, from, byte, bit);
        for (int64_t i = 0; i < count; i += LANES) {
            Streams streams = load_streams(codes, byte + i, bit + i);
            for (int64_t m = from; m < last; m++) {
                const Words code = next_codes(&streams, bits, mask);
                const Words found = (code + (uint32_t)(m * size)) * (uint32_t)stride;
                over |= code + spare;
                memcpy(word + m * pitch + i, &found, sizeof found);
            }
        }
    }
    uint32_t wrong = 0;
    for (int64_t k = 0; k < LANES; k++) wrong |= over[k];
    return !(wrong >> bits);
}

#else
/* As find_codes below, row by row: vectors here have no shifts of each lane by a number of its own.
 * `books` may be a constant. */
INLINE int find_some(const Table *table, const int64_t *row, int64_t count, int64_t stride,
                     int64_t books, uint32_t *word) {
    const int64_t bits = table->bits, size = table->size, pitch = pitch_of(count);
    const int64_t once = books <= 3 ? books : MOST_BITS / bits; /* three always fit */
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    const uint8_t *codes = ADDRESS(table->codes);
    uint64_t over = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t bit = (row[i] < 0 ? 0 : row[i]) * bits * books;
        for (int64_t from = 0; from < books; from += once, bit += once * bits) {
            const int64_t to = from + once < books ? from + once : books;
            uint64_t stream = load64(codes + (bit >> 3)) >> (bit & 7);
            for (int64_t m = from; m < to; m++, stream >>= bits) {
                const int64_t code = (int64_t)(stream & mask);
                over |= (uint64_t)code + spare_codes(table);
                word[m * pitch + i] = (uint32_t)((m * size + code) * stride);
            }
        }
    }
    return !(over >> bits);
}

OUTLINE int find_codes(const Table *table, const int64_t *row, int64_t count, int64_t stride,
                       uint32_t *word) {
    if (table->books == 1) return find_some(table, row, count, stride, 1, word);
    if (table->books == 2) return find_some(table, row, count, stride, 2, word);
    if (table->books == 3) return find_some(table, row, count, stride, 3, word);
    return find_some(table, row, count, stride, table->books, word);
}
#endif

/* As find_codes, of a table whose rows are its codewords. */
INLINE int find_only(const Table *table, const int64_t *row, int64_t count, int64_t stride,
                     uint32_t *word) {
    for (int64_t i = 0; i < count; i++) {
        if (row[i] >= table->size) return 0;
        word[i] = (uint32_t)(row[i] * stride);
    }
    return 1;
}

/* Where the codewords of rows of zeros would be. */
INLINE void forget_zeros(const Table *table, const int64_t *row, int64_t count, int64_t stride,
                         uint32_t *word) {
    const uint32_t none = (uint32_t)(table->books * table->size * stride);
    int any = 0;
    for (int64_t i = 0; i < count; i++) any |= row[i] < 0;
    /* Which ids these are cannot be foreseen: no branches. */
    for (int64_t m = 0; any && m < table->books; m++, word += pitch_of(count))
        for (int64_t i = 0; i < count; i++) word[i] = row[i] < 0 ? none : word[i];
}

/* The codewords of `count` ids from number `first` on; 0 where there are none. */
INLINE int find_round(const Job *job, int64_t first, int64_t count, Round *round) {
    uint32_t *word = round->word;
    int fits = list_round(job, first, count, round);
    for (int64_t t = 0; t < job->plan->tiers && fits; t++) {
        const Table *table = job->plan->table + t;
        const int64_t found = round->count[t], stride = job->step[t];
        if (table->bits)
            fits = !found || find_codes(table, round->row[t], found, stride, word);
        else
            fits = find_only(table, round->row[t], found, stride, word);
        if (job->zero_id >= 0) forget_zeros(table, round->row[t], found, stride, word);
        word += pitch_of(found) * table->books;
    }
    return fits;
}

/* Sums of codewords, `lines` times 16 columns, and 8 more where `half`. Rows whose codewords would be
 * at `none` are zeros. */
INLINE void sum_round(const uint32_t *word, const int32_t *at, int64_t count, int64_t books,
                      uint32_t none, const char *words, int lines, int half, float *out,
                      int64_t stride) {
    const int64_t pitch = pitch_of(count);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t *next = word + i;
        Line total[MOST_LINES];
        Floats rest;
        if (*next == none) {
            memset(out + at[i] * stride, 0, (lines * LINE_LANES + half * LANES) * sizeof(float));
            continue;
        }
        for (int v = 0; v < lines; v++) total[v] = line_at(words + *next, v);
        if (half) rest = half_line_at(words + *next, lines);
        for (int64_t m = 1; m < books; m++) {
            next += pitch;
            for (int v = 0; v < lines; v++) add_line(&total[v], line_at(words + *next, v));
            if (half) add_floats(&rest, half_line_at(words + *next, lines));
        }
        put_lines(total, &rest, lines, half, out + at[i] * stride);
    }
}

/* ---- Sums of whole numbers ---- */

/* Where rows of zeros would have their codewords. */
INLINE uint32_t none_of(const Job *job, int64_t tier) {
    const Table *table = job->plan->table + tier;
    return (uint32_t)(table->books * table->size * job->step[tier]);
}

#if VECTOR >= 32
INLINE Whole whole_at(const Job *job, int64_t tier, const char *words) {
    const Table *table = job->plan->table + tier;
    return (Whole){
        .words = (const int8_t *)words,
        .books = table->books,
        .none = none_of(job, tier),
        .factors = job->factors[tier],
    };
}

/* As sum_round. */
INLINE void sum_round_of_bytes(const Job *job, int64_t tier, const uint32_t *word, const int32_t *at,
                               int64_t count, const char *words, int eights, float *out,
                               int64_t stride) {
    const Whole all = whole_at(job, tier, words);
    const int64_t pitch = pitch_of(count);
    for (int64_t i = 0; i < count; i++) {
        Sums sums[MOST_EIGHTS / SUMS_EIGHTS];
        clear_sums(sums, eights);
        if (word[i] != all.none) sum_bytes(&all, word + i, pitch, eights, sums);
        put_bytes(sums, eights, job->unit[tier], 0, out + at[i] * stride);
    }
}

/* As add_rows: as many rows at a time as fit 16 bits, but those of zeros. */
INLINE void add_rows_of_bytes(const Job *job, const uint32_t *word, int64_t pitch, int64_t count,
                              const char *words, int64_t width, int eights, int fresh, float *out) {
    const Whole all = whole_at(job, 0, words);
    /* A whole bag that fits: to the output at once. */
    if (fresh && width == eights * LANES && count <= job->together && job->zero_id < 0) {
        Sums sums[MOST_EIGHTS / SUMS_EIGHTS];
        clear_sums(sums, eights);
        sum_rows_of_bytes(&all, word, pitch, count, eights, sums);
        put_bytes(sums, eights, job->unit[0], 0, out);
        return;
    }
    float sum[MOST_EIGHTS * LANES];
    memset(sum, 0, eights * LANES * sizeof(float));
    if (!fresh) memcpy(sum, out, width * sizeof(float));
    for (int64_t i = 0, to; i < count; i = to) {
        Sums sums[MOST_EIGHTS / SUMS_EIGHTS];
        clear_sums(sums, eights);
        to = i + job->together < count ? i + job->together : count;
        for (int64_t stop; i < to; i = stop + 1) {
            stop = job->zero_id < 0 ? to : i;
            while (stop < to && word[stop] != all.none) stop++;
            sum_rows_of_bytes(&all, word + i, pitch, stop - i, eights, sums);
        }
        put_bytes(sums, eights, job->unit[0], 1, sum);
    }
    memcpy(out, sum, width * sizeof(float));
}
#else
/* Such processors gain nothing by it: whole_numbers() says no. */
#define sum_round_of_bytes(...)
#define add_rows_of_bytes(...)
#endif

/* ---- Rounds ---- */

/* Codewords of a tier, of the block that begins with a column. */
INLINE const char *words_at(const Job *job, int64_t tier, int64_t column) {
    return (const char *)ADDRESS(job->plan->table[tier].words) +
           column / (job->lines * LINE_LANES) * job->block[tier];
}

/* Sums of a block of columns for all ids of a round. */
INLINE void sum_columns(const Job *job, const Round *round, int64_t column, int lines, int half,
                        float *out, int64_t stride) {
    const uint32_t *word = round->word;
    for (int64_t t = 0; t < job->plan->tiers; t++) {
        const int64_t books = job->plan->table[t].books, count = round->count[t];
        const char *const words = words_at(job, t, column);
        if (lines > FLOAT_LINES || job->unit[t])
            sum_round_of_bytes(job, t, word, round->at[t], count, words, 2 * lines + half, out, stride);
        else
            sum_round(word, round->at[t], count, books, none_of(job, t), words, lines, half, out,
                      stride);
        word += pitch_of(count) * books;
    }
}

/* `call` with the numbers of lines and half lines of a block of columns as constants. */
#define BY_FLOAT_LINES(halves, call)    \
    switch (halves) {                   \
        case 1: call(0, 1); break;      \
        case 2: call(1, 0); break;      \
        case 3: call(1, 1); break;      \
        case 4: call(2, 0); break;      \
        case 5: call(2, 1); break;      \
        case 6: call(3, 0); break;      \
        case 7: call(3, 1); break;      \
        default: call(FLOAT_LINES, 0);  \
    }
#if VECTOR >= 32
#define BY_LINES(halves, call)             \
    if ((halves) > 2 * FLOAT_LINES) {      \
        call(MOST_LINES, 0);               \
    } else {                               \
        BY_FLOAT_LINES(halves, call)       \
    }
#else
#define BY_LINES BY_FLOAT_LINES
#endif

INLINE int64_t halves_of(const Job *job, int64_t column) {
    const int64_t left = (job->plan->dim - column + LANES - 1) / LANES;
    return left < 2 * job->lines ? left : 2 * job->lines;
}

/* Ask for the map, or the codes, of a later round. Of one or two codebooks asking costs more
 * than it brings: find_codes waits for those of many ids together. */
INLINE void expect_round(const Job *job, int64_t from, int64_t count, int64_t end) {
    const Table *table = job->plan->table;
    const int far = table->books > 2 && table->rows * table->bits * table->books > 8 * FAR_CODES;
    const int64_t to = from + count < end ? from + count : end;
    const Ids *ids = &job->ids, wide = {ids->from, 1, 1};
    if (job->plan->tiers == 1 && !far) return;
    if (ids->wide && ids->stride == 1) ids = &wide; /* constants, for the compiler */
    expect_ids(job->plan, ids, from, to);
}

/* Rows of a round: to the output, where half lines may be written after a row; else row by row. */
INLINE void put_round(const Job *job, Round *round, int64_t first, int64_t count, int direct) {
    const int64_t dim = job->plan->dim, columns = job->lines * LINE_LANES;
    /* The last columns first: what they write after a row belongs to the first of the next. */
    for (int64_t column = (dim - 1) / columns * columns; column >= 0; column -= columns) {
        const int64_t width = dim - column < columns ? dim - column : columns;
        float *const out = job->out + first * job->pitch + column;
        float *const sums = (float *)round->sums, *const to = direct ? out : sums;
        const int64_t stride = direct ? job->pitch : columns;
#define ROWS(lines, half) sum_columns(job, round, column, lines, half, to, stride)
        BY_LINES(halves_of(job, column), ROWS)
        for (int64_t i = 0; i < count && !direct; i++)
            memcpy(out + i * job->pitch, sums + i * columns, width * sizeof(float));
    }
}

/* Add the rows of ids first..last of one bag, which begin at `sums`, to some columns of it. */
INLINE void add_to_bag(const Job *job, int64_t first, int64_t last, const Line *sums,
                       int64_t width, int lines, int half, float *out) {
    Line total[MOST_LINES];
    Floats rest;
    float all[MOST_LINES * LINE_LANES];
    memcpy(all, out, width * sizeof(float));
    for (int v = 0; v < lines; v++) memcpy(&total[v], all + v * LINE_LANES, sizeof *total);
    if (half) memcpy(&rest, all + lines * LINE_LANES, sizeof rest);
    for (int64_t i = first; i < last; i++, sums += job->lines) {
        for (int v = 0; v < lines; v++) add_line(&total[v], sums[v]);
        if (half) add_floats(&rest, half_line_at((const char *)sums, lines));
    }
    put_lines(total, &rest, lines, half, all);
    memcpy(out, all, width * sizeof(float));
}

/* Add the next `rows` rows, each the sum of `books` codewords, to a bag. An addition waits for the
 * one before: of narrow blocks of columns, several rows are made side by side. */
INLINE void add_words(const uint32_t *word, int64_t pitch, int64_t books, int rows,
                      const char *words, int lines, int half, Line *total, Floats *rest) {
    Line row[MOST_ROWS][FLOAT_LINES];
    Floats last[MOST_ROWS];
    for (int r = 0; r < rows; r++) {
        const char *at = words + word[r];
        for (int v = 0; v < lines; v++) row[r][v] = line_at(at, v);
        if (half) last[r] = half_line_at(at, lines);
    }
    for (int64_t m = 1; m < books; m++) {
        word += pitch;
        for (int r = 0; r < rows; r++) {
            const char *at = words + word[r];
            for (int v = 0; v < lines; v++) add_line(&row[r][v], line_at(at, v));
            if (half) add_floats(&last[r], half_line_at(at, lines));
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < lines; v++) add_line(&total[v], row[r][v]);
        if (half) add_floats(rest, last[r]);
    }
}

/* Add `count` rows to some columns of a bag, or put their sum there where it is `fresh`. */
INLINE void add_rows(const uint32_t *word, int64_t pitch, int64_t count, int64_t books,
                     const char *words, int64_t width, int lines, int half, int fresh, float *out) {
    const int once = lines > 2 ? LONG_ROWS : lines > 1 ? 2 : MOST_ROWS;
    Line total[FLOAT_LINES];
    Floats rest;
    float all[FLOAT_LINES * LINE_LANES];
    memset(all, 0, (lines * LINE_LANES + half * LANES) * sizeof(float));
    /* What was written in parts takes long to be read as a whole. */
    if (!fresh) memcpy(all, out, width * sizeof(float));
    for (int v = 0; v < lines; v++) memcpy(&total[v], all + v * LINE_LANES, sizeof *total);
    if (half) memcpy(&rest, all + lines * LINE_LANES, sizeof rest);
    for (; count >= once; count -= once, word += once)
        add_words(word, pitch, books, once, words, lines, half, total, &rest);
    for (; count > 0; count--, word++)
        add_words(word, pitch, books, 1, words, lines, half, total, &rest);
    put_lines(total, &rest, lines, half, all);
    memcpy(out, all, width * sizeof(float));
}

/* As add_to_bag, with weights. */
INLINE void weigh_bag(const Job *job, int64_t first, int64_t last, const Line *sums, int64_t width,
                      float *out) {
    for (int64_t i = first; i < last; i++, sums += job->lines) {
        if (id_at(&job->ids, i) == job->zero_id) continue;
        /* Fused, as torch's own bags are. */
        for (int64_t j = 0; j < width; j++)
            out[j] = __builtin_fmaf(((const float *)sums)[j], job->weights[i], out[j]);
    }
}

/* Add a block of columns of the ids of a round to their bags, of which `bag` is the first or
 * before it; the last of them. */
INLINE int64_t add_round(const Job *job, const Round *round, int64_t first, int64_t last,
                         int64_t bag, int64_t column, int lines, int half) {
    const int64_t dim = job->plan->dim, most = lines * LINE_LANES + half * LANES;
    const int64_t width = dim - column < most ? dim - column : most;
    for (int64_t i = first, stop; i < last; i = stop) {
        while (offset_at(job, bag + 1) <= i) bag++;
        stop = offset_at(job, bag + 1) < last ? offset_at(job, bag + 1) : last;
        const Line *sums = round->sums + (i - first) * job->lines;
        float *out = job->out + bag * dim + column;
        if (job->weights)
            weigh_bag(job, i, stop, sums, width, out);
        else if (width == most)
            add_to_bag(job, i, stop, sums, most, lines, half, out);
        else
            add_to_bag(job, i, stop, sums, width, lines, half, out);
    }
    return bag;
}

/* As add_round, with sums of rows that stay in registers. */
INLINE int64_t add_codewords(const Job *job, const Round *round, int64_t first, int64_t last,
                             int64_t bag, int64_t column, int lines, int half) {
    const int64_t dim = job->plan->dim, most = lines * LINE_LANES + half * LANES;
    const int64_t width = dim - column < most ? dim - column : most;
    const int64_t books = job->plan->table->books, pitch = pitch_of(last - first);
    const char *words = words_at(job, 0, column);
    for (int64_t i = first, stop; i < last; i = stop) {
        while (offset_at(job, bag + 1) <= i) bag++;
        stop = offset_at(job, bag + 1) < last ? offset_at(job, bag + 1) : last;
        const uint32_t *word = round->word + (i - first);
        const int fresh = offset_at(job, bag) == i;
        float *out = job->out + bag * dim + column;
        if (lines > FLOAT_LINES || job->unit[0])
            add_rows_of_bytes(job, word, pitch, stop - i, words, width, 2 * lines + half, fresh, out);
        else if (width == most)
            add_rows(word, pitch, stop - i, books, words, most, lines, half, fresh, out);
        else
            add_rows(word, pitch, stop - i, books, words, width, lines, half, fresh, out);
    }
    return bag;
}

/* Whether bags are the sums of their rows, whose codewords stand one after the other. */
INLINE int adds_codewords(const Job *job) {
    return job->plan->tiers == 1 && !job->weights;
}

/* The ids of a bag that are not left out. */
INLINE int64_t members_of(const Job *job, int64_t bag) {
    int64_t members = 0;
    for (int64_t i = offset_at(job, bag); i < offset_at(job, bag + 1); i++)
        members += id_at(&job->ids, i) != job->zero_id;
    return members;
}

/* Divide sums by the numbers of their ids. */
INLINE void share_bags(const Job *job, int64_t begin, int64_t end) {
    const int64_t dim = job->plan->dim;
    for (int64_t bag = begin; bag < end; bag++) {
        const int64_t members = members_of(job, bag);
        for (int64_t j = 0; j < dim && members > 1; j++)
            job->out[bag * dim + j] /= (float)members;
    }
}

INLINE int offsets_fit(const Job *job, int64_t begin, int64_t end) {
    if (!begin && offset_at(job, 0)) return 0;
    for (int64_t bag = begin; bag < end; bag++)
        if (offset_at(job, bag) < 0 || offset_at(job, bag + 1) < offset_at(job, bag)) return 0;
    return offset_at(job, end) <= job->count;
}

/* Some columns of the sum of ids first..last of one bag, of a table that was unpacked. */
INLINE int sum_unpacked(const Job *job, const Ids *ids, int64_t first, int64_t last, int64_t column,
                        int lines, int half, float *out) {
    const int64_t rows = job->plan->rows, most = lines * LINE_LANES + half * LANES;
    const int64_t left = job->plan->dim - column, width = left < most ? left : most;
    const char *words = words_at(job, 0, column);
    Line total[FLOAT_LINES];
    Floats rest;
    float all[FLOAT_LINES * LINE_LANES];
    memset(total, 0, lines * sizeof *total);
    memset(&rest, 0, sizeof rest);
    for (int64_t i = first; i < last; i++) {
        const int64_t id = id_at(ids, i);
        if (id < 0 || id >= rows) return 0;
        const char *word = words + (id == job->zero_id ? rows : id) * job->step[0];
        for (int v = 0; v < lines; v++) add_line(&total[v], line_at(word, v));
        if (half) add_floats(&rest, half_line_at(word, lines));
    }
    put_lines(total, &rest, lines, half, all);
    memcpy(out, all, width * sizeof(float));
    return 1;
}

INLINE int64_t sum_all_unpacked(const Job *job, const Ids *ids, int64_t begin, int64_t end) {
    const int64_t dim = job->plan->dim, columns = job->lines * LINE_LANES;
    int fits = offsets_fit(job, begin, end);
    for (int64_t bag = begin; bag < end && fits; bag++) {
        const int64_t first = offset_at(job, bag), last = offset_at(job, bag + 1);
        for (int64_t column = 0; column < dim && fits; column += columns) {
            float *out = job->out + bag * dim + column;
#define UNPACKED(lines, half) fits = sum_unpacked(job, ids, first, last, column, lines, half, out)
            BY_FLOAT_LINES(halves_of(job, column), UNPACKED)
        }
    }
    if (fits && job->mode == MEAN) share_bags(job, begin, end);
    return !fits;
}

/* ---- Gradients ---- */

/* Gradient of the codebooks begin..end from that of rows, or of bags: each is one thread's alone,
 * and sums in the order of ids. */
INLINE int64_t collect(const Job *job, int64_t begin, int64_t end, int of_bags) {
    const Table *table = job->plan->table;
    const int64_t dim = job->plan->dim, bits = table->bits, width = table->width;
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    const uint8_t *codes = ADDRESS(table->codes);
    float share = 1.0f;
    for (int64_t i = 0, bag = -1; i < job->count; i++) {
        if (of_bags && (bag < 0 || offset_at(job, bag + 1) <= i)) {
            do bag++;
            while (offset_at(job, bag + 1) <= i);
            if (job->mode == MEAN) share = 1.0f / (float)members_of(job, bag);
        }
        const int64_t id = id_at(&job->ids, i);
        if (id == job->zero_id) continue;
        if (id < 0 || id >= table->rows) return 1;
        if (job->weights) share = job->weights[i];
        for (int64_t m = begin; m < end; m++) {
            int64_t word = id;
            if (bits) {
                const int64_t place = (id * table->books + m) * bits;
                word = (int64_t)(load64(codes + (place >> 3)) >> (place & 7) & mask);
            }
            if (word >= table->size) return 1;
            const int64_t line = of_bags ? bag : i;
            const float *from = job->grad + line * dim + (table->product ? m * width : 0);
            float *to = job->out + (m * table->size + word) * width;
            if (of_bags)
                for (int64_t j = 0; j < width; j++) to[j] += from[j] * share;
            else
                for (int64_t j = 0; j < width; j++) to[j] += from[j];
        }
    }
    return 0;
}

/* ---- Parts of jobs ---- */

/* What threads do, for one kind of processor (parts.h). */
typedef struct {
    void (*widen)(const Table *table, int64_t lines, char *to);
    Part rows, wide_rows, copy_rows;          /* one by one, by rounds, and of all rows */
    Part bags, wide_bags, unpacked_bags;      /* the same */
    Part collect, collect_bags;               /* gradients */
    Part tiers;                               /* where rows are */
} Parts;
extern const Parts parts_by_16;
#ifdef FOR_32
extern const Parts parts_by_32, parts_by_64;
#endif

#endif
