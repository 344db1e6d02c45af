/* Normal equations of the least-squares problem that codebooks of sums of codewords solve. */
#include "native.h"

#define BLOCK 4096 /* rows that are added up for every codebook before the next ones */

typedef struct {
    const int64_t *codes;      /* (rows, books) */
    const float *x, *weights;  /* (rows, width), (rows) */
    int64_t rows, books, size, width;
    double *normal, *right;    /* (words, words), (words, width) */
} Problem;

/* What rows add to the equations of one codebook; 0 where a code is none. */
INLINE int add_rows(const Problem *problem, int64_t begin, int64_t end, int64_t m) {
    const int64_t size = problem->size, words = problem->books * size, width = problem->width;
    for (int64_t i = begin; i < end; i++) {
        const int64_t *codes = problem->codes + i * problem->books;
        const double mass = problem->weights[i];
        if (codes[m] < 0 || codes[m] >= size) return 0;
        double *normal = problem->normal + (m * size + codes[m]) * words;
        for (int64_t other = 0; other <= m; other++) {
            if (codes[other] < 0 || codes[other] >= size) return 0;
            normal[other * size + codes[other]] += mass;
        }
        double *right = problem->right + (m * size + codes[m]) * width;
        const float *x = problem->x + i * width;
        for (int64_t j = 0; j < width; j++) right[j] += mass * x[j];
    }
    return 1;
}

/* The equations of codebooks begin..end: each is one thread's alone. */
INLINE int64_t add_books(const void *what, int64_t begin, int64_t end) {
    const Problem *problem = what;
    for (int64_t i = 0; i < problem->rows; i += BLOCK)
        for (int64_t m = begin; m < end; m++)
            if (!add_rows(problem, i, i + BLOCK < problem->rows ? i + BLOCK : problem->rows, m))
                return 1;
    return 0;
}

#define ADD_PART(target, name) \
    target static int64_t name(const void *what, int64_t begin, int64_t end) { \
        return add_books(what, begin, end); \
    }

ADD_PART(, add_by_16)
#ifdef FOR_32
ADD_PART(FOR_32, add_by_32)
ADD_PART(FOR_64, add_by_64)
#endif

/* codes, x, weights, rows, codebooks, codewords of each, columns, normal (zeroed; the blocks on and
 * below the diagonal are filled), right (zeroed), threads -> 0, or 1 where a code is none */
PyObject *normal(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long v[10];
    if (read_integers(args, given, 10, v)) return NULL;
    const Problem problem = {ADDRESS(v[0]), ADDRESS(v[1]), ADDRESS(v[2]), v[3], v[4], v[5], v[6],
                             ADDRESS(v[7]), ADDRESS(v[8])};
    int64_t failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_parts(VARIANT(add), &problem, problem.books, 1, (int)v[9]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(failed);
}
