/* Codes of least squared error for rows that shall be sums of codewords, by beam search: which
 * variant of search.h, for how many rows at once. */
#include "encode.h"

#define MOST_ROWS 512         /* that take a step together */
#define STATE_BYTES (1 << 18) /* of their sums */

/* For what the processor runs, of those with vectors of `most` bytes or less. */
static Part search_by(int64_t most) {
#ifdef SEARCH_BY_32_AND_64
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                     __builtin_cpu_supports("bmi2");
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (most >= 64 && avx2 && avx512) return search_by_64;
    if (most >= 32 && avx2) return search_by_32;
#else
    (void)most;
#endif
    return search_by_16;
}

/* alone, norms, gram (doubled), rows, codebooks, codewords of each, beam, codes (out), threads, bytes
 * of a vector at most -> 0, or 1 where memory is short */
PyObject *encode(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[10];
    if (read_integers(args, given, 10, v)) return NULL;
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
    const Part part = search_by(v[9]);
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = rows ? run_parts(part, &search, rows, search.block, (int)threads) : 0;
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}
