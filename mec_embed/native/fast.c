/* Lookups of whole modules, past the dispatcher: see mec_embed/ops/fast.py.
 *
 * What Python would check in some forty steps of its interpreter is checked here, as a lookup of a
 * few rows takes no longer than ten of them.
 */
#include "native.h"

static struct {
    PyObject *tensor, *int32, *int64; /* torch.Tensor, torch.int32, torch.int64 */
    PyObject *guards;                 /* functions that return 0, False or None where none watches */
    PyObject *grad_enabled, *threads; /* torch.is_grad_enabled, torch.get_num_threads */
    PyObject *new_empty;              /* of a float32 tensor on the CPU */
} torch;

/* Names of attributes, interned. */
#define NAMES(each) \
    each(requires_grad) each(data_ptr) each(is_cpu) each(is_cuda) each(dtype) each(shape) \
    each(is_contiguous) each(stride) each(get_device)
#define DECLARE(name) PyObject *name;
static struct { NAMES(DECLARE) } names;
#define INTERN(name) \
    if (!(names.name = PyUnicode_InternFromString(#name))) return NULL;

/* torch.Tensor, torch.int32, torch.int64, guards, is_grad_enabled, get_num_threads, new_empty */
PyObject *set_up(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (given != 7) {
        PyErr_SetString(PyExc_TypeError, "set_up takes 7 arguments");
        return NULL;
    }
    NAMES(INTERN)
    for (Py_ssize_t i = 0; i < given; i++) Py_INCREF(args[i]);
    torch.tensor = args[0];
    torch.int32 = args[1];
    torch.int64 = args[2];
    torch.guards = args[3];
    torch.grad_enabled = args[4];
    torch.threads = args[5];
    torch.new_empty = args[6];
    Py_RETURN_NONE;
}

/* 1 for True, 0 for False, 0 and None; -1 with an exception set. Takes the reference. */
static int is_set(PyObject *value) {
    if (!value) return -1;
    const int set = value == Py_None ? 0 : PyObject_IsTrue(value);
    Py_DECREF(value);
    return set;
}

static int attribute(PyObject *of, PyObject *name) { return is_set(PyObject_GetAttr(of, name)); }

int64_t as_integer(PyObject *value) {
    if (!value) return -1;
    const int64_t number = PyLong_AsLongLong(value);
    Py_DECREF(value);
    return number;
}

int64_t address_of(PyObject *tensor) {
    return as_integer(PyObject_CallMethodObjArgs(tensor, names.data_ptr, NULL));
}

int64_t device_of(PyObject *tensor) {
    return as_integer(PyObject_CallMethodObjArgs(tensor, names.get_device, NULL));
}

int has_dtype(PyObject *tensor, PyObject *dtype) {
    PyObject *found = PyObject_GetAttr(tensor, names.dtype);
    Py_XDECREF(found); /* torch holds its dtypes */
    return found == dtype;
}

enum { STALE, READY, GRADIENT };

/* Whether the tensors that a plan was packed for are where they were, see
 * mec_embed.ops.fast.Places: (dict, key, value, its data_ptr or None, address) again and again in one
 * tuple. -1 with an exception set. */
static int check_places(PyObject *places) {
    const Py_ssize_t length = PyTuple_Size(places);
    if (length < 0) return -1;
    for (Py_ssize_t i = 0; i + 4 < length; i += 5) {
        PyObject *value = PyTuple_GetItem(places, i + 2);
        PyObject *where = PyTuple_GetItem(places, i + 3);
        if (PyDict_GetItemWithError(PyTuple_GetItem(places, i), PyTuple_GetItem(places, i + 1)) !=
            value)
            return PyErr_Occurred() ? -1 : STALE;
        if (where != Py_None && as_integer(PyObject_CallNoArgs(where)) !=
                                    PyLong_AsLongLong(PyTuple_GetItem(places, i + 4)))
            return PyErr_Occurred() ? -1 : STALE;
    }
    return READY;
}

/* Whether gradients are to flow to one of the codebooks; -1 with an exception set. */
static int has_gradient(PyObject *codebooks) {
    int enabled = -2; /* not asked yet */
    for (Py_ssize_t i = 0; i < PyTuple_Size(codebooks); i++) {
        const int trained = attribute(PyTuple_GetItem(codebooks, i), names.requires_grad);
        if (trained < 0) return -1;
        if (trained && enabled == -2) enabled = is_set(PyObject_CallNoArgs(torch.grad_enabled));
        if (trained && enabled) return enabled;
    }
    return 0;
}

/* 1: a plain tensor on that device (is_cpu, is_cuda) that nothing watches; -1 with an exception set. */
static int is_plain(PyObject *ids, PyObject *is_there) {
    if ((PyObject *)Py_TYPE(ids) != torch.tensor) return 0;
    const int there = attribute(ids, is_there);
    if (there != 1) return there;
    for (Py_ssize_t i = 0; i < PyTuple_Size(torch.guards); i++) {
        const int watched = is_set(PyObject_CallNoArgs(PyTuple_GetItem(torch.guards, i)));
        if (watched) return watched < 0 ? -1 : 0;
    }
    return 1;
}

/* Whether a tensor is one block in memory; -1 with an exception set. */
static int is_block(PyObject *tensor) {
    return is_set(PyObject_CallMethodObjArgs(tensor, names.is_contiguous, NULL));
}

/* A column of a batch (B, F), as most models look up, is no contiguous tensor. */
int64_t spacing(PyObject *ids) {
    const int contiguous = is_block(ids);
    if (contiguous) return contiguous;
    PyObject *strides = PyObject_CallMethodObjArgs(ids, names.stride, NULL);
    if (!strides) return -1;
    int64_t stride = 0;
    if (PyTuple_Size(strides) == 1) stride = PyLong_AsLongLong(PyTuple_GetItem(strides, 0));
    Py_DECREF(strides);
    return stride;
}

int id_bytes(PyObject *ids) {
    PyObject *dtype = PyObject_GetAttr(ids, names.dtype);
    if (!dtype) return -1;
    const int bytes = dtype == torch.int64 ? 8 : dtype == torch.int32 ? 4 : 0;
    Py_DECREF(dtype); /* torch holds its dtypes */
    return bytes;
}

PyObject *make_output(PyObject *new_empty, PyObject *ids, int64_t dim, int64_t *count) {
    PyObject *shape = PyObject_GetAttr(ids, names.shape);
    if (!shape) return NULL;
    const Py_ssize_t axes = PyTuple_Size(shape);
    PyObject *out = NULL, *whole = axes < 0 ? NULL : PyTuple_New(axes + 1);
    *count = 1;
    for (Py_ssize_t i = 0; whole && i < axes; i++) {
        PyObject *size = PyTuple_GetItem(shape, i);
        Py_INCREF(size);
        *count *= PyLong_AsLongLong(size);
        PyTuple_SetItem(whole, i, size);
    }
    PyObject *last = PyLong_FromLongLong(dim);
    if (whole && last && !PyTuple_SetItem(whole, axes, last))
        out = PyObject_CallObject(new_empty, whole); /* sizes as arguments parse faster */
    Py_XDECREF(whole);
    Py_DECREF(shape);
    return out;
}

/* Of a plan for the tensors in `places` and `codebooks`; -1 with an exception set. */
static int state_of(PyObject *places, PyObject *codebooks) {
    const int state = check_places(places);
    if (state != READY) return state;
    const int flows = has_gradient(codebooks);
    return flows < 0 ? -1 : flows ? GRADIENT : READY;
}

/* True, False, or None for READY, STALE, GRADIENT; NULL with an exception set. */
static PyObject *answer_of(int state) {
    if (state < 0) return NULL;
    PyObject *answer = state == READY ? Py_True : state == STALE ? Py_False : Py_None;
    Py_INCREF(answer);
    return answer;
}

/* Bytes of one id where the kernel may read `ids` by a plan (or None) for the tensors in `places` and
 * `codebooks`; else 0, and in `answer` what the caller is to return: False where the plan is stale,
 * None where the operators must serve, NULL with an exception set. */
static int may_read(PyObject *const *args, Plan *plan, PyObject **answer) {
    PyObject *packed = args[0], *places = args[1], *codebooks = args[2], *ids = args[3];
    *answer = NULL;
    const int plain = is_plain(ids, names.is_cpu);
    const int bytes = plain == 1 ? id_bytes(ids) : plain;
    if (bytes < 0) return 0;
    int state = bytes ? STALE : GRADIENT;
    if (bytes && packed != Py_None) {
        state = state_of(places, codebooks);
        if (state == READY && read_plan(packed, plan)) state = -1;
    }
    if (state == READY) return bytes;
    *answer = answer_of(state);
    return 0;
}

/* places, codebooks, mec_embed.ops.gpu.Lookups.ready or None, ids, zero id -> of ids on a GPU: the
 * rows; or 0 where the tensors in `places` are others now, 1 where they are not, and 2 where gradients
 * are to flow to codebooks; None where the operators must serve */
PyObject *rows_on_gpu(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long zero_id;
    if (read_integers(args + 4, given - 4, 1, &zero_id)) return NULL;
    const int plain = is_plain(args[3], names.is_cuda);
    if (!plain) Py_RETURN_NONE;
    const int state = plain < 0 ? -1 : state_of(args[0], args[1]);
    PyObject *rows = NULL;
    if (state == READY && args[2] != Py_None) rows = decode_on_gpu(args[2], args[3], zero_id);
    return rows || PyErr_Occurred() ? rows : PyLong_FromLong(state);
}

/* The sizes of a tensor of `axes` axes; 0 where it has others. */
static int sizes_of(PyObject *tensor, Py_ssize_t axes, long long *sizes) {
    PyObject *shape = PyObject_GetAttr(tensor, names.shape);
    if (!shape) {
        PyErr_Clear(); /* a nested tensor has none: the operators say so */
        return 0;
    }
    const int fits = PyTuple_Size(shape) == axes;
    for (Py_ssize_t i = 0; fits && i < axes; i++)
        sizes[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
    Py_DECREF(shape);
    return fits && !PyErr_Occurred();
}

/* Bags whose tensors are read as they are, as read_bags (lookup.c) takes them, of ids of `bytes` each; 0
 * where they are not. */
static int read_plain_bags(PyObject *ids, int bytes, PyObject *offsets, int last_is_end, long long *v) {
    long long sizes[2];
    if (is_block(ids) != 1) return 0;
    v[0] = address_of(ids);
    v[1] = bytes;
    if (offsets == Py_None) {
        if (!sizes_of(ids, 2, sizes)) return 0;
        v[2] = sizes[0] * sizes[1];
        v[4] = v[5] = 0;
        v[6] = sizes[0];
        v[7] = sizes[1];
        return !PyErr_Occurred();
    }
    if ((PyObject *)Py_TYPE(offsets) != torch.tensor || attribute(offsets, names.is_cpu) != 1 ||
        (v[5] = id_bytes(offsets)) <= 0 || is_block(offsets) != 1 || !sizes_of(ids, 1, sizes) ||
        !sizes_of(offsets, 1, sizes + 1))
        return 0;
    const long long bags = sizes[1] - last_is_end;
    v[2] = sizes[0];
    v[4] = address_of(offsets);
    v[6] = bags;
    v[7] = 0;
    if (PyErr_Occurred() || bags < 1) return 0;
    if (!last_is_end) return 1;
    const void *const end = (const char *)ADDRESS(v[4]) + bags * v[5];
    return v[2] == (v[5] == 8 ? *(const int64_t *)end : *(const int32_t *)end);
}

static PyObject *make_bags(int64_t bags, int64_t dim) {
    PyObject *rows = PyLong_FromLongLong(bags), *columns = PyLong_FromLongLong(dim), *out = NULL;
    if (rows && columns) out = PyObject_CallFunctionObjArgs(torch.new_empty, rows, columns, NULL);
    Py_XDECREF(rows);
    Py_XDECREF(columns);
    return out;
}

static int64_t threads_for(int64_t count, int64_t dim) {
    return MAY_SHARE(count, dim) ? as_integer(PyObject_CallNoArgs(torch.threads)) : 1;
}

/* plan or None, places, codebooks, ids, offsets or None, weights or None, id left out, mode as read_bags
 * takes it, whether the last offset is the end -> the bags, or as may_read; True where the plan serves,
 * but there are weights, tensors cannot be read as they are, or are refused */
PyObject *fast_bags(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Plan plan;
    PyObject *answer;
    long long v[10], options[3];
    if (read_integers(args + 6, given - 6, 3, options)) return NULL;
    const int bytes = may_read(args, &plan, &answer);
    if (!bytes) return answer;
    v[3] = options[0];
    v[8] = 0;
    v[9] = options[1];
    if (args[5] != Py_None || !read_plain_bags(args[3], bytes, args[4], (int)options[2], v)) {
        if (PyErr_Occurred()) return NULL;
        Py_RETURN_TRUE;
    }
    PyObject *out = make_bags(v[6], plan.dim);
    if (!out) return NULL;
    const int64_t to = address_of(out), threads = threads_for(v[2], plan.dim);
    const int broken = PyErr_Occurred() != NULL;
    if (!broken && !reduce_ids(&plan, v, to, (int)threads)) return out;
    Py_DECREF(out);
    if (broken) return NULL;
    Py_RETURN_NONE;
}

/* plan or None, places, codebooks, ids, zero id -> the rows, or as may_read */
PyObject *fast_rows(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Plan plan;
    PyObject *answer, *ids = args[3];
    long long zero_id;
    if (read_integers(args + 4, given - 4, 1, &zero_id)) return NULL;
    const int bytes = may_read(args, &plan, &answer);
    if (!bytes) return answer;
    const int64_t stride = spacing(ids);
    if (stride < 0) return NULL;
    if (!stride) Py_RETURN_NONE;
    int64_t count;
    PyObject *out = make_output(torch.new_empty, ids, plan.dim, &count);
    if (!out) return NULL;
    const int64_t from = address_of(ids), to = address_of(out);
    const int64_t threads = threads_for(count, plan.dim);
    const int broken = PyErr_Occurred() != NULL;
    if (!broken &&
        !decode_ids(&plan, from, bytes, stride, count, zero_id, to, (int)threads))
        return out;
    Py_DECREF(out);
    if (broken) return NULL;
    Py_RETURN_NONE;
}
