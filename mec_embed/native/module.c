/* The Python module: CPython's stable ABI, no torch headers. */
#include "native.h"

int read_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, long long *values) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", wanted, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < wanted; i++) {
        values[i] = PyLong_AsLongLong(args[i]);
        if (values[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

int read_packed(PyObject *packed, void *to, size_t size) {
    char *data;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(packed, &data, &length)) return -1;
    if (length != (Py_ssize_t)size) {
        PyErr_SetString(PyExc_ValueError, "packed for another version of the kernel");
        return -1;
    }
    memcpy(to, data, size);
    return 0;
}

int longest_vectors;

static int vectors_of_processor(void) {
#ifdef FOR_32
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") ||
        !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("popcnt"))
        return 16;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 64;
    return 32;
#else
    return 16;
#endif
}

/* bytes */
PyObject *limit_vectors(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long bytes;
    if (read_integers(args, given, 1, &bytes)) return NULL;
    const int most = vectors_of_processor();
    longest_vectors = bytes < most ? (int)bytes : most;
    Py_RETURN_NONE;
}

#define CALL(function, text) \
    {#function, (PyCFunction)(void (*)(void))function, METH_FASTCALL, text}

static PyMethodDef methods[] = {
    CALL(share_threads, "Tell where torch's OpenMP runtime is; once."),
    CALL(set_up, "Tell what torch offers; once."),
    CALL(fast_rows, "Rows of a module, where nothing watches."),
    CALL(fast_bags, "Bags of a module, where nothing watches."),
    CALL(rows_on_gpu, "Rows of a module on a GPU, where nothing watches."),
    CALL(set_up_gpu, "Tell how to launch kernels on a GPU; once."),
    CALL(launch, "Launch a kernel on a GPU."),
    CALL(rows, "Decode rows."),
    CALL(bags, "Decode and reduce bags of rows."),
    CALL(gradient, "Gradient of the codebooks by that of rows."),
    CALL(bags_gradient, "Gradient of the codebooks by that of bags."),
    CALL(tiers, "Tier and place of rows."),
    CALL(encode, "Codes of rows that are sums of codewords."),
    CALL(normal, "Normal equations of codebooks."),
    CALL(limit_vectors, "Use no longer vectors, as on other processors: for tests."),
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods};

PyMODINIT_FUNC PyInit__native(void) {
    prepare_threads();
    longest_vectors = vectors_of_processor();
    return PyModule_Create(&module);
}
