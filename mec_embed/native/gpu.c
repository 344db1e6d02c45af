/* Kernels on a GPU that Triton compiled, launched by the CUDA driver's own function: see
 * mec_embed/ops/driver.py. No headers of CUDA: its function is given by address. */
#include "native.h"

/* cuLaunchKernel: function, grid, block, bytes of shared memory, stream, parameters, extra. */
typedef int (*Launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                      void *, void **, void **);

static struct {
    Launch launch;
    PyObject *device, *stream; /* the current device; the current stream of a device */
} driver;

/* Arguments of a kernel, and null addresses that Triton adds to them, at most. */
enum { MOST_ARGUMENTS = 32, MOST_ADDED = 2, WORDS = MOST_ARGUMENTS + MOST_ADDED };

/* Of a lookup: ids, output, stride, count and zero id come first. */
enum { OWN = 5 };

/* As Python packs them (mec_embed/ops/driver.py): all fields are int64. */
typedef struct {
    int64_t function, threads, shared, device;
    int64_t aligned, bound; /* a bit for each argument: whether it starts at 16 bytes; if that counts */
} Kernel;

typedef struct {
    Kernel kernel;
    int64_t dim, chunks, together, most; /* chunks of a row, and of a program; ids of a call */
    int64_t fixed[MOST_ARGUMENTS - OWN]; /* arguments after the first, then zeros */
} Lookups;

/* address of cuLaunchKernel, current device, current stream of a device */
PyObject *set_up_gpu(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long launch;
    if (given != 3) {
        PyErr_SetString(PyExc_TypeError, "set_up_gpu takes 3 arguments");
        return NULL;
    }
    if (read_integers(args, 1, 1, &launch)) return NULL;
    Py_INCREF(args[1]);
    Py_INCREF(args[2]);
    driver.launch = (Launch)ADDRESS(launch);
    driver.device = args[1];
    driver.stream = args[2];
    Py_RETURN_NONE;
}

/* 1: the kernel's device is the current one, on which kernels are launched; -1 with an exception set. */
static int is_current(const Kernel *kernel) {
    const int64_t device = as_integer(PyObject_CallNoArgs(driver.device));
    return PyErr_Occurred() ? -1 : device == kernel->device;
}

/* 1: launched on the current stream of its device. 0: the driver would not; -1 with an exception set. */
static int run_kernel(const Kernel *kernel, int64_t *words, int64_t x, int64_t y) {
    PyObject *number = PyLong_FromLongLong(kernel->device);
    if (!number) return -1;
    const int64_t stream = as_integer(PyObject_CallFunctionObjArgs(driver.stream, number, NULL));
    Py_DECREF(number);
    if (stream == -1 && PyErr_Occurred()) return -1;
    void *parameters[WORDS];
    for (int i = 0; i < WORDS; i++) parameters[i] = words + i;
    int failed;
    /* The driver waits where too many launches are under way. */
    Py_BEGIN_ALLOW_THREADS
    failed = driver.launch(ADDRESS(kernel->function), (unsigned)x, (unsigned)y, 1,
                           (unsigned)kernel->threads, 1, 1, (unsigned)kernel->shared,
                           ADDRESS(stream), parameters, NULL);
    Py_END_ALLOW_THREADS
    return !failed;
}

/* 1: `argument` is of that kind, and its word was added to `words`; -1 with an exception set. */
static int add_word(PyObject *argument, PyObject *kind, int is_bound, int is_aligned,
                    int64_t *words, int *count) {
    if (argument == Py_None || kind == Py_None) return argument == kind;
    if (PyLong_Check(argument)) {
        if (kind != (PyObject *)&PyLong_Type) return 0;
        words[(*count)++] = PyLong_AsLongLong(argument);
    } else {
        if (kind == (PyObject *)&PyLong_Type || !has_dtype(argument, kind))
            return PyErr_Occurred() ? -1 : 0;
        const int64_t word = address_of(argument);
        if (is_bound && (word % 16 == 0) != is_aligned) return PyErr_Occurred() ? -1 : 0;
        words[(*count)++] = word;
    }
    return PyErr_Occurred() ? -1 : 1;
}

/* kernel, kinds, x and y of the grid, arguments... -> True; False where Triton is to launch it */
PyObject *launch(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Kernel kernel;
    long long grid[2];
    int64_t words[WORDS] = {0};
    int count = 0;
    if (given < 4 || given > 4 + MOST_ARGUMENTS || PyTuple_Size(args[1]) != given - 4) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "launch takes as many arguments as kinds");
        return NULL;
    }
    if (read_packed(args[0], &kernel, sizeof kernel) || read_integers(args + 2, 2, 2, grid))
        return NULL;
    const int current = is_current(&kernel);
    if (current < 0) return NULL;
    if (!current) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < given - 4; i++) {
        const int added = add_word(args[4 + i], PyTuple_GetItem(args[1], i), kernel.bound >> i & 1,
                                   kernel.aligned >> i & 1, words, &count);
        if (added < 0) return NULL;
        if (!added) Py_RETURN_FALSE;
    }
    const int launched = run_kernel(&kernel, words, grid[0], grid[1]);
    if (launched < 0) return NULL;
    return PyBool_FromLong(launched);
}

/* Rows of ids by mec_embed.ops.gpu.Lookups.ready; NULL where it cannot, also without an exception. */
PyObject *decode_on_gpu(PyObject *ready, PyObject *ids, int64_t zero_id) {
    const int bytes = id_bytes(ids);
    if (bytes <= 0) return NULL;
    PyObject *packed = PyTuple_GetItem(ready, bytes == 4 ? 1 : 2);
    if (!packed || packed == Py_None) return NULL;
    Lookups plan;
    if (read_packed(packed, &plan, sizeof plan)) return NULL;
    const int64_t stride = spacing(ids), device = device_of(ids);
    if (stride <= 0 || device != plan.kernel.device || is_current(&plan.kernel) != 1) return NULL;
    int64_t count;
    PyObject *out = make_output(PyTuple_GetItem(ready, 0), ids, plan.dim, &count);
    if (!out) return NULL;
    int64_t words[WORDS] = {address_of(ids), address_of(out), stride, count, zero_id};
    memcpy(words + OWN, plan.fixed, sizeof plan.fixed);
    const int64_t programs = (count * plan.chunks + plan.together - 1) / plan.together;
    if (!PyErr_Occurred() && count && count <= plan.most && programs <= INT32_MAX &&
        run_kernel(&plan.kernel, words, programs, 1) == 1)
        return out;
    Py_DECREF(out);
    return NULL;
}
