/* What the parts of the kernel share: CPython's stable ABI, no torch headers. */
#ifndef MEC_EMBED_NATIVE_H
#define MEC_EMBED_NATIVE_H

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* What gains from longer vectors is compiled for three kinds of processors, each with vectors of VECTOR
 * bytes; VARIANT(name) is the one for the processor that this is. Not by clones of functions: those
 * need a loader that chooses, and GCC lowers long vectors before it makes them. */
#if defined(__GNUC__) && defined(__x86_64__) && !defined(_WIN32)
#define FOR_32 __attribute__((target("avx2,bmi,bmi2,fma,popcnt")))
#define FOR_64 \
    __attribute__((target("avx2,bmi,bmi2,fma,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#define VARIANT(name) \
    (longest_vectors >= 64 ? name##_by_64 : longest_vectors >= 32 ? name##_by_32 : name##_by_16)
#else
#define VARIANT(name) name##_by_16
#endif

#if !defined(VECTOR)
#define TARGET
#elif VECTOR == 64
#define TARGET FOR_64
#define OWN(name) name##_by_64
#elif VECTOR == 32
#define TARGET FOR_32
#define OWN(name) name##_by_32
#else
#define TARGET
#define OWN(name) name##_by_16
#endif

#if defined(__GNUC__)
#define INLINE TARGET static inline __attribute__((always_inline))
#define OUTLINE TARGET static __attribute__((noinline))
#define TEXT_OF(what) #what
#define UNROLL(n) _Pragma(TEXT_OF(GCC unroll n))
#define PREFETCH(address) __builtin_prefetch((const void *)(uintptr_t)(address))
#else
#define INLINE static inline
#define OUTLINE static
#define UNROLL(n)
#define PREFETCH(address)
#endif

/* Bytes of the longest vectors that are used: 64 where the processor has all that FOR_64 names, 32
 * with that of FOR_32, else 16. Tests lower it, never during a call. */
extern int longest_vectors;

/* Addresses come from Python as integers. */
#define ADDRESS(value) ((void *)(uintptr_t)(value))

/* Work on the items begin..end of a job; anything but 0 stops the job and is its result. */
typedef int64_t (*Part)(const void *job, int64_t begin, int64_t end);

/* Share total items, `step` at a time, between threads; the result of a part that is not 0, or 0. */
int64_t run_parts(Part part, const void *job, int64_t total, int64_t step, int threads);

/* To be called once, when the module is imported. */
void prepare_threads(void);

/* Read `wanted` integers from the arguments of a call; -1 with an exception set if they are not. */
int read_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, long long *values);

/* Copy what Python packed into a bytes object of that size; -1 with an exception set. */
int read_packed(PyObject *packed, void *to, size_t size);

/* Of tensors. What gives a number gives -1 with an exception set, too. */
int64_t as_integer(PyObject *value); /* takes the reference */
int64_t address_of(PyObject *tensor);
int64_t device_of(PyObject *tensor); /* number of its GPU */
int has_dtype(PyObject *tensor, PyObject *dtype);
int id_bytes(PyObject *ids);    /* of one id; 0 for other dtypes */
int64_t spacing(PyObject *ids); /* items from one id to the next; 0 where they are not evenly spaced */

/* A tensor (*ids.shape, dim) by that function, and the number of ids. */
PyObject *make_output(PyObject *new_empty, PyObject *ids, int64_t dim, int64_t *count);

/* Rows of ids by mec_embed.ops.gpu.Lookups.ready; NULL where it cannot, also without an exception. */
PyObject *decode_on_gpu(PyObject *ready, PyObject *ids, int64_t zero_id);

/* Whether more than one thread pays, as `threads_for` of mec_embed/ops/cpu.py says. */
#define MAY_SHARE(count, columns) ((count) * ((columns) + 16) >= 1 << 15)

/* As Python packs them (mec_embed/ops/cpu.py): all fields are int64. */
typedef struct {
    int64_t codes, words, scales; /* addresses; scales (bfloat16) of int8 codewords only */
    int64_t rows, bits, books, size, width; /* codewords of a codebook, columns of a codeword */
    int64_t product, kind, one_row; /* one_row: every row is the only codeword */
} Table;

typedef struct {
    int64_t rows, dim, tiers; /* tiers: number of tables that are in use, 1 or 2 */
    Table table[2];           /* the popular rows, the others */
    int64_t bitmap, runs, starts, before; /* the map of the tiers, see mec_embed.tiers.TierMap */
} Plan;

/* The plan that was packed into a bytes object; -1 with an exception set. */
int read_plan(PyObject *packed, Plan *plan);

/* Rows of ids that are `stride` items apart, all given by address; 0, or 1 where an id is no row or
 * its codes are damaged. */
int64_t decode_ids(Plan *plan, int64_t ids, int bytes, int64_t stride, int64_t count,
                   int64_t zero_id, int64_t out, int threads);

/* Bags of ids, given as read_bags (lookup.c) takes them; as decode_ids, and 1 where offsets do not fit. */
int64_t reduce_ids(Plan *plan, const long long *bags, int64_t out, int threads);

/* What Python calls; the comment at each says what it takes. */
PyObject *rows(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *set_up(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *fast_rows(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *fast_bags(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *rows_on_gpu(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *set_up_gpu(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *launch(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *bags(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *gradient(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *bags_gradient(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *tiers(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *encode(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *normal(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *share_threads(PyObject *self, PyObject *const *args, Py_ssize_t given);
PyObject *limit_vectors(PyObject *self, PyObject *const *args, Py_ssize_t given);

#endif
