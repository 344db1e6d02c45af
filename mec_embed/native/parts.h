/* The parts of lookups, for a kind of processor: parts_16.c and its like include it. */
#include "lookup.h"

TARGET static int64_t rows_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const Ids ids = job->ids, wide = {ids.from, 1, 1}, narrow = {ids.from, 0, 1};
    if (ids.stride != 1) return decode_rows(job, &ids, begin, end);
    /* Constants, for the compiler. */
    return ids.wide ? decode_rows(job, &wide, begin, end) : decode_rows(job, &narrow, begin, end);
}

TARGET static int64_t bags_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const int plain = !job->weights && job->mode != MAX && all_alike(job->plan);
    float *row = malloc(job->plan->dim * sizeof(float));
    int fine = row != NULL;
    if (fine) switch (plain ? job->plan->table->kind : -1) {
            case FLOAT32: fine = reduce_bags(job, begin, end, FLOAT32, row); break;
            case INT8: fine = reduce_bags(job, begin, end, INT8, row); break;
            case FLOAT16: fine = reduce_bags(job, begin, end, FLOAT16, row); break;
            case BFLOAT16: fine = reduce_bags(job, begin, end, BFLOAT16, row); break;
            default: fine = reduce_bags(job, begin, end, -1, row);
        }
    free(row);
    return !fine;
}

TARGET static int64_t wide_rows_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const Plan *plan = job->plan;
    const int64_t dim = plan->dim, step = ids_of_round(plan);
    const int fits = (dim + LANES - 1) / LANES * LANES <= job->pitch;
    Round round;
    expect_round(job, begin, step, end);
    for (int64_t i = begin; i < end; i += step) {
        const int64_t count = end - i < step ? end - i : step, next = i + count;
        expect_round(job, next, step, end);
        if (!find_round(job, i, count, &round)) return 1;
        /* What follows the last row is another thread's, or nobody's. */
        const int direct = fits || (plan->tiers == 1 && (end - next) * dim >= LANES);
        put_round(job, &round, i, count, direct);
    }
    return 0;
}

/* All codewords of a table in blocks of columns at `to`, with zeros after the last of each. */
TARGET static void widen_codebooks(const Table *table, int64_t lines, char *to) {
    const int64_t words = table->books * table->size, stride = stride_of(table);
    const int64_t width = table->width, line = lines * LINE;
    const int64_t block = block_bytes(words, line);
    const char *word = ADDRESS(table->words);
    for (int64_t w = 0; w < words; w++, word += stride) {
        char *const at = to + w * line;
        float scale = 1.0f;
        put_scale(table, w, &scale);
        switch (table->kind) {
            case FLOAT32: widen(word, width, FLOAT32, scale, lines, block, at); break;
            case INT8: widen(word, width, INT8, scale, lines, block, at); break;
            case FLOAT16: widen(word, width, FLOAT16, scale, lines, block, at); break;
            default: widen(word, width, BFLOAT16, scale, lines, block, at);
        }
    }
    for (int64_t column = 0; column < width; column += lines * LINE_LANES, to += block)
        memset(to + words * line, 0, line);
}

/* Rows of a table that was unpacked. */
TARGET static int64_t copy_rows_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const int64_t rows = job->plan->rows, dim = job->plan->dim;
    const char *all = ADDRESS(job->plan->table->words);
    for (int64_t i = begin; i < end; i++) {
        const int64_t id = id_at(&job->ids, i);
        if (id < 0 || id >= rows) return 1;
        memcpy(job->out + i * job->pitch, all + (id == job->zero_id ? rows : id) * job->step[0],
               dim * sizeof(float));
    }
    return 0;
}

TARGET static int64_t wide_bags_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const Plan *plan = job->plan;
    const int64_t dim = plan->dim, step = ids_of_round(plan), columns = job->lines * LINE_LANES;
    if (!offsets_fit(job, begin, end)) return 1;
    const int64_t first = offset_at(job, begin), last = offset_at(job, end);
    int64_t bag = begin;
    Round round;
    memset(job->out + begin * dim, 0, (end - begin) * dim * sizeof(float));
    expect_round(job, first, step, last);
    for (int64_t i = first; i < last; i += step) {
        const int64_t count = last - i < step ? last - i : step, next = i + count;
        expect_round(job, next, step, job->count);
        if (!find_round(job, i, count, &round)) return 1;
        int64_t latest = bag;
        for (int64_t column = 0; column < dim; column += columns) {
#define BAGS(lines, half)                                                                   \
    sum_columns(job, &round, column, lines, half, (float *)round.sums, columns);            \
    latest = add_round(job, &round, i, next, bag, column, lines, half)
#define SUMS(lines, half) latest = add_codewords(job, &round, i, next, bag, column, lines, half)
            if (adds_codewords(job)) {
                BY_LINES(halves_of(job, column), SUMS)
            } else {
                BY_LINES(halves_of(job, column), BAGS)
            }
        }
        bag = latest;
    }
    if (job->mode == MEAN) share_bags(job, begin, end);
    return 0;
}

/* Bags without weights of a table that was unpacked. */
TARGET static int64_t unpacked_bags_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    const Ids wide = {job->ids.from, 1, 1}, narrow = {job->ids.from, 0, 1};
    /* Constants, for the compiler. */
    return job->ids.wide ? sum_all_unpacked(job, &wide, begin, end)
                         : sum_all_unpacked(job, &narrow, begin, end);
}

TARGET static int64_t collect_part(const void *what, int64_t begin, int64_t end) {
    return collect(what, begin, end, 0);
}

TARGET static int64_t collect_bags_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    return !offsets_fit(job, 0, job->bags) || collect(job, begin, end, 1);
}

TARGET static int64_t tiers_part(const void *what, int64_t begin, int64_t end) {
    const Job *job = what;
    for (int64_t i = begin; i < end; i++) {
        const int64_t id = id_at(&job->ids, i);
        if (id < 0 || id >= job->plan->rows) return 1;
        job->flags[i] = (uint8_t)is_popular(job->plan, id, job->places + i);
    }
    return 0;
}

const Parts OWN(parts) = {
    .widen = widen_codebooks,
    .rows = rows_part,
    .wide_rows = wide_rows_part,
    .copy_rows = copy_rows_part,
    .bags = bags_part,
    .wide_bags = wide_bags_part,
    .unpacked_bags = unpacked_bags_part,
    .collect = collect_part,
    .collect_bags = collect_bags_part,
    .tiers = tiers_part,
};
