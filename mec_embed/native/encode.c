/* Codes of least squared error for rows that shall be sums of codewords, by beam search: which
 * variant of search.h, for how many rows at once. */
#include "encode.h"

#define MOST_ROWS 512         /* that take a step together */
#define STATE_BYTES (1 << 18) /* of their sums */

/* alone, norms, gram (doubled), rows, codebooks, codewords of each, beam, codes (out), threads
 * -> 0, or 1 where memory is short */
PyObject *encode(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[9];
    if (read_integers(args, given, 9, v)) return NULL;
    Search job = {.alone = ADDRESS(v[0]), .norms = ADDRESS(v[1]), .gram = ADDRESS(v[2]),
                  .books = v[4], .size = v[5], .codes = ADDRESS(v[7])};
    const int64_t rows = v[3], threads = v[8];
    job.beam = v[6] < MOST_BEAM ? v[6] : MOST_BEAM;
    job.width = (job.size + LANES - 1) / LANES * LANES;
    while (job.width / LANES > 1 << job.bits) job.bits++;
    job.stride = (job.books + WORDS - 1) / WORDS * WORDS;
    const int64_t fit = STATE_BYTES / (job.beam * job.stride * 2) + 1;
    const int64_t most = threads * (fit < MOST_ROWS ? fit : MOST_ROWS);
    /* As many blocks for each thread, and as large ones. */
    const int64_t parts = threads * ((rows + most - 1) / most);
    job.block = rows ? (rows + parts - 1) / parts : 0;
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = rows ? run_parts(VARIANT(search), &job, rows, job.block, (int)threads) : 0;
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}
