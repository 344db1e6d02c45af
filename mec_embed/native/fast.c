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
#define NAMES(each)                                                                              \
    each(_modules) each(_parameters) each(_buffers) each(code_table) each(codebook_set)          \
    each(codes) each(codebooks) each(scales) each(requires_grad) each(data_ptr) each(is_cpu)     \
    each(dtype) each(shape) each(is_contiguous) each(bitmap) each(starts) each(before)     \
    each(head) each(tail) each(tier_map)
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

static int64_t integer(PyObject *value) {
    if (!value) return -1;
    const int64_t number = PyLong_AsLongLong(value);
    Py_DECREF(value);
    return number;
}

static int64_t address(PyObject *tensor) {
    return integer(PyObject_CallMethodObjArgs(tensor, names.data_ptr, NULL));
}

/* The entry `name` of the dictionary `dict` of `of`: a borrowed reference, NULL if it has none. */
static PyObject *held(PyObject *of, PyObject *dict, PyObject *name) {
    PyObject *entries = PyObject_GetAttr(of, dict);
    if (!entries) return NULL;
    PyObject *value = PyDict_GetItemWithError(entries, name);
    Py_DECREF(entries); /* the module holds it on */
    return value;
}

/* 1: at an address that the plan was packed for; 0: elsewhere; -1 with an exception set. */
static int still_at(PyObject *tensor, int64_t planned) {
    if (!tensor || tensor == Py_None) return PyErr_Occurred() ? -1 : !planned;
    const int64_t now = address(tensor);
    return now == -1 && PyErr_Occurred() ? -1 : now == planned;
}

enum { STALE, READY, GRADIENT };

/* Whether a table has the tensors that the plan was packed for; -1 with an exception set. */
static int check_table(PyObject *module, const int64_t *planned) {
    PyObject *code_table = held(module, names._modules, names.code_table);
    PyObject *books = held(module, names._modules, names.codebook_set);
    if (!code_table || !books) return PyErr_Occurred() ? -1 : STALE;
    PyObject *words = held(books, names._parameters, names.codebooks);
    if (PyErr_Occurred()) return -1;
    if (words) {
        int flows = attribute(words, names.requires_grad);
        if (flows > 0) flows = is_set(PyObject_CallObject(torch.grad_enabled, NULL));
        if (flows) return flows < 0 ? -1 : GRADIENT;
    } else {
        words = held(books, names._buffers, names.codebooks);
    }
    int same = still_at(held(code_table, names._buffers, names.codes), planned[0]);
    if (same == 1) same = still_at(words, planned[1]);
    if (same == 1) same = still_at(held(books, names._buffers, names.scales), planned[2]);
    return same;
}

/* As check_table, of a whole module: one table, or tiers and their map. */
static int check_module(PyObject *module, const Plan *plan) {
    if (plan->tiers == 1) return check_table(module, &plan->table[0].codes);
    PyObject *head = held(module, names._modules, names.head);
    PyObject *tail = held(module, names._modules, names.tail);
    PyObject *tier_map = held(module, names._modules, names.tier_map);
    if (!head || !tail || !tier_map) return PyErr_Occurred() ? -1 : STALE;
    int state = check_table(head, &plan->table[0].codes);
    if (state == READY) state = check_table(tail, &plan->table[1].codes);
    if (state == READY) state = still_at(held(tier_map, names._buffers, names.bitmap), plan->bitmap);
    if (state == READY) state = still_at(held(tier_map, names._buffers, names.starts), plan->starts);
    if (state == READY) state = still_at(held(tier_map, names._buffers, names.before), plan->before);
    return state;
}

/* 1: plain ids on the CPU that nothing watches; -1 with an exception set. */
static int is_plain(PyObject *ids) {
    if ((PyObject *)Py_TYPE(ids) != torch.tensor) return 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(torch.guards); i++) {
        const int watched = is_set(PyObject_CallObject(PyTuple_GetItem(torch.guards, i), NULL));
        if (watched) return watched < 0 ? -1 : 0;
    }
    const int cpu = attribute(ids, names.is_cpu);
    if (cpu != 1) return cpu;
    return is_set(PyObject_CallMethodObjArgs(ids, names.is_contiguous, NULL));
}

/* Bytes of one id, 0 for other dtypes; -1 with an exception set. */
static int id_bytes(PyObject *ids) {
    PyObject *dtype = PyObject_GetAttr(ids, names.dtype);
    if (!dtype) return -1;
    const int bytes = dtype == torch.int64 ? 8 : dtype == torch.int32 ? 4 : 0;
    Py_DECREF(dtype); /* torch holds its dtypes */
    return bytes;
}

/* A tensor (*ids.shape, dim), and the number of ids. */
static PyObject *make_output(PyObject *ids, int64_t dim, int64_t *count) {
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
        out = PyObject_CallObject(torch.new_empty, whole); /* sizes as arguments parse faster */
    Py_XDECREF(whole);
    Py_DECREF(shape);
    return out;
}

/* Bytes of one id where the kernel may read `ids` by this plan (or None) of the module; else 0, and
 * in `answer` what the caller is to return: False where the plan is stale, None where the operators
 * must serve, NULL with an exception set. */
static int may_read(PyObject *packed, PyObject *module, PyObject *ids, Plan *plan,
                    PyObject **answer) {
    *answer = NULL;
    const int plain = is_plain(ids);
    const int bytes = plain == 1 ? id_bytes(ids) : plain;
    if (bytes < 0) return 0;
    int state = bytes ? STALE : GRADIENT;
    if (bytes && packed != Py_None)
        state = read_plan(packed, plan) ? -1 : check_module(module, plan);
    if (state == READY) return bytes;
    if (state >= 0) *answer = state == STALE ? Py_False : Py_None;
    Py_XINCREF(*answer);
    return 0;
}

/* plan or None, module, ids -> True, or as may_read */
PyObject *check(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Plan plan;
    PyObject *answer;
    if (read_integers(args + 3, given - 3, 0, NULL)) return NULL;
    if (!may_read(args[0], args[1], args[2], &plan, &answer)) return answer;
    Py_RETURN_TRUE;
}

/* plan or None, module, ids, zero id -> the rows, or as may_read */
PyObject *fast_rows(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Plan plan;
    PyObject *answer;
    long long zero_id;
    if (read_integers(args + 3, given - 3, 1, &zero_id)) return NULL;
    const int bytes = may_read(args[0], args[1], args[2], &plan, &answer);
    if (!bytes) return answer;
    int64_t count;
    PyObject *out = make_output(args[2], plan.dim, &count);
    if (!out) return NULL;
    const int64_t from = address(args[2]), to = address(out);
    const int64_t threads = count * plan.dim < THREAD_ENTRIES
                                ? 1
                                : integer(PyObject_CallObject(torch.threads, NULL));
    const int broken = PyErr_Occurred() != NULL;
    if (!broken && !decode_ids(&plan, from, bytes, count, zero_id, to, (int)threads)) return out;
    Py_DECREF(out);
    if (broken) return NULL;
    Py_RETURN_NONE;
}
